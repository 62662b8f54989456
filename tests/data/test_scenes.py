"""Every caption and answer of a scene, checked against the masks of what is drawn."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from zoo.data.loader import loader
from zoo.data.openmoji import OpenMojiConfig
from zoo.data.order import SampleOrder
from zoo.data.sample import ArraySource, BlankImages, data_hash
from zoo.data.scenes import Scenes, ScenesConfig, parse_range
from zoo.data.scenes_icons import is_thing, stems
from zoo.data.scenes_layout import BACKGROUNDS, Placed, Scene, beside, places, sizes
from zoo.data.scenes_layout import Stream as Draws
from zoo.data.scenes_render import Renderer
from zoo.data.scenes_texts import WORDS, captions
from zoo.errors import ConfigError, DataError

SIDE = 48
FIELDS: dict[str, Any] = {"size": SIDE, "train_scenes": 300, "val_scenes": 60, "test_scenes": 120}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of icons for this file."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(cache))


def make(**fields: Any) -> Scenes:
    return ScenesConfig(**{**FIELDS, **fields}).open(None)


@pytest.fixture
def scenes() -> Scenes:
    return make(objects="2..4", background="coloured", turns=0)


# -- the truth, from the masks alone -------------------------------------------------------------------------------


class Seen:
    """What the masks show: for each name the extents (left, top, right, bottom) of its objects' pixels."""

    def __init__(self, source: Scenes, id: str) -> None:
        masks = source.masks(id)
        names = [o["name"] for o in source.text_sample(id).meta["objects"]]
        assert masks.any((1, 2)).all(), "an object shows nothing"
        self.extents: dict[str, list[tuple[int, int, int, int]]] = {}
        for name, mask in zip(names, masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1]))
            self.extents.setdefault(name, []).append(box)

    @staticmethod
    def only(extents: dict[str, list[tuple[int, int, int, int]]]) -> Seen:
        made = Seen.__new__(Seen)
        made.extents = extents
        return made

    def count(self, name: str) -> int:
        return len(self.extents.get(name, []))

    def holds(self, a: str, side: str, b: str) -> bool:
        """Whether every pixel of every ``a`` lies beyond every pixel of every ``b``."""
        pairs = [(p, q) for p in self.extents[a] for q in self.extents[b]]
        beyond = {
            "left": lambda p, q: p[2] < q[0], "right": lambda p, q: p[0] > q[2],
            "above": lambda p, q: p[3] < q[1], "below": lambda p, q: p[1] > q[3],
        }[side]  # fmt: skip
        return all(beyond(p, q) for p, q in pairs)


def side_of(text: str) -> str:
    return next(side for side in ("left", "right", "above", "below", "top", "bottom") if side in text)


def is_right(seen: Seen, source: Scenes, id: str, question: Any) -> bool:
    """Answer a question from the masks alone and compare."""
    names = question.names
    if question.kind == "count":
        counts = seen.count(names[0]) if names else sum(map(len, seen.extents.values()))
        return question.answer == str(counts)
    if question.kind == "exist":
        return question.answer == ("yes" if seen.count(names[0]) else "no")
    if question.kind == "colour":
        return bool((source.images([id])[0].reshape(-1, 3) == BACKGROUNDS[question.answer]).all(1).mean() > 0.1)
    if question.kind == "where":
        a, b = names
        return (seen.count(a), seen.count(b)) == (1, 1) and seen.holds(a, question.answer, b)
    if question.kind == "relation":
        a, b = names
        true = seen.holds(a, side_of(question.question.replace(a, "").replace(b, "")), b)
        return question.answer == ("yes" if true else "no")
    if question.kind == "which":
        right, b = names
        side = side_of(question.question.replace(b, ""))
        others = [n for n in seen.extents if n not in (right, b)]
        some = any(Seen.only({right: [box], b: seen.extents[b]}).holds(right, side, b) for box in seen.extents[right])
        return question.answer == right and some and not any(seen.holds(n, side, b) for n in others)
    others = [name for name in seen.extents if name != names[0]]
    if not others:
        return question.answer == names[0]
    side = {"top": "above", "bottom": "below"}.get(side_of(question.question), side_of(question.question))
    outermost = max(
        seen.extents[names[0]],
        key=lambda box: {"left": -box[2], "right": box[0], "above": -box[3], "below": box[1]}[side],
    )
    alone = Seen.only({**seen.extents, names[0]: [outermost]})
    return question.answer == names[0] and all(alone.holds(names[0], side, other) for other in others)


@pytest.mark.parametrize("overlap", [False, True])
def test_every_answer_is_what_the_masks_say(overlap: bool) -> None:
    source = make(objects="1..4", background="coloured", turns=0, overlap=overlap)
    asked: Counter[str] = Counter()
    for id in [*source.ids("train")[:60], *source.ids("test")[:50]]:
        seen = Seen(source, id)
        for question in source.questions(id):
            asked[question.kind] += 1
            assert is_right(seen, source, id, question), (id, question, seen.extents)
    assert set(asked) == {"what", "count", "exist", "where", "relation", "which", "colour"}
    assert min(asked.values()) >= 15


def test_every_caption_is_what_the_masks_say(scenes: Scenes) -> None:
    kinds: Counter[str] = Counter()
    number = {word: n for n, word in enumerate(WORDS)}
    for id in scenes.ids("train")[:120]:
        seen, texts = Seen(scenes, id), scenes.text_sample(id).texts
        assert len(set(texts)) == len(texts)
        for text in texts:
            relation = re.fullmatch(r"the (.+) is (left of|right of|above|below) the (.+)", text)
            pair = re.fullmatch(r"(.+ icons?) (left of|right of|above|below) (.+ icons?)", text)
            order = re.fullmatch(r"from (left to right|top to bottom): (.+)", text)
            if relation:
                kinds["relation"] += 1
                assert seen.holds(relation[1], relation[2].split()[0], relation[3]), text
            elif order:
                kinds["order"] += 1
                axis = 0 if "left" in order[1] else 1
                boxes = sorted((box[axis], box[axis + 2], n) for n, group in seen.extents.items() for box in group)
                assert [n for *_, n in boxes] == order[2].split(", "), text
                assert all(a[1] < b[0] for a, b in pairwise(boxes)), text
            else:
                kinds["pair" if pair else "list"] += 1
                found = {}
                parts = (
                    pair.group(1, 3)
                    if pair
                    else re.split(r", | and (?=(?:an?|two|three|four) )", text.partition(": ")[2] or text)
                )
                for part in parts:
                    count, _, rest = part.partition(" ")
                    name = re.fullmatch(r"(.+) icons?", rest)
                    assert name, text
                    found[name[1]] = number.get(count, 1)
                assert found == {n: seen.count(n) for n in seen.extents}, text
                if pair:
                    first, second = list(found)
                    assert seen.holds(first, pair[2].split()[0], second), text
    assert min(kinds[k] for k in ("relation", "order", "pair", "list")) >= 20


# -- pictures, boxes and masks -------------------------------------------------------------------------------------


def test_pictures_are_their_parts_laid_over_each_other() -> None:
    source = make(objects="3..4", overlap=True, background="coloured")
    renderer, covered = source.renderer, 0
    for id in source.ids("train")[:120]:
        scene = source.scene(id)
        shares = renderer.visible(scene)  # [n, H, W]
        picture = np.zeros((SIDE, SIDE, 3))
        for placed, share in zip(scene.objects, shares, strict=True):
            left, top, side = renderer.square(scene, placed)
            sprite = np.zeros((SIDE, SIDE, 3))
            sprite[top : top + side, left : left + side] = renderer.sprites.get(placed.icon, side)[..., :3]
            picture += share[..., None] * sprite
        rest = 1 - shares.sum(0)
        assert rest.min() > -1e-5
        picture += rest[..., None] * np.asarray(BACKGROUNDS[scene.background])
        assert np.abs(picture - source.images([id])[0]).max() <= 1.01, id
        full = [renderer.visible(Scene((o,)))[0] for o in scene.objects]
        covered += sum(float((f - s).max()) > 0.5 for f, s in zip(full, shares, strict=True))
    assert covered > 3  # some were really covered, and their masks know it


def test_boxes_are_the_extents_of_the_masks(scenes: Scenes) -> None:
    for id in scenes.ids("val")[:30]:
        for known, mask in zip(scenes.text_sample(id).meta["objects"], scenes.masks(id), strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert known["box"] == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], (id, known)


@pytest.mark.parametrize("pixels", [37, 400])
def test_a_scene_is_the_same_at_any_resolution(pixels: int, scenes: Scenes) -> None:
    renderer = Renderer(scenes.renderer.sprites, pixels)
    for id in scenes.ids("train")[:3]:
        scene = scenes.scene(id)
        picture = renderer.image(scene)
        assert picture.shape == (pixels, pixels, 3)
        squares = [renderer.square(scene, o) for o in scene.objects]
        for n, (x, y, s) in enumerate(squares):
            assert min(x, y) >= 0
            assert max(x, y) + s <= pixels
            for u, v, t in squares[:n]:
                assert x + s <= u or u + t <= x or y + s <= v or v + t <= y  # apart stays apart, whatever is rounded
        small = np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.BOX), float)
        native = np.asarray(Image.fromarray(scenes.images([id])[0]).resize((16, 16), Image.Resampling.BOX), float)
        assert np.corrcoef(small.ravel(), native.ravel())[0, 1] > 0.8


def test_a_canvas_need_not_be_square(scenes: Scenes) -> None:
    icon = scenes.pools["train"].icons[5]
    wide = Scene((Placed(icon, "x", 64, 0, 32),), width=128, height=32, background="pink")
    picture = scenes.renderer.image(wide)
    assert picture.shape == (SIDE // 4, SIDE, 3)
    assert (picture[:, : SIDE // 2] == BACKGROUNDS["pink"]).all()
    assert (picture[:, SIDE // 2 :] != BACKGROUNDS["pink"]).any()


def test_every_icon_shows_in_the_middle_half_of_its_square(scenes: Scenes) -> None:
    """What may be covered lies outside it, so no icon of a scene can vanish."""
    sprites: NDArray[np.uint8] = scenes.renderer.sprites.all(18)
    middle = sprites[:, 4:14, 4:14, 3] >= 128
    least = middle.mean((1, 2))
    names = {i: n for pool in scenes.pools.values() for i, n in zip(pool.icons, pool.names, strict=True)}
    icons = list(scenes.renderer.sprites.files)
    assert least.min() > 0.04, sorted((round(float(v), 3), names[i]) for v, i in zip(least, icons, strict=True))[:10]


# -- what is drawn -------------------------------------------------------------------------------------------------


def test_scenes_are_the_same_in_another_process(scenes: Scenes) -> None:
    code = (
        "import hashlib, json\n"
        "from zoo.data.scenes import ScenesConfig\n"
        f"s = ScenesConfig(**{ {**FIELDS, 'objects': '2..4', 'background': 'coloured', 'turns': 0}!r}).open(None)\n"
        "ids = s.ids('test')[:20]\n"
        "d = hashlib.sha256(s.images(ids).tobytes())\n"
        "d.update(json.dumps([[s.text_sample(i).texts, s.text_sample(i).meta] for i in ids]).encode())\n"
        "print(d.hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    ids = scenes.ids("test")[:20]
    here = hashlib.sha256(scenes.images(ids).tobytes())
    here.update(json.dumps([[scenes.text_sample(i).texts, scenes.text_sample(i).meta] for i in ids]).encode())
    assert there.stdout.split()[-1] == here.hexdigest()


def test_seed_and_id_decide_and_nothing_else() -> None:
    a, b = make(), make(train_scenes=7, size=32, blank_images=True)
    assert [a.scene(i) for i in b.ids("train")] == [b.scene(i) for i in b.ids("train")]
    other = make(seed=1)
    assert sum(a.scene(i) == other.scene(i) for i in other.ids("train")) == 0
    assert data_hash(a, "train") != data_hash(other, "train")
    assert a.version == make(size=32).version


def test_splits_share_no_icon_and_no_scene() -> None:
    source = make(objects="1..3", train_scenes=2000)
    shown = {s: {o.icon for i in source.ids(s) for o in source.scene(i).objects} for s in ("train", "val", "test")}
    icons = OpenMojiConfig(size=16).open(None)
    for split, found in shown.items():
        assert found <= set(icons.ids(split))
        assert not any(icons.attributes(icon) for icon in found)  # no near copy in another skin tone
    names = {s: {icons.text(i) for i in found} for s, found in shown.items()}
    assert names["train"].isdisjoint(names["test"] | names["val"])
    mentioned = {n for i in source.ids("test") for q in source.questions(i) for n in q.names}
    assert mentioned.isdisjoint(source.pools["train"].names)  # not even what is asked for in vain
    known = make(icons="train", train_scenes=2000)
    pictures = {s: {frozenset(known.scene(i).objects) for i in known.ids(s)} for s in ("train", "val", "test")}
    assert {o.icon for i in known.ids("test") for o in known.scene(i).objects} <= set(icons.ids("train"))
    assert pictures["train"].isdisjoint(pictures["val"] | pictures["test"])
    assert pictures["val"].isdisjoint(pictures["test"])


def test_exist_questions_are_balanced_and_labelled_as_pope_does() -> None:
    source = make(questions="exist", turns=0, train_scenes=1500, objects="1..3")
    found: Counter[tuple[str, str]] = Counter()
    for id in source.ids("train"):
        own = source.questions(id)
        assert sorted(q.answer for q in own) == ["no", "yes"]
        pool, present = source.pools["train"], source.scene(id).kinds()
        for q in own:
            found[q.strategy, q.answer] += 1
            if q.answer == "no":
                row = pool.rows(q.names)[0]
                assert all(stems(q.names[0]).isdisjoint(stems(name)) for name in present)
                if q.strategy == "popular":
                    assert row in pool.popular
                if q.strategy == "adversarial":
                    assert any(row in pool.theme(r) for r in pool.rows(list(present)))
    assert all(400 < found[s, a] < 600 for s in ("random", "popular", "adversarial") for a in ("yes", "no"))


def test_popular_icons_and_themes_are_drawn_more_often() -> None:
    source = make(objects="2", questions="none", train_scenes=3000)
    pool = source.pools["train"]
    popular = {pool.icons[row] for row in pool.popular}
    drawn = [o.icon for i in source.ids("train") for o in source.scene(i).objects]
    assert 2 * len(popular) / len(pool.icons) < np.mean([icon in popular for icon in drawn]) < 0.5
    pairs = [pool.rows(list(source.scene(i).kinds())) for i in source.ids("train")]
    together = np.mean([b in pool.theme(a) for a, b in (p for p in pairs if len(p) == 2)])
    assert 0.35 < together < 0.6


def test_answers_are_spread() -> None:
    source = make(objects="1..4", turns=0, train_scenes=2000)
    answers: dict[str, Counter[str]] = {}
    for id in source.ids("train"):
        for q in source.questions(id):
            answers.setdefault(q.kind, Counter())[q.answer] += 1
    share = {kind: max(c.values()) / sum(c.values()) for kind, c in answers.items()}
    assert share["count"] < 0.48
    assert share["where"] < 0.35
    assert share["relation"] < 0.56
    assert share["what"] < 0.05
    assert min(sum(answers[k].values()) for k in ("where", "relation", "which")) > 300


def test_names_of_one_scene_cannot_be_confused(scenes: Scenes) -> None:
    assert not stems("cat").isdisjoint(stems("weary cat"))
    assert not stems("glasses").isdisjoint(stems("wine glass"))
    assert stems("pot of food").isdisjoint(stems("pair of socks"))
    for id in scenes.ids("train"):
        names = list(scenes.scene(id).kinds())
        assert all(stems(a).isdisjoint(stems(b)) for n, a in enumerate(names) for b in names[:n])
    assert is_thing("1F9C4", "garlic")
    assert not any(is_thing("1F9C4", n) for n in ("up arrow", "UP! button", "large blue diamond", "one-thirty", "Peru"))
    assert not is_thing("1F468-200D-1F373", "man cook")


def test_beside_knows_when_one_may_argue() -> None:
    def at(x: int, y: int, size: int = 10) -> Placed:
        return Placed("i", "n", x, y, size)

    assert beside(at(0, 0), at(10, 30), "left") is True
    assert beside(at(0, 0), at(9, 30), "left") is None
    assert beside(at(0, 0), at(0, 30), "left") is False
    assert beside(at(10, 0), at(0, 30), "right") is True
    assert beside(at(10, 0), at(0, 30), "left") is False
    assert beside(at(10, 0), at(0, 30), "above") is True
    assert beside(at(10, 30), at(0, 0), "below") is True


@pytest.mark.parametrize("count", [1, 4, 9, 16])
@pytest.mark.parametrize("overlap", [False, True])
def test_places_are_inside_and_apart(count: int, overlap: bool) -> None:
    met = 0
    for seed in range(60):
        found = places(Draws(seed), count, overlap)
        assert len(found) == count
        for n, (x, y, s) in enumerate(found):
            assert s in sizes(count)
            assert min(x, y) >= 0
            assert max(x, y) + s <= 64
            for u, v, t in found[:n]:
                depth = min(min(x + s, u + t) - max(x, u), min(y + s, v + t) - max(y, v))
                assert depth <= (min(s, t) // 4 if overlap else 0)
                met += depth > 0
    assert (met > 0) == (overlap and count > 1)


# -- as a source ---------------------------------------------------------------------------------------------------


def test_samples_hold_what_other_parts_read(scenes: Scenes) -> None:
    id = scenes.ids("val")[3]
    sample = scenes.sample(id)
    assert sample.image is not None
    assert np.array_equal(np.asarray(sample.image), scenes.images([id])[0])
    assert sample.texts == captions(scenes.scene(id))
    assert [(q["question"], q["answer"]) for q in sample.meta["questions"]] == list(sample.meta["turns"])
    assert {o["group"] for o in sample.meta["objects"]} == set(range(len(scenes.scene(id).kinds())))
    assert isinstance(scenes, ArraySource)
    blank = ScenesConfig(**FIELDS, blank_images=True).build()
    assert isinstance(blank, BlankImages)
    assert (blank.images([id]) == 255).all()
    assert make(questions="none").text_sample(id).meta.keys() == {"objects", "background"}
    two = make(turns=2)
    assert {len(two.questions(i)) for i in two.ids("val")} == {2}


def test_workers_read_the_same_batches(scenes: Scenes) -> None:
    import torch

    from zoo.data.images import ImageTransform
    from zoo.data.processor import PromptProcessor
    from zoo.data.text import OpenMojiBpeConfig

    processor = PromptProcessor(ImageTransform(size=SIDE), OpenMojiBpeConfig().build(), "plain", 4, 2000)
    order = SampleOrder(scenes.ids("train"), 3)
    alone = list(loader(scenes, processor, order, 8, stop_step=3, workers=0))
    there = list(loader(scenes, processor, order, 8, stop_step=3, workers=1))
    assert len(alone) == 3
    for a, b in zip(alone, there, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert a["pixel_values"].shape == (8, 3, SIDE, SIDE)


def test_mixes_and_what_cannot_be() -> None:
    source = make(questions="relation+count", turns=0, objects="2..3")
    assert {q.kind for i in source.ids("train") for q in source.questions(i)} == {"relation", "count"}
    only = make(questions="where", objects="1..2")
    assert all(q.kind == "where" for i in only.ids("train")[:50] for q in only.questions(i))
    assert all(only.questions(i) for i in only.ids("train"))
    white = make(turns=0)
    assert "colour" not in {q.kind for i in white.ids("train") for q in white.questions(i)}
    assert parse_range("3", "objects", 1, 16) == (3, 3)
    with pytest.raises(ConfigError, match="unknown kind 'cuont'; did you mean count"):
        make(questions="cuont")
    with pytest.raises(ConfigError, match="need two objects"):
        make(questions="where+relation", objects="1")
    with pytest.raises(ConfigError, match="background=coloured"):
        make(questions="colour")
    for wrong in ("0..3", "4..2", "17", "many", "1..", "-1..3"):
        with pytest.raises(ConfigError, match="expected a number or a range"):
            make(objects=wrong)
    with pytest.raises(ConfigError, match="16 to 2048"):
        make(size=8)
    with pytest.raises(ConfigError, match="test_scenes = -1"):
        make(test_scenes=-1)
    for wrong in ("train-000300", "train-1", "tset-000000", "train-x"):
        with pytest.raises(DataError, match="unknown id"):
            source.sample(wrong)


def test_a_request_for_a_description_stands_anywhere_in_the_dialogue(scenes: Scenes) -> None:
    source = make(objects="2..4", background="coloured", turns=0, describe="Describe the image.")
    places = []
    for id in source.ids("train")[:40]:
        plain, asked = scenes.text_sample(id), source.text_sample(id)
        turns = list(asked.meta["turns"])
        places.append(turns.index(("Describe the image.", plain.texts[0])))
        del turns[places[-1]]
        assert turns == plain.meta["turns"]
        assert asked.meta["questions"] == plain.meta["questions"]
    assert 0 in places, "never first"
    assert max(places) > 2, "a model that always describes first never learns to answer at once"


def test_a_small_world_shows_few_kinds() -> None:
    world = make(kinds=24, icons="train")
    seen = {o["name"] for id in world.ids("train")[:300] for o in world.text_sample(id).meta["objects"]}
    everything = make(icons="train")
    often = [o["name"] for id in everything.ids("train")[:300] for o in everything.text_sample(id).meta["objects"]]
    assert len(seen) == 24
    assert sum(name in seen for name in often) > len(often) / 795 * 24
    assert {o["name"] for id in world.ids("test")[:50] for o in world.text_sample(id).meta["objects"]} <= seen
    assert make(kinds=0).version == make().version != world.version
    with pytest.raises(ConfigError, match="kinds = 3"):
        make(kinds=3)
