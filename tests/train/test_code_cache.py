"""Runs that read a frozen image tokenizer's codes or latents from disk learn what others learn."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.train.test_run import assert_equal_weights, curve, stop_at
from zoo.cli.overrides import run_config
from zoo.compare.flops import count_recipe
from zoo.errors import ConfigError, DataError
from zoo.frozen_features import cache_root, check_cacheable
from zoo.models.autoencoder import AutoencoderConfig, Drawing
from zoo.objectives.base import Objective
from zoo.part import PartConfig
from zoo.plugin import Plugin, registered
from zoo.recipe import ObjectiveConfig
from zoo.registry import Component
from zoo.run_config import RunConfig
from zoo.survival import Interrupted
from zoo.train import run


@dataclass(frozen=True, kw_only=True)
class ReaderConfig(AutoencoderConfig):
    draws: bool = False

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Reader:
        return Reader(self, parts["image_tokenizer"][1], seed)  # type: ignore[arg-type]


class Reader(Drawing):
    """Reads images through its tokenizer alone; ``head`` learns to tell their first half from the second."""

    provides: ClassVar[frozenset[str]] = frozenset({"error"})
    reads_image_codes = True

    def __init__(self, config: ReaderConfig, image_config: Any, seed: int) -> None:
        super().__init__(config, image_config, seed)
        self.draws_latents = config.draws
        tokenizer: Any = self.image_tokenizer
        torch.manual_seed(seed)
        self.embed = nn.Embedding(tokenizer.codes, 4) if tokenizer.discrete else None
        self.head = nn.Linear(4 if tokenizer.discrete else tokenizer.channels, 1)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        read = self.tokenize_images(batch)
        x = self.embed(read) if self.embed is not None else read.flatten(2).transpose(1, 2)  # [B, n, C]
        place = torch.linspace(-1, 1, x.shape[1], device=x.device)
        return {"error": (self.head(x)[..., 0] - place).square().mean()}


@dataclass(frozen=True, kw_only=True)
class ErrorConfig(ObjectiveConfig):
    def build(self) -> Error:
        return Error()


class Error(Objective):
    needs: ClassVar[frozenset[str]] = frozenset({"error"})

    def forward(self, model: Any, batch: Any, outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return outputs["error"], {}


@pytest.fixture(autouse=True)
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType("zoo_reader_parts")
    module.ReaderConfig, module.ErrorConfig = ReaderConfig, ErrorConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zoo_reader_parts", module)
    wiring = Component(kind="wiring", name="reader", ref="zoo_reader_parts:ReaderConfig", summary="reads codes")
    error = Component(kind="objective", name="reader-error", ref="zoo_reader_parts:ErrorConfig", summary="an error")
    with registered(Plugin(name="reader", components=(wiring, error))):
        yield


SIZES = {
    "latents": ["model=kl-tokenizer", "image_tokenizer.width=32", "image_tokenizer.groups=2"],
    "draws": ["model=kl-tokenizer", "image_tokenizer.width=32", "image_tokenizer.groups=2", "++wiring.draws=true"],
    "codes": ["model=vq-tokenizer", "image_tokenizer.width=32", "image_tokenizer.blocks=0"],
}


def prepared(folder: Path, kind: str, *overrides: str) -> RunConfig:
    folder.mkdir(parents=True)
    common = [
        "scale=tiny", "wiring.name=reader", "wiring.augment=none", "objective=reader-error", "batch_size=8",
        "budget.value=4", "stages=[{name: read, train: [head]}]", "trainer.accelerator=cpu", "trainer.log_every=1",
        "trainer.checkpoint_every=2", "evaluation.tasks={}", f"trainer.cache_dir={folder.parent / 'cache'}",
    ]  # fmt: skip
    config = run_config([*SIZES[kind], *common, *overrides])
    config.write(folder / "run.yaml")
    return config


def manifest(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return read


STORED = {"codes": "int16", "latents": "float32", "draws": "float32"}
ROW = {"codes": 16 * 2, "latents": 8 * 8 * 8 * 4, "draws": 2 * 8 * 8 * 8 * 4}


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_a_run_with_the_cache_learns_what_one_without_learns(kind: str, tmp_path: Path) -> None:
    prepared(tmp_path / "plain", kind)
    config = prepared(tmp_path / "cached", kind, "trainer.cache_features=true")
    assert config.hash() == RunConfig.read(tmp_path / "plain" / "run.yaml").hash()
    run(tmp_path / "plain")
    run(tmp_path / "cached")
    for (step, a), (_, b) in zip(curve(tmp_path / "cached"), curve(tmp_path / "plain"), strict=True):
        assert a == pytest.approx(b, abs=2e-6), step  # draws too: the same noise from the step's seed
    about = manifest(tmp_path / "cached")["features"]
    assert about["images"] == about["computed"] == 32
    assert about["stored"] == STORED[kind]
    assert about["bytes"] == 32 * ROW[kind]
    prepared(tmp_path / "again", kind, "trainer.cache_features=true")
    run(tmp_path / "again")
    assert manifest(tmp_path / "again")["features"]["computed"] == 0
    assert_equal_weights(tmp_path / "again", tmp_path / "cached")


def test_a_resumed_run_reads_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "stopped"):
        prepared(tmp_path / name, "draws", "trainer.cache_features=true")
    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Interrupted):
            run(tmp_path / "stopped")
    run(tmp_path / "stopped")
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    assert_equal_weights(tmp_path / "stopped", tmp_path / "whole")


def test_latents_in_half_precision_take_half_the_room(tmp_path: Path) -> None:
    prepared(tmp_path / "half", "latents", "trainer.cache_features=true", "trainer.cache_dtype=float16")
    run(tmp_path / "half")
    about = manifest(tmp_path / "half")["features"]
    assert (about["stored"], about["bytes"]) == ("float16", 32 * ROW["latents"] // 2)


@pytest.mark.parametrize("kind", ["codes", "latents"])
def test_stale_rows_are_refused(kind: str, tmp_path: Path) -> None:
    config = prepared(tmp_path / "first", kind, "trainer.cache_features=true")
    run(tmp_path / "first")
    name = manifest(tmp_path / "first")["features"]["set"]
    folder = cache_root(config) / name
    raw = bytearray((folder / "tokens.bin").read_bytes())
    import zlib

    row = ROW[kind]
    index = bytearray((folder / "index.bin").read_bytes())
    for number in range(32):  # other values with the right checksums: as if the images had changed
        other = torch.frombuffer(raw[number * row : (number + 1) * row], dtype=torch.uint8).clone()
        values = other.view(torch.int16) + 1 if kind == "codes" else other.view(torch.float32) + 0.01
        plain = values.contiguous().view(torch.uint8).numpy().tobytes()
        raw[number * row : (number + 1) * row] = plain
        index[number * 24 + 16 : number * 24 + 20] = zlib.crc32(plain).to_bytes(4, "little")
    (folder / "tokens.bin").write_bytes(raw)
    (folder / "index.bin").write_bytes(index)
    prepared(tmp_path / "second", kind, "trainer.cache_features=true")
    with pytest.raises(DataError, match="are stale"):
        run(tmp_path / "second")


def test_flops_of_a_cached_step_leave_the_tokenizer_out(tmp_path: Path) -> None:
    for kind in sorted(SIZES):
        recipe = prepared(tmp_path / kind, kind).recipe
        plain, cached = count_recipe(recipe)[0], count_recipe(recipe, cached=True)[0]
        assert plain.forward > 10**6
        assert cached.frozen_forward == 0
        assert 0 < cached.trainable_forward < 10**4
        assert cached.backward == plain.backward > 0


def test_what_cannot_be_cached_is_refused_in_one_line(tmp_path: Path) -> None:
    on = "trainer.cache_features=true"
    for number, (extra, message) in enumerate(
        (
            ("stages=[{name: all, train: ['*']}]", "image_tokenizer learns in stage 'all'"),
            ("wiring.augment=flip", "wiring.augment = flip"),
        )
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            check_cacheable(prepared(tmp_path / str(number), "latents", on, extra))
        assert "\n" not in str(caught.value)


def test_a_batch_needs_pixels_codes_or_latents(tmp_path: Path) -> None:
    from zoo.api import build_module

    module = build_module(prepared(tmp_path / "draws", "draws").recipe, 0)
    model, tokenizer = module.model.eval(), module.model.image_tokenizer
    pixels = torch.randn(2, 3, 64, 64)
    statistics = tokenizer.statistics(pixels)
    mean = statistics[:, :8]
    for batch in ({"pixel_values": pixels}, {"image_latents": statistics}, {"image_latents": mean}):
        assert torch.equal(model.tokenize_images(batch), mean)
    model.train()
    torch.manual_seed(1)
    drawn = model.tokenize_images({"pixel_values": pixels})
    torch.manual_seed(1)
    assert torch.equal(model.tokenize_images({"image_latents": statistics}), drawn)
    assert not torch.equal(drawn, mean)
    with pytest.raises(ConfigError, match="neither pixel_values nor image_latents"):
        model.tokenize_images({})


@pytest.mark.parametrize("model", ["show-o", "transfusion"])
def test_the_unified_wirings_read_the_cache(model: str, tmp_path: Path) -> None:
    own = ["decoder.depth=1", "evaluation.tasks={}"]
    own += ["image_tokenizer.width=32", "image_tokenizer.groups=2"] if model == "transfusion" else []
    losses = []
    for name, cache in (("plain", "false"), ("cached", "true")):
        folder = tmp_path / name
        folder.mkdir()
        run_config(
            [
                f"model={model}", "scale=tiny", "batch_size=4", "budget.value=2", "trainer.log_every=1",
                "++wiring.augment=none", "trainer.accelerator=cpu", f"trainer.cache_dir={tmp_path / 'cache'}",
                "stages=[{name: all, train: [decoder]}]", f"trainer.cache_features={cache}", *own,
            ]
        ).write(folder / "run.yaml")  # fmt: skip
        run(folder)
        losses.append(curve(folder))
    assert manifest(tmp_path / "cached")["features"]["computed"] == 8
    for (step, a), (_, b) in zip(*losses, strict=True):
        assert a == pytest.approx(b, abs=5e-6), step
