"""Parts: encoders, one small file each, Config beside class."""
