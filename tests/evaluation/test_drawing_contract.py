"""The contracts of what draws images pass what holds them and name what does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from zoo.capabilities import CAPABILITIES, capabilities_of
from zoo.evaluation.contract import check_capabilities
from zoo.sampling.text import streams
from zoo.testing.recipes import _check_drawn

TEXTS = ["a", "the square", "two"]
IMAGES = [Image.new("RGB", (8, 8))] * 3


class Drawer:
    """Draws noise that follows from the seed, the row and the text's length; ``fault`` breaks one promise."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def generate_images(
        self, texts: Sequence[str], *, seed: int = 0, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        rows = [
            torch.rand(3, 4, 4, generator=stream) / len(text)
            for text, stream in zip(texts, streams(seed, 0, len(texts)), strict=True)
        ]
        images = torch.stack(rows)
        return {
            "": lambda: images,
            "range": lambda: images * 3,
            "nan": lambda: images * torch.nan,
            "dtype": lambda: images.double(),
            "shape": lambda: images[:, 0],
            "graph": lambda: images * torch.ones(1, requires_grad=True),
            "batch": lambda: images / len(texts),
            "global": lambda: images * torch.rand(()),
        }[self.fault]()


def test_what_holds_passes() -> None:
    assert check_capabilities(Drawer(), IMAGES, TEXTS) == ("generate_images",)
    draw = Drawer().generate_images
    _check_drawn(draw(TEXTS), draw(TEXTS[:1]), draw(TEXTS), "it")


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("range", "not within 0 and 1"),
        ("nan", "not within 0 and 1"),
        ("dtype", "float64"),
        ("shape", "(3, 4, 4)"),
        ("graph", "gra"),
        ("batch", "batch"),
        ("global", "global random state|same seed"),
    ],
)
def test_what_does_not_is_named(fault: str, why: str) -> None:
    pattern = why.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(AssertionError, match=pattern):
        check_capabilities(Drawer(fault), IMAGES, TEXTS)
    draw = Drawer(fault).generate_images
    with pytest.raises(AssertionError, match=pattern):
        _check_drawn(draw(TEXTS), draw(TEXTS[:1]), draw(TEXTS), "it")


def test_texts_and_images_in_one_order() -> None:
    image = torch.full((3, 4, 4), 0.5)
    rows: list[list[Any]] = [["a cat", image], [image], ["and so on"]]
    _check_drawn(rows, rows[:1], [list(row) for row in rows], "it")
    for wrong, why in (
        ([["a cat", image + 1], *rows[1:]], "not within 0 and 1"),
        ([["a cat", image[0]], *rows[1:]], "image of shape"),
        ([[3, image], *rows[1:]], "int among texts and images"),
    ):
        with pytest.raises(AssertionError, match=why):
            _check_drawn(wrong, wrong[:1], wrong, "it")
    with pytest.raises(AssertionError, match="row 2 differs from the same seed: 'and so on' and 'or not'"):
        _check_drawn(rows, rows[:1], [*rows[:2], ["or not"]], "it")
    with pytest.raises(AssertionError, match="row 0 depends on what shares its batch"):
        _check_drawn(rows, [["a cat"]], rows, "it")


def test_every_protocol_has_its_method_for_a_name() -> None:
    for name in ("generate_images", "inpaint_images", "edit_images", "generate_interleaved"):
        methods = {name, "prepared_images"} if name == "inpaint_images" else {name}
        model = type("Model", (), dict.fromkeys(methods, lambda self: None))()
        assert capabilities_of(model) == (name,)
        assert name in CAPABILITIES
