"""Parts: connectors, one small file each, Config beside class."""
