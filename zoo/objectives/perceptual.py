"""Distance of two images in the features of a frozen network: LPIPS, or the same on an encoder that the zoo trained."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError, WeightsError
from zoo.objectives.base import Objective, full_precision
from zoo.recipe import ObjectiveConfig

if TYPE_CHECKING:
    from zoo.weights.files import State

VGG = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
"""Channels of VGG-16's convolutions (arXiv 1409.1556, configuration D), 0 a pooling."""

READ = (3, 8, 15, 22, 29)
"""Places of the activations LPIPS reads: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""

EPS = 1e-8
"""In the length of a feature vector (LPIPS's newer code; its first had 1e-10 outside the root)."""


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig(ObjectiveConfig):
    """Needs weights: ``path``.

    Attributes:
        path: A run directory or checkpoint of the zoo whose model has an image encoder (a CLIP, say), or a file of
            VGG-16's weights as torchvision or LPIPS publish them.
        linear: LPIPS's file of channel weights, for VGG-16; empty = the one that torchmetrics carries.
        layers: Blocks of an encoder whose outputs are compared, evenly spaced, the last one included.
    """

    path: str = ""
    linear: str = ""
    layers: int = 4

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layers = {self.layers} must be 1 or more")

    def check_batch(self, batch_size: int) -> None:
        """Refuse a run without weights before anything begins."""
        if not self.path:
            raise ConfigError(
                "objective perceptual needs the weights of a network that sees: set objective.perceptual.path to a run"
                " or checkpoint of a zoo model with an image encoder, or to a file of VGG-16's weights"
            )

    def build(self) -> Perceptual:
        return Perceptual(self)


class Perceptual(Objective):
    """Mean distance of ``reconstruction`` and the batch's ``pixel_values``.

    Features of each layer are brought to unit length at every place; the squared differences are weighted by channel
    (LPIPS, arXiv 1801.03924, equation 1; all weights 1 for an encoder), summed over channels, meaned over places and
    images, and summed over layers (meaned for an encoder). The network is in no checkpoint.
    """

    learns: ClassVar[str] = "reconstruction"
    needs: ClassVar[frozenset[str]] = frozenset({"reconstruction"})

    def __init__(self, config: PerceptualConfig) -> None:
        super().__init__()
        self.config = config
        self.__dict__["eye"] = None  # no submodule: it is large, frozen, and its weights are in a file already

    def open(self, model: Any) -> None:
        """Read the network.

        Raises:
            ConfigError: No path, or a checkpoint without an image encoder.
            WeightsError: Another kind of file.
        """
        if self.__dict__["eye"] is None:
            self.config.check_batch(0)
            eye = open_eye(self.config).eval().requires_grad_(False)
            self.__dict__["eye"] = eye

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss, in fp32."""
        self.open(model)
        drawn = outputs["reconstruction"]
        eye: Any = self.__dict__["eye"]
        if drawn.is_meta:  # where costs are counted
            eye = copy.deepcopy(eye).to("meta")
        elif next(eye.parameters()).device != drawn.device:
            eye.to(drawn.device)
        config = model.image_config
        mean, std = (drawn.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (config.mean, config.std))
        with full_precision(drawn):
            with torch.no_grad():
                wanted = eye(batch["pixel_values"].float() * std + mean)
            loss = eye.distance(eye(drawn.float() * std + mean), wanted)
        return loss, {}


class VGGEye(nn.Module):
    """VGG-16's activations with LPIPS's channel weights.

    Args:
        state: VGG-16's tensors, named ``[features.|net.sliceK.]N.weight`` and ``bias``.
        linear: LPIPS's, named ``[lin|lins.]K.model.1.weight``, each [1, C, 1, 1].

    Raises:
        WeightsError: A tensor is missing or has another shape.
    """

    def __init__(self, state: State, linear: State) -> None:
        super().__init__()
        made: list[nn.Module] = []
        channels = 3
        for width in VGG:
            made += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            channels = width or channels
        self.features = nn.Sequential(*made)
        names = {
            f"{m[1]}.{m[2]}": tensor
            for name, tensor in state.items()
            if (m := re.search(r"(?:^|features\.|slice\d\.)(\d+)\.(weight|bias)$", name))
        }
        own = self.features.state_dict()
        lost = [k for k, v in own.items() if k not in names or names[k].shape != v.shape]
        if lost:
            raise WeightsError(f"{len(lost)} of VGG-16's tensors are missing or of another shape: {lost[0]}, ...")
        self.features.load_state_dict({k: names[k] for k in own})
        found = {int(m[1]): t for name, t in linear.items() if (m := re.search(r"(\d)\.model\.1\.weight$", name))}
        for layer, width in enumerate((64, 128, 256, 512, 512)):
            if layer not in found or found[layer].shape != (1, width, 1, 1):
                raise WeightsError(f"LPIPS's channel weights of layer {layer} are missing or not [1, {width}, 1, 1]")
            self.register_parameter(f"channel{layer}", nn.Parameter(found[layer].float()))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of images [B, 3, H, W] in [0, 1]: five of [B, C, h, w]."""
        x = (2 * images - 1 - self.shift) / self.scale  # type: ignore[operator]
        found: list[Tensor] = []
        for place, module in enumerate(self.features):
            x = module(x)
            if place in READ:
                found.append(x)
        return found

    def distance(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """LPIPS, meaned over images: a scalar."""
        total = ours[0].new_zeros(())
        for layer, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            difference = (unit(a, 1) - unit(b, 1)).square()  # [B, C, h, w]
            total = total + F.conv2d(difference, getattr(self, f"channel{layer}")).mean()
        return total


class EncoderEye(nn.Module):
    """Outputs of some blocks of a zoo encoder.

    Args:
        config: The encoder's, for the size and normalisation of its input.
        layers: How many blocks.
    """

    def __init__(self, encoder: nn.Module, config: Any, layers: int) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config
        lists = [m for m in encoder.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
        blocks = list(max(lists, key=len, default=nn.ModuleList()))
        count = min(layers, len(blocks))
        self.read = [blocks[(i + 1) * len(blocks) // count - 1] for i in range(count)]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of images [B, 3, H, W] in [0, 1]: of each block that is read, and the encoder's tokens."""
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (self.config.mean, self.config.std))
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        hooks = [module.register_forward_hook(keep) for module in self.read]
        try:
            tokens: Tensor = self.encoder((images - mean) / std).tokens
        finally:
            for hook in hooks:
                hook.remove()
        return [*found, tokens]

    def distance(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """Mean over images, places and layers of the squared distance of unit feature vectors, from 0 to 4."""
        total = ours[0].new_zeros(())
        for a, b in zip(ours, theirs, strict=True):
            dim = 1 if a.ndim == 4 else -1
            total = total + (unit(a, dim) - unit(b, dim)).square().sum(dim).mean()
        return total / len(ours)


def unit(x: Tensor, dim: int) -> Tensor:
    """Vectors along ``dim`` at unit length."""
    return x / (EPS + x.square().sum(dim, keepdim=True)).sqrt()


def open_eye(config: PerceptualConfig) -> VGGEye | EncoderEye:
    """Read what ``config.path`` names.

    Raises:
        ConfigError: A checkpoint whose model has no image encoder.
        WeightsError: Nothing is there, or it is another kind of file.
    """
    from zoo.weights import load_model
    from zoo.weights.files import read_file

    path = Path(config.path).expanduser()
    if path.is_file():
        return VGGEye(
            read_file(path), read_file(Path(config.linear).expanduser() if config.linear else shipped_linear())
        )
    folder = path / "weights" if (path / "weights").is_dir() else path
    model, recipe, _ = load_model(folder if folder.is_dir() else config.path)
    if "encoder" not in recipe.parts:
        raise ConfigError(
            f"objective.perceptual.path = {config.path!r} is a {recipe.model}, which has no image encoder: choose a"
            " checkpoint of clip, say"
        )
    encoder: Any = model.encoder
    return EncoderEye(encoder, recipe.parts["encoder"][1], config.layers)


def shipped_linear() -> Path:
    """LPIPS's channel weights for VGG-16 in the installed torchmetrics, which need not be imported."""
    from importlib.util import find_spec

    spec = find_spec("torchmetrics")
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root) / "functional" / "image" / "lpips_models" / "vgg.pth"
        if path.is_file():
            return path
    raise ConfigError("this torchmetrics carries no LPIPS weights: set objective.perceptual.linear to LPIPS's vgg.pth")
