"""Loading and saving weights: zoo checkpoints, transformers folders, official files."""
