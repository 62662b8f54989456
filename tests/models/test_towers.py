"""The towers wiring: what it computes, what it offers, and what a changed part leaves alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from zoo.capabilities import capabilities_of
from zoo.errors import ConfigError
from zoo.models.towers import CHUNK, Towers
from zoo.recipe import resolve

SMALL = {"width": 32, "depth": 2, "heads": 2, "ffn": 64}
ENCODERS = ("clip-vit-b-32", "clip-rn50", "vit-b-16", "timm-vit")


def build(encoder: str = "clip-vit-b-32", seed: int = 0, **changes: Any) -> Towers:
    """At the scale's image size and with its tokenizer."""
    made = resolve("clip", choices={"encoder": encoder}, values={"text_encoder": SMALL, **changes}, scale="tiny")
    model: Towers = made.wiring[1].build(made.parts, seed)
    return model


@pytest.fixture(scope="module")
def model() -> Towers:
    return build()


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(64, 64), (80, 50), (30, 90)]
    return [
        Image.frombytes("RGB", (w, h), bytes(torch.randint(0, 256, (h * w * 3,), generator=generator).tolist()))
        for w, h in (sizes[i % 3] for i in range(count))
    ]


def test_outputs_are_unit_vectors_and_the_log_temperature(model: Towers) -> None:
    batch = model.example_batch(3)
    batch["pixel_values"].normal_()
    out = model(batch)
    assert set(out) == model.provides
    for name in ("image_embeds", "text_embeds"):
        assert out[name].shape == (3, 32)
        assert_close(out[name].norm(dim=-1), torch.ones(3))
    assert out["logit_scale"] is model.logit_scale
    assert model.logit_scale.shape == ()
    assert abs(model.logit_scale.item() - math.log(1 / 0.07)) < 1e-6
    assert not torch.allclose(model.image_features(batch["pixel_values"]).norm(dim=-1), torch.ones(3))


def test_text_is_pooled_at_its_end_and_reads_nothing_behind_it(model: Towers) -> None:
    ids = torch.tensor([[1, 40, 41, 2, 0, 0], [1, 50, 51, 52, 53, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    model.eval()
    first = model.text_features(ids, mask)
    behind = ids.clone()
    behind[0, 4:] = torch.tensor([77, 78])
    assert_close(model.text_features(behind, mask), first)
    before = ids.clone()
    before[:, 1] = 99
    assert ((model.text_features(before, mask) - first).abs().max(-1).values > 1e-4).all()
    hidden = model.text_encoder(ids, mask)
    assert_close(hidden.pooled, torch.stack([hidden.tokens[0, 3], hidden.tokens[1, 5]]))


def test_capabilities_embed_in_chunks_and_restore_the_mode(model: Towers) -> None:
    assert capabilities_of(model) == ("embed_images", "embed_texts")
    model.train()
    model.text_encoder.eval()
    images = pictures(CHUNK + 3)
    texts = [f"a {word} thing" for word in ("red", "very big and rather round", "small")]
    embedded, words = model.embed_images(images), model.embed_texts(texts)
    assert embedded.shape == (CHUNK + 3, 32)
    assert_close(embedded.norm(dim=-1), torch.ones(CHUNK + 3))
    assert_close(model.embed_images(images[-1:]), embedded[-1:], atol=1e-6, rtol=1e-5)
    assert_close(model.embed_texts(texts[:1]), words[:1], atol=1e-6, rtol=1e-5)
    assert model.training
    assert model.encoder.training
    assert not model.text_encoder.training
    assert model.embed_images([]).shape == (0, 32)
    with pytest.raises(ConfigError, match="wrap it in a list"):
        model.embed_texts("one text")


def test_processor_makes_what_forward_takes(model: Towers) -> None:
    from zoo.data.sample import Sample

    rows = model.processor([Sample(str(i), p, ("red heart",)) for i, p in enumerate(pictures(2))])
    assert {k: (v.dtype, v.ndim) for k, v in rows.items()} == {
        k: (v.dtype, v.ndim) for k, v in model.example_batch(2).items()
    }
    out = model(rows)
    assert_close(out["image_embeds"], model.embed_images(pictures(2)), atol=1e-5, rtol=1e-4)


def test_layouts_say_what_is_attended(model: Towers) -> None:
    layouts = model.layouts()
    assert layouts["image"].kind == "full"
    assert layouts["image"].length == 17  # 16 patches and the class token
    assert layouts["text"].kind == "causal"


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_image_encoder_joins_and_learns(encoder: str) -> None:
    model = build(encoder)
    batch = {**model.example_batch(4), "pixel_values": torch.randn(4, 3, 64, 64)}
    batch["input_ids"] = torch.randint(4, 900, batch["input_ids"].shape)
    out = model(batch)
    assert out["image_embeds"].shape == out["text_embeds"].shape
    (out["image_embeds"] @ out["text_embeds"].T).diag().sum().mul(out["logit_scale"]).backward()
    lost = [n for n, p in model.named_parameters() if p.grad is None]
    assert not lost
    assert isinstance(model.image_projection, nn.Identity) == (encoder == "clip-rn50")


def test_exchanging_a_part_changes_no_other_weight() -> None:
    base = build().state_dict()
    for encoder in ENCODERS[1:]:
        options = {"encoder": {"embed_width": 32}} if encoder == "clip-rn50" else {}
        recipe = resolve("clip", choices={"encoder": encoder}, values={"text_encoder": SMALL, **options}, scale="tiny")
        other = recipe.wiring[1].build(recipe.parts, 0).state_dict()
        kept = [n for n in base if n.startswith(("text_encoder.", "text_projection.", "logit_scale"))]
        assert all(torch.equal(base[n], other[n]) for n in kept)
    again, another = build().state_dict(), build(seed=1).state_dict()
    assert all(torch.equal(t, again[n]) for n, t in base.items())
    assert not torch.equal(base["encoder.tower.conv1.weight"], another["encoder.tower.conv1.weight"])


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build()
    assert torch.equal(torch.rand(3), expected)


def test_parts_that_do_not_meet_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.pool=true"):
        build("eva-vit-g")
    with pytest.raises(ConfigError, match="projects to 128, the shared space is 40"):
        build("clip-rn50", wiring={"shared_width": 40})
    with pytest.raises(ConfigError, match="ids, more than"):
        _ = build(text_encoder={**SMALL, "vocab_size": 100}).processor
    with pytest.raises(ConfigError, match="openmoji-bpe"):
        _ = build(text_encoder={**SMALL, "tokenizer": "openmoji-bp"}).processor
    with pytest.raises(ConfigError, match=r"reads \[batch, 3, 64, 64\]"):
        build().image_features(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="129 tokens"):
        build().text_features(torch.ones(1, 129, dtype=torch.long))
