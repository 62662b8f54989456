"""The entropy terms on two processes are those of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from zoo.tokenizers.entropy import Entropies, bit_entropies, code_entropies, softmax_entropies

TABLE = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
WAYS = {
    "codes": lambda x: code_entropies(x, 0.5),
    "bits": lambda x: bit_entropies(x, 1.0),
    "table": lambda x: softmax_entropies(x, TABLE.to(x), 0.5, 3),
}


def whole() -> Tensor:
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).double()


def loss(found: Entropies) -> Tensor:
    return found.sample - 2 * found.batch


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    out = {}
    for name, way in WAYS.items():
        x = whole()[6 * rank : 6 * rank + 6].requires_grad_()
        value = loss(way(x))
        (gradient,) = torch.autograd.grad(value, x)
        out[name] = value.detach(), gradient / 2  # what DDP's mean over ranks leaves of it
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_as_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, way in WAYS.items():
        x = whole().requires_grad_()
        value = loss(way(x))
        (gradient,) = torch.autograd.grad(value, x)
        torch.testing.assert_close((first[name][0] + second[name][0]) / 2, value.detach())
        torch.testing.assert_close(torch.cat([first[name][1], second[name][1]]), gradient)
