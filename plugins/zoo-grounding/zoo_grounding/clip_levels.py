"""CLIP's image tower as PixelLM reads it (custom_clip.py of the release): several layers of one pass, and padded
patches that no other patch reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch.nn.functional as F
from torch import Tensor

from zoo.encoders.open_clip import check_image
from zoo.encoders.vit import ViT, ViTConfig
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, lay_out
from zoo.part import Features


@dataclass(frozen=True, kw_only=True)
class CLIPLevelsConfig(ViTConfig):
    """A vision transformer that gives several layers and hides padded patches. Presets say CLIP's sizes.

    A ``scale`` halves the patches: a mask is read from their grid, and the language model sees a quarter of them.
    """

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        own = super().scaled(sizes)
        return replace(own, patch_size=max(1, own.patch_size // 2)) if "patch_size" in sizes else own

    def build(self) -> CLIPLevels:
        return CLIPLevels(self)


class CLIPLevels(ViT):
    """``embed`` and ``trunk``, as ``ViT``."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """Encode pixel values [B, 3, H, W]; see ``ViT.forward``.

        Args:
            mask: [B, h*w] bool, True where a patch shows something. Others are no keys of any row; they have rows all
                the same, which read the real patches.
        """
        if mask is None:
            return super().forward(x)
        c = self.config
        if (c.class_token and c.cls) or c.pool:
            raise ConfigError(
                "an encoder that hides patches gives neither a class token nor pooled: set cls=false, pool=false"
            )
        return self.levels(x, [c.layer], mask)[0]

    def levels(self, x: Tensor, layers: Sequence[int], mask: Tensor | None = None) -> list[Features]:
        """The patches [B, h*w, width] after each of the blocks ``layers``, without a norm or a class token, from one
        pass.

        Args:
            x: [B, 3, H, W] of the configured size.
            layers: Python indexes into the published tower's blocks.
            mask: As in ``forward``; it is handed on, unless all patches are real (which only a CPU is asked).

        Raises:
            ConfigError: A block that was not built, as nothing behind ``layer`` is.
        """
        c = self.config
        check_image(x, c.image_size)
        blocks = [layer + c.depth if layer < 0 else layer for layer in layers]
        for layer, block in zip(layers, blocks, strict=True):
            if not 0 <= block < c.kept:
                raise ConfigError(
                    f"block {layer} of the image encoder was asked for, and it has the first {c.kept} of {c.depth}:"
                    " raise encoder.layer, or read earlier layers"
                )
        if mask is not None and mask.device.type == "cpu" and bool(mask.all()):
            mask = None
        embedded = self.embed(x)  # [B, (1+)h*w, D]
        layout = self._layout(mask, embedded)
        kept = slice(0, max(blocks, default=0) + 1)
        run = self.trunk(embedded, layout, layers=kept, taps=True, final_norm=False)
        taps = cast("tuple[Tensor, tuple[Tensor, ...]]", run)[1]
        first = int(c.class_token)
        return [Features(taps[block][:, first:], mask, None, self.grid) for block in blocks]

    def _layout(self, mask: Tensor | None, embedded: Tensor) -> Layout | None:
        if mask is None:
            return None
        seen = F.pad(mask, (1, 0), value=True) if self.config.class_token else mask
        layout = lay_out([Segment("image", embedded.shape[1], "image", "full")], len(seen), device=embedded.device)
        return layout.hide(~seen)
