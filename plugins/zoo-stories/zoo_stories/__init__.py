"""StoryDiffusion (arXiv 2405.01434) for the zoo. Nothing heavy is imported here."""

from __future__ import annotations

from zoo.plugin import Plugin

PLUGIN = Plugin(name="zoo-stories")
