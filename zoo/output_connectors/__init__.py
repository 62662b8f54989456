"""Output connectors: what stands between a language model's states and something that draws."""
