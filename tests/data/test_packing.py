"""Packed rows are the rows: every token's numbers, every loss and every gradient, whatever shares its sequence."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from torch import Tensor

import zoo
from zoo.data.loader import loader
from zoo.data.order import SampleOrder
from zoo.data.packing import Fill, check_packing, first_fit, pack, packing_line
from zoo.data.sample import Sample
from zoo.data.sequences import IGNORE, restarted
from zoo.errors import ConfigError, DataError
from zoo.testing.config import shake

NAMES = ("show-o", "show-o-clip-vit", "chameleon", "transfusion", "llava", "blip2-opt")
WORDS = ["a", "red", "apple", "beside", "two", "green", "pears", "and", "a", "blue", "cup", "under", "a", "table"]


def picture(seed: int) -> Picture.Image:
    return Picture.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8))


class Mixed:
    """Pairs, texts alone, dialogues and, where two images fit a row, texts and images in turn."""

    name, version, licence, max_bad = "mixed", "1", "none", 0

    def __init__(self, several: bool) -> None:
        self.several = several

    def ids(self, split: str) -> list[str]:
        return [f"{split}{n}" for n in range(23)]

    def sample(self, id: str) -> Sample:
        n = int(id.removeprefix("train"))
        text = " ".join(WORDS[: 1 + n * 5 % 13])
        if n % 5 == 1:
            return Sample(id, None, (text,))
        if n % 5 == 2:
            return Sample(id, picture(n), (text,), {"turns": (("what is it?", text), ("and now?", "yes"))})
        if n % 5 == 3 and self.several:
            return Sample(
                id,
                picture(n),
                (text,),
                {"images": (picture(n), picture(n + 99)), "parts": (text, 0, "then", 1), "given": 1},
            )
        return Sample(id, picture(n), (text,))


def made(name: str) -> Any:
    """The published recipe at its smallest, with weights that matter."""
    module = zoo.build(name, scale="tiny", seed=1)
    module.set_stage(len(module.recipe.stages) - 1)
    shake(module.model)
    return module


def fits_two(model: Any) -> bool:
    if not hasattr(model, "style"):
        return True
    return not model.style.padded_prompt and model.row_length >= 2 * (model.places + 2) + 40


def batches(module: Any, count: int, length: int, **more: Any) -> list[dict[str, Tensor]]:
    source = Mixed(fits_two(module.model))
    order = SampleOrder(source.ids("train"), seed=3)
    steps = loader(source, module.model.processor, order, 8, pack=length, **more)
    return list(itertools.islice(iter(steps), count))


def grads(module: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_that_of_the_rows(name: str) -> None:
    module = made(name)
    module.train()
    length = 2 * module.model.row_length
    check_packing(module.model, length)
    for plain, packed in zip(batches(module, 2, 0)[1:], batches(module, 2, length)[1:], strict=True):
        results = []
        for batch in (plain, packed):
            module.zero_grad()
            torch.manual_seed(7)  # what is drawn at random for images is drawn alike
            outputs = module.model(batch)
            torch.manual_seed(7)
            loss, report = module.losses(batch)
            loss.backward()
            results.append((outputs, loss.detach(), report, grads(module)))
        (rows, loss, report, own), (sequences, again, packed_report, theirs) = results
        document = packed["document"]
        assert len(document) < len(plain["input_ids"])
        wide = packed["input_ids"].shape[1]
        assert wide == length
        for row in range(8):
            real = plain["attention_mask"][row]
            here = document == row
            torch.testing.assert_close(
                module.model.decoder.logits(sequences["hidden"][here]),
                module.model.decoder.logits(rows["hidden"][row][real]),
                atol=1e-5, rtol=1e-5,
            )  # fmt: skip
            assert torch.equal(sequences["targets"][here], rows["targets"][row][real])
        assert bool((sequences["targets"][document < 0] == IGNORE).all())
        torch.testing.assert_close(again, loss, atol=1e-5, rtol=1e-5)
        assert report.keys() == packed_report.keys()
        torch.testing.assert_close(packed_report, report, atol=1e-5, rtol=1e-5)
        assert own.keys() == theirs.keys()
        assert len(own) > 10
        torch.testing.assert_close(theirs, own, atol=1e-5, rtol=1e-4)


def test_batches_are_the_same_for_every_reader_and_resume() -> None:
    module = made("transfusion")
    length = 2 * module.model.row_length
    whole = batches(module, 4, length)
    for other, same in (
        (batches(module, 4, length, workers=2), whole),
        (batches(module, 2, length, start_step=2), whole[2:]),
    ):
        torch.testing.assert_close(other, same, atol=0, rtol=0)
    halves = [batches(module, 4, length, rank=rank, world_size=2) for rank in range(2)]
    plain = batches(module, 4, 0)
    for step, rows in enumerate(plain):  # each rank packs its own share, and nothing is lost or read twice
        texts = [row[real].tolist() for row, real in zip(rows["input_ids"], rows["attention_mask"], strict=True)]
        found = [half[step]["input_ids"][half[step]["document"] == row].tolist() for half in halves for row in range(4)]
        assert found == texts


def test_a_sequence_is_counted_from_its_documents() -> None:
    document = torch.tensor([[2, 2, 2, 0, -1, -1], [1, 3, 3, 3, 3, 3]])
    assert restarted(document).tolist() == [[0, 1, 2, 0, 0, 0], [0, 0, 1, 2, 3, 4]]
    real = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    ids = torch.arange(12).view(3, 4)
    batch = {
        "input_ids": ids, "attention_mask": real, "labels": ids, "segment": torch.where(real, 0, -1),
        "image_slots": torch.tensor([[0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1]]).bool(), "task": torch.zeros(3).long(),
    }  # fmt: skip
    packed = pack(batch, 6)
    assert packed["input_ids"].tolist() == [[4, 5, 6, 7, 1, 2], [10, 11, 0, 0, 0, 0]]
    assert packed["document"].tolist() == [[1, 1, 1, 1, 0, 0], [2, 2, -1, -1, -1, -1]]
    assert packed["labels"].tolist() == [[-100, 5, 6, 7, -100, 2], [-100, 11, -100, -100, -100, -100]]
    assert packed["segment"].tolist() == [[0] * 6, [0, 0, -1, -1, -1, -1]]
    assert packed["image_order"].tolist() == [1, 2, 0, 3]
    fill = Fill(6)
    fill.add(packed)
    assert fill.to_plain() == {
        "length": 6, "rows": 3, "sequences": 2, "tokens": 8, "fill": round(8 / 12, 4), "padded_fill": round(8 / 12, 4)
    }  # fmt: skip
    assert "3 rows in 2 sequences of 6; 66.7% of the positions are tokens" in packing_line(fill.to_plain())


@pytest.mark.parametrize("count", [0, 1, 2, 7, 40, 200])
def test_first_fit_places_every_row_once_and_wastes_less_than_half(count: int) -> None:
    lengths = np.random.default_rng(count).integers(1, 21, count).tolist()
    sequences = first_fit(lengths, 20)
    assert sorted(row for rows in sequences for row in rows) == list(range(len(lengths)))
    used = [sum(lengths[row] for row in rows) for rows in sequences]
    assert all(0 < size <= 20 for size in used)
    assert sum(size <= 10 for size in used) <= 1  # two half-empty sequences would have been one


def test_what_cannot_be_packed_is_refused_in_one_line() -> None:
    module = made("transfusion")
    longest = module.model.row_length
    with pytest.raises(ConfigError, match=rf"trainer.pack = {longest - 1} is shorter than a row may be, {longest}"):
        check_packing(module.model, longest - 1)
    with pytest.raises(ConfigError, match=r"Linear reads no packed rows.*set trainer.pack=0"):
        check_packing(torch.nn.Linear(1, 1), 64)
    for name in ("instructblip-vicuna-7b", "cogvlm-base-224"):  # the connector reads the text; rows laid out otherwise
        with pytest.raises(ConfigError, match="reads no packed rows"):
            check_packing(made(name).model, 1024)
    with pytest.raises(DataError, match=r"sample 'train\d+' has \d+ tokens, and trainer.pack = 9 holds no more"):
        batches(module, 1, 9)
