"""Text decoding: greedy and sampled, with a key/value cache."""
