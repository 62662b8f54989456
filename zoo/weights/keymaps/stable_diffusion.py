"""diffusers' Stable Diffusion folders to the zoo's names: the parts' own names stay below ``net`` and ``vae``."""

from __future__ import annotations

from zoo.weights.formats.autoencoder_kl import KEYMAP as AUTOENCODER
from zoo.weights.keymaps import KeyMap, drop, rename
from zoo.weights.keymaps.clip import text

UNET = KeyMap(rename("unet.{**}", "denoiser.net.{**}"))


def _text(part: str, target: str) -> KeyMap:
    """A ``CLIPTextModel`` below ``part``; from transformers 5 on its names have no ``text_model`` in front."""
    return text(f"{part}.text_model.", target) + text(f"{part}.", target)


STABLE_DIFFUSION = UNET + _text("text_encoder", "text_encoder.tower.") + AUTOENCODER.under(source="vae.")
"""Of ``StableDiffusionPipeline``; tensors are named by their folder first."""


def stable_diffusion_xl(depth: int) -> KeyMap:
    """Of ``StableDiffusionXLPipeline``, whose first text encoder has ``depth`` blocks: the last one is not read."""
    prefixes = ("text_encoder.text_model.", "text_encoder.")
    unread = [
        drop(f"{prefix}{name}.{{**}}")
        for prefix in prefixes
        for name in (f"encoder.layers.{depth - 1}", "final_layer_norm")
    ]
    return (
        UNET
        + KeyMap(*unread)
        + _text("text_encoder", "text_encoder.first.tower.")
        + _text("text_encoder_2", "text_encoder.second.tower.")
        + KeyMap(rename("text_encoder_2.text_projection.weight", "text_encoder.projection.weight"))
        + AUTOENCODER.under(source="vae.")
    )
