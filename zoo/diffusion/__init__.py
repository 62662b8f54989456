"""Continuous denoising: how latents are made noisy, what a model predicts of them, and how it is followed back."""
