"""The unified wirings in several processes, one of which sees no image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zoo.api import build_module
from zoo.data.sequences import Image, Text, collate
from zoo.recipe import resolve

ROWS = ("t2i", "mmu", "lm", "lm")
"""Of the whole batch; two processes share it in halves."""


class Losses(nn.Module):
    """A step as a module, so that it can be wrapped."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.module = build_module(resolve(name, scale="tiny"), 0).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.module.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.module.losses(batch)[0]
        return loss


def data(model: Any, rows: slice) -> dict[str, Tensor]:
    """Rows of the whole batch, with the images that belong to them and the draws of their noise."""
    generator = torch.Generator().manual_seed(1)
    texts = [Text(tuple(torch.randint(5, 500, (n,), generator=generator).tolist())) for n in (6, 9, 12, 5)]
    image = Image(model.places)
    parts = {"t2i": lambda t: [t, image], "mmu": lambda t: [image, t], "lm": lambda t: [t]}
    written = [model.processor._row(task, parts[task](text)) for task, text in zip(ROWS, texts, strict=True)][rows]
    batch = collate(written, model.style, model.vocabulary, model.processor.words.pad)
    shown = slice(0, len(batch["image_given"]))
    tokenizer = model.image_tokenizer
    if tokenizer.discrete:
        extra = {
            "image_codes": torch.randint(tokenizer.codes, (2, model.places), generator=generator),
            "mask_ratio": torch.rand(2, generator=generator),
            "mask_order": torch.rand(2, model.places, generator=generator),
        }
    else:
        shape = (2, tokenizer.channels, *model.image_config.grid)
        time = model.process.times(torch.rand(2, generator=generator), torch.ones(2))
        extra = {
            "image_latents": torch.randn(shape, generator=generator),
            "image_noise": torch.randn(shape, generator=generator),
            "image_time": time,
        }
    return batch | {name: value[shown] for name, value in extra.items()}


def gradients(step: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    step.zero_grad()
    loss = step(batch)
    loss.backward()
    named = {name.removeprefix("module."): p for name, p in step.named_parameters() if p.requires_grad}
    return loss.detach(), {name: p.grad for name, p in named.items() if p.grad is not None}


def one_rank(rank: int, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    step = Losses(name)
    batch = data(step.module.model, slice(2 * rank, 2 * rank + 2))
    wrapped = DistributedDataParallel(step)
    gradients(wrapped, batch)  # a parameter without a gradient would stop the second step
    torch.save(gradients(wrapped, batch), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["show-o", "transfusion"])
def test_a_rank_without_images_learns_what_one_process_does(name: str, tmp_path: Path) -> None:
    step = Losses(name)
    loss, expected = gradients(step, data(step.module.model, slice(0, 4)))
    mp.spawn(one_rank, (name, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, loss, atol=1e-5, rtol=1e-5)
    for _, found in ranks:
        names = {key.removeprefix("module."): value for key, value in found.items()}
        wanted = {key.removeprefix("module."): value for key, value in expected.items()}
        assert names.keys() == wanted.keys()
        scale = max(float(value.abs().max()) for value in wanted.values())
        for key, value in wanted.items():
            torch.testing.assert_close(names[key], value, atol=1e-5 * scale, rtol=1e-3)
    assert sum(float(value.abs().max()) > 1e-4 for value in expected.values()) > len(expected) / 2
