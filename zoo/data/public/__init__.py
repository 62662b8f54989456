"""Published sets, read from the files as they are released, where the user has them. Nothing is downloaded."""
