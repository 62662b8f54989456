"""Edit pairs: each instruction is read again here, carried out by rules written anew, and compared with the second
scene; the pictures are compared pixel by pixel."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main
from zoo.data.edits import Edits, EditsConfig
from zoo.data.order import SampleOrder
from zoo.data.preview import CELL, sheet
from zoo.data.processor import images_of
from zoo.data.sample import data_hash, interleaved, parts_of
from zoo.data.scenes import ScenesConfig, owner
from zoo.data.scenes_edits import KINDS, LARGEST, Edit, apply, form, resized, wordings
from zoo.data.scenes_layout import BACKGROUNDS, Placed, Scene, beside, sizes
from zoo.data.stories import SIDES
from zoo.errors import ConfigError, DataError

SIDE = 48
FIELDS: dict[str, Any] = {"size": SIDE, "train_edits": 240, "val_edits": 60, "test_edits": 90}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(cache))


def make(**fields: Any) -> Edits:
    return EditsConfig(**{**FIELDS, **fields}).open(None)


@pytest.fixture(scope="module")
def edits() -> Edits:
    return make()


@pytest.fixture(scope="module")
def few() -> Edits:
    """Of few icons, which are soon rendered."""
    return make(kinds=24)


ALL = [f"{split}-{n:06d}" for split, count in (("train", 240), ("val", 60), ("test", 90)) for n in range(count)]


# -- reading an instruction again ----------------------------------------------------------------------------------

OF = r"(?P<side>left of|right of|above|below)"
ONE = r"an? (?P<{}>[a-z -]+) icon"
READINGS = (
    ("all", r"(remove all|delete all) (?P<name>[a-z -]+) icons"),
    ("all", r"(take every|erase every) (?P<name>[a-z -]+) icon( away)?"),
    ("corner", rf"(add|put|draw) {ONE.format('new')} in the (?P<where>(upper|lower) (left|right)) corner"),
    ("corner", rf"in the (?P<where>(upper|lower) (left|right)) corner, add {ONE.format('new')}"),
    ("swap", rf"put {ONE.format('new')} in place of the (?P<name>[a-z -]+)"),
    ("swap", rf"(replace|turn|swap) the (?P<name>[a-z -]+) (with|into|for) {ONE.format('new')}"),
    ("new", rf"(add|put|draw) {ONE.format('new')} {OF} the (?P<other>[a-z -]+)"),
    ("new", rf"{OF} the (?P<other>[a-z -]+), add {ONE.format('new')}"),
    ("colour", r"(make|change|turn) the background (to )?(?P<where>[a-z]+)"),
    ("colour", r"the background should be (?P<where>[a-z]+)"),
    ("edge", r"(move|put|push) the (?P<name>[a-z -]+) (to|at) the (?P<where>left|right|top|bottom) edge"),
    ("edge", r"the (?P<name>[a-z -]+) should be at the (?P<where>left|right|top|bottom) edge"),
    ("size", r"(make the|enlarge the|shrink the|reduce the|the) (?P<name>[a-z -]+?)(?P<where> larger| bigger| smaller|"
             r" in size| should be larger| should be smaller|)"),
    ("beside", rf"(move the|put the|place the|the) (?P<name>[a-z -]+?)( should be)? {OF} the (?P<other>[a-z -]+)"),
    ("gone", r"(remove|take|delete|erase) the (?P<name>[a-z -]+?)( away)?"),
)  # fmt: skip


def only(scene: Scene, name: str) -> Placed:
    found = [o for o in scene.objects if o.name == name]
    assert len(found) == 1, f"{name!r} is not one object"
    return found[0]


def level(size: int, other: Placed, side: str) -> tuple[int, int]:
    """Two units away on that side, middles level, kept on the canvas."""
    x, y = other.x + other.size / 2 - size / 2, other.y + other.size / 2 - size / 2
    if side == "left of":
        x = other.x - 2 - size
    elif side == "right of":
        x = other.x + other.size + 2
    elif side == "above":
        y = other.y - 2 - size
    else:
        y = other.y + other.size + 2
    return int(np.clip(x, 0, 64 - size)), int(np.clip(y, 0, 64 - size))


def carried_out(text: str, scene: Scene, icons: dict[str, str]) -> tuple[Scene, str]:
    """What the instruction makes of a scene, and which reading it is; icons: name -> hexcode."""
    names = {o.name for o in scene.objects}
    for kind, pattern in READINGS:
        found = re.fullmatch(pattern, text)
        words = found.groupdict() if found else {}
        if not found or not {words.get("name") or next(iter(names)), words.get("other") or next(iter(names))} <= names:
            continue  # the names decide where a pattern fits by chance
        objects = list(scene.objects)
        if kind == "colour":
            return replace(scene, background=words["where"]), kind
        if kind in ("all", "gone"):
            assert kind == "all" or only(scene, words["name"])
            return replace(scene, objects=tuple(o for o in objects if o.name != words["name"])), kind
        if kind == "corner":
            size = max(o.size for o in objects)
            x, y = 0 if "left" in words["where"] else 64 - size, 0 if "upper" in words["where"] else 64 - size
            return replace(scene, objects=(*objects, Placed(icons[words["new"]], words["new"], x, y, size))), kind
        if kind == "new":
            other = only(scene, words["other"])
            x, y = level(other.size, other, words["side"])
            return replace(scene, objects=(*objects, Placed(icons[words["new"]], words["new"], x, y, other.size))), kind
        old = only(scene, words["name"])
        place = objects.index(old)
        if kind == "swap":
            new = replace(old, icon=icons[words["new"]], name=words["new"])
        elif kind == "edge":
            x = {"left": 0, "right": 64 - old.size}.get(words["where"], old.x)
            y = {"top": 0, "bottom": 64 - old.size}.get(words["where"], old.y)
            new = replace(old, x=x, y=y)
        elif kind == "beside":
            x, y = level(old.size, only(scene, words["other"]), words["side"])
            new = replace(old, x=x, y=y)
        else:
            larger = text.startswith("enlarge") or words["where"].endswith(("larger", "bigger"))
            size = int(old.size * (1.5 if larger else 2 / 3) + 1e-9) // 4 * 4
            x, y = (int(np.clip(c + (old.size - size) / 2, 0, 64 - size)) for c in (old.x, old.y))
            new = replace(old, x=x, y=y, size=size)
        objects[place] = new
        return replace(scene, objects=tuple(objects)), kind
    raise AssertionError(f"cannot read {text!r}")


def test_the_instruction_applied_to_the_first_scene_gives_the_second_exactly(edits: Edits) -> None:
    kinds: Counter[str] = Counter()
    for id in ALL:
        pair = edits.pair(id)
        pool = edits.base.pools[edits.split_of(id)]
        icons = dict(zip(pool.names, pool.icons, strict=True))
        for text in pair.texts:
            made, kind = carried_out(text, pair.before, icons)
            assert made == pair.after, f"{id}: {text}"
            kinds[kind] += 1
        assert len(set(pair.texts)) == 4
        assert pair.before != pair.after
        assert pair.after.objects
    assert min(kinds[k] for k in ("all", "corner", "swap", "new", "colour", "edge", "size", "beside", "gone")) >= 12


def test_nothing_else_changes(few: Edits) -> None:
    """Outside the squares of what is changed the pictures are equal; a background changes behind all icons alike."""
    for id in ALL[:160]:
        pair, sample = few.pair(id), few.sample(id)
        first, second = (np.asarray(image) for image in sample.meta["images"])
        assert first.shape == second.shape == (SIDE, SIDE, 3)
        differs = (first != second).any(2)
        masks = few.masks(id)
        touched = np.zeros((SIDE, SIDE), bool)
        if pair.edit.kind == "background":
            assert (first[0, 0] == BACKGROUNDS[pair.before.background]).all() or not masks[0, 0, 0]
            full = few.renderer.visible(pair.before).sum(0) == 1
            assert not differs[full].any()
            assert differs[few.renderer.visible(pair.before).sum(0) == 0].all()
            continue
        changed = set(pair.before.objects) ^ set(pair.after.objects)
        for scene in (pair.before, pair.after):
            for placed in scene.objects:
                if placed in changed:
                    left, top, side = few.renderer.square(scene, placed)
                    touched[top : top + side, left : left + side] = True
        assert not differs[~touched].any(), id
        assert differs.sum() >= 4, id
        shown = masks.any(0)
        assert shown.any()
        assert touched[shown].all()


def test_changed_things_can_be_named_and_stay_apart(edits: Edits) -> None:
    for id in ALL:
        pair = edits.pair(id)
        for scene in (pair.before, pair.after):
            for n, a in enumerate(scene.objects):
                assert min(a.x, a.y) >= 0
                assert max(a.x, a.y) + a.size <= 64
                assert all(any(beside(a, b, d) for d in ("left", "right", "above", "below")) for b in scene.objects[:n])
        if pair.edit.anchor:
            side = pair.edit.where
            moved, anchor = only(pair.after, pair.edit.name), only(pair.after, pair.edit.anchor)
            assert beside(moved, anchor, side) is True
            if pair.edit.kind == "move":
                assert beside(only(pair.before, pair.edit.name), anchor, side) is not True


def test_samples_are_picture_instruction_picture(few: Edits) -> None:
    sample = few.sample("train-000005")
    assert parts_of(sample) == (0, sample.texts[0], 1)
    assert sample.meta["given"] == 2
    shown = interleaved(sample)
    assert shown[0] is sample.image is images_of(sample)[0]
    assert shown[2] is images_of(sample)[1]
    pair = few.pair("train-000005")
    for place, scene in ((0, pair.before), (1, pair.after)):
        assert np.array_equal(np.asarray(images_of(sample)[place]), few.renderer.image(scene))
    assert [o["name"] for o in sample.meta["after"]["objects"]] == [o.name for o in pair.after.objects]
    assert sample.meta["edit"]["form"] == form(pair.edit)
    assert len(sample.meta["captions"]) == 2
    alone = few.text_sample("train-000005")
    assert alone.image is None
    assert parts_of(alone) == parts_of(sample)


def test_kinds_are_drawn_equally_often() -> None:
    source = make(train_edits=1200)
    counts = Counter(source.pair(id).edit.kind for id in source.ids("train"))
    assert set(counts) == set(KINDS)
    assert max(abs(n - 200) for n in counts.values()) < 55  # 4 standard deviations
    forms = Counter(form(source.pair(id).edit) for id in source.ids("train"))
    for a, b in (("resize larger", "resize smaller"), ("move beside", "move edge"), ("add beside", "add corner")):
        assert 0.6 < forms[a] / forms[b] < 1.7


@pytest.mark.parametrize("icons", ["heldout", "train"])
def test_splits_share_no_picture(icons: Any) -> None:
    source = make(icons=icons, train_edits=1500)
    shown: dict[str, set[Any]] = {}
    for split in ("train", "val", "test"):
        pairs = [source.pair(id) for id in source.ids(split)]
        shown[split] = {(s.background, frozenset(s.objects)) for p in pairs for s in (p.before, p.after)}
        if icons == "train":
            assert all(owner(s) == split for p in pairs for s in (p.before, p.after))
    assert shown["train"].isdisjoint(shown["test"] | shown["val"])
    assert shown["val"].isdisjoint(shown["test"])
    if icons == "heldout":
        names = {split: {o.icon for _, objects in found for o in objects} for split, found in shown.items()}
        assert names["train"].isdisjoint(names["test"] | names["val"])


def test_an_id_and_the_seed_decide_everything() -> None:
    a, b = make(kinds=24), make(kinds=24, size=96, train_edits=7)
    for id in a.ids("train")[:7]:
        assert a.pair(id) == b.pair(id)
    assert b.sample("train-000000").meta["images"][1].size == (96, 96)
    other = make(kinds=24, seed=1)
    assert sum(a.pair(id) == other.pair(id) for id in a.ids("train")[:30]) == 0
    assert data_hash(a, "train") != data_hash(other, "train")
    assert make(edits="add").version != a.version
    again = pickle.loads(pickle.dumps(a))
    assert again.pair("val-000003") == a.pair("val-000003")
    plain = make()
    texts = " | ".join(plain.pair(id).texts[0] for id in ("train-000000", "train-000001", "train-000002"))
    assert texts == RECORDED  # the same on every machine: raise RULES when this changes


RECORDED = "delete all black flag icons | put a gloves icon in the lower right corner | put the microbe at the top edge"


def test_wordings_say_the_same(edits: Edits) -> None:
    assert wordings(Edit("add", (), (), "owl", where="upper left"))[0] == "add an owl icon in the upper left corner"
    assert wordings(Edit("move", (0,), (), "cat", where="at above"))[0] == "move the cat to the top edge"
    assert wordings(Edit("move", (0,), (), "cat", where="right", anchor="dog"))[3] == (
        "the cat should be right of the dog"
    )
    assert wordings(Edit("remove", (0, 2), (), "cat"))[1] == "take every cat icon away"
    assert wordings(Edit("replace", (0,), (), "cat", "owl"))[1] == "turn the cat into an owl icon"


def test_sides_stay_those_of_scenes() -> None:
    assert max(sizes(1)) == LARGEST
    small, large = Placed("a", "a", 0, 0, min(sizes(16))), Placed("a", "a", 8, 8, LARGEST)
    assert resized(small, "smaller") is None
    assert resized(large, "larger") is None
    assert resized(large, "smaller") == Placed("a", "a", 16, 16, 32)
    assert set(SIDES) == set(sizes(4))


def test_apply_leaves_order_and_the_rest() -> None:
    a, b, c = (Placed(n, n, 20 * i, 0, 16) for i, n in enumerate("abc"))
    scene = Scene((a, b, c))
    moved = replace(b, y=30)
    assert apply(Edit("move", (1,), (moved,), "b"), scene).objects == (a, moved, c)
    assert apply(Edit("remove", (0, 2), (), "a"), scene).objects == (b,)
    assert apply(Edit("add", (), (moved,), "b"), scene).objects == (a, b, c, moved)
    assert apply(Edit("background", where="pink"), scene) == Scene((a, b, c), background="pink")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"edits": "add+removal"}, "unknown kind 'removal'; did you mean remove or move?"),
        ({"edits": "remove", "objects": "1"}, "needs two objects"),
        ({"objects": "4..9"}, "at most 8"),
        ({"train_edits": -1}, "train_edits = -1"),
        ({"size": 8}, "16 to 2048 pixels"),
    ],
)
def test_mistakes_are_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        make(**fields)
    assert "\n" not in str(error.value)


def test_few_objects_and_unknown_ids(edits: Edits) -> None:
    one = make(objects="1")
    assert {one.pair(id).edit.kind for id in one.ids("train")[:60]} == set(KINDS) - {"remove"}
    many = make(objects="8", edits="add+move")
    assert {many.pair(id).edit.kind for id in many.ids("train")[:30]} == {"add", "move"}
    for wrong in ("train-000240", "train-1", "nothing-000000", ""):
        with pytest.raises(DataError, match="unknown id"):
            edits.pair(wrong)


def test_blank_and_text_only(few: Edits) -> None:
    blank = EditsConfig(**FIELDS, kinds=24, blank_images=True).build().sample("val-000000")
    assert all((np.asarray(image) == 255).all() for image in blank.meta["images"])
    alone = EditsConfig(**FIELDS, kinds=24, text_only=True).build().sample("val-000000")
    assert interleaved(alone) == [few.pair("val-000000").texts[0]]


def test_preview_shows_pictures_in_order(few: Edits, tmp_path: Path) -> None:
    ids = [place.id for place in SampleOrder(few.ids("train"), 0).slice(0, 3)]
    page = sheet(few, ids)
    assert page.height > 3 * CELL * 3 // 4
    out = tmp_path / "sheet.png"
    assert main(["data", "preview", "openmoji-edits,edits=add,kinds=24", "--count", "2", "--out", str(out)]) == 0
    assert Image.open(out).width > 2 * CELL * 3 // 4


def test_scene_prompts_are_one_each_and_name_the_colour() -> None:
    both = {
        how: ScenesConfig(size=SIDE, background="coloured", train_scenes=60, captions=how).open(None)
        for how in ("all", "first")
    }
    for id in both["all"].ids("train"):
        scene, every = both["all"].scene(id), both["all"].text_sample(id).texts
        (text,) = both["first"].text_sample(id).texts
        assert text.startswith(every[0])
        assert (f"on a {scene.background}" in text.replace("an orange", "a orange")) == (scene.background != "white")
    assert both["all"].version != both["first"].version
    assert "captions" not in both["all"].version
