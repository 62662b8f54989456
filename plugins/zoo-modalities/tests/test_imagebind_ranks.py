"""Two processes whose ranks have other numbers of pairs give the loss and the gradient of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch.testing import assert_close
from zoo_modalities.imagebind.objective import pair_loss

ROOT = Path(__file__).parents[1]
COUNTS = (3, 1)
"""Pairs of each rank, of four images."""

WORKER = """
import sys
import torch
import torch.distributed as dist
folder, rank, root, counts = sys.argv[1], int(sys.argv[2]), sys.argv[3], [int(n) for n in sys.argv[4:]]
sys.path.insert(0, root)
from zoo_modalities.imagebind.objective import pair_loss
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt", weights_only=True)
weight = data["weight"].requires_grad_()
images = torch.nn.functional.normalize(data["images"][4 * rank : 4 * rank + 4] @ weight, dim=-1)
first = sum(counts[:rank])
items = torch.nn.functional.normalize(data["items"][first : first + counts[rank]] @ weight, dim=-1)
loss, hits = pair_loss(images, items, torch.tensor(7.0), data["rows"][first : first + counts[rank]] - 4 * rank)
loss.backward()
torch.save({"loss": loss.detach(), "gradient": weight.grad}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_give_the_loss_and_the_gradient_of_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    data = {
        "images": torch.randn(8, 6, generator=generator),
        "items": torch.randn(sum(COUNTS), 6, generator=generator),
        "weight": torch.randn(6, 5, generator=generator),
        "rows": torch.tensor([3, 0, 2, 6]),
    }
    torch.save(data, tmp_path / "data.pt")
    arguments = [str(ROOT), *map(str, COUNTS)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(rank), *arguments], stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for process in ranks:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error.decode()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]

    weight = data["weight"].clone().requires_grad_()
    images, items = (torch.nn.functional.normalize(data[name] @ weight, dim=-1) for name in ("images", "items"))
    loss, _ = pair_loss(images, items, torch.tensor(7.0), data["rows"])
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 1e-2
    assert_close(torch.stack([f["loss"] for f in found]).mean(), loss.detach())
    assert_close(torch.stack([f["gradient"] for f in found]).mean(0), weight.grad)  # what DDP averages
