"""Any timm model with features as an image encoder: vision transformers at any size, and convolutional networks as
they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from zoo.encoders.base import Encoder, ImageEncoderConfig
from zoo.encoders.open_clip import check_image
from zoo.errors import ConfigError, WeightsError, near
from zoo.part import Features

VIT_SIZES = ("patch_size", "width", "depth", "heads")
FAMILY = ("vit_", "deit_", "deit3_")
"""Name prefixes of architectures whose four sizes timm takes as arguments."""


def _library() -> Any:
    from zoo import torchvision_ops

    torchvision_ops.ensure()
    import timm

    return timm


@dataclass(frozen=True, kw_only=True)
class TimmConfig(ImageEncoderConfig):
    """A timm model by name, without its classifier.

    ``layer = -1`` gives timm's ``forward_features`` (after the final norm); any other layer the block's own output.

    Attributes:
        arch: timm's name of the model (``vit_base_patch16_224``, ``convnext_tiny``); a tag after a dot chooses weights.
        pretrained: Download timm's weights.
        patch_size, width, depth, heads: Of a vision transformer, where they differ from ``arch``; 0 = as ``arch``
            has them.
        mean, std: Empty = as the model's data configuration says.
        pool: Return ``pooled``, what timm's classifier would read.
        drop_path: Stochastic depth rate in training.
    """

    arch: str = "vit_base_patch16_224"
    pretrained: bool = False
    patch_size: int = 0
    width: int = 0
    depth: int = 0
    heads: int = 0
    pool: bool = True
    drop_path: float = 0.0
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        timm = _library()
        if not timm.is_model(self.arch):
            raise ValueError(f"timm has no model {self.arch!r}{near(self.arch, timm.list_models())}")
        for name in VIT_SIZES:
            if getattr(self, name) and not self.resizable:
                raise ValueError(
                    f"{name} cannot be set: {self.arch} is no plain vision transformer; its size is its name's"
                )
        if self.width and self.heads and self.width % self.heads:
            raise ValueError(f"width = {self.width} must be a multiple of heads = {self.heads}")
        if self.patch_size and self.image_size % self.patch_size:
            raise ValueError(f"image_size = {self.image_size} must be a multiple of patch_size = {self.patch_size}")
        if self.pretrained and any(getattr(self, name) for name in ("width", "depth", "heads")):
            raise ValueError(
                f"pretrained weights of {self.arch} fit no other width, depth or heads: drop one or the other"
            )
        if not self.mean or not self.std:  # written out here, so that a checkpoint keeps what it was trained with
            published = timm.get_pretrained_cfg(self.arch)
            mean, std = (published.mean, published.std) if published else ((0.5,) * 3, (0.5,) * 3)
            object.__setattr__(self, "mean", self.mean or [float(m) for m in mean])
            object.__setattr__(self, "std", self.std or [float(s) for s in std])

    @property
    def resizable(self) -> bool:
        return self.arch.startswith(FAMILY)

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """As every part, except that an architecture whose size is its name's takes only the image size."""
        return super().scaled({k: v for k, v in sizes.items() if self.resizable or k not in VIT_SIZES})

    def build(self) -> TimmEncoder:
        return TimmEncoder(self)


class TimmEncoder(Encoder):
    """A timm model; its weights keep timm's names below ``model``."""

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        timm = _library()
        names = {"patch_size": "patch_size", "width": "embed_dim", "depth": "depth", "heads": "num_heads"}
        options = {timm_name: getattr(config, name) for name, timm_name in names.items() if getattr(config, name)}
        if config.drop_path:
            options["drop_path_rate"] = config.drop_path
        if config.resizable or "swin" in config.arch:
            options["img_size"] = config.image_size
        try:
            self.model = timm.create_model(config.arch, pretrained=config.pretrained, num_classes=0, **options)
        except (OSError, RuntimeError, TypeError, AssertionError) as error:
            if config.pretrained and isinstance(error, OSError):
                raise WeightsError(
                    f"the weights of {config.arch} could not be downloaded ({error}): set pretrained=false"
                ) from error
            raise ConfigError(f"timm cannot build {config.arch} at image_size {config.image_size}: {error}") from error
        self.layer = config.layer
        self.cls = config.cls
        self.image_size = config.image_size
        self.prefix = int(getattr(self.model, "num_prefix_tokens", 0))
        if config.layer != -1:
            self._check_layer(config)
        if not config.pool and hasattr(self.model, "prune_intermediate_layers"):
            if config.layer != -1:
                self.model.prune_intermediate_layers([self.layer], prune_norm=True)
            if getattr(self.model, "attn_pool", None) is not None:
                self.model.attn_pool = None
        self.width = int(self.model.num_features)
        self.pooled_width = int(self.model.head_hidden_size) if config.pool else 0
        self._measure()

    def _check_layer(self, config: TimmConfig) -> None:
        depth = len(getattr(self.model, "blocks", ()))
        if not hasattr(self.model, "forward_intermediates") or not depth:
            raise ConfigError(f"encoder.layer = {config.layer}: {config.arch} gives only its last features, layer = -1")
        if not -depth <= config.layer < depth:
            raise ConfigError(f"encoder.layer = {config.layer} is not among the {depth} blocks of {config.arch}")
        self.layer = config.layer % depth

    def _measure(self) -> None:
        """Token count, width and grid, from shapes alone: architectures reduce images in too many ways to compute
        them."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        parameter = next(self.model.parameters())
        training = self.training
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            image = torch.empty(1, 3, self.image_size, self.image_size, dtype=parameter.dtype, device=parameter.device)
            features = self.eval()(image)
        self.train(training)
        self.tokens, self.width = features.tokens.shape[1:]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """Encode pixel values [B, 3, H, W] of the configured size.

        Returns:
            ``tokens`` [B, prefix + h*w, width] (convolutional: [B, h*w, width] in row order) and ``pooled`` [B,
            pooled_width].
        """
        check_image(x, self.image_size)
        pooled = None
        if self.layer == -1:
            hidden = self.model.forward_features(x)
            tokens = hidden
            if self.pooled_width:
                pooled = self.model.forward_head(hidden, pre_logits=True)
        elif self.pooled_width:
            hidden, between = self.model.forward_intermediates(
                x, indices=[self.layer], output_fmt="NLC", return_prefix_tokens=True
            )
            tokens = _joined(between[0])
            pooled = self.model.forward_head(hidden, pre_logits=True)
        else:
            between = self.model.forward_intermediates(
                x,
                indices=[self.layer],
                output_fmt="NLC",
                return_prefix_tokens=True,
                intermediates_only=True,
                stop_early=True,
            )
            tokens = _joined(between[0])
        if tokens.ndim == 4:
            if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
                tokens = tokens.permute(0, 3, 1, 2)
            grid = (tokens.shape[2], tokens.shape[3])
            return Features(tokens.flatten(2).transpose(1, 2), None, pooled, grid)
        patches = tokens.shape[1] - self.prefix
        side = round(patches**0.5)
        if not self.cls:
            tokens = tokens[:, self.prefix :]
        return Features(tokens, None, pooled, (side, side) if side * side == patches else None)


def _joined(between: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """timm returns (patches, prefix) where there are prefix tokens; the prefix stands first."""
    return between if isinstance(between, Tensor) else torch.cat([between[1], between[0]], 1)
