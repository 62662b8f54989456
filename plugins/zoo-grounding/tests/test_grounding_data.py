"""Scenes whose answers are masks, ReasonSeg's files, and the task and command that read them."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from zoo_grounding.data.questions import KINDS, parse_kinds, sort_of
from zoo_grounding.data.reason_seg import ReasonSegConfig, drawn
from zoo_grounding.data.scenes import GroundingScenes, GroundingScenesConfig
from zoo_grounding.marks import TARGET
from zoo_grounding.overlay import COLOURS, coloured, overlay
from zoo_grounding.task import GroundingConfig

import zoo
from zoo.capabilities import MaskedText
from zoo.cli import main
from zoo.data.sample import Sample
from zoo.errors import ConfigError, DataError
from zoo.evaluation.segmentation import SegmentationConfig

SMALL: dict[str, Any] = {"kinds": 40, "train_scenes": 200, "val_scenes": 20, "test_scenes": 20}


@pytest.fixture(scope="module")
def scenes() -> GroundingScenes:
    return GroundingScenesConfig(**SMALL, turns=9).open(64)


def test_every_mask_is_what_its_words_name(scenes: GroundingScenes) -> None:
    """Against the masks of the scene itself, which the renderer gives object by object."""
    kinds: Counter[str] = Counter()
    for id in scenes.ids("train"):
        sample, own = scenes.sample(id), scenes.masks(id)
        names = [o["name"] for o in sample.meta["objects"]]
        masks = iter(sample.meta["masks"])
        for (question, answer), about in zip(sample.meta["turns"], sample.meta["questions"], strict=True):
            found = [next(masks).astype(bool) for _ in range(answer.count(TARGET))]
            assert len(found) == about["targets"]
            kinds[about["kind"]] += 1
            whole = [[n for n in range(len(names)) if np.array_equal(own[n], mask)] for mask in found]
            if about["kind"] == "absent":
                assert found == []
                assert not any(name in question.split(" the ")[1] for name in names if f"the {name}" in question)
            elif about["kind"] == "part":
                (inside,) = [n for n, name in enumerate(names) if f"of the {name} " in question.replace(".", " ")]
                assert found[0].sum() > 0
                assert not (found[0] & ~own[inside]).any()
                assert found[0].sum() < own[inside].sum()
            else:
                assert all(len(fit) == 1 for fit in whole)
                targets = [fit[0] for fit in whole]
                assert len(set(targets)) == len(targets)
                if about["kind"] == "every":
                    assert {names[n] for n in targets} == {names[targets[0]]}
                    assert len(targets) == names.count(names[targets[0]]) > 1
                    left = [sample.meta["objects"][n]["box"][0] for n in targets]
                    assert f"every {names[targets[0]]}" in question
                    assert len(left) == len(targets)
                if about["kind"] in ("name", "several"):
                    places = [question.index(f"the {names[n]}") for n in targets]
                    assert places == sorted(places)
                    assert all(names.count(names[n]) == 1 for n in targets)
                if about["kind"] == "several":
                    assert all(f"{names[n]} {TARGET}" in answer for n in targets)
        assert next(masks, None) is None
    assert set(kinds) == set(KINDS)


def test_hair_and_skin_are_disjoint_and_inside(scenes: GroundingScenes) -> None:
    person = sorted(scenes.people)[0]
    shares = {part: scenes.parts.share(person, part, 144) for part in ("hair", "skin")}
    alpha = scenes.base.renderer.sprites.get(person, 144)[..., 3] / 255
    assert all(share.sum() > 50 for share in shares.values())
    assert not ((shares["hair"] > 0.5) & (shares["skin"] > 0.5)).any()
    assert (sum(shares.values()) <= alpha + 0.02).all()
    # where hair fills a pixel the icon has one of few colours, and the skin another
    sprite = scenes.base.renderer.sprites.get(person, 144)[..., :3]
    hair, skin = (sprite[shares[part] > 0.99].astype(int) for part in ("hair", "skin"))
    assert np.abs(np.median(hair, 0) - np.median(skin, 0)).max() > 10


def test_splits_share_no_icon_and_no_person() -> None:
    scenes = GroundingScenesConfig(train_scenes=2, val_scenes=2, test_scenes=2).open(64)
    shown = {split: set(pool.icons) for split, pool in scenes.base.pools.items()}
    assert shown["train"].isdisjoint(shown["val"] | shown["test"])
    assert shown["val"].isdisjoint(shown["test"])
    names = {
        split: {pool.names[n] for n, i in enumerate(pool.icons) if i in scenes.people}
        for split, pool in scenes.base.pools.items()
    }
    assert all(names.values())
    assert names["train"].isdisjoint(names["val"] | names["test"])


def test_scenes_follow_from_their_id(scenes: GroundingScenes) -> None:
    copy = pickle.loads(pickle.dumps(scenes))
    for id in ("train-000003", "val-000001"):
        one, two = scenes.sample(id), copy.sample(id)
        assert one.meta["turns"] == two.meta["turns"]
        assert all(np.array_equal(a, b) for a, b in zip(one.meta["masks"], two.meta["masks"], strict=True))
        assert np.array_equal(np.asarray(one.image), np.asarray(two.image))
    large = GroundingScenesConfig(**SMALL, turns=9).open(128)
    assert large.asked("train-000003") == scenes.asked("train-000003")
    shapes = {mask.shape for id in large.ids("val") for mask in large.sample(id).meta["masks"]}
    assert shapes == {(128, 128)}
    assert GroundingScenesConfig(**SMALL).open(64).version != scenes.version


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"questions": "names"}, "unknown kind 'names'; did you mean name"),
        ({"questions": "several", "objects": 1}, "need two objects"),
        ({"questions": "part", "people": False}, "data.people is false"),
        ({"turns": 0}, "expected 1 or more questions a scene"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GroundingScenesConfig(**{**SMALL, **fields}).open(64)


def test_kinds_and_sorts(scenes: GroundingScenes) -> None:
    assert parse_kinds("part+name") == ("name", "part")
    assert parse_kinds("all") == KINDS
    scene = scenes.scene("train-000000")
    placed = scene.objects[0]
    icons = {"1F408": "animal", "1F354": "food", "1F697": "vehicle", "1F4D6": "thing", "2600": None}
    assert {code: sort_of(type(placed)(code, "x", 0, 0, 8)) for code in icons} == icons
    with pytest.raises(DataError, match="unknown id 'train-9'"):
        scenes.sample("train-9")


# -- ReasonSeg ---------------------------------------------------------------------------------------------------------


def square(label: str, left: int, top: int, side: int) -> dict[str, Any]:
    right, bottom = left + side - 1, top + side - 1
    return {"label": label, "points": [[left, top], [right, top], [right, bottom], [left, bottom]]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for number in range(2):
            Image.new("RGB", (40, 30), (10, 20, 30)).save(tmp_path / split / f"i{number}.jpg")
            shapes = [square("ignore", 12, 12, 4), square("target", 10, 10, 10), square("flag", 0, 0, 30)]
            text = ["what is to drink?", "a cup"] if number else ["the cup"]
            about = {"text": text, "is_sentence": bool(number), "shapes": shapes}
            (tmp_path / split / f"i{number}.json").write_text(json.dumps(about))
    longer = [{"image": "i1.jpg", "query": "what is to drink?", "outputs": "Water is."}]
    (tmp_path / "longer.json").write_text(json.dumps(longer))
    return tmp_path


def test_reason_seg(folder: Path) -> None:
    source = ReasonSegConfig(root=str(folder)).build()
    assert source.ids("train") == ["train/i0#0", "train/i1#0", "train/i1#1"]
    assert source.ids("test") == []
    named, asked = source.sample("val/i0#0"), source.sample("val/i1#0")
    assert named.meta["turns"] == [("Can you segment the cup in this image?", "{seg}.")]
    assert asked.meta["turns"][0][0] == "what is to drink? Please respond with segmentation mask."
    (mask,) = named.meta["masks"]
    assert mask.shape == (30, 40)
    assert (mask[10:20, 10:20] == np.where(np.pad(np.ones((4, 4)), (2, 4)), 255, 1)).all()  # the smaller shape on top
    assert (mask > 0).sum() == 100
    assert source.sample("train/i1#1").meta["cluster"] == "train/i1"
    explained = ReasonSegConfig(root=str(folder), explanations="longer.json").build()
    turn = explained.sample("train/i1#0").meta
    assert turn["turns"][0][1] in ("{seg}.", "{seg} Water is.", "Water is.")
    assert len(turn["masks"]) == turn["turns"][0][1].count(TARGET)
    assert explained.version != source.version


def test_reason_seg_names_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs data\.root"):
        ReasonSegConfig().build()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no JSON files in train, val or test"):
        ReasonSegConfig(root=str(tmp_path / "empty")).build()
    with pytest.raises(DataError, match=r"data\.explanations = 'no\.json' is not there"):
        ReasonSegConfig(root=str(folder), explanations="no.json").build()
    with pytest.raises(DataError, match="a shape needs 'label' and 'points'"):
        drawn([{"label": "target"}], 4, 4)
    (folder / "val" / "i0.json").write_text(json.dumps({"shapes": []}))
    with pytest.raises(DataError, match=r"val/i0\.json: expected 'text'"):
        ReasonSegConfig(root=str(folder)).build()
    about = {"text": ["caf\u00e9"], "is_sentence": False, "shapes": []}
    (folder / "val" / "i0.json").write_bytes(json.dumps(about, ensure_ascii=False).encode("cp1252"))
    assert ReasonSegConfig(root=str(folder)).build().sample("val/i0#0").texts == ("caf\u00e9",)
    (folder / "val" / "i0.jpg").unlink()
    with pytest.raises(DataError, match=r"val/i0\.json has no image of its name"):
        ReasonSegConfig(root=str(folder)).build()


# -- the task ----------------------------------------------------------------------------------------------------------


class Answers:
    """A model that answers with given masks, question by question."""

    def __init__(self, answers: dict[str, torch.Tensor]) -> None:
        self.answers = answers

    def segment(self, images: Any, prompts: Any, max_new_tokens: int = 64) -> list[MaskedText]:
        return [MaskedText("answer", self.answers[prompt]) for prompt in prompts]


class Fixed:
    name, version, max_bad = "fixed", "1", 0

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = {s.id: s for s in samples}

    def ids(self, split: str) -> list[str]:
        return list(self.samples)

    def sample(self, id: str) -> Sample:
        return self.samples[id]


def box(*edges: int) -> torch.Tensor:
    mask = torch.zeros(8, 10, dtype=torch.bool)
    mask[edges[0] : edges[1], edges[2] : edges[3]] = True
    return mask


def test_grounding_scores() -> None:
    """Half found; one of two missing; none rightly and none wrongly; an extra mask; pixels that nobody scores."""
    image = Image.new("RGB", (10, 8))
    partly = box(0, 4, 0, 4).numpy().astype(np.uint8)
    partly[0] = 255  # a row of 10 pixels that nobody scores
    turns = [("half", "{seg}."), ("two", "{seg} and {seg}."), ("no", "There is none."), ("wrong", "There is none.")]
    turns += [("extra", "{seg}."), ("ignored", "{seg}.")]
    masks = [box(0, 4, 0, 4), box(0, 2, 0, 2), box(4, 8, 0, 5), box(0, 2, 0, 5)]
    sample = Sample(
        "a", image, ("x",), {"turns": turns, "masks": [m.numpy().astype(np.uint8) for m in masks] + [partly]}
    )
    model = Answers(
        {
            "half": torch.stack([box(0, 4, 0, 2)]),
            "two": torch.stack([box(0, 2, 0, 2)]),
            "no": torch.zeros(0, 8, 10, dtype=torch.bool),
            "wrong": torch.stack([box(0, 1, 0, 1)]),
            "extra": torch.stack([box(0, 2, 0, 5), box(0, 0, 0, 0)]),
            "ignored": torch.stack([box(0, 4, 0, 4)]),
        }
    )
    result = GroundingConfig().build().run(model, Fixed([sample]), "test")
    rows = {row["item"]: row["iou"] for row in result.items}
    assert rows == {
        "a/0/0": 0.5, "a/1/0": 1.0, "a/1/1": 0.0, "a/2/0": 1.0, "a/3/0": 0.0, "a/4/0": 1.0, "a/4/1": 0.0, "a/5/0": 1.0,
    }  # fmt: skip
    metrics = result.metrics
    assert metrics["giou"] == pytest.approx(4.5 / 8)
    inside = 8 + 4 + 0 + 0 + 10 + 0 + 12
    either = 16 + 4 + 20 + 1 + 10 + 0 + 12
    assert metrics["ciou"] == pytest.approx(inside / either)
    assert metrics["giou_several"] == pytest.approx(0.5)
    assert metrics["giou_one"] == pytest.approx((0.5 + 1 + 0 + 1) / 4)
    assert metrics["absent_right"] == pytest.approx(0.5)
    assert metrics["count_right"] == pytest.approx(3 / 6)
    assert metrics["questions"] == 6
    assert {sample["id"] for sample in result.samples} == {"a"}


def test_grounding_names_what_is_wrong() -> None:
    image = Image.new("RGB", (10, 8))
    task = GroundingConfig().build()
    with pytest.raises(DataError, match="no chosen sample of fixed has questions with masks"):
        task.run(Answers({}), Fixed([Sample("a", image, ("x",), {})]), "test")
    bad = Sample("a", image, ("x",), {"turns": [("q", "{seg}")], "masks": []})
    with pytest.raises(DataError, match="name other than 0 targets"):
        task.run(Answers({}), Fixed([bad]), "test")
    good = Sample("a", image, ("x",), {"turns": [("q", "no")], "masks": []})
    with pytest.raises(ConfigError, match=r"expected bool \[masks, height, width\]"):
        task.run(Answers({"q": torch.zeros(1, 3, 3, dtype=torch.bool)}), Fixed([good]), "test")
    with pytest.raises(ConfigError, match="at least 1"):
        GroundingConfig(batch_size=0)


def test_tasks_run_on_a_model(scenes: GroundingScenes) -> None:
    module = zoo.build("lisa", scale="tiny", seed=0)
    metrics = GroundingConfig(items=3, max_new_tokens=3).build().run(module, scenes, "val").metrics
    assert 0 <= metrics["giou"] <= 1
    assert metrics["questions"] >= 3
    core = SegmentationConfig(items=2, absent=1).build().run(module, scenes, "val").metrics
    assert 0 <= core["giou"] <= 1
    assert core["images"] == 2


# -- pictures and the command ------------------------------------------------------------------------------------------


def test_overlay_and_colours() -> None:
    image = Image.new("RGB", (10, 8), (200, 200, 200))
    masks = torch.stack([box(0, 5, 0, 5), box(6, 8, 6, 10)])
    out = np.asarray(overlay(image, masks))
    assert tuple(out[0, 0]) == COLOURS[0]  # an edge in the full colour
    assert tuple(out[7, 9]) == COLOURS[1]
    middle = 0.45 * 200 + 0.55 * np.array(COLOURS[0])
    assert np.abs(out[2, 2] - middle).max() <= 1
    assert (out[5, 5] == 222).all()
    assert np.array_equal(np.asarray(overlay(image, masks[:0])), np.asarray(image))
    with pytest.raises(ValueError, match="masks of shape"):
        overlay(image, masks[:, :4])
    answer = MaskedText("a cat [1], [2] and [3]", masks)
    assert coloured(answer, colour=False) == answer.text
    shown = coloured(answer)
    assert shown.count("\x1b[0m") == 2
    assert "48;2;0;114;178m[1]" in shown
    assert shown.endswith("and [3]")


def test_zoo_segment(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.weights import save

    module = zoo.build("lisa", scale="tiny", seed=0)
    save(module.model, module.recipe, tmp_path / "weights")
    image = tmp_path / "p.png"
    Image.new("RGB", (50, 40), (9, 99, 199)).save(image)
    words = ["segment", str(tmp_path / "weights"), "--image", str(image), "--prompt", "Where?", "--max-new-tokens", "3"]
    assert main(words) == 0
    assert Image.open(tmp_path / "p.segmented.png").size == (50, 40)
    assert "p.segmented.png" in capsys.readouterr().out
    wrong: list[tuple[list[str], str]] = [
        (["segment", "lisa", "--image", str(image), "--prompt", "x"], "lisa is a recipe without weights"),
        ([*words[:3], str(tmp_path / "no.png"), "--prompt", "x"], "there is no image"),
        ([*words[:5], " "], "--prompt is empty"),
        ([*words, "--out", str(tmp_path / "no" / "o.png")], "there is no folder"),
    ]
    for line, message in wrong:
        assert main(line) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.strip().count("\n") == 0
