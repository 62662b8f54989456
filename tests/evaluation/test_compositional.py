"""Seen against held-out combinations: which are paired, and the gap of a model that has learned by heart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zoo.data.openmoji import OpenMojiConfig
from zoo.data.sample import Sample
from zoo.errors import ConfigError, DataError
from zoo.evaluation.catalogue import METRICS
from zoo.evaluation.compositional import CompositionalConfig, combination, pair
from zoo.evaluation.run import evaluate

ROLES, TONES = ("cook", "pilot", "judge", "singer"), ("light", "medium", "dark")
HELD = {("cook", "dark"), ("pilot", "light"), ("judge", "medium")}


def made(**factors: str) -> tuple[tuple[str, str], ...]:
    return tuple(factors.items())


def test_pairs_share_what_they_can() -> None:
    seen = {
        "a": made(role="cook", tone="light"),
        "b": made(role="cook", tone="medium"),
        "c": made(role="pilot", tone="dark"),
        "d": (),
        "e": made(role="judge", tone="dark"),
    }
    held = {
        "known": made(role="cook", tone="light"),  # its combination is in train
        "new role": made(role="diver", tone="dark"),  # its role is not
        "plain": (),
        "x": made(role="cook", tone="dark"),
        "y": made(role="cook", tone="dark"),
        "z": made(role="judge", tone="medium"),
    }
    found = pair(held, seen)
    assert set(found) == {"x", "y", "z"}
    assert {found["x"], found["y"]} == {"a", "b"}  # the role counts first, and partners are shared out
    assert found["z"] == "e"
    assert pair(held, seen) == found


def test_what_makes_a_combination() -> None:
    sample = Sample("x", None, ("t",), {"role": "cook", "gender": "woman", "name": "n"})
    assert combination(sample, ["role", "tone", "gender"]) == (("role", "cook"), ("gender", "woman"))
    assert combination(sample, ["role", "tone"]) == ()


class Crew:
    """A picture for every role and tone; red tells the role, green the tone."""

    name, version, licence, max_bad = "crew", "1", "CC0-1.0", 0

    def ids(self, split: str) -> list[str]:
        everything = [f"{role}-{tone}" for role in ROLES for tone in TONES]
        return [i for i in everything if (tuple(i.split("-")) in HELD) == (split == "test")]

    def text_sample(self, id: str) -> Sample:
        role, tone = id.split("-")
        meta = {"name": f"{role} {tone}", "role": role, "skin_tone": tone, "cluster": role}
        return Sample(id, None, (f"{role} {tone}",), meta)

    def sample(self, id: str) -> Sample:
        found = self.text_sample(id)
        role, tone = id.split("-")
        image = Image.new("RGB", (4, 4), (ROLES.index(role), TONES.index(tone), 0))
        return Sample(id, image, found.texts, found.meta)


class ByHeart:
    """Knows every training picture, and takes a held-out one for the role in another tone unless it ``recombines``."""

    def __init__(self, recombines: bool) -> None:
        self.recombines = recombines
        self.shown: list[int] = []

    def _vector(self, role: str, tone: str) -> Tensor:
        generator = torch.Generator().manual_seed(97 * ROLES.index(role) + TONES.index(tone))
        return torch.randn(24, generator=generator)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(torch.stack([self._vector(*text.split()) for text in texts]), dim=-1)

    def embed_images(self, images: Sequence[Any]) -> Tensor:
        self.shown.append(len(images))
        rows = []
        for image in images:
            role, tone = ROLES[image.getpixel((0, 0))[0]], TONES[image.getpixel((0, 0))[1]]
            if (role, tone) in HELD and not self.recombines:
                tone = next(t for t in TONES if (role, t) not in HELD)
            rows.append(self._vector(role, tone))
        return F.normalize(torch.stack(rows), dim=-1)


def test_the_gap_of_a_model_that_learned_by_heart() -> None:
    fields = {"naming": {"candidates": 6}}
    result = CompositionalConfig(fields=fields).build().run(ByHeart(recombines=False), Crew(), "test")
    values = result.metrics
    assert values["pairs"] == 3
    for key in ("naming_top1", "retrieval_i2t_r1"):
        assert values[f"{key}_seen"] == 1.0
        assert values[f"{key}_heldout"] == 0.0
        assert values[f"{key}_gap"] == 1.0
    good = CompositionalConfig(fields=fields).build().run(ByHeart(recombines=True), Crew(), "test")
    assert good.metrics["naming_top1_heldout"] == good.metrics["retrieval_t2i_r1_heldout"] == 1.0
    assert good.metrics["naming_top1_gap"] == 0.0
    assert "naming_exact_match_gap" not in good.metrics  # it writes nothing
    for row in result.items:
        assert row["seen"] in Crew().ids("train")
        assert row["seen"].split("-")[0] == row["cluster"] == row["item"].split("-")[0]
    for name, value in values.items():
        if name in METRICS["compositional"]:
            info = METRICS["compositional"][name]
            assert sum(r[info.numerator] for r in result.items) / len(result.items) == pytest.approx(value)


def test_tasks_that_a_model_cannot_do_are_left_out(tmp_path: Path) -> None:
    class Writes:
        def generate_text(self, images: Sequence[Any], prompts: Any = None, max_new_tokens: int = 32) -> list[str]:
            return ["cook light"] * len(images)

    report = evaluate(Writes(), Crew(), "test", [CompositionalConfig().build()], tmp_path)
    metrics = report["metrics"]["compositional"]
    assert set(metrics) == {f"naming_exact_match_{p}" for p in ("heldout", "seen", "gap")} | {"pairs", "seen"}
    assert (tmp_path / "items" / "compositional.parquet").is_file()
    skipped = evaluate(object(), Crew(), "test", [CompositionalConfig(tasks="retrieval").build()])["skipped"]
    assert "embed_images, embed_texts (retrieval)" in skipped["compositional"]


def test_drawings_of_held_out_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that draws what it knows and a grey square of what it does not, judged by one that knows all."""

    class Draws:
        def generate_images(self, texts: Sequence[str], **how: Any) -> Tensor:
            out = torch.full((len(texts), 3, 4, 4), 2 / 255)
            for n, (role, tone) in enumerate(text.split() for text in texts):
                if (role, tone) not in HELD:
                    out[n, 0], out[n, 1] = ROLES.index(role) / 255, TONES.index(tone) / 255
            return out

    monkeypatch.setattr("zoo.evaluation.text_to_image.load_evaluator", lambda *a: ByHeart(recombines=True))
    monkeypatch.setattr("zoo.evaluation.drawing.evaluator_hash", lambda path, task: f"hash of {path}")
    task = CompositionalConfig(
        tasks="text-to-image+naming", evaluator="judge", fields={"text-to-image": {"candidates": 6}}
    ).build()
    values = task.run(Draws(), Crew(), "test").metrics
    assert values["text_to_image_score_seen"] == pytest.approx(1.0, abs=1e-5)
    assert values["text_to_image_r_precision_seen"] == 1.0
    assert values["text_to_image_score_heldout"] < 0.5
    assert values["text_to_image_score_gap"] > 0.5
    assert "naming_top1_gap" not in values
    assert "hash of judge" in str(task.spec(Crew(), "test")["inner"])


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ConfigError, match="not one of naming, retrieval, text-to-image"):
        CompositionalConfig(tasks="naming+captioning")
    with pytest.raises(ConfigError, match="twice"):
        CompositionalConfig(tasks="naming+naming")
    with pytest.raises(ConfigError, match="not among tasks"):
        CompositionalConfig(tasks="naming", fields={"retrieval": {}})
    with pytest.raises(ConfigError, match=r"set compositional\.items"):
        CompositionalConfig(fields={"naming": {"items": 3}})
    with pytest.raises(ConfigError, match=r"text-to-image\.evaluator: set compositional\.evaluator"):
        CompositionalConfig(tasks="text-to-image", fields={"text-to-image": {"evaluator": "x"}})
    with pytest.raises(ConfigError, match="at least two"):
        CompositionalConfig(factors="role")
    with pytest.raises(ConfigError, match="candidatess"):
        CompositionalConfig(fields={"naming": {"candidatess": 3}}).check()
    with pytest.raises(ConfigError, match="evaluator"):
        CompositionalConfig(tasks="text-to-image").check()
    with pytest.raises(ConfigError, match="holds nothing out"):
        CompositionalConfig().build().run(ByHeart(True), Crew(), "train")
    with pytest.raises(DataError, match=r"no item of the test split.*split_scheme=compositional"):
        CompositionalConfig(factors="name+role").build().run(ByHeart(True), Crew(), "test")
    specs = [
        CompositionalConfig(fields=f).build().spec_hash(Crew(), "test") for f in ({}, {"naming": {"candidates": 5}})
    ]
    assert specs[0] != specs[1]


def test_every_held_out_icon_has_a_partner_of_its_role_or_its_looks() -> None:
    source = OpenMojiConfig(split_scheme="compositional").open(32)
    keys = CompositionalConfig().keys
    seen = {i: combination(source.text_sample(i), keys) for i in source.ids("train")}
    held = {i: combination(source.text_sample(i), keys) for i in source.ids("test")}
    pairs = pair(held, seen)
    assert len(pairs) == 400
    assert set(pairs.values()) <= set(source.ids("train"))
    alike = [sum(a == b for a, b in zip(held[i], seen[other], strict=False)) for i, other in pairs.items()]
    assert min(alike) >= 1
    assert sum(n == 2 for n in alike) > 350
