"""Matching of VLMo in several processes; apart from its other tests, so that the processes import little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from zoo.recipe import resolve

IMAGE_OF, TEXT_OF = [3, 5, 4, 0, 2, 1], [4, 3, 0, 5, 1, 2]
"""Negatives of a batch of six in two ranks of three, most of them the other rank's."""

SIZES = {"width": 32, "depth": 4, "heads": 4, "ffn": 64, "image_size": 32, "patch_size": 8, "drop_path": 0.0}


def built() -> tuple[Any, Any]:
    """A model with weights that matter, and its matching objective."""
    recipe = resolve("vlmo", values={"trunk": SIZES}, scale="tiny")
    model = recipe.wiring[1].build(recipe.parts, 0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, recipe.objectives["matching"].build()


def data(rows: slice) -> dict[str, Tensor]:
    """Pairs with their negatives; every rank pads to a length of its own."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 1000, (6, 9), generator=generator)
    lengths = torch.tensor([9, 7, 5, 8, 4, 6])
    pixels = torch.randn(6, 3, 32, 32, generator=generator)
    mask = torch.arange(9) < lengths[:, None]
    longest = int(lengths[rows].max())
    return {
        "pixel_values": pixels[rows],
        "input_ids": ids.masked_fill(~mask, 0)[rows, :longest],
        "attention_mask": mask[rows, :longest],
        "negative_images": torch.tensor(IMAGE_OF)[rows],
        "negative_texts": torch.tensor(TEXT_OF)[rows],
    }


def learned(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, a gradient that reaches back through the gathered images, and the weights negatives are drawn by."""
    model, objective = built()
    batch = data(rows)
    outputs = model(batch)
    weights, _ = objective.weights(batch, outputs)
    loss, _ = objective(model, batch, outputs)
    loss.backward()
    return loss.detach(), model.trunk.stem.patch.weight.grad, weights


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(learned(slice(3 * rank, 3 * rank + 3)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_negatives_come_from_every_rank(tmp_path: Path) -> None:
    """Two ranks learn what one process with the whole batch does; nobody draws its own pair."""
    loss, gradient, _ = learned(slice(0, 6))
    assert gradient.abs().max() > 1e-3
    mp.spawn(one_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((ranks[0][1] + ranks[1][1]) / 2, gradient, atol=1e-5, rtol=1e-4)
    for rank, (_, _, weights) in enumerate(ranks):
        assert weights.shape == (3, 6)
        assert torch.equal(weights[:, 3 * rank : 3 * rank + 3].diagonal(), torch.zeros(3))
        assert (weights > 0).sum() == 15
