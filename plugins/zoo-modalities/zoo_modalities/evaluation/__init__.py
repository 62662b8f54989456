"""Evaluation across modalities: pairs that were never trained."""
