"""What stands between continuous image latents and the vectors of a sequence."""
