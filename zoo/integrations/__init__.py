"""Doors for other projects' tools. Nothing in the zoo imports these; the tools do."""
