"""Latent diffusion's components of the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from typing import Any

from zoo.registry import Component


def _unet(name: str, summary: str, **preset: Any) -> Component:
    return Component(kind="denoiser", name=name, ref="zoo.denoisers.unet:UNetConfig", preset=preset, summary=summary)


def _dit(name: str, summary: str, **preset: Any) -> Component:
    return Component(kind="denoiser", name=name, ref="zoo.denoisers.dit:DiTConfig", preset=preset, summary=summary)


DENOISERS = (
    Component(
        kind="text_encoder",
        name="openclip-h-text",
        ref="zoo.encoders.open_clip:OpenCLIPTextConfig",
        preset={"width": 1024, "depth": 23, "heads": 16, "ffn": 4096, "quick_gelu": False},
        summary="OpenCLIP ViT-H/14's text transformer without its last block, as Stable Diffusion 2 reads it",
    ),
    Component(
        kind="text_encoder",
        name="sdxl-text",
        ref="zoo.encoders.clip_text_pair:CLIPTextPairConfig",
        summary="CLIP ViT-L/14's and OpenCLIP ViT-bigG/14's text transformers side by side, before their last blocks",
    ),
    Component(
        kind="image_tokenizer",
        name="sd-vae-768",
        ref="zoo.tokenizers.kl:KLConfig",
        preset={"image_size": 768, "channels": 4, "scaling": 0.18215},
        summary="Stable Diffusion's autoencoder for 768 pixels",
    ),
    _unet("unet-sd15", "Stable Diffusion 1's U-Net, 0.86B: 320 to 1,280 channels, 8 heads a level"),
    _unet(
        "unet-sd21", "Stable Diffusion 2's U-Net, 0.87B: the same widths, heads 64 wide",
        attention_heads=[5, 10, 20, 20], linear=True,
    ),
    _unet(
        "unet-sdxl", "SDXL's U-Net, 2.6B: up to ten transformer blocks, told the pooled text and the image's sizes",
        widths=[320, 640, 1280], depths=[0, 2, 10], attention_heads=[5, 10, 20], linear=True, size_width=256,
    ),
    _dit("dit-s", "DiT-S/2 with cross-attention on the condition: 12 blocks of width 384"),
    _dit("dit-b", "DiT-B/2 with cross-attention on the condition: 12 blocks of width 768", width=768, heads=12),
    _dit(
        "dit-l", "DiT-L/2 with cross-attention on the condition: 24 blocks of width 1,024",
        width=1024, depth=24, heads=16,
    ),
    _dit(
        "dit-xl", "DiT-XL/2 with cross-attention on the condition, PixArt-alpha's size: 28 blocks of width 1,152",
        width=1152, depth=28, heads=16,
    ),
    Component(
        kind="wiring",
        name="latent-diffusion",
        ref="zoo.models.latent_diffusion:LatentDiffusionConfig",
        summary="a text encoder, a denoiser that reads its tokens, and the autoencoder in whose latents it works",
    ),
)  # fmt: skip
