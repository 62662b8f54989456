"""From a character and a script to pictures, page and clip; the command line, and its refusals in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_stories
from PIL import Image
from zoo_stories import Consistency
from zoo_stories.drawing import draw_frames, model_of
from zoo_stories.memory import check_memory, needed_bytes
from zoo_stories.page import comic_page, wrapped
from zoo_stories.script import read_characters, read_script, write_script
from zoo_stories.transitions import between, interpolated

import zoo
from zoo.cli import main
from zoo.errors import ConfigError, RunError
from zoo.weights.save import save

HERO = {"Fox": "a fox icon", "Owl": "an owl icon"}
SCRIPT = "[Fox] on a blue background # The fox wakes.\n[Fox][Owl] {Owl} left of {Fox}\n[NC] a tree icon # Trees."
FAST: dict[str, Any] = {"steps": 3, "guidance": 2.0}


@pytest.fixture(scope="session")
def module() -> Any:
    """Latent diffusion of no training whose denoiser reads everything that it is given."""
    built = zoo.build("latent-diffusion", scale="tiny", seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(built.model.denoiser.named_parameters()):
            if parameter.ndim > 1:
                scale = parameter[0].numel() ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            elif not name.endswith("weight"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return built.eval()


def test_scripts_in_the_notation_of_the_demo() -> None:
    one, two, three = read_script(SCRIPT, HERO)
    assert (one.prompt, one.caption) == ("a fox icon, on a blue background", "The fox wakes.")
    assert (two.prompt, two.characters) == ("an owl icon left of a fox icon", frozenset({"Fox", "Owl"}))
    assert two.caption == two.prompt
    assert (three.prompt, three.caption, three.characters) == ("a tree icon", "Trees.", frozenset())
    (plain,) = read_script(["\n", "asleep"], HERO)
    assert (plain.prompt, plain.characters) == ("a fox icon, asleep", frozenset({"Fox"}))
    assert read_characters("a fox icon") == {"hero": "a fox icon"}
    assert read_characters(["Fox: a fox", "Owl: an owl"]) == {"Fox": "a fox", "Owl": "an owl"}


@pytest.mark.parametrize(
    ("character", "script", "message"),
    [
        ("", "a", "a story with no character: give one as 'Fox: a red fox"),
        ("Fox:", "a", "the character 'Fox' without a name or a description"),
        ("Fox: a fox", "  \n", "the script has no frames"),
        ("Fox: a fox", "[Fax] sleeps", "names 'Fax', which is no character; known: Fox"),
        ("Fox: a fox", "[NC] # a caption alone", "says nothing to draw"),
        ("Fox: a fox", ["a"] * 300, "300 frames, at most 256"),
    ],
)
def test_wrong_scripts(character: str, script: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_script(script, read_characters(character))


class Writer:
    def __init__(self, *texts: str) -> None:
        self.texts, self.prompts = list(texts), list[str]()

    def generate_text(self, images: Any, prompts: Any, max_new_tokens: int = 32) -> list[str]:
        assert len(images) == len(prompts) == 1
        self.prompts += prompts
        return [self.texts.pop(0)]


def test_a_model_writes_the_script() -> None:
    writer = Writer("1. The fox sails out. It rains.", '"It meets [an] owl"', "\n Home again #x\n")
    lines = write_script(writer, "a journey", HERO, 3)
    frames = read_script(lines, HERO)
    assert [frame.caption for frame in frames] == ["The fox sails out.", "It meets an owl", "Home again x"]
    assert frames[1].prompt == "a fox icon, It meets an owl"
    assert "a journey" in writer.prompts[0]
    assert "picture 3 of 3" in writer.prompts[2]
    assert "The fox sails out." in writer.prompts[2]
    with pytest.raises(RunError, match="wrote nothing for frame 2"):
        write_script(Writer("One.", " \n"), "a journey", HERO, 2)
    with pytest.raises(ConfigError, match="writes no text"):
        write_script(object(), "a journey", HERO, 2)
    with pytest.raises(ConfigError, match="needs a theme"):
        write_script(writer, " ", HERO, 2)


def test_frames_drawn_alone_are_those_of_generate_images(module: Any) -> None:
    prompts = [frame.prompt for frame in read_script(SCRIPT, HERO)]
    who = [frozenset({"Fox"})] * 3
    plain = module.generate_images(prompts, seed=4, **FAST)
    assert torch.equal(draw_frames(module, prompts, who, Consistency(rate=0.0), seed=4, **FAST), plain)
    together = draw_frames(module, prompts, who, Consistency(), seed=4, **FAST)
    assert together.shape == plain.shape
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(together, plain, strict=True))
    assert torch.equal(together, draw_frames(module, prompts, who, Consistency(), seed=4, **FAST))
    apart = draw_frames(module, prompts, [frozenset("a"), frozenset("b"), frozenset()], Consistency(), seed=4, **FAST)
    torch.testing.assert_close(apart, plain, atol=1e-4, rtol=0)
    assert torch.equal(module.generate_images(prompts, seed=4, **FAST), plain)  # nothing is left behind


def test_long_stories(module: Any) -> None:
    prompts, who = [f"fox {n}" for n in range(5)], [frozenset({"Fox"})] * 5
    whole = draw_frames(module, prompts, who, Consistency(), **FAST)
    assert torch.equal(draw_frames(module, prompts, who, Consistency(window=5), **FAST), whole)
    passes, layers, banks = (
        draw_frames(module, prompts, who, Consistency(window=2, long=long), **FAST)
        for long in ("passes", "layers", "banks")
    )
    assert passes.shape == layers.shape == banks.shape == whole.shape
    first = draw_frames(module, prompts[:2], who[:2], Consistency(), **FAST)
    torch.testing.assert_close(banks[:2], first, atol=1e-4, rtol=0)  # the references know nothing of what follows
    assert not torch.allclose(passes[:2], first, atol=1e-3)


def test_a_story(module: Any, tmp_path: Path) -> None:
    story = zoo_stories.tell(
        module, HERO, SCRIPT, title="A walk", seed=3, pictures_between=2, consistency=Consistency(window=2), **FAST
    )
    assert story.images.shape == (3, 3, 64, 64)
    assert (len(story.frames), [len(m) for m in story.moves], story.how) == (3, [2, 2], "latents")
    assert [shown for _, shown in story.clip] == [900, 90, 90, 900, 90, 90, 900]
    story.save(page=tmp_path / "page.png", clip=tmp_path / "clip.gif")
    with Image.open(tmp_path / "page.png") as page:
        assert page.width > 2 * 256
    with Image.open(tmp_path / "clip.gif") as clip:
        assert (clip.n_frames, clip.size, clip.info["duration"]) == (7, (256, 256), 900)
    assert story._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(RunError, match="cannot write"):
        story.save(page=tmp_path / "none" / "page.png")


def test_latents_between(module: Any) -> None:
    one, other = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    line = interpolated(one, other, 5)
    assert torch.equal(line[0], one)
    assert torch.equal(line[-1], other)
    torch.testing.assert_close(line[2], (one + other) / 2)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = between(model_of(module), images, ["a", "b", "c"], "latents", 2)
    assert [tuple(part.shape) for part in found] == [(2, 3, 64, 64)] * 2
    with pytest.raises(ConfigError, match="predicts no motion"):
        between(model_of(module), images, ["a", "b", "c"], "motion", 2, predictor=module)


def test_pages() -> None:
    from PIL import ImageFont

    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue", "black", "gray")]
    page = comic_page(pictures, ["one", "two", "three", "four", "a very long caption " * 9], panel=90)
    assert page.getpixel((20 + 45, 20 + 45)) == (255, 0, 0)
    assert page.width == 2 * 20 + 3 * 90 + 2 * 14
    font = ImageFont.load_default(12)
    lines = wrapped("a very long caption " * 9, font, 90)
    assert len(lines) == 4
    assert lines[-1].endswith("...")
    assert all(font.getlength(line) <= 90 for line in lines[:-1])
    with pytest.raises(ConfigError, match="expected one each"):
        comic_page(pictures, ["one"])


def test_more_frames_than_memory_allows(module: Any) -> None:
    plain = model_of(module)
    few, many = (needed_bytes(plain, n, Consistency(), 2.0, 3) for n in (4, 40))
    assert 5 * few < many < 15 * few
    assert needed_bytes(plain, 40, Consistency(window=4), 2.0, 3) == few
    banks = needed_bytes(plain, 40, Consistency(window=4, long="banks"), 2.0, 100)  # their size grows with the steps
    assert few < banks < many
    assert check_memory(plain, 4, Consistency(), guidance=2.0, steps=3, limit=few) == few
    with pytest.raises(ConfigError, match=r"40 frames, 40 of them at once, need about .* draw \d+ at once"):
        zoo_stories.tell(module, HERO, ["asleep"] * 40, memory=2 * few, **FAST)


def test_refusals_of_tell(module: Any) -> None:
    for changes, message in (
        ({"script": ""}, "no script: give its lines, or a theme"),
        ({"script": "a", "theme": "b"}, "nothing is left for a theme"),
        ({"script": "a", "transitions": "fade"}, "expected one of none, latents, motion"),
        ({"script": "a", "transitions": "motion"}, "needs a motion predictor"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo_stories.tell(module, HERO, **changes)
    with pytest.raises(ConfigError, match=r"clip.* has no denoiser whose images could read each other"):
        zoo_stories.tell(zoo.build("clip", scale="tiny"), HERO, "a")


def test_the_command_line(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, script = tmp_path / "model", tmp_path / "script.txt"
    save(module.model, module.recipe, folder)
    script.write_text(SCRIPT)
    page, clip = tmp_path / "page.png", tmp_path / "clip.gif"
    who = ["--character", "Fox: a fox icon", "--character", "Owl: an owl icon"]
    fast = ["--steps", "2", "--guidance", "1"]
    out = ["--out", str(page), "--clip", str(clip), "--between", "1", "--window", "2", "--long", "banks"]
    assert main(["story", str(folder), *who, "--script", str(script), *fast, *out]) == 0
    said = capsys.readouterr().out
    assert "an owl icon left of a fox icon" in said
    assert f"{page}, {clip}: 3 frames, between them: latents" in said
    assert page.is_file()
    assert clip.is_file()

    clip_model = tmp_path / "clip"
    blind = zoo.build("clip", scale="tiny")
    save(blind.model, blind.recipe, clip_model)
    frame = ["--frame", "asleep", "--out", str(page)]
    for words, message in (
        ([str(folder), *frame], "a story needs a character"),
        ([str(folder), *who, "--frame", "asleep"], "a story needs a place"),
        ([str(folder), *who, "--frame", "asleep", "--out", "page.jpg"], "expected a file ending in .png"),
        ([str(folder), *who, "--script", str(tmp_path / "none"), "--out", str(page)], "cannot be read"),
        ([str(folder), *who, "--out", str(page)], "the story has no script"),
        ([str(folder), *who, *frame, "--rate", "2"], "rate = 2.0: expected a share"),
        ([str(folder), *who, *["--frame", "x"] * 200, "--out", str(page), "--memory-gb", "0.01"], "200 frames"),
        ([str(clip_model), *who, *frame], "no denoiser"),
    ):
        assert main(["story", *words]) == 2
        line = capsys.readouterr().err
        assert message in line
        assert line.count("\n") == 1
