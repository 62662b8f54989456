"""Rows, numbered pieces and masks of the three styles, against the goldens and by their rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.sequences import (
    CODE,
    IGNORE,
    TASKS,
    Image,
    Text,
    Words,
    collate,
    layout_of,
    next_targets,
    segments_of,
    style,
    write_row,
)
from zoo.data.vocabulary import Vocabulary
from zoo.errors import ConfigError, DataError

PAD = 40


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("show_o")


SHOW_O = style("show-o")
JOINT = SHOW_O.vocabulary(40, 32)
WORDS = Words(bos=39, eos=39, pad=PAD)


def texts(rows: Tensor) -> list[tuple[int, ...]]:
    return [tuple(i for i in row if i >= 0) for row in rows.tolist()]


def test_the_vocabulary_is_the_released_one(g: Any) -> None:
    c = g.config
    assert JOINT.size == c["vocab_size"]
    assert JOINT.first_code == c["image_token_offset"]
    assert JOINT.mask_id == c["mask_token_id"]
    for name in SHOW_O.specials:
        assert JOINT.id(name) == c["special_ids"][name]
    phi = SHOW_O.vocabulary(50295, 8192)
    assert (phi.size, phi.first_code, phi.mask_id, phi.id("soi")) == (58498, 50305, 58497, 50296)


def test_a_vocabulary_whose_codes_lie_inside_the_text() -> None:
    published = Vocabulary(
        text=65536, specials=("boi", "eoi"), codes=8192, places={"boi": 8197, "eoi": 8196}, code_place=4
    )
    assert published.size == 65536
    assert published.code_ids == slice(4, 8196)
    assert (published.id("boi"), published.slot_id) == (8197, 65536)
    with pytest.raises(ConfigError, match="no mask id"):
        _ = published.mask_id
    with pytest.raises(ConfigError, match=r"no special token 'bo'.*boi"):
        published.id("bo")
    with pytest.raises(ConfigError, match="do not lie inside"):
        Vocabulary(text=1024, specials=("boi",), codes=16, places={"boi": 8197})


def mixed_rows(g: Any) -> dict[str, Tensor]:
    n, most = g.config["num_vq_tokens"], g.config["max_seq_length"]
    length = most + 1 + n + 2
    dropped = g.inputs["t2i_dropout_u"] < g.config["cond_dropout_prob"]
    rows = [
        write_row(SHOW_O, JOINT, WORDS, "t2i", [Text(() if drop else ids), Image(n)], length=length, text_length=most)
        for ids, drop in zip(texts(g.inputs["t2i_text"]), dropped.tolist(), strict=True)
    ]
    rows += [write_row(SHOW_O, JOINT, WORDS, "lm", [Text(ids)], length=length) for ids in texts(g.inputs["lm_text"])]
    rows += [
        write_row(SHOW_O, JOINT, WORDS, "mmu", [Image(n), Text(ids)], length=length, text_length=most)
        for ids in texts(g.inputs["mmu_text"])
    ]
    return collate(rows, SHOW_O, JOINT, PAD)


def test_rows_of_the_mixed_batch_are_the_released_ones(g: Any) -> None:
    batch, expected, labels = mixed_rows(g), g.outputs["ids"], g.outputs["labels"]
    slots = batch["image_slots"]
    assert torch.equal(batch["input_ids"][~slots], expected[~slots])
    assert bool((expected[slots] >= JOINT.first_code).all())
    assert [TASKS[i] for i in batch["task"].tolist()] == ["t2i"] * 4 + ["lm"] * 2 + ["mmu"] * 2
    first = g.config["max_seq_length"] + 1
    # of t2i rows only the image is trained, in its own place; elsewhere the labels are the released ones
    assert bool((batch["labels"][:4, :first] == IGNORE).all())
    assert bool((batch["labels"][:4][slots[:4]] == CODE).all())
    kept = ~slots[:4, first:]
    assert torch.equal(batch["labels"][:4, first:][kept], labels[:4, first:][kept])
    assert torch.equal(batch["labels"][4:], labels[4:])


@pytest.mark.parametrize("name", ["mixed", "gen", "gen_nocfg", "inpaint"])
def test_masks_of_t2i_lm_and_mmu(g: Any, name: str) -> None:
    if name == "mixed":
        ids, expected = g.outputs["ids"], g.outputs["mask"]
        segment = mixed_rows(g)["segment"]
        assert torch.equal(segment, segments_of(ids, ids != PAD, SHOW_O, JOINT))  # codes in the slots change nothing
    else:
        rows = [g.inputs[f"{name}_cond_ids"]] + ([g.inputs[f"{name}_uncond_ids"]] if name != "gen_nocfg" else [])
        ids, expected = torch.cat(rows), g.outputs[f"{name}_prompt_mask"]
        segment = segments_of(ids, ids != PAD, SHOW_O, JOINT)
    layout = layout_of(segment, SHOW_O)
    ours, real = layout.mask()[:, 0], layout.real
    # right pads are read by text rows behind nothing, left pads by pads alone: no real row differs
    assert torch.equal(ours[real], (expected & real[:, None])[real])
    assert not bool((expected[real] & ~ours[real]).any())  # not even in columns of pads
    pads = ~real
    assert torch.equal(ours[pads], torch.eye(ids.shape[1]).bool().expand_as(ours)[pads])


def test_mask_of_interleaved_rows(g: Any) -> None:
    ids = g.inputs["lvg_ids"]
    layout = layout_of(segments_of(ids, ids != PAD, SHOW_O, JOINT), SHOW_O)
    ours, real = layout.mask()[:, 0], layout.real
    expected = g.outputs["lvg_mask"]
    # the released text before the first image reads the left pads: the one difference
    assert torch.equal(ours[real], (expected & real[:, None])[real])
    behind = (ids == JOINT.id("soi")).cumsum(1) > 0
    assert torch.equal(ours[behind], expected[behind])


def test_mask_of_features_read_ahead(g: Any) -> None:
    ours = style("show-o-features")
    prefix, suffix, count = g.inputs["clip_prefix_ids"], g.inputs["clip_suffix_ids"], g.inputs["clip_feats"].shape[1]
    ids = torch.cat([prefix, torch.full((1, count), JOINT.slot_id), suffix], 1)
    layout = layout_of(segments_of(ids, None, ours, JOINT), ours)
    packed = np.unpackbits(g.outputs["clip_mask_packed"].numpy(), axis=-1)[:, : ids.shape[1]]
    assert torch.equal(layout.mask()[0, 0], torch.from_numpy(packed).bool())
    row = write_row(
        ours, JOINT, WORDS, "mmu", [Image(count), Text((2, 27, 0, 15, 7))],
        length=1000, system=(11, 30, 3), closed=False,
    )  # fmt: skip
    assert list(row.ids) == ids[0].tolist()


def test_features_and_codes_in_one_batch() -> None:
    ours = style("show-o-features")
    rows = [
        write_row(ours, JOINT, WORDS, "t2i", [Text((1, 2)), Image(4)], length=99, text_length=5),
        write_row(ours, JOINT, WORDS, "mmu", [Image(3), Text((1, 2))], length=99, system=(7,)),
    ]
    mask = layout_of(collate(rows, ours, JOINT, PAD)["segment"], ours).mask()[:, 0]
    assert not bool(mask[0, 1:6, 6:].any())  # a prompt never sees its image
    assert bool(mask[0, 6:12, 6:12].all())  # start, places and end see each other
    assert bool(mask[1, :3, 3:6].all())  # what stands before features reads them
    assert not bool(mask[1, :3, 6:].any())
    assert torch.equal(mask[1, 6:10, 6:10], torch.ones(4, 4).bool().tril())


@pytest.mark.parametrize("name", ["", "_b"])
def test_transfusion_masks_and_targets(golden: Callable[[str], Any], name: str) -> None:
    t = golden("transfusion")
    ours = style("transfusion")
    vocabulary = Vocabulary(text=28, specials=ours.specials)
    assert (vocabulary.id("boi"), vocabulary.id("eoi"), vocabulary.size) == (28, 29, 30)
    if name:  # spans that no boundaries surround are laid out by their numbers
        spans, expected = t.inputs["spans_b"], t.outputs["mask_b"]
        segment = torch.zeros(expected.shape[:2], dtype=torch.long)
        for row, own in enumerate(spans.tolist()):
            for number, (_, offset, count) in enumerate(own):
                segment[row, offset : offset + count] = number + 1
    else:
        ids, expected = t.inputs["ids"], t.outputs["mask"]
        segment = segments_of(ids, None, ours, vocabulary)
        labels = torch.where((ids < 0) | (ids == vocabulary.id("eoi")), IGNORE, ids)
        assert torch.equal(next_targets(labels), t.outputs["lm_targets"])
    assert torch.equal(layout_of(segment, ours).mask()[:, 0], expected)


def test_transfusion_rows_learn_boi_and_neither_patches_nor_eoi() -> None:
    ours = style("transfusion")
    vocabulary = Vocabulary(text=28, specials=ours.specials)
    boi, eoi, slot = vocabulary.id("boi"), vocabulary.id("eoi"), vocabulary.slot_id
    row = write_row(ours, vocabulary, Words(1, 2, 0), "t2i", [Text((5, 6)), Image(3)], length=20)
    assert row.ids == (1, 5, 6, boi, slot, slot, slot, eoi, 2)
    assert row.first == (False,)
    targets = next_targets(torch.tensor([row.labels]))[0].tolist()
    assert targets == [5, 6, boi, IGNORE, IGNORE, IGNORE, IGNORE, 2, IGNORE]
    described = write_row(ours, vocabulary, Words(1, 2, 0), "mmu", [Image(3), Text((5, 6))], length=20)
    assert described.first == (True,)
    assert described.ids == (1, boi, slot, slot, slot, eoi, 5, 6, 2)


def test_chameleon_rows_learn_everything_and_are_causal() -> None:
    ours = style("chameleon")
    vocabulary = ours.vocabulary(28, 10)
    row = write_row(ours, vocabulary, Words(1, 2, 0), "mmu", [Image(2), Text((5,))], length=20)
    boi, eoi = vocabulary.id("boi"), vocabulary.id("eoi")
    assert row.labels == (1, boi, CODE, CODE, eoi, 5, 2)
    short = write_row(ours, vocabulary, Words(1, 2, 0), "lm", [Text((5,))], length=20)
    batch = collate([row, short], ours, vocabulary, 0)
    layout = layout_of(batch["segment"], ours)
    assert layout.kind == "causal"
    assert batch["segment"][0].tolist() == [0, 0, 1, 1, 0, 0, 0]
    assert torch.equal(layout.mask()[0, 0], torch.ones(7, 7).bool().tril())


def test_given_parts_are_not_learned() -> None:
    ours = style("chameleon")
    vocabulary = ours.vocabulary(28, 10)
    row = write_row(
        ours, vocabulary, Words(1, 2, 0), "interleaved", [Image(2, given=True), Text((5,), trained=False), Image(2)],
        length=20,
    )  # fmt: skip
    boi, eoi = vocabulary.id("boi"), vocabulary.id("eoi")
    assert row.labels == (1, *[IGNORE] * 5, boi, CODE, CODE, eoi, 2)
    assert row.given == (True, False)


@pytest.mark.parametrize("name", ["show-o", "transfusion", "chameleon"])
def test_what_does_not_fit_is_one_line(name: str) -> None:
    ours = style(name)
    vocabulary = ours.vocabulary(28, 10)
    words = Words(1, 2, 0)
    with pytest.raises(DataError, match="image places included, and 6 fit: shorten") as error:
        write_row(ours, vocabulary, words, "mmu", [Image(16), Text((5,))], length=6, text_length=8)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"and 8 fit|and 6 fit"):
        write_row(ours, vocabulary, words, "t2i", [Text((5,) * 9)], length=6, text_length=8, closed=False)
    cut = write_row(ours, vocabulary, words, "lm", [Text((5,) * 99)], length=6)
    assert len(cut.ids) == 6


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"unknown sequence style 'showo'.*show-o"):
        style("showo")
    with pytest.raises(ConfigError, match="unknown task 't2v'"):
        write_row(SHOW_O, JOINT, WORDS, "t2v", [], length=9)


def test_positions_count_real_tokens() -> None:
    row = write_row(SHOW_O, JOINT, WORDS, "t2i", [Text((1, 2)), Image(4)], length=99, text_length=8)
    batch = collate([row], SHOW_O, JOINT, PAD)
    layout = layout_of(batch["segment"], SHOW_O)
    assert row.pads == 4
    assert layout.position[0, row.pads :].tolist() == list(range(len(row.ids)))
    assert F.pad(layout.real.long(), (1, 0)).diff(dim=1).abs().sum() == 1
