"""PixelLM (model/PixelLM.py of the release): LLaVA whose CLIP hides padded patches and is read at two layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import WeightsError
from zoo.weights.keymaps import KeyMap, clip_trunk, lisa, llama, rename

DECODER = ("model.mask_decoder.{**}", "model.prompt_encoder.{**}", "model.image_feature_neck.{**}")
"""Names of the pixel decoder, which is no part of the trunk."""


def resized_positions(table: Tensor, cells: int) -> Tensor:
    """Resize CLIP's position table ``[1 + n·n, D]`` to ``[1 + cells·cells, D]`` as the release does.

    The release takes the last row for that of CLS (CLIP's is the first) and leaves it at the end. Checkpoints do not
    carry the CLIP tower, so official results need just this.

    Raises:
        WeightsError: the table is not that of a square grid and a CLS.
    """
    grid, last = table[:-1], table[-1:]
    side = round(len(grid) ** 0.5)
    if side * side != len(grid):
        raise WeightsError(f"a position table of {len(table)} rows; expected a square number and one for CLS")
    image = grid.T.reshape(1, -1, side, side)
    return torch.cat([F.interpolate(image, (cells, cells), mode="bilinear")[0].flatten(1).T, last])


def keymap() -> KeyMap:
    """Return the map to parts ``stem``, ``vit``, ``projector`` (to the language model), ``out_projector`` (to the pixel
    decoder), ``embed``, ``trunk``, ``head``, ``text_hidden``."""
    return (
        clip_trunk.keymap("vit.", "stem.").under("model.vision_tower.vision_tower.vision_model.")
        + llama.keymap()
        + lisa.HIDDEN
        + KeyMap(
            rename("model.mm_projector.{i}.{p}", "projector.{i}.{p}"),
            rename("model.out_mm_projector.{i}.{p}", "out_projector.{i}.{p}"),
        )
    )
