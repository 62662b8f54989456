"""Masked data modelling and masked captioning: what is hidden, how often, and what the losses are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo.objectives.masked_captioning import MaskedCaptioningConfig, smoothed_divergence
from zoo.objectives.masked_data import Masked, MaskedData, MaskedDataConfig, block_masks, masked_cross_entropy

Shake = Callable[[nn.Module], nn.Module]


def mean_piece(masks: Tensor, grid: tuple[int, int]) -> float:
    """Mean number of hidden patches that hang together."""
    sizes = []
    for mask in masks:
        left = {divmod(int(p), grid[1]) for p in mask.nonzero()[:, 0]}
        while left:
            stack, size = [left.pop()], 0
            while stack:
                y, x = stack.pop()
                size += 1
                near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
                left -= near
                stack += near
            sizes.append(size)
    return sum(sizes) / len(sizes)


@pytest.mark.parametrize(("grid", "count"), [((14, 14), 78), ((16, 16), 102), ((4, 4), 6), ((3, 5), 15), ((4, 4), 0)])
def test_blocks_hide_exactly_the_requested_count(grid: tuple[int, int], count: int) -> None:
    torch.manual_seed(0)
    masks = block_masks(50, grid, count)
    assert masks.shape == (50, grid[0] * grid[1])
    assert masks.dtype == torch.bool
    assert bool((masks.sum(1) == count).all())


def test_blocks_are_rectangles_and_not_single_patches() -> None:
    torch.manual_seed(0)
    masks = block_masks(100, (14, 14), 78)
    single = torch.rand(100, 196).argsort(1) < 78
    assert mean_piece(masks, (14, 14)) > 4 * mean_piece(single, (14, 14))
    assert bool((masks.float().mean(0) > 0.02).all())  # no corner is spared
    squares = {"blocks": masks, "single": single}
    inside = {}
    for name, drawn in squares.items():
        m = drawn.view(-1, 14, 14)
        square = m[:, 1:, 1:] & m[:, :-1, 1:] & m[:, 1:, :-1] & m[:, :-1, :-1]
        covered = torch.zeros_like(m)
        for dy in (0, 1):
            for dx in (0, 1):
                covered[:, dy : dy + 13, dx : dx + 13] |= square
        inside[name] = float(covered.sum() / m.sum())  # share of the hidden patches within a hidden 2 x 2 square
    assert inside["blocks"] > 0.85
    assert inside["single"] < 0.4


def test_blocks_come_from_the_global_stream() -> None:
    torch.manual_seed(3)
    first = block_masks(4, (14, 14), 78)
    torch.manual_seed(3)
    assert torch.equal(block_masks(4, (14, 14), 78), first)
    assert not torch.equal(block_masks(4, (14, 14), 78), first)


def test_more_patches_than_there_are_cannot_be_hidden() -> None:
    with pytest.raises(ValueError, match="17 of 16"):
        block_masks(1, (4, 4), 17)


@pytest.fixture(scope="module")
def module() -> Any:
    made = zoo.build("beit3", scale="tiny", image_tokenizer={"vocab_size": 30}, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.add_((0.2 if p.ndim < 2 else 0.05) * noise)
    return made.eval()


def batch_of(count: int = 6, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(10, 1000, (count, length), generator=generator)
    mask = torch.arange(length) < torch.randint(5, length + 1, (count, 1), generator=generator)
    ids[:, 0] = 1
    ids = ids.scatter(1, mask.sum(1, keepdim=True) - 1, 2).masked_fill(~mask, 0)
    pixels = torch.randn(count, 3, 64, 64, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}


def test_rates_are_those_of_the_paper(module: Any) -> None:
    config = MaskedDataConfig(share=1.0)
    assert (config.image_rate, config.text_rate) == (0.4, 0.15)
    assert (config.pair_image_rate, config.pair_text_rate) == (0.4, 0.5)
    torch.manual_seed(0)
    batch = batch_of(1000, 40)
    special = (batch["input_ids"] <= 2) | ~batch["attention_mask"]
    drawn = config.build().draw(module.model, batch)
    words = int((~special).sum())
    for stream, rate in (("text", 0.15), ("pair", 0.5)):
        labels = drawn[stream].labels
        assert labels is not None
        chosen = labels != -100
        assert not bool((chosen & special).any())
        assert float(chosen.sum()) / words == pytest.approx(rate, abs=0.01)
        ids = drawn[stream].ids
        assert ids is not None
        assert torch.equal(ids[~chosen], batch["input_ids"][~chosen])
        assert torch.equal(labels[chosen], batch["input_ids"][chosen])
        masked = (ids[chosen] == module.model.special_ids["mask"]).float().mean()
        kept = (ids[chosen] == labels[chosen]).float().mean()
        assert float(masked) == pytest.approx(0.8, abs=0.02)
        assert float(kept) == pytest.approx(0.1, abs=0.02)
    for stream in ("image", "pair"):
        hidden = drawn[stream].hidden
        assert hidden is not None
        assert bool((hidden.sum(1) == int(0.4 * 16)).all())
    assert drawn["image"].ids is None
    assert drawn["text"].hidden is None
    other = MaskedDataConfig(share=1.0, text_rate=0.1).build().draw(module.model, batch)["text"].labels
    assert other is not None
    assert float((other != -100).sum()) / words == pytest.approx(0.1, abs=0.01)


def test_a_third_sends_every_sample_through_one_stream(module: Any) -> None:
    drawn = MaskedDataConfig().build().draw(module.model, batch_of(6))
    rows = torch.cat([m.rows for m in drawn.values()])
    assert [len(m.rows) for m in drawn.values()] == [2, 2, 2]
    assert sorted(rows.tolist()) == list(range(6))


def literal(model: Any, batch: dict[str, Tensor], codes: Tensor, drawn: dict[str, Masked]) -> dict[str, Tensor]:
    """The losses position by position."""
    out: dict[str, Tensor] = {}
    for name, masked in drawn.items():
        values: dict[str, list[Tensor]] = {"code": [], "word": []}
        for n, row in enumerate(masked.rows.tolist()):
            pixels, mask = batch["pixel_values"][row][None], batch["attention_mask"][row][None]
            ids = None if masked.ids is None else masked.ids[n][None]
            hidden = None if masked.hidden is None else masked.hidden[n][None]
            image = None if hidden is None else model.trunk.embed_image(pixels, hidden)
            text = None if ids is None else model.trunk.embed_text(ids)
            read = model.trunk(image, text, None if text is None else mask)
            if hidden is not None:
                for place in hidden[0].nonzero()[:, 0].tolist():
                    logits = model.codes(read.image[0, 1 + place])
                    values["code"].append(F.cross_entropy(logits, codes[row, place]))
            if masked.labels is not None:
                for place in (masked.labels[n] != -100).nonzero()[:, 0].tolist():
                    logits = model.words(read.text[0, place])
                    values["word"].append(F.cross_entropy(logits, masked.labels[n, place]))
        out[name] = sum((torch.stack(v).mean() for v in values.values() if v), torch.zeros(()))
    return out


@torch.no_grad()
def test_loss_is_the_mean_over_what_is_hidden_and_nothing_else(module: Any) -> None:
    model, batch = module.model, batch_of()
    objective = MaskedDataConfig(share=1.0, weights={"pair": 0.5}).build()
    torch.manual_seed(2)
    drawn = objective.draw(model, batch)
    codes = model(batch)["image_codes"]
    loss, report = objective.loss(model, batch, codes, drawn)
    expected = literal(model, batch, codes, drawn)
    for name, value in expected.items():
        torch.testing.assert_close(report[name], value, atol=1e-5, rtol=1e-5)
    total = expected["image"] + expected["text"] + 0.5 * expected["pair"]
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)
    seen = ~(drawn["image"].hidden | drawn["pair"].hidden)  # type: ignore[operator]
    other = torch.where(seen, (codes + 1) % 30, codes)  # targets of patches that nobody hid do not matter
    assert torch.equal(objective.loss(model, batch, other, drawn)[0], loss)


def test_targets_are_codes_without_gradient(module: Any) -> None:
    batch = batch_of()
    codes = module.model(batch)["image_codes"]
    assert codes.dtype == torch.int64
    assert codes.shape == (6, 16)
    assert 0 <= int(codes.min()) <= int(codes.max()) < 30
    assert torch.equal(codes, module.model(batch)["image_codes"])
    module.set_stage(1)
    module.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss, _ = module.losses(batch)
    loss.backward()
    assert all(p.grad is None for p in module.model.image_tokenizer.parameters())
    assert module.model.codes.weight.grad is not None
    module.eval()


def test_predictor_of_the_published_size_has_8192_classes() -> None:
    with torch.device("meta"):
        model = zoo.build("beit3").model
    assert model.codes.out_features == 8192
    assert model.image_tokenizer.codes == 8192
    assert model.words.decoder.out_features == 64010


def test_one_loss_and_no_contrast_in_pre_training(module: Any) -> None:
    stages = {s.name: s for s in module.recipe.stages}
    assert stages["pretrain"].objectives == ["masked-data"]
    assert {type(o) for n, o in module.objectives.items() if n in stages["pretrain"].objectives} == {MaskedData}
    assert MaskedData.needs == {"image_codes"}
    logits = torch.randn(5, 7)
    for targets in (torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 0, 6, 6, 6])):
        value, right = masked_cross_entropy(logits, targets)
        torch.testing.assert_close(value, F.cross_entropy(logits, targets))
        assert torch.equal(right, (logits.argmax(1) == targets).float())


def test_nothing_hidden_is_a_zero_with_a_graph(module: Any) -> None:
    module.model.requires_grad_(True)  # the module is shared, and a stage may have frozen it
    batch = batch_of(3)
    ids = batch["input_ids"]
    drawn = {"text": Masked(torch.arange(3), ids=ids, labels=torch.full_like(ids, -100))}
    loss, _ = MaskedDataConfig().build().loss(module.model, batch, torch.zeros(3, 16, dtype=torch.long), drawn)
    assert loss.item() == 0
    assert loss.requires_grad


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"streams": ["video"]}, "one of image, text, pair"),
        ({"streams": []}, "at least one"),
        ({"streams": ["image", "image"]}, "each once"),
        ({"text_rate": 0.0}, "between 0 and 1"),
        ({"share": 1.5}, "share"),
        ({"weights": {"images": 1.0}}, "images"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedDataConfig(**fields)


# -- captions ----------------------------------------------------------------------------------------------------------


def test_captions_mask_a_fixed_share_of_each_row_and_the_end_too(module: Any) -> None:
    batch = batch_of(400, 12)
    torch.manual_seed(0)
    ids, labels = MaskedCaptioningConfig().build().draw(module.model, batch)
    chosen, length = labels != -100, batch["attention_mask"].sum(1)
    wanted = torch.minimum((0.7 * length + 0.5).long(), length - 1)
    assert torch.equal(chosen.sum(1), wanted)
    assert not bool(chosen[:, 0].any())
    assert not bool((chosen & ~batch["attention_mask"]).any())
    ends = batch["input_ids"] == 2
    assert 0.5 < float(chosen[ends].float().mean()) < 0.95
    assert float((ids[chosen] == module.model.special_ids["mask"]).float().mean()) == pytest.approx(0.8, abs=0.03)


def test_smoothed_divergence_is_a_cross_entropy_less_a_constant() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(9, 6), torch.randint(6, (9,))
    smooth = torch.full((9, 6), 0.1 / 5).scatter(1, targets[:, None], 0.9)
    expected = F.kl_div(logits.log_softmax(-1), smooth, reduction="none").sum(1)
    torch.testing.assert_close(smoothed_divergence(logits, targets, 0.1), expected.mean())
    kept = expected.sort().values[: int(9 * 0.8)]
    torch.testing.assert_close(smoothed_divergence(logits, targets, 0.1, 0.2), kept.mean())
    torch.testing.assert_close(smoothed_divergence(logits, targets, 0.0), F.cross_entropy(logits, targets))


def test_caption_loss_trains_through_causal_text(module: Any) -> None:
    batch = batch_of(4)
    ids = batch["input_ids"].clone()
    labels = torch.full_like(ids, -100)
    labels[:, 2] = ids[:, 2]
    objective = MaskedCaptioningConfig(label_smoothing=0.0).build()

    def loss_of(ids: Tensor, pixels: Tensor) -> Tensor:
        rows = {**batch, "pixel_values": pixels, "masked_ids": ids, "masked_labels": labels}
        with torch.no_grad():
            return objective(module.model, rows, module.model(rows))[0]

    base = loss_of(ids, batch["pixel_values"])
    later, earlier = ids.clone(), ids.clone()
    later[:, 3], earlier[:, 1] = 77, 77
    assert torch.equal(loss_of(later, batch["pixel_values"]), base)
    assert not torch.equal(loss_of(earlier, batch["pixel_values"]), base)
    assert not torch.equal(loss_of(ids, -batch["pixel_values"]), base)
