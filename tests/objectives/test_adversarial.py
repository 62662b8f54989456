"""The discriminator: values by hand, whose gradient goes where, its optimizer, late start, resume, several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import zoo
from tests.train.test_run import assert_equal_weights, curve, stop_at
from zoo.checkpoints import load_checkpoint
from zoo.cli.overrides import run_config
from zoo.compare.flops import count_recipe
from zoo.objectives.adversarial import Adversarial, AdversarialConfig, PatchDiscriminator, adaptive_weight
from zoo.own_optimizers import OwnOptimizers
from zoo.survival import Interrupted
from zoo.train import run


def made(**fields: Any) -> Adversarial:
    torch.manual_seed(0)
    objective = AdversarialConfig(base=8, **fields).build().train()
    with torch.no_grad():
        for parameter in objective.discriminator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return objective


def images(seed: int) -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_discriminator_has_the_published_size_and_reads_patches_of_70_pixels() -> None:
    made = PatchDiscriminator()
    assert sum(p.numel() for p in made.parameters()) == 2_765_633
    assert made(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    weights = torch.cat([m.weight.flatten() for m in made if isinstance(m, torch.nn.Conv2d)])
    assert float(weights.detach().std()) == pytest.approx(0.02, rel=0.02)
    alone = PatchDiscriminator(base=8, norm="group")
    x = torch.zeros(1, 3, 128, 128, requires_grad=True)
    for module in alone:  # a norm looks at the whole image; the patch is that of the convolutions
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda y: y  # type: ignore[method-assign]
    alone(x)[0, 0, 7, 7].backward()
    assert x.grad is not None
    rows = x.grad.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


@pytest.mark.parametrize("generator", ["hinge", "non-saturating"])
def test_losses_by_hand(generator: str) -> None:
    objective = made(generator=generator, lecam=0.05, decay=0.9)
    real, drawn = images(1), images(2)
    judge = objective.discriminator
    wanted_fake = judge(drawn)
    loss, report = objective(None, {"pixel_values": real}, {"reconstruction": drawn.requires_grad_()})
    by_hand = {"hinge": -wanted_fake, "non-saturating": -torch.sigmoid(wanted_fake).log()}[generator].mean()
    torch.testing.assert_close(loss, by_hand)
    assert report["adaptive"] == 1
    objective.answers.copy_(torch.tensor([0.3, -0.2]))
    own, values = objective.own_loss()
    real_logits, fake_logits = judge(real), judge(drawn)
    hinge = 0.5 * ((1 - real_logits).clamp(min=0).mean() + (1 + fake_logits).clamp(min=0).mean())
    ema = 0.9 * torch.tensor([0.3, -0.2]) + 0.1 * torch.stack([real_logits.mean(), fake_logits.mean()])
    torch.testing.assert_close(objective.answers, ema.detach())
    lecam = (real_logits - ema[1]).clamp(min=0).square().mean() + (ema[0] - fake_logits).clamp(min=0).square().mean()
    torch.testing.assert_close(own, hinge + 0.05 * lecam)
    torch.testing.assert_close(values["discriminator"], hinge.detach())
    torch.testing.assert_close(values["lecam"], lecam.detach())
    assert objective.own_loss()[0] is None  # a pair counts once
    assert float(hinge.detach()) not in (0.0, 1.0)


def test_each_side_learns_from_its_own_loss_only() -> None:
    objective = made()
    own = OwnOptimizers({"adversarial": objective})
    before = {k: v.clone() for k, v in objective.discriminator.state_dict().items()}
    drawn = images(2).requires_grad_()
    loss, _ = objective(None, {"pixel_values": images(1)}, {"reconstruction": drawn})
    loss.backward()
    assert drawn.grad is not None
    assert float(drawn.grad.abs().max()) > 0
    assert all(p.grad is None and not p.requires_grad for p in objective.discriminator.parameters())
    drawn.grad = None
    report = own.backward(["adversarial"])
    assert set(report) == {f"adversarial/{key}" for key in ("discriminator", "real", "drawn", "lecam")}
    assert drawn.grad is None
    assert all(p.grad is not None and not p.requires_grad for p in objective.discriminator.parameters())
    own.step(["adversarial"])
    assert all(p.grad is None for p in objective.discriminator.parameters())
    assert any(not torch.equal(v, before[k]) for k, v in objective.discriminator.state_dict().items())
    assert int(objective.steps) == 1


def test_discriminator_learns_to_tell() -> None:
    objective = made(lr=1e-2)
    own = OwnOptimizers({"adversarial": objective})
    seen = []
    for step in range(20):
        objective(None, {"pixel_values": images(step) + 0.5}, {"reconstruction": 0.5 * images(100 + step)})
        seen.append(float(own.backward(["adversarial"])["adversarial/discriminator"]))
        own.step(["adversarial"])
    assert seen[-1] < 0.6 * seen[0]


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer() -> None:
    torch.manual_seed(0)
    last = torch.nn.Conv2d(4, 3, 3, padding=1)
    hidden, real = torch.randn(2, 4, 16, 16), torch.randn(2, 3, 16, 16)
    drawn = last(hidden)
    others, loss = (drawn - real).abs().mean(), 0.01 * drawn.square().mean()
    found = adaptive_weight(others, loss, last.weight)
    ours = torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm()
    theirs = torch.autograd.grad(others, last.weight, retain_graph=True)[0].norm()
    torch.testing.assert_close(found, theirs / (ours + 1e-4))
    assert not found.requires_grad
    assert float(adaptive_weight(1e9 * others, loss, last.weight)) == 1e4
    (others + found * loss).backward()  # the graph is still there


def test_module_multiplies_by_the_adaptive_weight_of_the_other_losses() -> None:
    sizes = {"width": 32, "groups": 2}
    module = zoo.build("kl-tokenizer-gan", scale="tiny", image_tokenizer=sizes, objective={"adversarial": {"base": 8}})
    batch = {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    module.eval()
    loss, report = module.losses(batch)
    outputs = module.model(batch)
    kl, _ = module.objectives["kl-reconstruction"](module.model, batch, outputs)
    gan = -module.objectives["adversarial"].discriminator(outputs["reconstruction"]).mean()
    factor = adaptive_weight(kl, gan, module.model.image_tokenizer.vae.decoder.conv_out.weight)
    torch.testing.assert_close(report["adversarial/adaptive"], factor)
    torch.testing.assert_close(loss, kl + 0.5 * factor * gan)
    assert float((factor - 1).abs()) > 0.01


# -- runs --------------------------------------------------------------------------------------------------------------

SIZES = [
    "model=kl-tokenizer-gan", "scale=tiny", "image_tokenizer.width=32", "image_tokenizer.groups=2", "batch_size=8",
    "objective.adversarial.base=8", "objective.adversarial.norm=group", "objective.adversarial.lecam=0.05",
    "budget.value=4", "trainer.accelerator=cpu", "trainer.log_every=1", "trainer.checkpoint_every=2",
    "evaluation.tasks={}",
]  # fmt: skip


def prepared(folder: Path, *overrides: str) -> Path:
    folder.mkdir(parents=True)
    run_config([*SIZES, *overrides]).write(folder / "run.yaml")
    return folder


def judged(folder: Path) -> dict[str, Tensor]:
    state = load_checkpoint(folder / "checkpoint")["state_dict"]
    return {k: v for k, v in state.items() if k.startswith("objectives.adversarial.")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepared(tmp_path_factory.mktemp("gan") / "whole")
    run(folder)
    return folder


def test_a_resumed_run_is_bit_equal_in_both_networks(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = prepared(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Interrupted):
            run(stopped)
    kept = load_checkpoint(stopped / "checkpoint")["zoo_own_optimizers"]["adversarial"]
    assert kept["state"][0]["step"] == 2
    halfway = judged(stopped)
    run(stopped)
    assert curve(stopped) == curve(whole)
    assert_equal_weights(stopped, whole)
    ours, theirs = judged(stopped), judged(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert int(ours["objectives.adversarial.steps"]) == 4
    assert not torch.equal(
        halfway["objectives.adversarial.discriminator.0.weight"], ours["objectives.adversarial.discriminator.0.weight"]
    )


def test_saved_weights_and_counts_leave_the_discriminator_out(whole: Path) -> None:
    import json

    module = zoo.from_pretrained(whole / "weights")
    assert not any("discriminator" in name for name, _ in module.model.named_parameters())
    from safetensors import safe_open

    with safe_open(whole / "weights" / "model.safetensors", framework="pt") as file:
        assert not any("discriminator" in key or "objectives" in key for key in file.keys())  # noqa: SIM118
    own = sum(p.numel() for p in module.model.parameters())
    counted = json.loads((whole / "manifest.json").read_text())["parameters"]
    assert counted == {"total": own, "trainable": own}
    line = json.loads((whole / "curve.jsonl").read_text().splitlines()[-1])
    assert {"adversarial/discriminator", "adversarial/real", "adversarial/adaptive"} <= set(line)


def test_nothing_of_it_happens_before_its_start(tmp_path: Path) -> None:
    import json

    folder = prepared(tmp_path / "late", "objective.adversarial.start=3")
    run(folder)
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    for line in lines[:3]:
        assert line["adversarial"] == line["adversarial/discriminator"] == 0
        assert line["loss"] == line["kl-reconstruction"]
    assert lines[3]["adversarial/discriminator"] > 0
    assert lines[3]["adversarial"] != 0
    state = judged(folder)
    assert int(state["objectives.adversarial.steps"]) == 4
    optimizer = load_checkpoint(folder / "checkpoint")["zoo_own_optimizers"]["adversarial"]
    assert optimizer["state"][0]["step"] == 1


def test_added_up_batches_are_one_batch(whole: Path, tmp_path: Path) -> None:
    fixed = [
        "objective.adversarial.adaptive=false",
        "objective.adversarial.lecam=0",
        "objective.kl-reconstruction.kl=0",
    ]
    runs = []
    for name, extra in (("one", []), ("two", ["trainer.accumulate=2"])):
        folder = prepared(tmp_path / name, *fixed, *extra, "image_tokenizer.blocks=1", "budget.value=1")
        run(folder)
        runs.append(folder)
    one, two = (judged(folder) for folder in runs)
    assert int(two["objectives.adversarial.steps"]) == 1
    # the latents' noise differs by micro-batch, so that only the real half and the first layer's direction agree
    for key in one:
        assert one[key].shape == two[key].shape
    name = "objectives.adversarial.discriminator.0.weight"
    initial = zoo.build(
        "kl-tokenizer-gan", scale="tiny", image_tokenizer={"width": 32, "groups": 2},
        objective={"adversarial": {"base": 8, "norm": "group"}},
    ).objectives["adversarial"].discriminator[0].weight  # fmt: skip
    moved, other = one[name] - initial, two[name] - initial
    assert float(moved.abs().max()) > 1e-5
    assert float(torch.nn.functional.cosine_similarity(moved.flatten(), other.flatten(), dim=0)) > 0.9


class Drawer(torch.nn.Module):
    """A model of one layer with the objective inside, as a distributed wrapper sees it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Conv2d(3, 3, 1)
        self.objective = made(norm="group", lecam=0.5, lr=1e-3)

    def forward(self, real: Tensor) -> Tensor:
        loss, _ = self.objective(None, {"pixel_values": real}, {"reconstruction": self.layer(real)})
        return loss


def trained(wrap: Any, rows: slice) -> dict[str, Tensor]:
    drawer = Drawer()
    wrapped, own = wrap(drawer), OwnOptimizers({"adversarial": drawer.objective})
    optimizer = torch.optim.SGD([p for p in drawer.parameters() if p.requires_grad], lr=0.1)
    real = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(real[rows]).backward()
        own.backward(["adversarial"])
        optimizer.step()
        own.step(["adversarial"])
    return {k: v.detach().clone() for k, v in drawer.state_dict().items()}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    wrap = torch.nn.parallel.DistributedDataParallel
    torch.save(trained(wrap, slice(2 * rank, 2 * rank + 2)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_learn_what_one_process_does(tmp_path: Path) -> None:
    alone = trained(lambda module: module, slice(0, 4))
    mp.spawn(one_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    start = Drawer().state_dict()
    for name, value in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], value, atol=2e-5, rtol=1e-4, msg=name)
        assert not torch.equal(value, start[name]), name


def test_flops_count_what_the_discriminator_learns() -> None:
    sizes = {"image_tokenizer": {"width": 32, "groups": 2}}
    plain = count_recipe(zoo.build("kl-tokenizer", scale="tiny", **sizes).recipe)[0]
    fixed = {"adversarial": {"adaptive": False}}
    both = count_recipe(zoo.build("kl-tokenizer-gan", scale="tiny", objective=fixed, **sizes).recipe)[0]
    judge = PatchDiscriminator()
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        judge(torch.zeros(1, 3, 64, 64))
    once = counter.get_total_flops()
    assert both.forward - plain.forward == once
    assert both.backward - plain.backward > 4 * once  # its gradient, and two passes with weight gradients
