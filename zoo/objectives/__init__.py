"""Parts: objectives, one small file each, Config beside class."""
