"""Denoisers: networks that predict, of noisy latents and the tokens they are drawn from, the noise or the image."""
