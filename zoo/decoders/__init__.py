"""Parts: decoders, one small file each, Config beside class."""
