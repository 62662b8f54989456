"""The contrastive objective against its definition, and two processes against one (clip.md sections 4 and 10)."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from zoo.objectives.contrastive import ContrastiveConfig


def outputs(images: Tensor, texts: Tensor, log_scale: float | Tensor) -> dict[str, Tensor]:
    scale = log_scale if isinstance(log_scale, Tensor) else torch.tensor(log_scale)
    return {
        "image_embeds": F.normalize(images, dim=-1),
        "text_embeds": F.normalize(texts, dim=-1),
        "logit_scale": scale,
    }


def loss(images: Tensor, texts: Tensor, log_scale: float, **options: float) -> Tensor:
    return ContrastiveConfig(**options).build()(None, {}, outputs(images, texts, log_scale))[0]


def test_loss_is_the_mean_of_both_cross_entropies_written_out() -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(6, 8), torch.randn(6, 8)
    similarity = math.exp(1.3) * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    expected = 0.0
    for i in range(6):
        expected += -math.log(similarity[i, i].exp() / similarity[i].exp().sum()) / 12
        expected += -math.log(similarity[i, i].exp() / similarity[:, i].exp().sum()) / 12
    assert abs(loss(images, texts, 1.3).item() - expected) < 1e-6
    assert_close(loss(images, texts, 1.3), loss(texts, images, 1.3))


def test_equal_pairs_at_scale_100_cost_nothing_and_a_zero_scale_costs_ln_n() -> None:
    eye = torch.eye(8)
    assert loss(eye, eye, math.log(100)) < 1e-6
    torch.manual_seed(0)
    assert_close(loss(torch.randn(8, 4), torch.randn(8, 4), -200.0), torch.tensor(math.log(8)))


def test_label_smoothing_is_that_of_cross_entropy() -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(5, 8), torch.randn(5, 8)
    logits = math.exp(1.0) * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    uniform = (-logits.log_softmax(1).mean() - logits.T.log_softmax(1).mean()) / 2
    assert_close(loss(images, texts, 1.0, label_smoothing=0.1), 0.9 * loss(images, texts, 1.0) + 0.1 * uniform)


def test_the_scale_learns_and_is_clamped_after_a_step() -> None:
    torch.manual_seed(0)
    model = SimpleNamespace(logit_scale=nn.Parameter(torch.tensor(1.0)))
    objective = ContrastiveConfig().build()
    value, report = objective(model, {}, outputs(torch.randn(4, 8), torch.randn(4, 8), model.logit_scale))
    value.backward()
    assert model.logit_scale.grad.abs() > 1e-3
    assert_close(report["logit_scale"], torch.tensor(math.e))
    assert not report["logit_scale"].requires_grad
    with torch.no_grad():
        model.logit_scale.fill_(10.0)
    objective.after_step(model)
    assert abs(model.logit_scale.item() - 4.6052) < 1e-4
    with torch.no_grad():
        model.logit_scale.fill_(-1.0)
    objective.after_step(model)
    assert model.logit_scale.item() == 0.0


def test_wrong_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="gather"):
        ContrastiveConfig(gather="all")
    with pytest.raises(ValueError, match="label_smoothing"):
        ContrastiveConfig(label_smoothing=1.0)


class Pair(nn.Module):
    """A projection each and a temperature: enough to have parameter gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(5, 7), nn.Linear(6, 7)
        self.logit_scale = nn.Parameter(torch.tensor(1.2))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return outputs(self.image(images), self.text(texts), self.logit_scale)


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(8, 5), torch.randn(8, 6)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images, texts = (x[4 * rank : 4 * rank + 4] for x in data())
    results = {}
    for gather in ("local", "full", "none"):
        model = Pair()
        parallel = nn.parallel.DistributedDataParallel(model)  # averages only while it is alive
        value, _ = ContrastiveConfig(gather=gather).build()(model, {}, parallel(images, texts))
        value.backward()
        results[gather] = (value.detach(), {n: p.grad.clone() for n, p in model.named_parameters()})
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_loss_and_the_gradient_of_one(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    model = Pair()
    whole, _ = ContrastiveConfig().build()(model, {}, model(*data()))
    whole.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert min(g.abs().max() for g in gradients.values()) > 1e-3
    for gather in ("local", "full"):
        assert_close(torch.stack([r[gather][0] for r in ranks]).mean(), whole.detach())
        for rank in ranks:  # what DistributedDataParallel has averaged
            assert_close(rank[gather][1], gradients)
    assert_close(ranks[0]["full"][0], whole.detach())
    assert (torch.stack([r["none"][0] for r in ranks]).mean() - whole).abs() > 0.1
