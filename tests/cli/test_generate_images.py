"""zoo generate for pictures, with a model whose pictures show what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from zoo.capabilities import EditImages, GenerateImages, GenerateInterleaved, InpaintImages
from zoo.cli import main
from zoo.cli.drawing import mask_of
from zoo.data.images import ImageTransform
from zoo.errors import ConfigError, DataError

SIDE = 16


@dataclass
class Fake:
    """Draws one colour: red is the length of the text, green the seed, blue the steps."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    processor: Any = field(default_factory=lambda: SimpleNamespace(transform=ImageTransform(size=SIDE, mode="squash")))

    def _colours(self, texts: Sequence[str], seed: int, steps: int | None, guidance: float | None) -> Tensor:
        if steps is not None and steps < 1:
            raise ConfigError(f"steps = {steps}: expected at least 1")
        rows = torch.tensor([[len(text), seed, steps or 0] for text in texts]) / 255
        return rows[:, :, None, None].expand(-1, -1, SIDE, SIDE)

    def _call(self, **what: Any) -> None:
        self.calls.append(what)

    def generate_images(
        self, texts: Sequence[str], *, seed: int = 0, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        self._call(texts=list(texts), seed=seed, guidance=guidance)
        return self._colours(texts, seed, steps, guidance)

    def prepared_images(self, images: Sequence[Any]) -> Tensor:
        shown = [torch.from_numpy(np.array(i.resize((SIDE, SIDE)))).permute(2, 0, 1) for i in images]
        return torch.stack(shown) / 255

    def inpaint_images(
        self,
        images: Sequence[Any],
        masks: Tensor,
        texts: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        self._call(masks=masks, texts=list(texts), images=list(images))
        return torch.where(masks[:, None], self._colours(texts, seed, steps, guidance), self.prepared_images(images))

    def edit_images(
        self,
        images: Sequence[Any],
        instructions: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        self._call(images=list(images), texts=list(instructions))
        return self._colours(instructions, seed, steps, guidance)

    def generate_interleaved(
        self,
        prompts: Sequence[Sequence[Any]],
        *,
        max_images: int = 4,
        max_new_tokens: int = 64,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> list[list[str | Tensor]]:
        self._call(prompts=prompts, max_new_tokens=max_new_tokens)
        return [["then it left", *[torch.full((3, SIDE, SIDE), 0.25)] * max_images] for _ in prompts]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    module = SimpleNamespace(model=made, recipe=SimpleNamespace(name="fake"))
    monkeypatch.setattr("zoo.cli.commands.chat.load", lambda *_: module)
    return made


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., str]:
    def write(name: str, size: tuple[int, int] = (40, 30), colour: Any = (9, 99, 199)) -> str:
        path = tmp_path / name
        Image.new("RGB", size, colour).save(path)
        return str(path)

    return write


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path).convert("RGB"))


def test_the_fake_has_the_capabilities() -> None:
    for protocol in (GenerateImages, InpaintImages, EditImages, GenerateInterleaved):
        assert isinstance(Fake(), protocol)


def test_one_text_is_one_picture_as_it_is(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.png"
    options = ["--seed", "7", "--steps", "3", "--guidance", "2.5"]
    assert main(["generate", "m", "--text", "a cat", "--out", str(out), *options]) == 0
    assert (pixels(out) == (5, 7, 3)).all()
    assert pixels(out).shape == (SIDE, SIDE, 3)
    assert fake.calls == [{"texts": ["a cat"], "seed": 7, "guidance": 2.5}]
    assert capsys.readouterr().out == f"{out}: 1 image of fake, seed 7\n"


def test_several_texts_and_seeds_are_a_sheet(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.png"
    assert main(["generate", "m", "--text", "one", "--text", "three", "--count", "3", "--out", str(out)]) == 0
    assert [call["seed"] for call in fake.calls] == [0, 1, 2]
    page = pixels(out)
    for text in ("one", "three"):
        for seed in range(3):
            assert (page == (len(text), seed, 0)).all(2).sum() > 120 * 120
    assert "6 images of fake, seed 0, seed 1, seed 2" in capsys.readouterr().out


def test_inpainting_takes_a_mask_of_the_images_size(fake: Fake, files: Any, tmp_path: Path) -> None:
    image, out = files("a.png"), tmp_path / "x.png"
    hole = Image.new("L", (40, 30), 0)
    hole.paste(255, (20, 0, 40, 30))
    hole.save(tmp_path / "m.png")
    given = ["--image", image, "--mask", str(tmp_path / "m.png"), "--text", "word"]
    assert main(["generate", "m", *given, "--out", str(out)]) == 0
    mask = fake.calls[0]["masks"][0]
    assert mask.dtype == torch.bool
    assert mask[:, 8:].all()
    assert not mask[:, :8].any()
    assert (pixels(out)[:, 8:] == (4, 0, 0)).all()
    assert (pixels(out)[:, :8] == (9, 99, 199)).all()
    sheet = tmp_path / "sheet.png"
    assert main(["generate", "m", *given, "--text", "two", "--count", "2", "--out", str(sheet)]) == 0
    assert fake.calls[-1]["texts"] == ["word", "two"]
    assert len(fake.calls[-1]["images"]) == 2
    assert pixels(sheet).shape[1] > 3 * 128


def test_masks_go_the_way_of_the_image_or_are_taken_as_they_are() -> None:
    wide, transform = Image.new("RGB", (80, 40)), ImageTransform(size=SIDE, mode="crop")
    edge = Image.new("L", (80, 40), 0)
    edge.paste(255, (0, 0, 20, 40))  # cut away with the edges of the image
    edge.paste(200, (50, 0, 60, 40))
    found = mask_of(edge, wide, transform)
    assert found.shape == (SIDE, SIDE)
    assert found[:, 12:].all()
    assert not found[:, :11].any()
    own = Image.new("L", (SIDE, SIDE), 0)
    own.putpixel((3, 5), 255)
    assert mask_of(own, wide, transform).nonzero().tolist() == [[5, 3]]
    with pytest.raises(DataError, match="mask is 30 x 30 pixels, the image 80 x 40: expected"):
        mask_of(Image.new("L", (30, 30), 255), wide, transform)
    with pytest.raises(DataError, match="no white"):
        mask_of(Image.new("L", (80, 40), 100), wide, transform)


def test_edits_are_of_each_image(fake: Fake, files: Any, tmp_path: Path) -> None:
    a, b, out = files("a.png"), files("b.png", (20, 20), (200, 0, 0)), tmp_path / "x.png"
    assert main(["generate", "m", "--image", a, "--image", b, "--edit", "make it blue", "--out", str(out)]) == 0
    assert fake.calls[0]["texts"] == ["make it blue"] * 2
    assert [image.size for image in fake.calls[0]["images"]] == [(40, 30), (20, 20)]
    page = pixels(out)
    assert (page == (12, 0, 0)).all(2).sum() > 2 * 120 * 120
    assert (page == (200, 0, 0)).all(2).sum() > 120 * 120


def test_parts_are_continued(fake: Fake, files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.png"
    parts = ["--part", "once", "--part", f"@{files('a.png')}", "--part", "and"]
    assert main(["generate", "m", *parts, "--max-images", "2", "--max-new-tokens", "9", "--out", str(out)]) == 0
    (given,) = fake.calls[0]["prompts"]
    assert [type(part) is str for part in given] == [True, False, True]
    assert fake.calls[0]["max_new_tokens"] == 9
    assert (pixels(out) == (64, 64, 64)).all(2).sum() > 2 * 120 * 120
    assert capsys.readouterr().out.splitlines() == ["then it left", f"{out}: 2 images of fake"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "x"], "--out FILE.png"),
        (["--text", "x", "--out", "x.jpg"], "ending in .png"),
        (["--text", "x", "--out", "{dir}/no/x.png"], "in a folder that exists"),
        (["--text", " ", "--out", "{dir}/x.png"], "says nothing to draw"),
        (["--text", "x", "--out", "{dir}/x.png", "--count", "0"], "expected at least 1"),
        (["--text", "x", "--out", "{dir}/x.png", "--steps", "0"], "steps = 0: expected at least 1"),
        (["--text", "x", "--image", "{image}", "--out", "{dir}/x.png"], "add --mask FILE"),
        (["--text", "x", "--prompt", "y", "--out", "{dir}/x.png"], "--prompt asks about an image"),
        (["--edit", "x", "--out", "{dir}/x.png"], "--edit needs the image to change"),
        (["--edit", "x", "--text", "y", "--image", "{image}", "--out", "{dir}/x.png"], "leave --text and --mask out"),
        (["--mask", "{image}", "--text", "y", "--out", "{dir}/x.png"], "give --image FILE and --text too"),
        (["--image", "{dir}/none.png", "--edit", "x", "--out", "{dir}/x.png"], "no image"),
        (["--image", "{image}", "--mask", "{dir}/none.png", "--text", "y", "--out", "{dir}/x.png"], "no image"),
        (["--image", "{image}", "--mask", "{small}", "--text", "y", "--out", "{dir}/x.png"], "mask is 5 x 5 pixels"),
        (["--image", "{image}", "--image", "{small}", *["--edit", "x"] * 3, "--out", "{dir}/x.png"], "one each"),
        (["--part", "x", "--text", "y", "--out", "{dir}/x.png"], "leave the others out"),
        (["--part", "@{dir}/none.png", "--out", "{dir}/x.png"], "no image"),
        (["--part", "x", "--count", "2", "--out", "{dir}/x.png"], "continued once"),
        (["--image", "{image}", "--steps", "3"], "--steps is for drawing"),
        ([], "nothing to do"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, fake: Fake, files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"dir": str(tmp_path), "image": files("a.png"), "small": files("s.png", (5, 5), "white")}
    assert main(["generate", "m", *[text.format(**places) for text in arguments]]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "x.png").exists()


def test_a_model_that_cannot_draw_says_so(
    monkeypatch: pytest.MonkeyPatch, files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = SimpleNamespace(model=object(), recipe=SimpleNamespace(name="clip"))
    monkeypatch.setattr("zoo.cli.commands.chat.load", lambda *_: module)
    image, out = files("a.png"), ["--out", str(tmp_path / "x.png")]
    for given, message in (
        (["--text", "x"], "clip draws no images from texts"),
        (["--text", "x", "--image", image, "--mask", image], "clip does not inpaint"),
        (["--edit", "x", "--image", image], "clip does not edit images"),
        (["--part", "x"], "clip does not continue texts and images"),
    ):
        assert main(["generate", "clip", *given, *out]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(["generate", "clip", "--image", image]) == 2
    assert "clip writes no text" in capsys.readouterr().err
