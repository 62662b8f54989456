"""Data tokenizers: data of one modality in, a sequence of tokens out (the plugin zoo-modalities has twelve)."""
