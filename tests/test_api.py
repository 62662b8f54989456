"""The notebook door: build, train in a Trainer, use, show, save, load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import zoo
from zoo.errors import ConfigError
from zoo.torchvision_ops import ensure

SMALL: dict[str, Any] = {
    "scale": "tiny",
    "stages": "joint",
    "encoder": {"width": 32, "depth": 2, "ffn": 64},
    "decoder": {"depth": 1},
}


@pytest.fixture
def red() -> Image.Image:
    return Image.new("RGB", (50, 30), (220, 20, 20))


def test_models_are_listed_by_pattern() -> None:
    assert {"clip", "llava", "llava-1.5", "blip2-opt"} <= set(zoo.list_models())
    assert zoo.list_models("llava*")[0] == "llava"
    assert zoo.list_models("nothing*") == []


def test_what_build_returns_trains_in_a_trainer() -> None:
    ensure()
    from lightning.pytorch import LightningModule, Trainer

    from zoo.data.loader import loader
    from zoo.data.order import SampleOrder
    from zoo.plugin import catalogue

    module = zoo.build("llava", connector="mlp", **SMALL)
    assert isinstance(module, LightningModule)
    assert isinstance(module.model, torch.nn.Module)
    assert not isinstance(module.model, LightningModule)
    source = catalogue()["data"].parse("openmoji", {}, "data").build(64)
    batches = loader(source, module.processor, SampleOrder(source.ids("train"), 0), 8, stop_step=3)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, batches)
    assert trainer.global_step == 3
    moved = [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]
    assert any(name.startswith("model.connector") for name in moved)
    assert any(name.startswith("model.decoder") for name in moved)


def test_capabilities_are_offered_directly_and_missing_ones_say_what_is_there(red: Image.Image) -> None:
    clip = zoo.build("clip", scale="tiny")
    vectors = clip.embed_images([red, red])
    assert vectors.shape == (2, 128)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    assert clip.embed_texts(["a red card"]).shape == (1, 128)
    with pytest.raises(AttributeError, match="does not offer generate_text; it offers embed_images, embed_texts"):
        clip.generate_text([red])
    llava = zoo.build("llava", **SMALL)
    assert isinstance(llava.generate_text([red], max_new_tokens=3)[0], str)
    assert llava.score_text([red], ["a card"])[0] < 0
    assert llava.training  # as it was


def test_exchanging_the_connector_leaves_every_other_initial_weight_bit_equal() -> None:
    linear = zoo.build("llava", connector="linear", **SMALL).state_dict()
    torch.manual_seed(123)  # the global stream is not what decides
    for name in ("mlp", "qformer", "perceiver-resampler", "pixel-shuffle"):
        other = zoo.build("llava", connector=name, **SMALL).state_dict()
        shared = [key for key in linear if not key.startswith("model.connector.")]
        assert shared
        for key in shared:
            assert torch.equal(linear[key], other[key]), (name, key)
    another = zoo.build("llava", connector="linear", seed=1, **SMALL).state_dict()
    assert not torch.equal(linear["model.connector.proj.weight"], another["model.connector.proj.weight"])


def test_building_leaves_the_global_random_stream_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    zoo.build("clip", scale="tiny")
    assert torch.equal(torch.rand(3), expected)


def test_wiring_is_shown_as_html_and_text() -> None:
    module = zoo.build("llava", connector="qformer", scale="tiny")
    page = module._repr_html_()
    for word in ("llava+connector=qformer", "qformer", "frozen", "trained", "parameters"):
        assert word in page
    text = zoo.describe("llava", connector="qformer", scale="tiny")
    assert "stage 2 of 2: instruct" in text
    assert "layout decoder" in text


def test_a_published_size_is_described_without_building_its_weights() -> None:
    text = zoo.describe("blip2-opt")
    assert "eva-vit-g" in text
    assert "2.65 G" in text  # OPT-2.7B's parameters


def test_saved_weights_come_back_and_a_changed_part_is_new_and_said_so(tmp_path: Path, red: Image.Image) -> None:
    from zoo.weights import save

    module = zoo.build("llava", **SMALL)
    save(module, module.recipe, tmp_path / "llava")
    again = zoo.from_pretrained(tmp_path / "llava")
    assert not again.training
    for key, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert again.recipe == module.recipe
    changed = zoo.from_pretrained(tmp_path / "llava", connector="mlp")
    assert "connector" in str(changed.load_report)
    assert torch.equal(
        changed.state_dict()["model.decoder.lm.model.embed_tokens.weight"],
        module.state_dict()["model.decoder.lm.model.embed_tokens.weight"],
    )


def test_frozen_parts_stay_in_eval_mode_and_get_no_gradient() -> None:
    module = zoo.build("llava", scale="tiny")
    module.train()
    assert not module.model.encoder.training
    assert not module.model.decoder.training
    assert module.model.connector.training
    batch = module.model.example_batch(2)
    batch["labels"][:, -3:] = 5
    module.losses(batch)[0].backward()
    assert all(p.grad is None for p in module.model.encoder.parameters())
    assert all(p.grad is None for p in module.model.decoder.parameters())
    assert all(p.grad is not None for p in module.model.connector.parameters())


def test_a_stage_that_names_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"conector.*connector"):
        zoo.build("llava", scale="tiny", stages=[{"name": "x", "train": ["conector"]}])


def test_mistakes_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"llav.*llava"):
        zoo.build("llav")
    with pytest.raises(ConfigError, match=r"conector.*connector"):
        zoo.build("llava", conector="mlp")
    with pytest.raises(ConfigError, match=r"connector\.depth"):
        zoo.build("llava", connector={"name": "mlp", "depth": "two"})
    with pytest.raises(AttributeError, match="biuld"):
        zoo.biuld  # noqa: B018


def test_compose_gives_what_train_starts_from_and_leaves_hydra_as_it_was() -> None:
    from hydra.core.global_hydra import GlobalHydra

    plain = zoo.compose(["model=llava", "connector=mlp", "scale=tiny"])
    assert plain["connector"] == {"name": "mlp"}
    assert plain["scale"]["name"] == "tiny"
    assert not GlobalHydra.instance().is_initialized()
