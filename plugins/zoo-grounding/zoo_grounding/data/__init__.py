"""Questions whose answers are masks."""
