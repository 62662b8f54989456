"""Meta-Transformer (arXiv 2307.10802): twelve data-to-sequence tokenizers before one frozen transformer."""
