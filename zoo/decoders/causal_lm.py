"""Any causal language model of transformers, built from sizes, behind the zoo's decoder interface."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters import AdapterFields, add_adapters
from zoo.decoders.base import Decoder, DecoderConfig
from zoo.errors import ConfigError, near
from zoo.layout import Layout, TokenBatch
from zoo.layout_facts import kind
from zoo.quantized import QuantizeFields, quantize

SIZES: dict[str, dict[str, str]] = {
    "gpt2": {
        "width": "n_embd", "depth": "n_layer", "heads": "n_head", "ffn": "n_inner", "context_length": "n_positions",
        "kv_heads": "", "dropout": "resid_pdrop",
    },
    "opt": {"ffn": "ffn_dim", "kv_heads": "", "dropout": "dropout"},
    "gpt_neox": {"kv_heads": "", "dropout": "hidden_dropout"},
    "phi": {"dropout": "resid_pdrop"},
}  # fmt: skip
"""Where a family's configuration departs from Llama's field names; an empty name means that it has no such field."""

LLAMA_SIZES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "context_length": "max_position_embeddings",
    "dropout": "attention_dropout",
}


NOT_ARCHITECTURE = {
    "model_type", "vocab_size", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path",
    "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "use_cache", "return_dict", "id2label", "label2id",
    "problem_type", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder",
    "_attn_implementation", "attn_implementation", "pretraining_tp", "auto_map", "quantization_config",
}  # fmt: skip
"""Keys of a ``config.json`` that change no tensor of a model built for the zoo."""

STATED = {"rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_parameters", "tie_word_embeddings"}
"""Options that are written out even where they are the family's default: a preset may say otherwise, and options are
merged."""


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig(QuantizeFields, AdapterFields, DecoderConfig):
    """A transformers causal LM by family and size. Defaults: a Llama of SmolLM2-135M's size.

    Attributes:
        family: transformers ``model_type``: llama, opt, phi, gpt2, mistral, qwen2, ...
        width: Hidden size.
        depth: Layers.
        heads: Attention heads.
        kv_heads: Key/value heads; 0 = as many as heads.
        ffn: Width of the feed-forward layers.
        dropout: Dropout while training.
        options: Further fields of the family's transformers configuration (``rms_norm_eps``, ``rope_theta``, ...).
    """

    family: str = "llama"
    width: int = 576
    depth: int = 30
    heads: int = 9
    kv_heads: int = 0
    ffn: int = 1536
    dropout: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check_adapters()
        self.check_quantize()
        if self.heads < 1 or (self.width % self.heads and "head_dim" not in self.options):
            raise ValueError(f"width = {self.width} must be a multiple of heads = {self.heads}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} must be a multiple of kv_heads = {self.kv_heads}")

    def library(self) -> Any:
        """The transformers configuration.

        Raises:
            ConfigError: Unknown family, or an option its configuration does not have.
        """
        from zoo.torchvision_ops import ensure

        ensure()
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if self.family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ConfigError(
                f"decoder.family = {self.family!r} is no causal LM of transformers"
                f"{near(self.family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}"
            )
        known = {f for f in inspect.signature(CONFIG_MAPPING[self.family].__init__).parameters if f != "self"}
        known |= set(vars(CONFIG_MAPPING[self.family]()))
        for key in self.options:
            if key not in known:
                raise ConfigError(f"decoder.options has no field {key!r} for family {self.family!r}{near(key, known)}")
        names = {**LLAMA_SIZES, **SIZES.get(self.family, {})}
        sizes = {
            names[size]: value
            for size, value in {
                "width": self.width,
                "depth": self.depth,
                "heads": self.heads,
                "kv_heads": self.kv_heads or self.heads,
                "ffn": self.ffn,
                "context_length": self.context_length,
                "dropout": self.dropout,
            }.items()
            if names[size]
        }
        if self.family == "opt":  # else its embeddings would keep the width of the default size
            sizes = {"word_embed_proj_dim": self.width, "attention_dropout": 0.0, **sizes}
        if self.family == "gpt2":
            sizes |= {"embd_pdrop": self.dropout, "attn_pdrop": self.dropout}
        # token ids of the library's default vocabulary would lie outside a small one; decoding here is told its own
        tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        return AutoConfig.for_model(self.family, **{**tokens, "vocab_size": self.vocab_size, **sizes, **self.options})

    def language_model(self, library: Any, attention: str) -> nn.Module:
        """The transformers model of ``library`` with new weights."""
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_config(library, attn_implementation=attention)
        return model

    def build(self) -> CausalLM:
        return CausalLM(self)

    @staticmethod
    def complete(family: str, section: Mapping[str, Any]) -> dict[str, Any] | None:
        """The plain values of a ``config.json`` section with the family's defaults for what it leaves out; None for a
        family that is no causal LM of transformers."""
        from zoo.torchvision_ops import ensure

        ensure()
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return None
        values = {key: value for key, value in section.items() if key != "model_type"}
        plain: dict[str, Any] = CONFIG_MAPPING[family].from_dict(values).to_dict()
        return plain

    @classmethod
    def from_library(cls, config: Mapping[str, Any], tokenizer: str) -> CausalLMConfig:
        """The fields that rebuild the model of a ``config.json``'s text section.

        Args:
            config: The plain values, as ``complete`` gives them.
            tokenizer: Name of the text tokenizer.
        """
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        family = str(config["model_type"])
        names = {**LLAMA_SIZES, **SIZES.get(family, {})}
        fields = {size: config[key] for size, key in names.items() if key and config.get(key) is not None}
        default = CONFIG_MAPPING[family]().to_dict()
        derived = {"word_embed_proj_dim": fields["width"], "head_dim": fields["width"] // fields["heads"]}
        options = {
            key: value
            for key, value in config.items()
            if key in default and value is not None and (value != default[key] or key in STATED)
            if key not in NOT_ARCHITECTURE and key not in names.values() and value != derived.get(key)
        }
        return cls(family=family, vocab_size=config["vocab_size"], tokenizer=tokenizer, options=options, **fields)


class CausalLM(Decoder):
    """``lm`` is the transformers module, with its own parameter names. Attention runs through SDPA where
    the family has it.

    Layouts that are causal with pads behind the text (or none) need no mask; causal ones padded elsewhere go in as a
    2-D mask, so that families with sliding windows keep theirs; every other layout goes in as a 4-D boolean mask.
    """

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        library = config.library()
        from transformers import AutoModelForCausalLM

        self.config = config
        self._fused = bool(AutoModelForCausalLM._model_mapping[type(library)]._supports_sdpa)
        attention = "sdpa" if self._fused else "eager"
        self.lm = config.language_model(library, attention)
        quantize(self.lm, config)
        add_adapters(self.lm, config)
        self.width = self._embedding.weight.shape[1]
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self.takes_positions = "position_ids" in inspect.signature(self._base.forward).parameters
        self._soft_cap = getattr(library, "final_logit_softcapping", None)
        self._scale = getattr(library, "logit_scale", None) or 1 / (getattr(library, "logits_scaling", None) or 1)

    @property
    def _embedding(self) -> nn.Embedding:
        embedding: nn.Embedding = self.lm.get_input_embeddings()  # type: ignore[operator]
        return embedding

    @property
    def _base(self) -> nn.Module:
        base: nn.Module = self.lm.base_model  # type: ignore[assignment]
        return base

    def embed(self, ids: Tensor) -> Tensor:
        embeds: Tensor = self._embedding(ids)
        return embeds

    def forward(self, batch: TokenBatch, cache: Any = None) -> Tensor:
        rows = batch.embeds.shape[1]
        mask, position = self._attention(batch.layout, rows, cached=cache is not None)
        if batch.layout.position.ndim != 2:
            raise ConfigError(f"decoder family {self.config.family!r} counts positions on one axis, the layout on more")
        inputs: dict[str, Any] = {"position_ids": position} if self.takes_positions else {}
        hidden: Tensor = self._base(
            inputs_embeds=batch.embeds,  # [B, rows, D]
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **inputs,
        ).last_hidden_state
        return hidden

    def _attention(self, layout: Layout, rows: int, cached: bool) -> tuple[Tensor | None, Tensor]:
        """The mask in the form the library takes, and the position ids [B, rows] of the new rows."""
        position = layout.position[..., -rows:]
        first = slice(layout.length - rows, layout.length)
        if layout.segment.device.type == "meta":  # the library looks at values when it is given no mask
            return self._dense(layout, first), position
        if layout.kind == "causal" and (cached or bool((position.diff(dim=-1) == 1).all())):
            # without a cache the library reads jumps in the positions as packed documents, hence the look at them
            return (None if layout.padding == "none" or not cached else layout.real), position
        if layout.table is not None and kind(layout.runs, layout.table, "none", layout.length) == "causal":
            return layout.real, position
        return self._dense(layout, first), position

    def _dense(self, layout: Layout, rows: slice) -> Tensor:
        """The 4-D mask: boolean for SDPA; families with their own attention add theirs to the scores."""
        mask = layout.mask(rows)
        if self._fused:
            return mask
        dtype = self._embedding.weight.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm.get_output_embeddings()(hidden)  # type: ignore[operator]
        if self._scale != 1:
            logits = logits * self._scale
        if self._soft_cap:
            logits = torch.tanh(logits / self._soft_cap) * self._soft_cap
        return logits

    def tables(self) -> tuple[Tensor, Tensor]:
        return self._embedding.weight, self.lm.get_output_embeddings().weight  # type: ignore[operator]

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.lm.config)

    def select_cache(self, cache: Any, index: Tensor) -> Any:
        """The cache of the batch rows ``index`` [N]; repeats allowed. ``cache`` must not be used afterwards."""
        cache.batch_select_indices(index)
        return cache

    def cut_cache(self, cache: Any, length: int) -> Any:
        """The cache of the first ``length`` tokens."""
        if (surplus := cache.get_seq_length() - length) > 0:
            cache.crop(-surplus)  # a positive number is refused by newer versions
        return cache
