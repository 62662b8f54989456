"""Transfusion's components of the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from zoo.registry import Component


def _trunk(name: str, width: int, depth: int, heads: int, ffn: int) -> Component:
    """A row of table 2 of arXiv 2408.11039; the feed-forward width is 8/3 of the width, rounded up to 256."""
    return Component(
        kind="decoder",
        name=f"transfusion-{name}",
        ref="zoo.decoders.trunk_lm:TrunkLMConfig",
        preset={
            "width": width, "depth": depth, "heads": heads, "kv_heads": 0, "ffn": ffn, "tie": False,
            "vocab_size": 32000, "context_length": 4096, "tokenizer": "hf:meta-llama/Llama-2-7b-hf",
        },
        summary=f"Transfusion's {name.upper()} trunk: {depth} layers of width {width}, {heads} heads",
    )  # fmt: skip


TRANSFUSION = (
    _trunk("0.16b", 768, 16, 12, 2048),
    _trunk("0.37b", 1024, 24, 16, 2816),
    _trunk("0.76b", 1536, 24, 24, 4096),
    _trunk("1.4b", 2048, 24, 16, 5632),
    _trunk("7b", 4096, 32, 32, 11008),
    Component(
        kind="patch_codec",
        name="linear",
        ref="zoo.patch_codecs.linear:LinearCodecConfig",
        summary="a linear map of a noisy patch and one back (Transfusion)",
    ),
    Component(
        kind="patch_codec",
        name="unet",
        ref="zoo.patch_codecs.unet:UNetCodecConfig",
        summary="the halves of a U-Net before and behind the trunk, 0.27B at patches of 2 (Transfusion)",
    ),
    Component(
        kind="objective",
        name="diffusion",
        ref="zoo.objectives.denoising:DiffusionConfig",
        summary="DDPM of image latents: the noise's squared error, a mean of images (Transfusion)",
    ),
    Component(
        kind="objective",
        name="flow",
        ref="zoo.objectives.denoising:FlowConfig",
        summary="flow matching of image latents: the velocity's squared error, a mean of images",
    ),
    Component(
        kind="wiring",
        name="unified-latent",
        ref="zoo.models.unified_latent:UnifiedLatentConfig",
        summary="a text decoder, a patch codec and a continuous image tokenizer: noisy patches among words",
    ),
)
