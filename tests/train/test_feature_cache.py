"""Runs that read a frozen encoder's tokens from disk learn what others learn, and refuse what cannot be cached."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from tests.train.test_run import assert_equal_weights, curve, stop_at, weights
from zoo.cli.overrides import run_config
from zoo.compare.flops import count_recipe
from zoo.data.feature_cache import FeatureStore
from zoo.errors import ConfigError, DataError
from zoo.frozen_features import cache_root, check_cacheable, open_features
from zoo.run_config import RunConfig
from zoo.survival import Interrupted
from zoo.train import run

SIZES = [
    "model=llava",
    "scale=tiny",
    "batch_size=16",
    "budget.value=6",
    "encoder.width=32",
    "encoder.depth=3",
    "encoder.ffn=64",
    "encoder.patch_size=16",
    "connector=qformer",
    "connector.depth=2",
    "connector.width=32",
    "decoder.depth=1",
    "stages=[{name: align, train: [connector], share: 3}, {name: instruct, train: [connector, decoder], share: 3}]",
    "trainer.accelerator=cpu",
    "trainer.log_every=1",
    "trainer.checkpoint_every=3",
    "evaluation.split=val",
    "evaluation.tasks={caption-likelihood: {items: 4}}",
]


def prepared(folder: Path, *overrides: str) -> RunConfig:
    folder.mkdir(parents=True)
    config = run_config([*SIZES, f"trainer.cache_dir={folder.parent / 'cache'}", *overrides])
    config.write(folder / "run.yaml")
    return config


def manifest(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return read


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "plain"
    prepared(folder)
    run(folder)
    return folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images the encoder was given, a number a call."""
    from zoo.encoders.open_clip import OpenCLIPViT

    calls: list[int] = []
    real = OpenCLIPViT.forward

    def forward(self: Any, x: torch.Tensor, mask: Any = None) -> Any:
        if x.device.type != "meta":
            calls.append(len(x))
        return real(self, x, mask)

    monkeypatch.setattr(OpenCLIPViT, "forward", forward)
    return calls


def test_losses_and_weights_equal_those_without_a_cache(plain: Path, tmp_path: Path, counted: list[int]) -> None:
    config = prepared(tmp_path / "cached", "trainer.cache_features=true")
    assert config.hash() == RunConfig.read(plain / "run.yaml").hash()  # the same run, executed otherwise
    run(tmp_path / "cached")
    for (step, a), (_, b) in zip(curve(tmp_path / "cached"), curve(plain), strict=True):
        assert a == pytest.approx(b, abs=2e-6), step
    ours, theirs = weights(tmp_path / "cached"), weights(plain)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if "encoder." in name:
            assert torch.equal(ours[name], theirs[name]), name
        else:
            torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=0)
    about = manifest(tmp_path / "cached")["features"]
    assert about["images"] == about["computed"] == 96  # six steps of sixteen distinct icons
    assert sum(counted) == 96 + 1 + 4  # each once; a blank one for the shape; four of the evaluation

    # a second run, and one of another connector, find them all
    counted.clear()
    prepared(tmp_path / "again", "trainer.cache_features=true")
    run(tmp_path / "again")
    assert curve(tmp_path / "again") == curve(tmp_path / "cached")
    assert_equal_weights(tmp_path / "again", tmp_path / "cached")
    prepared(tmp_path / "fewer", "trainer.cache_features=true", "connector.queries=4")
    run(tmp_path / "fewer")
    assert [manifest(tmp_path / name)["features"]["computed"] for name in ("again", "fewer")] == [0, 0]
    assert sum(counted) == 2 * (1 + 4 + 4)  # shape, check, evaluation


@pytest.mark.parametrize("model", ["blip2", "blip2-opt-staged", "blip2-flan-t5"])
def test_every_wiring_with_a_frozen_eye_reads_the_cache(model: str, tmp_path: Path) -> None:
    sizes = ["wiring.augment=none", "encoder.depth=2", "connector.depth=2", *["decoder.depth=1"] * (model != "blip2")]
    common = [f"model={model}", "scale=tiny", "batch_size=8", "budget.value=4", "trainer.log_every=1", *sizes]
    losses = []
    for name, cache in (("plain", "false"), ("cached", "true")):
        folder = tmp_path / name
        folder.mkdir()
        own = [f"trainer.cache_features={cache}", f"trainer.cache_dir={tmp_path / 'cache'}", "trainer.accelerator=cpu"]
        run_config([*common, *own, "evaluation.tasks={}"]).write(folder / "run.yaml")
        run(folder)
        losses.append(curve(folder))
    assert manifest(tmp_path / "cached")["features"]["images"] == 32
    for (step, a), (_, b) in zip(*losses, strict=True):
        assert a == pytest.approx(b, abs=5e-6), step


def test_a_resumed_run_that_began_from_other_weights_reads_their_features(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["trainer.cache_features=true", "seed=3", f"init={plain}"]
    prepared(tmp_path / "whole", *common)
    run(tmp_path / "whole")
    prepared(tmp_path / "stopped", *common)
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Interrupted):
            run(tmp_path / "stopped")
    run(tmp_path / "stopped")
    assert manifest(tmp_path / "stopped")["features"]["computed"] == 0
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    assert_equal_weights(tmp_path / "stopped", tmp_path / "whole")


def test_flops_count_the_encoder_once_an_image(plain: Path, tmp_path: Path) -> None:
    config = prepared(tmp_path / "cached", "trainer.cache_features=true")
    run(tmp_path / "cached")
    with_encoder, without = count_recipe(config.recipe), count_recipe(config.recipe, cached=True)
    encoder = with_encoder[0].frozen_forward - without[0].frozen_forward
    assert 0.9 < encoder / vit_flops(16, 32, 64, 2) < 1.1
    assert with_encoder[0].trainable_forward == without[0].trainable_forward
    assert with_encoder[1].backward == without[1].backward
    flops, cost = (manifest(tmp_path / "cached")[key] for key in ("flops", "cost"))
    assert flops["features"] == {"images": 96, "forward": encoder, "total": 96 * encoder}
    steps = sum(stage["per_sample"] * 3 * 16 for stage in flops["stages"])
    assert cost["flops"]["total"] == steps + cost["flops"]["features"] == steps + 96 * encoder
    assert (
        cost["flops"]["total"] == manifest(plain)["cost"]["flops"]["total"]
    )  # one epoch: every image is encoded once either way


def vit_flops(patches: int, width: int, ffn: int, blocks: int) -> int:
    tokens = patches + 1
    block = 2 * tokens * (4 * width * width + 2 * width * ffn) + 4 * tokens * tokens * width
    return blocks * block + 2 * patches * 3 * 16 * 16 * width


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages=joint"], "encoder learns in stage 'joint'"),
        (["stages=[{name: a, train: [connector]}, {name: b, train: [encoder.*]}]"], "encoder learns in stage 'b'"),
        (["wiring.augment=shift"], "wiring.augment = shift draws another image each time"),
    ],
)
def test_what_cannot_be_cached_is_refused_before_anything_begins(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    from zoo.cli.commands.train import train

    arguments = [*SIZES, "trainer.cache_features=true", f"trainer.cache_dir={tmp_path}", *overrides, f"out={tmp_path}"]
    if overrides[0].startswith("stages"):
        arguments = [a for a in arguments if not a.startswith("stages") or a in overrides]
    with pytest.raises(ConfigError, match=message) as caught:
        train(arguments)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # no run directory, no cache


def test_a_wiring_that_reads_the_encoder_otherwise_is_refused() -> None:
    config = run_config(["model=clip", "scale=tiny", "trainer.cache_features=true"])
    with pytest.raises(ConfigError, match="wiring 'towers' reads more of its encoder"):
        check_cacheable(config)


def test_wrong_settings_are_one_line() -> None:
    for override, message in (
        ("trainer.cache_dtype=float17", "float16"),
        ("trainer.cache_max_gb=0", "must be more than 0"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            run_config([*SIZES, override])
        assert "\n" not in str(caught.value)


def test_too_small_a_bound_is_refused_before_the_first_image(tmp_path: Path, counted: list[int]) -> None:
    prepared(tmp_path / "small", "trainer.cache_features=true", "trainer.cache_max_gb=0.0001")
    with pytest.raises(ConfigError, match=r"96 images take .* GB, more than trainer.cache_max_gb"):
        run(tmp_path / "small")
    assert counted == [1]  # the blank one that tells the shape
    assert manifest(tmp_path / "small")["status"] == "failed"


def test_float16_is_another_run_close_to_the_first(plain: Path, tmp_path: Path) -> None:
    config = prepared(tmp_path / "half", "trainer.cache_features=true", "trainer.cache_dtype=float16")
    assert config.hash() != RunConfig.read(plain / "run.yaml").hash()
    run(tmp_path / "half")
    for (step, a), (_, b) in zip(curve(tmp_path / "half"), curve(plain), strict=True):
        assert a == pytest.approx(b, abs=2e-2), step
    about = manifest(tmp_path / "half")["features"]
    assert (about["stored"], about["bytes"]) == ("float16", 96 * 16 * 32 * 2)


def test_bf16_autocast_reads_what_autocast_computed(tmp_path: Path) -> None:
    for name, cache in (("plain", "false"), ("cached", "true")):
        prepared(tmp_path / name, "trainer.precision=bf16", f"trainer.cache_features={cache}")
        run(tmp_path / name)
    for (step, a), (_, b) in zip(curve(tmp_path / "cached"), curve(tmp_path / "plain"), strict=True):
        assert a == pytest.approx(b, abs=2e-2), step


def pictures(root: Path, count: int = 24) -> None:
    root.mkdir()
    generator = torch.Generator().manual_seed(0)
    for n in range(count):
        pixels = torch.randint(0, 256, (40 + n, 50, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(root / f"picture {n}.png")


FOLDER = ["data=folder", "data.val_fraction=0.2", "data.test_fraction=0", "budget.value=4"]


def test_a_folder_of_pictures_with_workers_and_changed_files(tmp_path: Path, counted: list[int]) -> None:
    pictures(tmp_path / "own")
    (tmp_path / "own" / "broken.png").write_bytes(b"no picture")
    data = [*FOLDER, f"data.root={tmp_path / 'own'}", "data.max_bad=1", "data.val_fraction=0.1"]
    prepared(tmp_path / "plain", *data)
    run(tmp_path / "plain")
    prepared(tmp_path / "cached", *data, "trainer.cache_features=true", "trainer.workers=2")
    run(tmp_path / "cached")
    for (step, a), (_, b) in zip(curve(tmp_path / "cached"), curve(tmp_path / "plain"), strict=True):
        assert a == pytest.approx(b, abs=2e-6), step
    # a picture that is replaced by another of the same size in bytes is another picture
    from zoo.data.folder import FolderConfig

    ids = FolderConfig(root=str(tmp_path / "own"), val_fraction=0.1, test_fraction=0, max_bad=1).build().ids("train")
    file = tmp_path / "own" / next(id for id in ids if id != "broken.png")
    size = file.stat().st_size
    Image.new("RGB", (64, 64), (255, 0, 0)).save(file)
    file.write_bytes(file.read_bytes() + b"\0" * (size - file.stat().st_size))
    assert file.stat().st_size == size
    prepared(tmp_path / "after", *data, "trainer.cache_features=true")
    run(tmp_path / "after")
    assert manifest(tmp_path / "after")["features"]["computed"] == 1
    assert sum(counted) > 0


def test_a_stale_cache_is_refused_in_one_line(tmp_path: Path) -> None:
    config = prepared(tmp_path / "first", "trainer.cache_features=true")
    run(tmp_path / "first")
    (tokens,) = cache_root(config).glob("*/tokens.bin")
    # as if other images or another library had been used: whole rows with right checksums, of other features
    about = json.loads((tokens.parent / "about.json").read_text())
    shape, stored = tuple(about.pop("shape")), about.pop("stored")
    store = FeatureStore(cache_root(config), about, shape, getattr(torch, stored))
    keys = [key for key, _ in sorted(store._rows.items(), key=lambda item: item[1])]
    rows = store.read(range(len(store))) + 1e-3
    store.close()
    for name in ("tokens.bin", "index.bin"):
        (tokens.parent / name).write_bytes(b"")
    store = FeatureStore(cache_root(config), about, shape, getattr(torch, stored))
    with store.filling():
        store.reserve(len(keys), 10**9)
        store.append(keys, rows)
    store.close()
    prepared(tmp_path / "second", "trainer.cache_features=true")
    with pytest.raises(DataError, match="are stale: recomputed ones differ by") as caught:
        run(tmp_path / "second")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "second" / "curve.jsonl").exists()


def test_another_encoder_is_another_set(tmp_path: Path) -> None:
    config = prepared(tmp_path / "a", "trainer.cache_features=true")
    run(tmp_path / "a")
    prepared(tmp_path / "b", "trainer.cache_features=true", "seed=1")  # other weights
    run(tmp_path / "b")
    prepared(tmp_path / "c", "trainer.cache_features=true", "data.blank_images=true")  # other images
    run(tmp_path / "c")
    assert [manifest(tmp_path / name)["features"]["computed"] for name in "abc"] == [96, 96, 96]
    assert len(list(cache_root(config).glob("*/tokens.bin"))) == 3


def test_runs_at_once_encode_each_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks belong to an open file, so that threads meet as processes do (tests/data has two processes)."""
    from zoo.api import build_module
    from zoo.plugin import catalogue

    config = prepared(tmp_path / "run", "trainer.cache_features=true")
    source = catalogue()["data"].parse("openmoji", {}, "data").build(config.recipe.image_size)
    modules = [build_module(config.recipe, config.seed) for _ in range(3)]
    barrier, phases = threading.Barrier(3), []
    real = FeatureStore.append

    def slow(self: FeatureStore, keys: Any, rows: torch.Tensor) -> None:
        time.sleep(0.1)
        real(self, keys, rows)

    monkeypatch.setattr(FeatureStore, "append", slow)

    def fill(module: Any) -> int:
        barrier.wait()
        found = open_features(config, module, source, 96, progress=lambda phase, *rest: phases.append(phase))
        assert (found.images, len(found.features.store)) == (96, 96)
        return found.computed

    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(fill, modules)) == [0, 0, 96]
    assert "waiting for another run to encode" in phases


def test_a_batch_of_text_alone_and_one_with_some_images(tmp_path: Path) -> None:
    """Rows without an image have no slots, whatever stands in their place among the cached tokens."""
    import zoo
    from zoo.data.feature_cache import CachedFeatures
    from zoo.data.sample import Sample

    module = zoo.build("llava", scale="tiny")
    model = module.model.train()
    model.encoder.requires_grad_(False)
    images = [Image.new("RGB", (64, 64), color) for color in ((255, 0, 0), (0, 90, 255))]
    samples = [Sample("a", images[0], ("red",)), Sample("b", None, ("nothing",)), Sample("c", images[1], ("blue",))]
    with torch.no_grad():
        tokens = model.encoder(model.processor.transform(images)).tokens
    store = FeatureStore(tmp_path, {}, tuple(tokens.shape[1:]), torch.float32)
    features = CachedFeatures(store, torch.float32)
    with store.filling():
        store.reserve(2, 10**9)
        store.append([features.key("a"), features.key("c")], tokens)
    for chosen in (samples, samples[1:2]):
        batch = model.processor(chosen, True, [0] * len(chosen))
        processor = features.over(model.processor)
        cached = features.tokens(processor([features.mark(s) for s in chosen], True, [0] * len(chosen)))
        assert "pixel_values" not in cached
        expected, _ = module.losses(batch)
        got, _ = module.losses(cached)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
        got.backward()
        assert model.connector.proj.weight.grad is not None  # or two processes would wait for each other


def test_image_tokens_stand_for_pixels_in_any_model(shake: Any) -> None:
    """The hook that wirings share: equal features, and no graph through a frozen encoder."""
    import zoo

    model = zoo.build("llava", scale="tiny", connector="pixel-shuffle").model.eval()
    shake(model)
    model.encoder.requires_grad_(False)
    pixels = torch.randn(3, 3, 64, 64)
    features = model.encode_images(pixels)
    assert not features.tokens.requires_grad
    again = model.encode_images(None, features.tokens)
    assert again.grid == features.grid == (4, 4)
    torch.testing.assert_close(
        model.image_features(pixels), model.image_features(None, image_tokens=features.tokens), atol=0, rtol=0
    )
    assert isinstance(model, nn.Module)
    with pytest.raises(ConfigError, match="neither pixel_values nor image_tokens"):
        model.encode_images(None)
