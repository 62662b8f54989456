"""Scenes are checked by cutting out and naming what they show: right on real scenes, near nought on anything else."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from zoo.data.scenes import Scenes, ScenesConfig
from zoo.errors import ConfigError, DataError
from zoo.evaluation import drawing, scene_check, scene_gallery
from zoo.evaluation.catalogue import METRICS
from zoo.evaluation.scene_check import SceneCheckConfig, scene_icons
from zoo.evaluation.scene_facts import Facts, Found, check, facts_of, holds, stated
from zoo.evaluation.scene_gallery import Gallery, Space
from zoo.evaluation.scene_objects import best_cut, components, foreground, framed, groups_of, grown, softened

SCENES = 30


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    """Two or three icons at 64 pixels, rendered into a cache of their own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("ZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
    config = ScenesConfig(size=64, objects="2..3", questions="none", test_scenes=SCENES, background="coloured")
    source = config.build()
    assert isinstance(source, Scenes)
    source.prepare()
    scene_icons(source)
    patch.undo()
    return source


class Pixels:
    """An evaluator whose space is the picture itself at 12 x 12 pixels."""

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        small = [np.asarray(i.resize((12, 12), Image.Resampling.BOX), np.float32) / 255 - 1 for i in images]
        return torch.nn.functional.normalize(torch.from_numpy(np.stack(small)).flatten(1) + 1e-3, dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        raise AssertionError("scenes are checked by pictures alone")


class Showing:
    """Draws for each text the picture that ``picture`` makes of its scene's."""

    def __init__(self, source: Scenes, picture: Any) -> None:
        known = {source.text_sample(i).texts[0]: n for n, i in enumerate(source.ids("test"))}
        self.pictures = {text: picture(source.sample(f"test-{n:06d}").image, n, source) for text, n in known.items()}

    def generate_images(
        self, texts: Sequence[str], *, seed: int = 0, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        arrays = [torch.from_numpy(np.array(self.pictures[text])) for text in texts]
        return torch.stack(arrays).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def gallery(scenes: Scenes) -> Gallery:
    """The icons of the test scenes, and every sixth of the others."""
    used = {o["name"] for i in scenes.ids("test") for o in scenes.text_sample(i).meta["objects"]}
    icons = {name: icon for n, (name, icon) in enumerate(scene_icons(scenes).items()) if n % 6 == 0 or name in used}
    return Gallery(Pixels(), list(icons.values()), list(icons))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch, gallery: Gallery) -> None:
    monkeypatch.setattr(scene_gallery, "Gallery", lambda judge, icons, names, batch: gallery)
    monkeypatch.setattr(scene_check, "load_evaluator", lambda path, task, model: Pixels())
    monkeypatch.setattr(drawing, "evaluator_hash", lambda path, task: "hash")


def measure(source: Any, picture: Any, **fields: Any) -> Any:
    return SceneCheckConfig(evaluator="judge", items=0, **fields).build().run(Showing(source, picture), source, "test")


# -- what is stated ------------------------------------------------------------------------------------------------


def test_every_caption_states_what_is_true(scenes: Scenes) -> None:
    """Each of the source's captions, read back, holds for the objects that the scene is made of."""
    seen = {"positions": 0.0, "counts": 0.0}
    for id in scenes.ids("test"):
        sample = scenes.text_sample(id)
        truth = [Found(o["name"], tuple(o["box"])) for o in sample.meta["objects"]]
        names = list(dict.fromkeys(f.name for f in truth))
        for text in sample.texts:
            facts = facts_of(text, names)
            right, wanted = check(facts, truth), stated(facts)
            assert {k.removeprefix("right_"): v for k, v in right.items()} == {
                k.removeprefix("stated_"): v for k, v in wanted.items()
            }, text
            for key in seen:
                seen[key] += wanted[f"stated_{key}"]
        assert facts_of(sample.texts[0], names).names == tuple(dict.fromkeys(names)) or len(names) == 2
    assert seen["positions"] > 50
    assert seen["counts"] > 150


def test_kinds_of_captions() -> None:
    names = ["cat", "big cat", "salt and pepper"]
    assert facts_of("two cat icons left of a big cat icon, on a pink background", names) == Facts(
        ("cat", "big cat"), {"cat": 2, "big cat": 1}, (("cat", "left", "big cat"),)
    )
    assert facts_of("a salt and pepper icon, three cat icons and a big cat icon", names) == Facts(
        ("salt and pepper", "cat", "big cat"), {"salt and pepper": 1, "cat": 3, "big cat": 1}, ()
    )
    line = facts_of("from top to bottom: cat, big cat, salt and pepper, cat", names)
    assert line.counts == {"cat": 2, "big cat": 1, "salt and pepper": 1}
    assert line.relations == (("big cat", "above", "salt and pepper"),)
    assert facts_of("the big cat is right of the cat", names) == Facts(
        ("big cat", "cat"), {}, (("big cat", "right", "cat"),)
    )
    for text in ("a dog icon", "what is left of the cat?", ""):
        with pytest.raises(ValueError, match="no caption"):
            facts_of(text, names)


def test_what_holds() -> None:
    a, b = Found("a", (0, 10, 20, 30)), Found("b", (30, 10, 50, 30))
    assert holds(a, "left", b)
    assert holds(b, "right", a)
    assert not any(holds(a, d, b) for d in ("right", "above", "below"))
    near = Found("b", (3, 10, 23, 30))  # 3 of 40 pixels: within the slack
    assert not holds(a, "left", near)
    facts = Facts(("a", "b"), {"a": 1, "b": 2}, (("a", "left", "b"),))
    assert check(facts, [a, b, Found("c", (0, 0, 5, 5))]) == {
        "right_objects": 2.0, "right_counts": 1.0, "right_positions": 1.0, "right_scenes": 0.0,
    }  # fmt: skip
    both = [a, b, Found("b", (30, 40, 50, 60))]
    assert check(facts, both)["right_scenes"] == 1.0
    assert check(facts, [*both[:2], Found("b", (0, 40, 15, 60))])["right_positions"] == 0.0  # one b is not right of a
    assert check(facts, [b]) == {
        "right_objects": 1.0, "right_counts": 0.0, "right_positions": 0.0, "right_scenes": 0.0,
    }  # fmt: skip
    assert sum(check(facts, []).values()) == 0


# -- pixels to objects ---------------------------------------------------------------------------------------------


def flooded(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    left = {(int(r), int(c)) for r, c in np.argwhere(mask)}
    found = []
    while left:
        waiting, own = deque([left.pop()]), set()
        while waiting:
            r, c = waiting.popleft()
            own.add((r, c))
            around = {(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= around
            waiting.extend(around)
        found.append(own)
    return sorted(found, key=min)


@pytest.mark.parametrize("density", [0.1, 0.35, 0.6, 1.0])
def test_components_are_what_a_flood_fill_finds(density: float) -> None:
    rng = np.random.default_rng(0)
    for shape in ((20, 31), (1, 9), (9, 1), (33, 33)):
        mask = rng.random(shape) < density
        numbers = components(mask)
        assert bool(((numbers > 0) == mask).all())
        mine = [{(int(r), int(c)) for r, c in np.argwhere(numbers == n)} for n in np.unique(numbers) if n]
        assert sorted(mine, key=min) == flooded(mask)


def test_growing_is_a_square() -> None:
    mask = np.random.default_rng(1).random((17, 23)) < 0.05
    for radius in (0, 1, 3, 40):
        wide = torch.nn.functional.max_pool2d(
            torch.from_numpy(mask)[None].float(), 2 * min(radius, 22) + 1, 1, min(radius, 22)
        )
        assert bool((grown(mask, radius) == (wide[0].numpy() > 0)).all())


def test_the_background_is_the_ring() -> None:
    pixels = np.full((32, 32, 3), (200, 150, 90), np.uint8)
    pixels[10:20, 12:25] = (10, 20, 30)
    pixels[0, :10] = 0  # an object at the rim does not change the median
    mask = foreground(pixels)
    assert mask.sum() == 130 + 10
    assert foreground(np.full((16, 16, 3), 77, np.uint8)).sum() == 0


def test_groups_join_step_by_step() -> None:
    mask = np.zeros((64, 64), bool)
    mask[10:20, 10:20] = mask[10:20, 23:33] = True  # three pixels apart
    mask[50:60, 10:20] = True  # far from both
    mask[40, 40] = True  # a speck
    roots = groups_of(mask)
    assert sorted((g.box, g.area, len(g.parts)) for g in roots) == [
        ((10, 10, 33, 20), 200, 2),
        ((10, 50, 20, 60), 100, 0),
    ]
    pair = next(g for g in roots if g.parts)
    left, right = pair.parts
    value, chosen = best_cut(pair, {id(pair): 0.9, id(left): 0.9, id(right): 0.9})
    assert chosen == [pair]
    assert value == pytest.approx(180)
    value, chosen = best_cut(pair, {id(pair): 0.5, id(left): 0.9, id(right): 0.8})
    assert chosen == [left, right]
    assert value == pytest.approx(170)
    assert best_cut(pair, {id(pair): 0.5, id(left): 1.0, id(right): -1.0})[1] == [pair]
    assert groups_of(np.zeros((8, 8), bool)) == []


def test_whitening_drops_what_differs_within_an_icon() -> None:
    """Two directions vary between renderings of one icon, ten times as much as icons differ in a third."""
    generator = torch.Generator().manual_seed(0)
    icons = torch.randn(50, 3, generator=generator) * torch.tensor([0.0, 0.0, 1.0])
    views = icons + torch.randn(6, 50, 3, generator=generator) * torch.tensor([10.0, 10.0, 0.05])
    space = Space(views)
    fresh = icons + torch.randn(50, 3, generator=generator) * torch.tensor([10.0, 10.0, 0.05])
    sign = (space(fresh) * space(icons)).sum(-1)
    plain = torch.nn.functional.cosine_similarity(fresh - views.mean((0, 1)), icons - views.mean((0, 1)))
    assert float(sign.median()) > 0.6 > 0.3 > float(plain.median())


# -- whole -----------------------------------------------------------------------------------------------------------


def test_real_scenes_are_read(scenes: Scenes, judged: None) -> None:
    result = measure(scenes, lambda image, n, source: image)
    m = result.metrics
    for what in ("objects", "counts", "positions", "scenes"):
        assert m[what] == m[f"{what}_real"]
        assert m[f"{what}_blurred"] <= m[f"{what}_real"] + 0.02
    assert m["objects"] > 0.9
    assert m["counts"] > 0.9
    assert m["positions"] > 0.8
    assert m["objects_blurred"] > 0.75
    assert m["objects_other"] < 0.1
    assert m["images"] == SCENES
    assert {s["kind"] for s in result.samples} == {"drawn scene"}
    for name, info in METRICS["scene-check"].items():
        total = sum(row[info.numerator] for row in result.items) / sum(row[info.denominator] for row in result.items)
        assert m[name] == pytest.approx(total)


def test_what_is_no_scene_counts_for_nothing(scenes: Scenes, judged: None) -> None:
    rng = np.random.default_rng(0)

    def noise(image: Any, n: int, source: Any) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))

    def blobs(image: Any, n: int, source: Any) -> Image.Image:
        pixels = np.full((64, 64, 3), 255, np.uint8)
        for left, top in rng.integers(4, 40, (3, 2)):
            pixels[top : top + 16, left : left + 16] = rng.integers(0, 200, 3)
        return Image.fromarray(pixels)

    blank = measure(scenes, lambda image, n, source: Image.new("RGB", (64, 64), "white")).metrics
    assert blank["objects"] == blank["counts"] == blank["positions"] == blank["scenes"] == 0
    assert blank["objects_real"] > 0.9
    for picture in (noise, blobs):
        m = measure(scenes, picture).metrics
        assert m["objects"] < 0.05
        assert m["scenes"] == 0


def test_parts_of_a_scene_count_in_part(scenes: Scenes, judged: None) -> None:
    def mirrored(image: Any, n: int, source: Any) -> Image.Image:
        """Every icon in its mirrored place, itself unchanged."""
        left = Image.new("RGB", image.size, image.getpixel((0, 0)))
        for o in source.text_sample(f"test-{n:06d}").meta["objects"]:
            box = tuple(o["box"])
            left.paste(image.crop(box), (64 - box[2], 64 - box[3]))
        return left

    def one_less(image: Any, n: int, source: Any) -> Image.Image:
        without = image.copy()
        box = source.text_sample(f"test-{n:06d}").meta["objects"][0]["box"]
        without.paste(image.getpixel((0, 0)), (box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1))
        return without

    turned = measure(scenes, mirrored).metrics
    assert turned["objects"] > 0.85
    assert turned["positions"] < 0.1
    fewer = measure(scenes, one_less).metrics
    assert fewer["scenes"] < 0.05 < fewer["objects"] < 0.8
    assert measure(scenes, lambda image, n, source: softened(image, 32)).metrics["objects"] > 0.75


def test_the_threshold_keeps_the_share_it_says(scenes: Scenes, gallery: Gallery) -> None:
    gallery.least = -1.0
    images = [scenes.sample(i).image for i in scenes.ids("test")]
    every = gallery.objects(images)
    likeness = torch.tensor([v for own in gallery.find(images) for _, v in own])
    gallery.least = float(likeness.quantile(0.25))
    kept = gallery.objects(images)
    assert sum(map(len, kept)) == pytest.approx(0.75 * sum(map(len, every)), abs=1.5)
    assert gallery.find([Image.new("RGB", (64, 64))]) == [[]]


def test_bad_input(scenes: Scenes, judged: None, make_source: Any) -> None:
    with pytest.raises(DataError, match="use data=openmoji-scenes"):
        SceneCheckConfig(evaluator="judge").build().run(None, make_source(), "test")
    with pytest.raises(ConfigError, match="keep = 0"):
        SceneCheckConfig(keep=0.0)
    with pytest.raises(ConfigError, match="none is given"):
        SceneCheckConfig().check()
    from zoo.data.sample import BlankImages

    task = SceneCheckConfig(evaluator="judge").build()
    with pytest.raises(DataError, match="finds no object in the real scenes"):
        task.run(None, BlankImages(scenes), "test")
    assert framed(np.eye(4, dtype=bool)).box == (0, 0, 4, 4)
