"""Sources of samples, their fixed order, and the processors that turn samples into tensors."""
