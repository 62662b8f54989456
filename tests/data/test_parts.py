"""Samples as one order of texts and images, and samples without their images."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from zoo.data.mixture import MixtureConfig
from zoo.data.openmoji import OpenMojiConfig
from zoo.data.sample import ArraySource, BadSample, Sample, TextOnly, interleaved, parts_of
from zoo.errors import ConfigError, DataError

RED, BLUE = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")


def story(**meta: Any) -> Sample:
    return Sample("s", RED, ("all of it",), {"images": (RED, BLUE), "parts": ("a", 0, "b", 1), "given": 1, **meta})


def test_parts_hold_each_image_in_its_place() -> None:
    assert parts_of(story()) == ("a", 0, "b", 1)
    shown = interleaved(story())
    assert shown[0] == "a"
    assert shown[1] is RED
    assert shown[2] == "b"
    assert shown[3] is BLUE


def test_plain_samples_are_an_image_and_its_first_text() -> None:
    assert parts_of(Sample("x", RED, ("one", "two"))) == (0, "one")
    assert interleaved(Sample("x", RED, ("one",))) == [RED, "one"]
    assert parts_of(Sample("x", None, ("one",))) == ("one",)
    assert parts_of(Sample("x", RED)) == (0,)


@pytest.mark.parametrize("parts", [("a", 1, 0), (0, 0), (0, 2), (1,), ("a", None), (0, True)])
def test_parts_in_disorder_are_refused(parts: tuple[Any, ...]) -> None:
    with pytest.raises(DataError, match="of its images in order"):
        parts_of(story(parts=parts))


def test_images_that_parts_do_not_name_and_given_out_of_range() -> None:
    with pytest.raises(DataError, match="name 1 images, and it has 2"):
        interleaved(story(parts=("a", 0)))
    for wrong in (5, -1, "2"):
        with pytest.raises(DataError, match="from 0 to its 4 parts"):
            parts_of(story(given=wrong))


class One:
    name, version, licence, max_bad = "one", "1", "CC0-1.0", 0

    def __init__(self, sample: Sample) -> None:
        self.only = sample

    def ids(self, split: str) -> list[str]:
        return [self.only.id]

    def sample(self, id: str) -> Sample:
        return self.only


def test_text_only_takes_the_images_out_of_parts_too() -> None:
    left = TextOnly(One(story())).sample("s")
    assert left.image is None
    assert "images" not in left.meta
    assert left.texts == ("all of it",)
    assert interleaved(left) == ["a", "b"]
    assert left.meta["given"] == 0
    with pytest.raises(BadSample, match="no text"):
        TextOnly(One(Sample("x", RED))).sample("x")


def test_text_only_of_any_source_renders_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.data.openmoji._load_or_render", lambda *_: pytest.fail("rendered"))
    plain, texts = OpenMojiConfig().build(16), OpenMojiConfig(text_only=True).build(16)
    assert texts.ids("val") == plain.ids("val")
    assert texts.version == plain.version + "/text-only"
    id = texts.ids("val")[0]
    assert texts.sample(id).texts == plain.text_sample(id).texts  # type: ignore[attr-defined]
    assert not isinstance(texts, ArraySource)
    assert not hasattr(texts, "prepare")
    with pytest.raises(ConfigError, match="set one of the two"):
        OpenMojiConfig(text_only=True, blank_images=True).build(16)


def test_text_only_within_and_around_a_mixture() -> None:
    inner = MixtureConfig(sources={"icons": {"name": "openmoji", "text_only": True}}).build(16)
    outer: Any = MixtureConfig(sources={"icons": {"name": "openmoji"}}, text_only=True).build(16)
    id = inner.ids("test")[3]
    assert inner.sample(id).image is None
    assert inner.sample(id).texts
    assert outer.sample(id).image is None
    assert outer.order("train", 0).slice(0, 3)
