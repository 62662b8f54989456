"""Mask decoders: an image and a language model's states in, masks out."""
