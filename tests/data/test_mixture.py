"""Several sources as one: rates, order, and that training reads by them."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from zoo.cli.overrides import run_config
from zoo.data.loader import loader
from zoo.data.mixture import Mixture, MixtureConfig, MixtureOrder
from zoo.data.openmoji import OpenMojiConfig
from zoo.data.order import SampleOrder, training_order
from zoo.data.sample import Sample
from zoo.errors import ConfigError, DataError


class Numbers:
    """``count`` samples named by their number."""

    name, version, licence, max_bad = "numbers", "1", "none", 0

    def __init__(self, count: int) -> None:
        self.count = count

    def ids(self, split: str) -> list[str]:
        return [f"{split}{n}" for n in range(self.count)]

    def sample(self, id: str) -> Sample:
        return Sample(id, Image.new("RGB", (8, 8)), (id,), {"cluster": id[:-1]})


def names(order: MixtureOrder, start: int, stop: int) -> Counter[str]:
    return Counter(draw.id.partition("/")[0] for draw in order.slice(start, stop))


@pytest.mark.parametrize(("power", "ratio"), [(0.5, 10.0), (1.0, 100.0), (0.0, 1.0)])
def test_a_hundredfold_dataset_is_drawn_as_its_power_says(power: float, ratio: float) -> None:
    """instructblip.md, section 10: with sizes 1:100 and square roots the sampled ratio tends to 1:10."""
    mixture = Mixture({"small": Numbers(50), "large": Numbers(5000)}, power, {})
    drawn = names(mixture.order("train", seed=3), 0, 50_000)
    assert drawn["large"] / drawn["small"] == pytest.approx(ratio, rel=0.01)


def test_every_block_has_its_shares_and_is_mixed() -> None:
    order = Mixture({"a": Numbers(10), "b": Numbers(90)}, 0.5, {}).order("train", seed=0)
    for block in range(5):
        assert abs(names(order, block * order.block, (block + 1) * order.block)["a"] - order.block / 4) <= 1
    dealt = [draw.id[0] for draw in order.slice(0, order.block)]
    assert dealt != sorted(dealt)
    assert dealt != [draw.id[0] for draw in order.slice(order.block, 2 * order.block)]


def test_factors_multiply_shares() -> None:
    rates = Mixture({"a": Numbers(100), "b": Numbers(100)}, 0.5, {"b": 3.0}).rates()
    assert rates == pytest.approx({"a": 0.25, "b": 0.75})


def test_no_sample_of_a_source_is_repeated_before_all_were_seen() -> None:
    order = Mixture({"a": Numbers(7), "b": Numbers(700)}, 0.5, {}).order("train", seed=1)
    seen = [draw for draw in order.slice(0, 3000) if draw.id.startswith("a/")]
    for epoch in range(len(seen) // 7):
        part = seen[7 * epoch : 7 * epoch + 7]
        assert len({draw.id for draw in part}) == 7
        assert {draw.draw for draw in part} == {epoch}


def test_any_place_is_found_without_those_before_it() -> None:
    order = Mixture({"a": Numbers(7), "b": Numbers(70), "c": Numbers(1)}, 0.5, {}).order("train", seed=1)
    whole = order.slice(0, 5000)
    assert order.slice(1000, 3100) == whole[1000:3100]
    assert pickle.loads(pickle.dumps(order)).slice(4000, 4010) == whole[4000:4010]
    assert order.hash(4000) == Mixture({"a": Numbers(7), "b": Numbers(70), "c": Numbers(1)}, 0.5, {}).order(
        "train", seed=1
    ).hash(4000)
    other = Mixture({"a": Numbers(7), "b": Numbers(70), "c": Numbers(1)}, 0.5, {}).order("train", seed=2)
    assert other.slice(0, 100) != whole[:100]


def test_equal_sources_are_not_read_in_step() -> None:
    order = Mixture({"a": Numbers(40), "b": Numbers(40)}, 0.5, {}).order("train", seed=0)
    first, second = ([d.id[2:] for d in order.slice(0, 60) if d.id[0] == name] for name in "ab")
    assert first[:20] != second[:20]


def test_samples_keep_what_they_are_under_their_new_ids() -> None:
    mixture = Mixture({"a": Numbers(3), "b": Numbers(2)}, 0.5, {})
    assert mixture.ids("val") == ["a/val0", "a/val1", "a/val2", "b/val0", "b/val1"]
    sample = mixture.sample("b/val1")
    assert (sample.id, sample.texts, sample.meta["cluster"]) == ("b/val1", ("val1",), "b/val")
    with pytest.raises(DataError, match="none of a, b"):
        mixture.sample("c/val1")


def test_a_run_reads_icons_and_scenes_by_their_rates() -> None:
    scenes = "{name:openmoji-scenes,train_scenes:400,val_scenes:9,test_scenes:9,objects:'1..2'}"
    fields = f"{{icons:{{name:openmoji}},scenes:{scenes}}}"
    config = run_config(["model=clip", "scale=tiny", "data=mixture", f"data.sources={fields}", "data.balance=equal"])
    assert config.data["sources"]["scenes"]["train_scenes"] == 400
    values = {k: v for k, v in config.data.items() if k != "name"}
    source = MixtureConfig(**values).build(64)
    order = training_order(source, 0)
    assert isinstance(order, MixtureOrder)
    from zoo.api import build_module

    module = build_module(config.recipe, 0)
    batch = next(iter(loader(source, module.model.processor, order, 8, stop_step=1)))
    assert batch["pixel_values"].shape == (8, 3, 64, 64)
    assert names(order, 0, 1024) == {"icons": 512, "scenes": 512}


def test_blank_images_reach_through() -> None:
    source = MixtureConfig(sources={"icons": {"name": "openmoji"}}, blank_images=True).build(64)
    assert isinstance(training_order(source, 0), MixtureOrder)
    assert source.sample(source.ids("train")[0]).image.getextrema() == ((255, 255),) * 3  # type: ignore[union-attr]
    assert isinstance(training_order(OpenMojiConfig().build(64), 0), SampleOrder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "needs sources"),
        ({"sources": {"a": {}}}, r"data.sources.a: expected .* 'name'"),
        ({"sources": {"a/b": {"name": "openmoji"}}}, "without '/'"),
        ({"sources": {"a": {"name": "openmojy"}}}, "openmoji"),
        ({"sources": {"a": {"name": "openmoji", "siez": 3}}}, "data.sources.a has no field 'siez'"),
        ({"sources": {"a": {"name": "openmoji"}}, "factors": {"b": 2.0}}, "no source"),
        ({"sources": {"a": {"name": "openmoji"}}, "factors": {"a": 0.0}}, "above 0"),
    ],
)
def test_mistakes_are_one_line(fields: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        MixtureConfig(**fields).build(64)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
