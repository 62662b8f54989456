"""The momentum copy, its queue and soft targets, as ALBEF's card states them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.errors import ConfigError
from zoo.module import ZooModule
from zoo.objectives.masked_lm import mask_words
from zoo.objectives.momentum import MomentumContrastive, MomentumContrastiveConfig
from zoo.run_config import RunConfig

SMALL = {"encoder.width": 32, "encoder.ffn": 64, "encoder.depth": 2, "text_encoder.width": 32, "text_encoder.ffn": 64}
QUEUE = "objective.momentum-contrastive.queue_size"


def made(**options: Any) -> ZooModule:
    module = zoo.build("albef", scale="tiny", options={**SMALL, QUEUE: 12, **options})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if name != "temperature":
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.3 if parameter.ndim < 2 else 0.1) * noise)
    return module.train()


def batch_of(rows: int = 4, seed: int = 0, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 1000, (rows, length), generator=generator)
    ids[:, 0] = 1
    mask = torch.arange(length) < torch.randint(3, length + 1, (rows, 1), generator=generator)
    pixels = torch.randn(rows, 3, 64, 64, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids.where(mask, 0), "attention_mask": mask}


def contrast_of(module: ZooModule) -> MomentumContrastive:
    objective = module.objectives["momentum-contrastive"]
    assert isinstance(objective, MomentumContrastive)
    return objective


# -- the moving average ------------------------------------------------------------------------------------------------


def test_copies_start_equal_and_then_follow_slowly() -> None:
    module = zoo.build("albef", scale="tiny", options={**SMALL, QUEUE: 12, "stages": "joint"}).train()
    momentum = module.momentum
    assert momentum is not None
    online = dict(module.model.named_parameters())
    copies = dict(momentum.teacher.named_parameters())
    assert set(online) - set(copies) == {"temperature", "matching_head.weight", "matching_head.bias"}
    assert all(torch.equal(p, online[n]) and p.data_ptr() != online[n].data_ptr() for n, p in copies.items())
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.5)
    module.losses(batch_of())[0].backward()
    optimizer.step()
    optimizer.zero_grad()
    old = {n: p.clone() for n, p in copies.items()}
    module.losses(batch_of(seed=1))[0].backward()
    moved = 0
    for name, parameter in copies.items():
        assert parameter.grad is None
        assert not parameter.requires_grad
        torch.testing.assert_close(parameter, 0.995 * old[name] + 0.005 * online[name].detach())
        moved += not torch.equal(parameter, online[name])
    assert moved > len(copies) // 2


def test_copies_are_outside_the_optimizer_and_inside_the_checkpoint() -> None:
    module = made()
    module.steps = 10
    held = {id(p) for group in module.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    assert module.momentum is not None
    assert not held & {id(p) for p in module.momentum.teacher.parameters()}
    assert held == {id(p) for p in module.model.parameters()}
    module.losses(batch_of())
    other = made()
    other.load_state_dict(module.state_dict())
    torch.manual_seed(5)
    one = module.losses(batch_of(seed=2))[0]
    torch.manual_seed(5)
    assert torch.equal(one, other.losses(batch_of(seed=2))[0])  # a resumed run goes on exactly
    assert not any(name.startswith("momentum") for name in module.model.state_dict())


def test_momentum_features_are_computed_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    module = made()
    assert module.momentum is not None
    calls = []
    encode = module.momentum.teacher.encode
    monkeypatch.setattr(module.momentum.teacher, "encode", lambda batch: calls.append(1) or encode(batch))
    module.losses(batch_of())
    assert len(calls) == 1
    module.losses(batch_of())
    assert len(calls) == 2


def test_objectives_that_disagree_on_the_decay_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"0\.9 and 0\.995"):
        made(**{"objective.masked-lm.momentum": 0.9})


def test_nothing_is_copied_where_nobody_distils() -> None:
    module = zoo.build("albef", scale="tiny", objective=["contrastive", "matching"], options=SMALL)
    assert module.momentum is None
    loss, report = module.losses(batch_of())
    assert bool(torch.isfinite(loss))
    assert "matching/accuracy" in report


# -- the queue ---------------------------------------------------------------------------------------------------------


def test_queue_is_a_ring_of_momentum_features() -> None:
    module = made()
    contrast = contrast_of(module)
    ones = torch.ones(12)
    torch.testing.assert_close(contrast.image_queue.norm(dim=1), ones)
    torch.testing.assert_close(contrast.text_queue.norm(dim=1), ones)
    for step in range(4):
        batch = batch_of(seed=step)
        before = contrast.text_queue.clone()
        module.losses(batch)
        assert module.momentum is not None
        with torch.no_grad():
            keys = module.momentum.teacher.encode(batch)
        rows = [(4 * step + i) % 12 for i in range(4)]
        torch.testing.assert_close(contrast.image_queue[rows], keys["image_embeds"])
        torch.testing.assert_close(contrast.text_queue[rows], keys["text_embeds"])
        rest = [i for i in range(12) if i not in rows]
        assert torch.equal(contrast.text_queue[rest], before[rest])
        assert int(contrast.pointer) == 4 * (step + 1) % 12
    torch.testing.assert_close(contrast.image_queue.norm(dim=1), ones)


def test_evaluation_changes_no_state() -> None:
    module = made().eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.losses(batch_of())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_queue_that_the_batch_does_not_divide_is_one_line() -> None:
    recipe = made().recipe
    with pytest.raises(ConfigError, match="queue_size = 12 is not divisible by the batch of 5") as error:
        RunConfig(recipe=recipe, data={"name": "openmoji"}, batch_size=5)
    assert "\n" not in str(error.value)
    assert RunConfig(recipe=recipe, data={"name": "openmoji"}, batch_size=4).batch_size == 4
    with pytest.raises(ConfigError, match="not divisible by the batch of 5"):
        made().losses(batch_of(5))


# -- the loss ----------------------------------------------------------------------------------------------------------


def contrasted(alpha: float, module: ZooModule, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The objective's loss, and by the formula: the logits' hard and soft cross-entropies."""
    contrast = contrast_of(module)
    contrast.config = MomentumContrastiveConfig(queue_size=12, alpha=alpha, ramp=0)
    outputs = module.model(batch)
    loss, _ = contrast(module.model, batch, outputs)
    assert module.momentum is not None
    slow = module.momentum.teacher.encode(batch)
    temperature = module.model.temperature
    hard, soft = [], []
    for mine, own, keys, queue in (
        ("image_embeds", "image_embeds", "text_embeds", contrast.text_queue),
        ("text_embeds", "text_embeds", "image_embeds", contrast.image_queue),
    ):
        every = torch.cat([slow[keys], queue])
        logits = outputs[mine] @ every.T / temperature
        assert logits.shape == (4, 4 + 12)
        hard.append(F.cross_entropy(logits, torch.arange(4)))
        soft.append(F.cross_entropy(logits, (slow[own] @ every.T / temperature).softmax(-1).detach()))
    return loss, sum(hard) / 2, sum(soft) / 2  # type: ignore[return-value]


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_loss_is_the_blend_of_hard_and_soft_targets(alpha: float) -> None:
    loss, hard, soft = contrasted(alpha, made(), batch_of())
    torch.testing.assert_close(loss, (1 - alpha) * hard + alpha * soft)
    assert abs(float(hard - soft)) > 1e-2


def test_image_ids_spread_the_hard_target() -> None:
    module, batch = made(), {**batch_of(), "image_ids": torch.tensor([7, 3, 7, 9])}
    contrast = contrast_of(module)
    contrast.id_queue[:3] = torch.tensor([9, 3, 5])
    contrast(module.model, batch, module.model(batch))
    hard = contrast._targets(4, 16, 0, batch["image_ids"])
    torch.testing.assert_close(hard.sum(1), torch.ones(4))
    assert hard[0].nonzero()[:, 0].tolist() == [0, 2]
    assert hard[3].nonzero()[:, 0].tolist() == [3, 4]
    assert float(hard[3, 4]) == 0.5


def test_gradient_reaches_the_online_features_and_the_temperature_alone() -> None:
    module = made()
    loss, _, _ = contrasted(0.4, module, batch_of())
    loss.backward()
    assert float(module.model.temperature.grad.abs()) > 1e-3
    assert float(module.model.image_projection.weight.grad.abs().max()) > 0
    assert module.momentum is not None
    assert all(p.grad is None for p in module.momentum.teacher.parameters())


def test_temperature_divides_and_is_clamped() -> None:
    module = made()
    model = module.model
    torch.testing.assert_close(model.logit_scale.exp(), 1 / model.temperature)
    for start, kept in ((0.9, 0.5), (1e-5, 0.001), (0.2, 0.2)):
        model.temperature.data.fill_(start)
        module.losses(batch_of())
        assert float(model.temperature) == pytest.approx(kept)


def test_alpha_is_ramped() -> None:
    momentum = made().momentum
    assert momentum is not None
    config = MomentumContrastiveConfig(alpha=0.4, ramp=0.5)
    momentum.steps = 200
    for step, wanted in ((0, 0.0), (50, 0.2), (100, 0.4), (150, 0.4)):
        momentum.step.fill_(step)
        assert float(momentum.share(config)) == pytest.approx(wanted)
    momentum.step.fill_(5)
    assert float(momentum.share(MomentumContrastiveConfig(ramp=10))) == pytest.approx(0.2)
    assert float(momentum.share(MomentumContrastiveConfig(ramp=0))) == pytest.approx(0.4)


def test_alpha_counts_training_steps() -> None:
    module = made(**{"objective.momentum-contrastive.ramp": 4})
    seen = [float(module.losses(batch_of())[1]["momentum-contrastive/alpha"]) for _ in range(6)]
    assert seen == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])


# -- matching ----------------------------------------------------------------------------------------------------------


def test_matching_reads_three_times_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = made(), batch_of()
    seen: list[Tensor] = []
    judge = module.model.matching_logits
    monkeypatch.setattr(module.model, "matching_logits", lambda fused: seen.append(judge(fused)) or seen[-1])
    loss, _ = module.objectives["matching"](module.model, batch, module.model(batch))
    assert seen[0].shape == (12, 2)
    torch.testing.assert_close(loss, F.cross_entropy(seen[0], torch.tensor([1] * 4 + [0] * 8)))


def test_negatives_are_drawn_by_similarity_and_never_the_own_pair() -> None:
    module, batch = made(), batch_of(6)
    matching = module.objectives["matching"]
    with torch.no_grad():
        outputs = module.model(batch)
        images, texts = matching.weights(batch, outputs)
    for weights in (images, texts):
        assert torch.equal(weights.diagonal(), torch.zeros(6))
        assert bool((weights + torch.eye(6) > 0).all())  # every other has a chance
    torch.manual_seed(0)
    drawn = torch.stack([torch.stack(matching._negatives(batch, outputs)[:2]) for _ in range(3000)])  # [3000, 2, 6]
    for side, weights in enumerate((images, texts)):
        for row in range(6):
            counts = torch.bincount(drawn[:, side, row], minlength=6)
            assert int(counts[row]) == 0
            others = [i for i in range(6) if i != row]
            expected = (weights[row, others] / weights[row].sum()).double() * 3000
            observed = counts[others].double()
            rare = expected < 5
            cells = [(float(o), float(e)) for o, e in zip(observed[~rare], expected[~rare], strict=True)]
            if float(expected[rare].sum()) > 1:
                cells.append((float(observed[rare].sum()), float(expected[rare].sum())))
            distance = sum((o - e) ** 2 / e for o, e in cells)
            assert distance < 35  # chi-square with at most 4 degrees of freedom: p < 1e-6
            assert observed.max() < 3000 or float(expected.max()) > 2990  # drawn, not always the most similar


def test_pairs_of_one_image_are_no_negatives() -> None:
    module, batch = made(), {**batch_of(), "image_ids": torch.tensor([7, 3, 7, 9])}
    with torch.no_grad():
        weights = module.objectives["matching"].weights(batch, module.model(batch))
    for side in weights:
        assert float(side[0, 2]) == float(side[2, 0]) == 0
        assert float(side[0, 1]) > 0
    alone = {**batch, "image_ids": torch.full((4,), 5)}  # nothing to draw: only the positives count
    loss, report = module.objectives["matching"](module.model, alone, module.model(alone))
    assert bool(torch.isfinite(loss))
    assert float(report["accuracy"]) in (0.0, 0.25, 0.5, 0.75, 1.0)


def test_matching_needs_two_pairs() -> None:
    module = made()
    with pytest.raises(ConfigError, match="a batch of 1 has none"):
        module.objectives["matching"](module.model, batch_of(1), module.model(batch_of(1)))


# -- masked words ------------------------------------------------------------------------------------------------------


def test_masking_chooses_words_alone_and_splits_80_10_10() -> None:
    torch.manual_seed(0)
    ids = torch.randint(5, 900, (2000, 12))
    ids[:, 0], ids[:, 9:] = 1, 0
    words = (ids != 1) & (ids != 0)
    masked, labels = mask_words(ids, words, mask_id=3, vocab_size=1000, probability=0.15)
    chosen = labels != -100
    assert not bool((chosen & ~words).any())
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert float(chosen.sum() / words.sum()) == pytest.approx(0.15, abs=0.01)
    shares = [(masked[chosen] == 3), (masked[chosen] == ids[chosen])]
    assert float(shares[0].float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float(shares[1].float().mean()) == pytest.approx(0.1, abs=0.03)


def test_masked_words_see_the_image() -> None:
    module, batch = made(), batch_of()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 1] = batch["input_ids"][:, 1]
    batch |= {"masked_ids": batch["input_ids"].clone().index_fill(1, torch.tensor([1]), 3), "masked_labels": labels}
    blank = {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}
    objective = module.objectives["masked-lm"]
    one, two = (objective(module.model, b, module.model(b))[0] for b in (batch, blank))
    assert abs(float(one - two)) > 1e-3


def test_masked_loss_is_the_blend_at_the_masked_places() -> None:
    module, batch = made(**{"objective.masked-lm.ramp": 0}), batch_of()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:3, 1] = batch["input_ids"][:3, 1]
    batch |= {"masked_ids": batch["input_ids"].clone(), "masked_labels": labels}
    outputs = module.model(batch)
    loss, report = module.objectives["masked-lm"](module.model, batch, outputs)
    assert module.momentum is not None
    from zoo.part import Features

    logits = []
    for model, seen in ((module.model, outputs), (module.momentum.teacher, module.momentum.teacher.encode(batch))):
        fused = model.fuse(Features(seen["image_tokens"]), batch["masked_ids"], batch["attention_mask"]).tokens
        logits.append(model.word_logits(fused[:3, 1]))
    hard, soft = F.cross_entropy(logits[0], labels[:3, 1]), F.cross_entropy(logits[0], logits[1].softmax(-1))
    torch.testing.assert_close(loss, 0.6 * hard + 0.4 * soft)
    assert int(report["words"]) == 3


def test_wiring_shows_the_copy_as_what_it_is() -> None:
    from zoo.compare.wiring import part_rows

    rows = {row.path: row for row in part_rows(made())}
    assert rows["momentum"].state == "frozen"
    assert rows["momentum"].parameters == sum(rows[p].parameters for p in rows if p not in _OWN)
    assert rows["other"].parameters == 1  # the temperature


_OWN = ("momentum", "matching_head", "other")
