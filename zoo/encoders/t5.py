"""T5's encoder as a text encoder: what LlamaGen and many latent diffusion models read their captions with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.encoders.base import Encoder, TextEncoderConfig
from zoo.errors import ConfigError, near
from zoo.part import Features

OWN = (
    *("vocab_size", "d_model", "num_layers", "num_heads", "d_kv", "d_ff", "dropout_rate", "feed_forward_proj"),
    *("dense_act_fn", "is_gated_act", "is_encoder_decoder", "use_cache"),
)
"""Fields of transformers' configuration that are fields here, or do not matter to an encoder."""


@dataclass(frozen=True, kw_only=True)
class T5EncoderConfig(TextEncoderConfig):
    """The encoder half of a T5 1.1 or Flan-T5 of transformers. Defaults: FlanT5-base's size.

    Attributes:
        context_length: Longest text, its end included; LlamaGen's captions have 120.
        width: Hidden size.
        depth: Layers.
        heads: Attention heads.
        head_dim: Width of a head; heads x head_dim need not be ``width``.
        ffn: Width of the feed-forward layers.
        activation: By transformers' name; ``gelu_new`` is the tanh approximation, which T5 1.1 was trained with.
        gated: The activation gates a second projection (T5 1.1 and Flan); False = T5 1.0.
        dropout: While training.
        options: Further fields of the transformers configuration.
    """

    starts_with_bos: ClassVar[bool] = False

    tokenizer: str = "hf:google/flan-t5-base"
    vocab_size: int = 32128
    context_length: int = 120
    width: int = 768
    depth: int = 12
    heads: int = 12
    head_dim: int = 64
    ffn: int = 2048
    activation: str = "gelu_new"
    gated: bool = True
    dropout: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)

    def library(self) -> Any:
        """The transformers configuration.

        Raises:
            ConfigError: Unknown activation, or an option its configuration does not have.
        """
        from zoo.torchvision_ops import ensure

        ensure()
        from transformers import T5Config
        from transformers.activations import ACT2FN

        if self.activation not in ACT2FN:
            raise ConfigError(
                f"text_encoder.activation = {self.activation!r} is unknown{near(self.activation, ACT2FN)}"
            )
        known = set(vars(T5Config())) - set(OWN)
        for key in self.options:
            if key not in known:
                raise ConfigError(f"text_encoder.options has no field {key!r}{near(key, known)}")
        config = T5Config(
            vocab_size=self.vocab_size,
            d_model=self.width,
            num_layers=self.depth,
            num_heads=self.heads,
            d_kv=self.head_dim,
            d_ff=self.ffn,
            dropout_rate=self.dropout,
            feed_forward_proj=("gated-" if self.gated else "") + self.activation,
            is_encoder_decoder=False,
            use_cache=False,
            **self.options,
        )
        # the library derives both from one string, in which "gelu" means the tanh approximation
        config.dense_act_fn, config.is_gated_act = self.activation, self.gated
        return config

    def build(self) -> T5Encoder:
        return T5Encoder(self)


class T5Encoder(Encoder):
    """``lm`` is transformers' ``T5EncoderModel``, with its own parameter names. It pools nothing."""

    def __init__(self, config: T5EncoderConfig) -> None:
        super().__init__()
        library = config.library()
        from transformers import T5EncoderModel

        self.config = config
        self.width, self.pooled_width = config.width, 0
        self.tokens = config.context_length
        self._fused = bool(T5EncoderModel._supports_sdpa)
        self.lm: nn.Module = T5EncoderModel._from_config(
            library, attn_implementation="sdpa" if self._fused else "eager"
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """Encode ids [B, T] with their mask [B, T], True = real; pads stand behind the text.

        Raises:
            ConfigError: The text is too long.
        """
        if x.shape[1] > self.tokens:
            raise ConfigError(f"a text has {x.shape[1]} tokens, the text encoder reads {self.tokens}: truncate it")
        keys = x.new_ones(x.shape, dtype=torch.bool) if mask is None else mask.bool()
        read = keys[:, None, None].expand(-1, -1, x.shape[1], -1)  # [B, 1, T, T]: four axes are taken as they stand
        if not self._fused:
            dtype = next(self.lm.parameters()).dtype
            read = torch.zeros_like(read, dtype=dtype).masked_fill(~read, torch.finfo(dtype).min)
        states: Tensor = self.lm(input_ids=x, attention_mask=read).last_hidden_state
        return Features(states, None if mask is None else keys)
