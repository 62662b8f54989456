"""ALBEF's objectives on two processes are those of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import zoo
from zoo.module import ZooModule

OPTIONS = {
    "encoder.width": 32, "encoder.ffn": 64, "encoder.depth": 2,
    "text_encoder.width": 32, "text_encoder.ffn": 64, "text_encoder.depth": 2,
    "objective.momentum-contrastive.queue_size": 12, "objective.momentum-contrastive.ramp": 0,
    "objective.masked-lm.ramp": 0,
}  # fmt: skip


def made() -> ZooModule:
    torch.manual_seed(0)
    module = zoo.build("albef", scale="tiny", options=OPTIONS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if name != "temperature":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.train()


def whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 1000, (6, 7), generator=generator)
    ids[:, 0] = 1
    labels = torch.full_like(ids, -100)
    labels[[0, 1, 1, 4], [1, 1, 2, 2]] = ids[[0, 1, 1, 4], [1, 1, 2, 2]]  # three words on rank 0, one on rank 1
    return {
        "pixel_values": torch.randn(6, 3, 64, 64, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "masked_ids": torch.where(labels != -100, 3, ids),
        "masked_labels": labels,
        "negative_images": torch.tensor([5, 0, 4, 1, 2, 3]),  # from the other rank, too
        "negative_texts": torch.tensor([3, 5, 0, 4, 1, 2]),
    }


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    module, batch = made(), whole()
    loss, _ = module.losses({name: tensor[3 * rank : 3 * rank + 3] for name, tensor in batch.items()})
    loss.backward()
    gradients = {}
    for name, parameter in module.model.named_parameters():
        dist.all_reduce(parameter.grad)  # what DDP does
        gradients[name] = parameter.grad / 2
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    contrast = module.objectives["momentum-contrastive"]
    held = {name: getattr(contrast, name) for name in ("image_queue", "text_queue", "pointer")}
    torch.save({"loss": mean / 2, "gradients": gradients, **held}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    module = made()
    loss, _ = module.losses(whole())
    loss.backward()
    contrast = module.objectives["momentum-contrastive"]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["loss"], loss.detach(), atol=1e-5, rtol=1e-5)
        for name in ("image_queue", "text_queue", "pointer"):
            torch.testing.assert_close(found[name], getattr(contrast, name))
        for name, parameter in module.model.named_parameters():
            torch.testing.assert_close(found["gradients"][name], parameter.grad, atol=1e-5, rtol=1e-4)
    assert int(contrast.pointer) == 6
