"""Any encoder-decoder language model of the T5 kind, built from sizes, behind the zoo's decoder interface."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from zoo.adapters import AdapterFields, add_adapters
from zoo.decoders.base import Decoder, DecoderConfig
from zoo.decoders.causal_lm import NOT_ARCHITECTURE
from zoo.errors import ConfigError, near
from zoo.layout import TokenBatch

FAMILIES = ("t5", "mt5")
"""Families whose stacks take embeddings, and whose positions are distances between places: they share T5's fields."""

SIZES = {
    "width": "d_model",
    "depth": "num_layers",
    "decoder_depth": "num_decoder_layers",
    "heads": "num_heads",
    "head_dim": "d_kv",
    "ffn": "d_ff",
    "dropout": "dropout_rate",
    "activation": "dense_act_fn",
    "gated": "is_gated_act",
}
"""The zoo's field -> transformers'."""

OWN = {"feed_forward_proj", "scale_decoder_outputs", "tie_word_embeddings", "decoder_start_token_id", "is_decoder"}
"""Keys of a T5 ``config.json`` that fields of ``Seq2SeqLMConfig`` stand for, beside those of ``SIZES``."""


@dataclass(frozen=True, kw_only=True)
class Seq2SeqLMConfig(AdapterFields, DecoderConfig):
    """A T5 of transformers by family and size. Defaults: FlanT5-base's size, which is T5 1.1's (arXiv 2210.11416).

    At ``scale=tiny`` both stacks have the scale's depth: a token passes as many layers as in a causal LM of that scale,
    so a pass costs about the same, while the weights are twice as many, as published (FlanT5-XL's 24 + 24 layers beside
    OPT-2.7B's 32).

    Attributes:
        vocab_size: Rows of the embedding table; T5's tokenizers have 32,100 ids, its tables 32,128 rows.
        context_length: Longest sequence of either stack, image tokens included. T5's relative positions set no limit;
            it was trained on 512.
        family: transformers ``model_type``: t5 (Flan's too) or mt5.
        width: Hidden size of both stacks.
        depth: Layers of the encoder.
        decoder_depth: Layers of the decoder; 0 = as many as the encoder.
        heads: Attention heads.
        head_dim: Width of a head; heads x head_dim need not be ``width``.
        ffn: Width of the feed-forward layers.
        activation: Of the feed-forward layers, by transformers' name: ``gelu`` is exact, ``gelu_new`` the tanh
            approximation. BLIP-2 runs FlanT5 with the exact one (LAVIS, blip2_t5.py), Google trained with the other.
        gated: The activation gates a second projection (T5 1.1 and Flan); False = T5 1.0.
        tied: The output projection is the embedding table (T5 1.0); Flan has its own.
        scaled_output: Hidden states are divided by sqrt(width) before it (T5 1.0, which goes with ``tied``).
        start_id: The id the decoder's text starts from; T5's is the pad's.
        dropout: Dropout while training.
        options: Further fields of the family's transformers configuration (``relative_attention_num_buckets``, ...).
    """

    reads_context: ClassVar[bool] = True

    tokenizer: str = "hf:google/flan-t5-base"
    vocab_size: int = 32128
    context_length: int = 512
    family: str = "t5"
    width: int = 768
    depth: int = 12
    decoder_depth: int = 0
    heads: int = 12
    head_dim: int = 64
    ffn: int = 2048
    activation: str = "gelu"
    gated: bool = True
    tied: bool = False
    scaled_output: bool = False
    start_id: int = 0
    dropout: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check_adapters()
        if min(self.width, self.depth, self.heads, self.head_dim, self.ffn) < 1 or self.decoder_depth < 0:
            raise ValueError("width, depth, heads, head_dim and ffn must be 1 or more, decoder_depth 0 or more")
        if not 0 <= self.start_id < self.vocab_size:
            raise ValueError(f"start_id = {self.start_id} must be an id below vocab_size = {self.vocab_size}")

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """As every part's; a scale that sets the depth sets it for both stacks."""
        small = super().scaled(sizes)
        return replace(small, decoder_depth=0) if "depth" in sizes else small

    def library(self) -> Any:
        """The transformers configuration.

        Raises:
            ConfigError: Unknown family or activation, or an option its configuration does not have.
        """
        from zoo.torchvision_ops import ensure

        ensure()
        from transformers import AutoConfig
        from transformers.activations import ACT2FN
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if self.family not in FAMILIES:
            raise ConfigError(
                f"decoder.family = {self.family!r}: expected {', '.join(FAMILIES)}{near(self.family, FAMILIES)}; for a"
                " decoder-only model choose decoder=causal-lm"
            )
        if self.activation not in ACT2FN:
            raise ConfigError(f"decoder.activation = {self.activation!r} is unknown{near(self.activation, ACT2FN)}")
        known = {f for f in inspect.signature(CONFIG_MAPPING[self.family].__init__).parameters if f != "self"}
        known |= set(vars(CONFIG_MAPPING[self.family]()))
        known -= OWN | set(SIZES.values())
        for key in self.options:
            if key not in known:
                raise ConfigError(f"decoder.options has no field {key!r} for family {self.family!r}{near(key, known)}")
        sizes = {theirs: getattr(self, ours) for ours, theirs in SIZES.items()}
        sizes["num_decoder_layers"] = self.decoder_depth or self.depth
        config = AutoConfig.for_model(
            self.family,
            vocab_size=self.vocab_size,
            feed_forward_proj=("gated-" if self.gated else "") + self.activation,
            decoder_start_token_id=self.start_id,
            **sizes,
            **self.options,
        )
        # the library derives both from one string, in which "gelu" means the tanh approximation
        config.dense_act_fn, config.is_gated_act = self.activation, self.gated
        return config

    def build(self) -> Seq2SeqLM:
        return Seq2SeqLM(self)

    @classmethod
    def from_library(cls, section: Mapping[str, Any], tokenizer: str, *, tied: bool | None = None) -> Seq2SeqLMConfig:
        """The fields that rebuild the language model of a ``config.json``'s text section.

        Args:
            section: Its values, with the family's defaults for what it leaves out or without them.
            tokenizer: Name of the text tokenizer.
            tied: Whether the weights hold one table for both ends; by default what the section says of T5 1.0.

        Raises:
            ConfigError: A family that is no T5.
        """
        from zoo.torchvision_ops import ensure

        ensure()
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        family = str(section.get("model_type", "t5"))
        if family not in FAMILIES:
            raise ConfigError(f"text model {family!r}: expected {', '.join(FAMILIES)}{near(family, FAMILIES)}")
        default = CONFIG_MAPPING[family]().to_dict()
        full = CONFIG_MAPPING[family].from_dict({k: v for k, v in section.items() if k != "model_type"}).to_dict()
        # transformers 5 writes tie_word_embeddings = true for every T5; what the file meant is in the other key
        scaled = bool(section.get("scale_decoder_outputs", section.get("tie_word_embeddings") is not False))
        scaled = scaled and "scale_decoder_outputs" in default
        form = str(full["feed_forward_proj"])
        activation = section.get("dense_act_fn") or ("gelu_new" if form == "gated-gelu" else form.split("-")[-1])
        named = {ours: full[theirs] for ours, theirs in SIZES.items() if ours not in ("activation", "gated")}
        if named["decoder_depth"] == named["depth"]:
            named["decoder_depth"] = 0
        passed = NOT_ARCHITECTURE | OWN | set(SIZES.values())
        options = {
            key: value
            for key, value in full.items()
            if key in default and key not in passed and value is not None and value != default[key]
        }
        start = full.get("decoder_start_token_id")
        return cls(
            family=family,
            vocab_size=full["vocab_size"],
            tokenizer=tokenizer,
            activation=str(activation),
            gated=bool(section.get("is_gated_act", form.startswith("gated"))),
            tied=scaled if tied is None else tied,
            scaled_output=scaled,
            start_id=int(start if start is not None else full.get("pad_token_id") or 0),
            options=options,
            **named,
        )


@dataclass
class Memory:
    """Keys and values of both kinds of attention, and what the cross-attention's came from.

    Attributes:
        cache: transformers' ``EncoderDecoderCache``.
        states: [B, N, width] the encoder's output; None before a context was read.
        mask: [B, N] bool, True = real.
    """

    cache: Any
    states: Tensor | None = None
    mask: Tensor | None = None


class Seq2SeqLM(Decoder):
    """``lm`` is the transformers module, with its own parameter names.

    ``forward`` is the decoder stack; the ``context`` it is given are *embeddings* (image tokens and words), which the
    encoder stack reads first. With a cache the encoder runs once, with the first rows.

    T5 counts distances by place, so in both stacks pads stand behind the text, and positions of a layout say nothing.
    """

    def __init__(self, config: Seq2SeqLMConfig) -> None:
        super().__init__()
        library = config.library()
        from transformers import AutoModelForSeq2SeqLM

        self.config = config
        self._fused = bool(AutoModelForSeq2SeqLM._model_mapping[type(library)]._supports_sdpa)
        attention = "sdpa" if self._fused else "eager"
        self.lm: nn.Module = AutoModelForSeq2SeqLM.from_config(library, attn_implementation=attention)
        self.width = self.context_width = config.width
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        head = self._head
        if config.tied:
            head.weight = self._embedding.weight
        else:
            # transformers 5 ties every T5, so that loading both tensors of Flan would keep one of them. Logits then
            # start at unit size, as they do tied and divided by sqrt(width)
            head.weight = nn.Parameter(torch.empty_like(head.weight))
            nn.init.normal_(head.weight, std=config.width**-0.5)
        add_adapters(self.lm, config)

    @property
    def _embedding(self) -> nn.Embedding:
        embedding: nn.Embedding = self.lm.get_input_embeddings()  # type: ignore[operator]
        return embedding

    @property
    def _head(self) -> nn.Linear:
        head: nn.Linear = self.lm.get_output_embeddings()  # type: ignore[operator]
        return head

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the table that both stacks share."""
        embeds: Tensor = self._embedding(ids)
        return embeds

    def encode(self, embeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """The encoder stack's states [B, N, width] of embeddings [B, N, width]; mask [B, N] bool, True = real, pads
        behind."""
        batch, length, _ = embeds.shape
        keys = self._keys(mask, batch, length, embeds.device).expand(-1, -1, length, -1)
        stack: Any = self.lm.encoder
        states: Tensor = stack(inputs_embeds=embeds, attention_mask=self._form(keys)).last_hidden_state
        return states

    def forward(
        self, batch: TokenBatch, cache: Any = None, *, context: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states [B, T, width] of the decoder stack after its final norm.

        Args:
            batch: Embeddings of ``embed``, the start token in the first place, and their layout.
            context: [B, N, width] embeddings that the encoder reads; a cache keeps what comes of them.
            context_mask: [B, N] bool, True = real, pads behind.
        """
        rows, layout = batch.embeds.shape[1], batch.layout
        states = None if context is None else self.encode(context, context_mask)
        memory: Memory | None = cache
        if memory is not None:
            if states is not None:
                memory.states, memory.mask = states, context_mask
            states, context_mask = memory.states, memory.mask
        reads: dict[str, Any] = {}
        if states is not None:
            count, length, _ = states.shape
            keys = self._keys(context_mask, count, length, states.device).expand(-1, -1, rows, -1)
            reads = {"encoder_hidden_states": states, "encoder_attention_mask": self._form(keys)}
        stack: Any = self.lm.decoder
        hidden: Tensor = stack(
            inputs_embeds=batch.embeds,  # [B, T, D]
            attention_mask=self._form(layout.mask(slice(layout.length - rows, layout.length))),
            past_key_values=None if memory is None else memory.cache,
            use_cache=memory is not None,
            **reads,
        ).last_hidden_state
        return hidden

    @staticmethod
    def _keys(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
        """[B, 1, 1, N] bool: the keys every row reads."""
        if mask is None:
            return torch.ones(batch, 1, 1, length, dtype=torch.bool, device=device)
        return mask.bool()[:, None, None]

    def _form(self, mask: Tensor) -> Tensor:
        """A boolean mask as the library takes it: 4-D, so that it is used as it stands; additive where it has no SDPA.

        The diagonal distances of T5 come on top.
        """
        if self._fused:
            return mask
        dtype = self._embedding.weight.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden * self.width**-0.5 if self.config.scaled_output else hidden)
        return logits

    def new_cache(self) -> Memory:
        from transformers import DynamicCache, EncoderDecoderCache

        return Memory(EncoderDecoderCache(DynamicCache(), DynamicCache()))

    def select_cache(self, cache: Any, index: Tensor) -> Memory:
        """The cache of the batch rows ``index`` [N]; repeats allowed. ``cache`` must not be used afterwards."""
        cache.cache.batch_select_indices(index)
        states = None if cache.states is None else cache.states[index]
        mask = None if cache.mask is None else cache.mask[index]
        return Memory(cache.cache, states, mask)
