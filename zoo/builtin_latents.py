"""The zoo's continuous image tokenizers and what trains tokenizers to be sharp, in the manifest a plugin uses."""

from __future__ import annotations

from typing import Any

from zoo.registry import Component


def _kl(name: str, summary: str, **preset: Any) -> Component:
    return Component(
        kind="image_tokenizer", name=name, ref="zoo.tokenizers.kl:KLConfig", preset=preset, summary=summary
    )


LATENTS = (
    _kl("kl", "KL autoencoder, 8 x 8 pixels a latent of 8 channels, scaled by what it measures while it trains"),
    _kl("kl-f8-8ch", "Transfusion's KL autoencoder, 8 channels, 256 px", image_size=256, channels=8),
    _kl("sd-vae", "Stable Diffusion's autoencoder, 4 channels", image_size=512, channels=4, scaling=0.18215),
    _kl(
        "sdxl-vae", "Stable Diffusion XL's autoencoder, 4 channels, in fp32", image_size=1024, channels=4,
        scaling=0.13025, upcast=True,
    ),
    _kl(
        "sd3-vae", "Stable Diffusion 3's autoencoder, 16 channels", image_size=1024, channels=16, scaling=1.5305,
        shift=0.0609, quant_conv=False,
    ),
    _kl(
        "flux-vae", "FLUX.1's autoencoder, 16 channels", image_size=1024, channels=16, scaling=0.3611, shift=0.1159,
        quant_conv=False,
    ),
    Component(
        kind="objective",
        name="kl-reconstruction",
        ref="zoo.objectives.kl_reconstruction:KLReconstructionConfig",
        summary="draw the image again from latents near a unit Gaussian; trains continuous image tokenizers",
    ),
    Component(
        kind="objective",
        name="perceptual",
        ref="zoo.objectives.perceptual:PerceptualConfig",
        summary="distance in the features of a frozen network given by path: an encoder of the zoo, or LPIPS on VGG-16",
    ),
    Component(
        kind="objective",
        name="adversarial",
        ref="zoo.objectives.adversarial:AdversarialConfig",
        summary="a discriminator of patches, against which a tokenizer learns to draw sharp images",
    ),
)  # fmt: skip
