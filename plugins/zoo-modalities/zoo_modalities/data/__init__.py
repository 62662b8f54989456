"""Data of modalities, derived from the embedded corpora or simulated; docs/families/imagebind.md says which."""
