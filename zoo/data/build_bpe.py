"""Rebuild the tokenizer shipped as ``openmoji_bpe.json``: ``python -m zoo.data.build_bpe``.

It learns from English names alone, and only from those in the train split of both split schemes, so that no held-out
combination of words shapes the vocabulary.
"""

from __future__ import annotations

from pathlib import Path

from zoo.data.openmoji import OpenMojiConfig
from zoo.data.text import SPECIAL

VOCAB_SIZE = 1024


def train_names() -> list[str]:
    """Return the names in train under both schemes, ordered."""
    random, compositional = (
        set(OpenMojiConfig(split_scheme=scheme).open(None).names("train")) for scheme in ("random", "compositional")
    )
    return sorted(random & compositional)


def build() -> str:
    """Learn the merges and return the tokenizer as json; equal input gives equal output."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train_names(), trainer=trainer)
    return tokenizer.to_str(pretty=True) + "\n"


if __name__ == "__main__":
    target = Path(__file__).with_name("openmoji_bpe.json")
    target.write_text(build(), encoding="utf-8")
    print(f"wrote {target.name}")
