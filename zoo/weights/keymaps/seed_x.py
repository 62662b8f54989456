"""SEED-X (src/models/tokenizer/qwen_visual.py, src/models/detokenizer/resampler.py): resampler and adapter."""

from __future__ import annotations

import torch

from zoo.weights.keymaps import KeyMap, Rule, rename

RESAMPLER = KeyMap(
    rename("query", "query"),
    rename("pos_embed", "position"),
    rename("kv_proj.weight", "kv.weight"),
    rename("ln_q.{p}", "norm_q.{p}"),
    rename("ln_kv.{p}", "norm_kv.{p}"),
    rename("attn.{**}", "attn.{**}"),
)
"""To ``zoo.output_connectors.query_resampler.QueryResampler``."""


def adapter(widths: tuple[int, int] = (768, 1280)) -> KeyMap:
    """Return the map of ``ResamplerXLV2`` to ``FeatureAdapter``; ``widths`` are of the two maps behind the latents."""

    def two_maps(kind: str) -> Rule:
        return Rule(
            (f"unet_proj_1.{kind}", f"unet_proj_2.{kind}"),
            (f"proj_out.{kind}",),
            lambda t: (torch.cat(t),),
            lambda t: tuple(part.contiguous() for part in torch.split(t[0], list(widths))),
        )

    return KeyMap(
        rename("latents", "latents", lambda t: t[0], lambda t: t[None]),
        rename("proj_in.{p}", "proj_in.{p}"),
        rename("layers.{i}.0.norm1.{p}", "layers.{i}.norm_media.{p}"),
        rename("layers.{i}.0.norm2.{p}", "layers.{i}.norm_latents.{p}"),
        rename("layers.{i}.0.to_q.weight", "layers.{i}.q.weight"),
        rename("layers.{i}.0.to_kv.weight", "layers.{i}.kv.weight"),
        rename("layers.{i}.0.to_out.weight", "layers.{i}.out.weight"),
        rename("layers.{i}.1.{n}.{p}", "layers.{i}.ffn.{n}.{p}"),
        rename("norm_out.{p}", "norm.{p}"),
        rename("unet_attnpool.positional_embedding", "pool.position"),
        *(rename(f"unet_attnpool.{a}_proj.{{p}}", f"pool.{a}.{{p}}") for a in "qkv"),
        rename("unet_attnpool.c_proj.{p}", "pool.out.{p}"),
        two_maps("weight"),
        two_maps("bias"),
    )
