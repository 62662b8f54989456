"""BLIP-2's first stage in several processes; apart from its other tests, so that the processes import little."""

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

SIZES: dict[str, Any] = {
    "encoder": {"width": 32, "depth": 2, "heads": 2, "ffn": 48, "image_size": 32, "patch_size": 8},
    "connector": {"width": 24, "depth": 2, "heads": 2, "ffn": 40, "queries": 5},
}


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


def learned(rows: slice) -> dict[str, Tensor]:
    """The three losses, gradients of their sum, and the weights negatives are drawn by."""
    recipe = resolve("blip2", values=SIZES, scale="tiny")
    model = recipe.wiring[1].build(recipe.parts, 0).eval()
    model.encoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "heads.temperature":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    batch = data(rows)
    outputs = model(batch)
    found: dict[str, Tensor] = {}
    total = torch.zeros(())
    for name, config in recipe.objectives.items():
        objective = config.build()
        found[name], _ = objective(model, batch, outputs)
        total = total + found[name]
        if name == "matching":
            found["weights"], _ = objective.weights(batch, outputs)
    total.backward()  # type: ignore[no-untyped-call]
    named = dict(model.named_parameters())
    for name in (
        "connector.query_tokens",
        "heads.temperature",
        "connector.text.tokens.weight",
        "heads.matching.weight",
    ):
        found[f"grad {name}"] = named[name].grad
    return {name: value.detach().clone() for name, value in found.items()}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(learned(slice(3 * rank, 3 * rank + 3)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_learn_what_one_process_does(tmp_path: Path) -> None:
    whole = learned(slice(0, 6))
    mp.spawn(one_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in whole.items():
        if name == "weights":
            torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), value, atol=1e-5, rtol=1e-4)
            assert not value.diagonal().any()
            assert (value > 0).sum() == 30
            continue
        if name.startswith("grad"):
            assert value.abs().max() > 1e-4, name
        torch.testing.assert_close((ranks[0][name] + ranks[1][name]) / 2, value, atol=1e-5, rtol=1e-4, msg=name)
