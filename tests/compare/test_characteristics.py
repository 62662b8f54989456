"""The characteristics of recipes: read off built modules, kept on disk, printed and written by ``zoo list --table``."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch

from zoo.api import build_module
from zoo.cli import main
from zoo.compare import characteristics_cache, characteristics_table
from zoo.compare.characteristics import Characteristics, StageFacts, of_module, of_recipe, of_recipes
from zoo.errors import ConfigError
from zoo.recipe import resolve


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))


def of(name: str, **changes: str) -> Characteristics:
    return of_recipe(resolve(name, scale="tiny", choices=changes))


@pytest.mark.parametrize(
    ("name", "understands", "writes", "draws", "learns", "images"),
    [
        ("clip", True, "", "", ("contrastive",), "continuous"),
        ("llava", True, "autoregressive", "", ("autoregressive",), "continuous"),
        ("beit3-captioning", True, "masked", "", ("masked",), "continuous read, discrete predicted"),
        ("chameleon", True, "autoregressive", "autoregressive", ("autoregressive",), "discrete"),
        ("show-o", True, "autoregressive", "masked", ("masked", "autoregressive"), "discrete"),
        ("transfusion", True, "autoregressive", "diffusion", ("autoregressive", "diffusion"), "continuous"),
        ("transfusion-flow", True, "autoregressive", "flow", ("autoregressive", "flow"), "continuous"),
        ("llamagen-t2i", False, "", "autoregressive", ("autoregressive",), "discrete"),
        ("kl-tokenizer", False, "", "", ("reconstruction",), "continuous"),
    ],
)
def test_what_papers_say_of_the_families(
    name: str, understands: bool, writes: str, draws: str, learns: tuple[str, ...], images: str
) -> None:
    facts = of(name)
    assert (facts.understands, facts.writes, facts.draws) == (understands, writes, draws)
    assert (facts.learns, facts.images) == (learns, images)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("clip", "image full, text causal; apart"),
        ("albef", "full; cross-attention in text encoder"),
        ("llava", "causal; one sequence"),
        ("show-o", "text causal, image full; one sequence"),
        ("chameleon", "causal; one sequence"),
        ("blip-caption", "image full, text causal; cross-attention in decoder"),
        ("vlmo", "full; one sequence"),
        ("vq-tokenizer", "none"),
    ],
)
def test_who_reads_whom(name: str, attention: str) -> None:
    assert of(name).attention == attention


def test_a_changed_part_changes_the_words() -> None:
    few = of_recipe(resolve("llava", scale="tiny", values={"wiring": {"visual_tokens": 4}}))
    assert (of("llava").visual_tokens, few.visual_tokens) == (16, 4)
    assert of("llava", connector="qformer").parameters > of("llava").parameters
    causal = of_recipe(resolve("transfusion", scale="tiny", values={"wiring": {"image_attention": "causal"}}))
    assert causal.attention == "causal; one sequence"
    assert of("transfusion").attention == "text causal, image full; one sequence"


def test_stages_say_what_learns_and_what_does_not() -> None:
    align, instruct = of("llava").stages
    assert (align.name, align.trained, align.frozen) == ("align", ("connector",), ("encoder", "decoder"))
    assert (instruct.trained, instruct.frozen) == (("connector", "decoder"), ("encoder",))
    assert align.parameters < instruct.parameters
    partly = of("llava-1.5-lora").stages[-1]
    assert any(text.startswith("decoder (") and text.endswith(" %)") for text in partly.trained)


def test_published_sizes_are_counted_without_memory() -> None:
    facts = of_recipe(resolve("chameleon-34b"))
    assert 33e9 < facts.parameters < 36e9
    assert (facts.visual_tokens, facts.drawing_passes) == (1024, 1024)
    assert of_recipe(resolve("show-o")).visual_tokens == 256
    assert of_recipe(resolve("llava-1.5")).visual_tokens == 576
    assert of_recipe(resolve("llamagen-t2i")).visual_tokens == 256  # its connector is the text's
    assert of_recipe(resolve("show-o-clip-vit")).visual_tokens == 576  # what is read, not the 256 that are drawn


def test_a_built_module_is_left_as_it_was() -> None:
    module = build_module(resolve("show-o", scale="tiny"), 0)
    module.set_stage(1)
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    facts = of_module(module)
    assert {name: p.requires_grad for name, p in module.named_parameters()} == before
    assert module.stage == 1
    assert all(p.device == torch.device("cpu") for p in module.parameters())
    assert facts == of("show-o")
    assert facts.parameters == sum(p.numel() for p in module.model.parameters())


def test_plain_form_comes_back_and_foreign_forms_do_not() -> None:
    facts = of("blip2-opt-staged")
    assert Characteristics.from_plain(facts.to_plain()) == facts
    for foreign in (None, [], "x", {}, {"parameters": "5"}, {"parameters": None}):
        assert Characteristics.from_plain(foreign) is None
    odd = Characteristics.from_plain(
        {"parameters": 5, "stages": [3, {"name": 4}], "learns": "x", "visual_tokens": True}
    )
    assert odd == Characteristics(parameters=5, stages=(StageFacts(name="4", trained=(), frozen=()),))


def test_what_was_found_is_kept_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    found, failed = of_recipes(["clip", "vlmo"], "tiny")
    assert (list(found), failed) == (["clip", "vlmo"], {})
    (file,) = characteristics_cache.folder().glob("*.json")
    monkeypatch.setattr("zoo.compare.characteristics.of_recipe", lambda recipe: pytest.fail("it was kept"))
    assert of_recipes(["vlmo", "clip"], "tiny")[0] == found
    monkeypatch.undo()
    monkeypatch.setenv("ZOO_CACHE", str(file.parents[1]))
    monkeypatch.setattr(characteristics_cache, "digest", lambda: "another")
    assert of_recipes(["clip"], "tiny")[0]["clip"] == found["clip"]
    assert [f.stem for f in file.parent.glob("*.json")] == ["another"]
    file.with_name("another.json").write_text("{broken")
    assert of_recipes(["clip"], "tiny")[0]["clip"] == found["clip"]


def test_the_digest_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "sources" / "model.py"
    source.parent.mkdir()
    source.write_text("a = 1\n")
    monkeypatch.setattr(characteristics_cache, "_roots", lambda: [source.parent])
    first = characteristics_cache.digest()
    assert characteristics_cache.digest() == first
    source.write_text("a = 12\n")
    assert characteristics_cache.digest() != first


def test_the_command_prints_and_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--table", "transfusion*", "--scale", "tiny", "--out", str(tmp_path / "t.csv")]) == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert [row["model"] for row in rows] == ["transfusion", "transfusion-flow", "transfusion-unet"]
    assert [row["draws"] for row in rows] == ["diffusion", "flow", "diffusion"]
    assert all(int(row["parameters"]) > 0 for row in rows)
    assert main(["list", "--table", "model", "transfusion", "--scale", "tiny", "--out", str(tmp_path / "t.md")]) == 0
    assert (tmp_path / "t.md").read_text().splitlines()[2].startswith("| transfusion | ✓ | diffusion | – |")
    assert main(["list", "--table", "transfusion", "--scale", "tiny", "--out", str(tmp_path / "t.tex")]) == 0
    assert r"transfusion & \checkmark{} & diffusion & --" in (tmp_path / "t.tex").read_text()
    capsys.readouterr()
    assert main(["list", "--table", "transfusion", "--scale", "tiny"]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 80
    assert narrow.count("transfusion") == 2  # what has no room stands in a second table
    assert "diffusion" in narrow
    assert "und." in narrow
    assert "trained (frozen)" in narrow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.md"], "belong to --table"),
        (["--table", "encoder"], "is of models"),
        (["--table", "no-such-model*"], "no model matches"),
        (["--table", "clip", "--out", "x.pdf"], "must end in one of"),
        (["--table", "clip", "--scale", "tny"], "unknown scale 'tny'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_that_cannot_be_built_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(recipe: object) -> Characteristics:
        if getattr(recipe, "model", "") == "vlmo":
            raise ConfigError("needs what is not here")
        return Characteristics(parameters=1)

    monkeypatch.setattr("zoo.compare.characteristics.of_recipe", build)
    found, failed = of_recipes(["clip", "vlmo"], "tiny")
    assert (list(found), failed) == (["clip"], {"vlmo": "needs what is not here"})
    with pytest.raises(ConfigError, match="no recipe could be built"):
        of_recipes(["vlmo"], "tiny")


def test_the_lines_of_the_table() -> None:
    whole = StageFacts(name="joint", trained=("encoder", "text_encoder"), frozen=())
    partly = StageFacts(name="tune", trained=("decoder (4.5 %)",), frozen=("image_tokenizer",))
    facts = Characteristics(parameters=7_300_000_000, learns=("contrastive", "masked"), stages=(whole,))
    line = characteristics_table.cells("m", facts)
    assert len(line) == len(characteristics_table.HEADS) == len(characteristics_table.HELP)
    assert line[4] == "masked, contrastive"  # what samples can be drawn from comes first
    assert line[7:] == ["all", "7.3 G", "–"]
    both = characteristics_table.cells("m", Characteristics(parameters=1, stages=(whole, partly)))
    assert both[7] == "joint: all; tune: decoder (4.5 %) (image tokenizer)"
