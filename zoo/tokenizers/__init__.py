"""Parts: image tokenizers, which turn images into discrete codes and back, Config beside class."""
