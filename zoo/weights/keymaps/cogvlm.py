"""CogVLM in the layout of the hub: visual experts beside the language weights, EVA2-E vision, a gated adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from zoo.weights.keymaps import KeyMap, Rule, drop, llama, rename, split

EXPERTS = {"language": 0, "vision": 1}
"""Expert numbers, which are the modality ids. The begin-of-image token is visual, the end-of-image token is not."""


def _expert(name: str, number: int) -> tuple[Rule, ...]:
    attention = f"layers.{{i}}.self_attn.{name}_expert"
    return (
        split(
            f"{attention}_query_key_value.{{p}}",
            [f"layers.{{i}}.attn.{part}.{number}.{{p}}" for part in "qkv"],
        ),
        rename(f"{attention}_dense.{{p}}", f"layers.{{i}}.attn.out.{number}.{{p}}"),
        *(
            rename(f"layers.{{i}}.mlp.{name}_mlp.{part}_proj.{{p}}", f"layers.{{i}}.ffn.{number}.{part}.{{p}}")
            for part in ("gate", "up", "down")
        ),
    )


TRUNK = KeyMap(
    rename("layers.{i}.input_layernorm.{p}", "layers.{i}.attn_norm.{p}"),
    *(rule for name, number in EXPERTS.items() for rule in _expert(name, number)),
    rename("layers.{i}.post_attention_layernorm.{p}", "layers.{i}.ffn_norm.{p}"),
    rename("norm.{p}", "final_norm.{p}"),
    drop("layers.{i}.self_attn.rotary_emb.inv_freq"),
)
VIT = KeyMap(
    rename("layers.{i}.input_layernorm.{p}", "layers.{i}.attn_norm.{p}"),
    split("layers.{i}.attention.query_key_value.{p}", [f"layers.{{i}}.attn.{part}.{{p}}" for part in "qkv"]),
    rename("layers.{i}.attention.dense.{p}", "layers.{i}.attn.out.{p}"),
    rename("layers.{i}.post_attention_layernorm.{p}", "layers.{i}.ffn_norm.{p}"),
    rename("layers.{i}.mlp.fc1.{p}", "layers.{i}.ffn.up.{p}"),
    rename("layers.{i}.mlp.fc2.{p}", "layers.{i}.ffn.down.{p}"),
)


def _batched(tensor: Tensor) -> Tensor:
    return tensor[None]


def _single(tensor: Tensor) -> Tensor:
    return tensor[0]


STEM = KeyMap(
    rename("cls_embedding", "cls", _batched, _single),
    rename("position_embedding.weight", "positions", _batched, _single),
    rename("proj.{p}", "patch.{p}"),
)
ADAPTER = KeyMap(
    rename("linear_proj.{p}", "linear.{p}"),
    rename("norm1.{p}", "norm.{p}"),
    rename("gate_proj.{p}", "ffn.gate.{p}"),
    rename("dense_h_to_4h.{p}", "ffn.up.{p}"),
    rename("dense_4h_to_h.{p}", "ffn.down.{p}"),
)


def keymap() -> KeyMap:
    """Return the map of the hub's ``CogVLMForCausalLM`` to a bridge of ``vit``, ``glu-adapter`` and ``cogvlm-lm``."""
    return (
        STEM.under("model.vision.patch_embedding.", "encoder.embed.")
        + VIT.under("model.vision.transformer.", "encoder.trunk.")
        + ADAPTER.under("model.vision.linear_proj.", "connector.")
        + TRUNK.under("model.", "decoder.trunk.")
        + KeyMap(
            rename("model.vision.boi", "connector.boi"),
            rename("model.vision.eoi", "connector.eoi"),
            rename("model.embed_tokens.{p}", "decoder.embedding.tokens.{p}"),
            rename("lm_head.{p}", "decoder.lm_head.{p}"),
        )
    )


VISUAL_EXPERTS = ("trunk.layers.{i}.attn.{p}.1.weight", "trunk.layers.{i}.ffn.1.{p}.weight")
"""Names of the visual experts in ``cogvlm-lm``, which a Llama does not have."""


def llama_keymap(experts: Sequence[str] = ("qkv", "out", "ffn")) -> KeyMap:
    """Return the map of ``LlamaForCausalLM`` to the language half of ``cogvlm-lm``.

    Args:
        experts: the units that have a visual expert beside the language's.
    """
    units = {"qkv": ("attn.q", "attn.k", "attn.v"), "out": ("attn.out",), "ffn": ("ffn",)}
    routed = tuple(f".{unit}." for name in experts for unit in units[name])

    def ours(name: str) -> str:
        found = next((unit for unit in routed if unit in name), None)
        return name if found is None else name.replace(found, f"{found}{EXPERTS['language']}.")

    plain = llama.keymap(embed="embedding.tokens.", head="lm_head.")
    return KeyMap(*(replace(rule, target=tuple(ours(name) for name in rule.target)) for rule in plain.rules))
