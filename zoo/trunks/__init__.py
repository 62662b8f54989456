"""Parts: trunks that read images, text, or both, one small file each, Config beside class."""
