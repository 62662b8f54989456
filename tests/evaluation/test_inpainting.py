"""Fidelity inside and outside masks by hand, and the task on a model whose mistakes are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import zoo
from zoo.data.sample import Sample
from zoo.errors import ConfigError, DataError
from zoo.evaluation import inpainting
from zoo.evaluation.catalogue import METRICS
from zoo.evaluation.inpainting import InpaintingConfig, fidelity


def test_fidelity_by_hand() -> None:
    wanted = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, :4, :8] = True
    masks[1, 5:, 3:] = True
    drawn = wanted + torch.where(masks, 0.1, 0.02)[:, None]
    found = fidelity(drawn, wanted, masks)
    assert found["psnr_inside"] == pytest.approx([20.0, 20.0], abs=1e-4)
    assert found["psnr_outside"] == pytest.approx([-20 * math.log10(0.02)] * 2, abs=1e-4)
    perfect = fidelity(wanted, wanted, masks)
    assert perfect["psnr_inside"] == [100.0, 100.0]
    assert perfect["ssim_inside"] == pytest.approx([1.0, 1.0], abs=1e-5)
    small = fidelity(wanted[..., :8, :8], wanted[..., :8, :8], masks[:, :8, :8])
    assert "ssim_inside" not in small


def test_ssim_is_weighed_by_the_mask() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    generator = torch.Generator().manual_seed(1)
    wanted, drawn = torch.rand(2, 3, 20, 24, generator=generator), torch.rand(2, 3, 20, 24, generator=generator)
    masks = torch.zeros(2, 20, 24, dtype=torch.bool)
    masks[:, 3:12, 5:19] = True
    found = fidelity(drawn, wanted, masks)
    share = float(masks[0].float().mean())
    whole = structural_similarity_index_measure(drawn, wanted, data_range=1.0, reduction="none")
    for n in range(2):
        mixed = share * found["ssim_inside"][n] + (1 - share) * found["ssim_outside"][n]
        assert mixed == pytest.approx(float(whole[n]), abs=1e-6)


class Plain:
    """Images of one grey, 20 x 20; every second names the box of an object."""

    name, version, licence, max_bad = "plain", "1", "CC0-1.0", 0

    def ids(self, split: str) -> list[str]:
        return [f"g-{n}" for n in range(10)] if split == "test" else []

    def sample(self, id: str) -> Sample:
        n = int(id[2:])
        objects = [{"name": "x", "box": [2, 4, 10, 8]}]
        return Sample(id, Image.new("RGB", (20, 20), (10 * n,) * 3), (f"grey {n}",), {"objects": objects})


class Draws:
    """Redraws everything 0.02 too light and what is masked 0.1 too light, at 16 x 16."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.masks: list[Tensor] = []

    def prepared_images(self, images: Sequence[Any]) -> Tensor:
        greys = torch.tensor([image.getpixel((0, 0))[0] / 255 for image in images])
        return greys.view(-1, 1, 1, 1).expand(-1, 3, 16, 16).clone()

    def inpaint_images(self, images: Any, masks: Tensor, texts: Sequence[str], **how: Any) -> Tensor:
        self.calls.append(how | {"texts": list(texts)})
        self.masks.append(masks)
        return self.prepared_images(images) + torch.where(masks, 0.1, 0.02)[:, None]


def test_the_task_by_hand() -> None:
    model = Draws()
    result = InpaintingConfig(batch=4, steps=3, guidance=1.5, seed=7).build().run(model, Plain(), "test")
    assert result.metrics["psnr_inside"] == pytest.approx(20.0, abs=1e-4)
    assert result.metrics["psnr_outside"] == pytest.approx(-20 * math.log10(0.02), abs=1e-4)
    assert result.metrics["psnr_inside_redrawn"] == pytest.approx(-20 * math.log10(0.02), abs=1e-4)
    assert result.metrics["masked"] == 0.25
    assert [call["seed"] for call in model.calls] == [7, 7, 11, 11, 15, 15]
    assert model.calls[0]["steps"] == 3
    assert model.calls[0]["texts"] == ["grey 0", "grey 1", "grey 2", "grey 3"]
    assert not any(mask.any() for mask in model.masks[1::2])
    drawn = torch.cat(model.masks[::2])
    assert drawn.flatten(1).sum(1).tolist() == [64] * 10
    assert len({tuple(m.flatten().tolist()) for m in drawn}) > 5  # at a place of its own each
    again = Draws()
    InpaintingConfig(batch=3).build().run(again, Plain(), "test")
    assert torch.equal(torch.cat(again.masks[::2]), drawn)  # whatever the batch
    for name, info in METRICS["inpainting"].items():
        if name in result.metrics:
            assert sum(r[info.numerator] for r in result.items) / 10 == pytest.approx(result.metrics[name])


def test_the_mask_of_an_object_is_its_box_at_the_size_that_is_drawn() -> None:
    model = Draws()
    InpaintingConfig(mask="object", items=1).build().run(model, Plain(), "test")
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[3:7, 1:8] = True  # 2..10 by 4..8 of 20 pixels, outwards to whole pixels of 16
    assert torch.equal(model.masks[0][0], expected)


def test_an_evaluator_scores_the_whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    class Judge:
        def embed_images(self, images: Sequence[Any]) -> Tensor:
            light = torch.tensor([image.getpixel((15, 15))[0] / 255 for image in images])
            return torch.stack([light, (1 - light**2).sqrt()], 1)

        def embed_texts(self, texts: Sequence[str]) -> Tensor:
            return torch.tensor([[1.0, 0.0]] * len(texts))

    monkeypatch.setattr(inpainting, "load_evaluator", lambda *a: Judge())
    monkeypatch.setattr(inpainting, "evaluator_hash", lambda path, task: f"hash of {path}")
    task = InpaintingConfig(evaluator="judge", batch=3).build()
    result = task.run(Draws(), Plain(), "test")
    assert result.metrics["score_real"] == pytest.approx(sum(10 * n / 255 for n in range(10)) / 10, abs=1e-3)
    assert result.metrics["score"] > result.metrics["score_real"] + 0.01
    assert task.spec(Plain(), "test")["config"]["evaluator"] == "hash of judge"


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ConfigError, match="rectangle or object"):
        InpaintingConfig(mask="circle")
    with pytest.raises(ConfigError, match="between 0 and 1"):
        InpaintingConfig(share=1.0)
    with pytest.raises(ConfigError, match="does not exist"):
        InpaintingConfig(evaluator="/nowhere").check()
    InpaintingConfig().check()  # without an evaluator there is nothing to look for
    assert InpaintingConfig().build().missing(object()) == ("inpaint_images",)

    class Bare(Plain):
        def sample(self, id: str) -> Sample:
            found = super().sample(id)
            return Sample(id, found.image, found.texts)

    with pytest.raises(DataError, match="needs boxes"):
        InpaintingConfig(mask="object").build().run(Draws(), Bare(), "test")
    hashes = {InpaintingConfig(**f).build().spec_hash(Plain(), "test") for f in ({}, {"steps": 2}, {"share": 0.5})}
    assert len(hashes) == 3


def test_an_untrained_model_at_tiny_scale() -> None:
    model: Any = zoo.build("show-o", scale="tiny").model
    result = InpaintingConfig(items=3, steps=2).build().run(model, Plain(), "test")
    values = result.metrics
    assert all(math.isfinite(value) for value in values.values())
    # codes outside the mask stay, so that there drawing costs what drawing it again does, but for the codes at the edge
    assert values["psnr_outside"] == pytest.approx(values["psnr_outside_redrawn"], abs=3.0)
    image = Plain().sample("g-7").image
    prepared = model.prepared_images([image, image])
    assert prepared.shape[:2] == (2, 3)
    torch.testing.assert_close(prepared, torch.full_like(prepared, 70 / 255), atol=1e-4, rtol=0)
