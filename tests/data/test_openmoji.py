from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from zoo.data.openmoji import OpenMoji, OpenMojiConfig, _load_or_render, parse
from zoo.data.sample import ArraySource, BlankImages, Source, data_hash
from zoo.errors import ConfigError, DataError


@pytest.mark.parametrize("scheme", ["random", "compositional"])
def test_splits_are_disjoint_complete_and_of_the_stated_size(scheme: str) -> None:
    source = OpenMojiConfig(split_scheme=scheme).open(None)
    parts = {split: source.ids(split) for split in ("train", "val", "test")}
    assert {k: len(v) for k, v in parts.items()} == {"train": 3353, "val": 200, "test": 400}
    assert len(set().union(*parts.values())) == 3953
    assert OpenMojiConfig(split_scheme=scheme).open(None).ids("test") == parts["test"]


def test_names_are_distinct_and_clean(icons: OpenMoji) -> None:
    names = [n for split in ("train", "val", "test") for n in icons.names(split)]
    assert len(set(names)) == 3953
    assert not any(":" in n or "_" in n for n in names)
    assert icons.sample("1F9D1-200D-1F33E").texts == ("farmer",)


def test_compositional_holds_out_combinations_but_no_single_value() -> None:
    source = OpenMojiConfig(split_scheme="compositional").open(None)
    keys = ("role", "skin_tone", "gender")
    train = [source.attributes(i) for i in source.ids("train")]
    seen = {key: {a[key] for a in train if key in a} for key in keys}
    combinations = {tuple(a.get(k) for k in keys) for a in train}
    for split in ("val", "test"):
        for id in source.ids(split):
            held = source.attributes(id)
            assert set(held) == set(keys)
            assert tuple(held[k] for k in keys) not in combinations
            assert all(held[k] in seen[k] for k in keys)
    assert seen["skin_tone"] == {"none", "light", "medium-light", "medium", "medium-dark", "dark"}
    assert seen["gender"] == {"man", "woman", "person"}


@pytest.mark.parametrize(
    ("hexcode", "expected"),
    [
        ("1F469-1F3FF-200D-1F33E", ("1F9D1-200D-1F33E", "dark", "woman")),
        ("1F3C3-1F3FB-200D-2642-FE0F", ("1F3C3", "light", "man")),
        ("1F3C3-200D-2640-FE0F-200D-27A1-FE0F", ("1F3C3-200D-27A1", "none", "woman")),
        ("1F33E", ("1F33E", "none", "person")),
        ("1F469-1F3FB-200D-1F91D-200D-1F468-1F3FF", None),
        ("1F3FB", None),
    ],
)
def test_attributes_are_read_from_code_points(hexcode: str, expected: tuple[str, str, str] | None) -> None:
    assert parse(hexcode) == expected


def test_an_object_has_no_attributes_and_variants_share_a_cluster(icons: OpenMoji) -> None:
    assert icons.attributes("1F33E") == {}
    dark, light = icons.text_sample("1F469-1F3FF-200D-1F33E"), icons.text_sample("1F468-1F3FB-200D-1F33E")
    assert dark.meta["cluster"] == light.meta["cluster"] == "1F9D1-200D-1F33E"
    assert dark.meta["name"] == "woman farmer dark skin tone"


def test_images_and_samples_agree_and_show_something_on_white(icons: OpenMoji) -> None:
    ids = icons.ids("test")[:20]
    pixels = icons.images(ids)
    assert pixels.shape == (20, 16, 16, 3)
    assert pixels.dtype == np.uint8
    for row, id in enumerate(ids):
        assert np.array_equal(np.asarray(icons.sample(id).image), pixels[row])
        assert pixels[row].std() > 5
    assert (icons.pixels[:, 0, 0] == 255).all(-1).mean() > 0.9
    assert isinstance(icons, ArraySource)


def test_a_worker_gets_the_source_without_its_pixels(icons: OpenMoji) -> None:
    assert len(pickle.dumps(icons)) < 2_000_000


def _render(cache: str, files: list[Path], results: multiprocessing.Queue[float]) -> None:
    os.environ["ZOO_CACHE"] = cache
    results.put(float(_load_or_render(files, 12).sum()))


def test_processes_rendering_at_once_leave_one_whole_file(tmp_path: Path, icons: OpenMoji) -> None:
    files = [icons._files[i] for i in icons.ids("val")]
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[float] = context.Queue()
    workers = [context.Process(target=_render, args=(str(tmp_path), files, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    sums = {results.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(sums) == 1
    assert [p.suffix for p in (tmp_path / "openmoji").iterdir()] == [".npy"]


def test_a_damaged_cache_is_rendered_again(tmp_path: Path, icons: OpenMoji, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    files = [icons._files[i] for i in icons.ids("val")[:5]]
    first = np.array(_load_or_render(files, 12))
    path = next((tmp_path / "openmoji").iterdir())
    path.write_bytes(path.read_bytes()[:300])
    assert np.array_equal(_load_or_render(files, 12), first)
    assert isinstance(_load_or_render(files, 12), np.memmap)


def test_an_unwritable_cache_costs_only_time(
    tmp_path: Path, icons: OpenMoji, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "file"))
    pixels = _load_or_render([icons._files[i] for i in icons.ids("val")[:3]], 12)
    assert pixels.shape == (3, 12, 12, 3)
    assert "ZOO_CACHE" in caplog.text


def test_wrong_options_are_named() -> None:
    with pytest.raises(ConfigError, match="'germn'"):
        OpenMojiConfig(language="germn").open(None)
    with pytest.raises(ConfigError, match="name"):
        OpenMojiConfig(caption="an icon").open(None)
    with pytest.raises(ConfigError, match="did you mean test"):
        OpenMojiConfig().open(None).ids("tests")
    with pytest.raises(DataError, match="1F33E"):
        OpenMojiConfig().open(None).sample("1F33EE")


def test_other_languages_and_captions() -> None:
    german = OpenMojiConfig(language="de", caption="ein Bild: {name}").build(32)
    assert german.ids("test") == OpenMojiConfig().build(32).ids("test")
    assert german.text_sample("1F33B").texts == ("ein Bild: sonnenblume",)  # type: ignore[attr-defined]
    assert german.version != OpenMojiConfig().build(32).version


def test_blank_control_changes_only_the_images(icons: OpenMoji) -> None:
    blank = BlankImages(icons)
    id = icons.ids("test")[3]
    assert isinstance(blank, ArraySource)
    assert isinstance(blank, Source)
    image = blank.sample(id).image
    assert image is not None
    assert np.asarray(image).tolist() == np.full((16, 16, 3), 255).tolist()
    assert (blank.images([id, id]) == 255).all()
    assert blank.sample(id).texts == icons.sample(id).texts
    assert data_hash(blank, "test") == data_hash(icons, "test")
    assert blank.names("test") == icons.names("test")
    again = pickle.loads(pickle.dumps(blank))
    assert again.ids("val") == icons.ids("val")
    assert isinstance(OpenMojiConfig(blank_images=True).build(16), BlankImages)


def test_data_hash_tells_splits_and_schemes_apart(icons: OpenMoji) -> None:
    other = OpenMojiConfig(split_scheme="compositional").open(None)
    hashes = {data_hash(icons, "train"), data_hash(icons, "test"), data_hash(other, "train")}
    assert len(hashes) == 3
    assert data_hash(OpenMojiConfig(size=32).open(None), "train") == data_hash(icons, "train")
