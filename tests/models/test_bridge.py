"""The bridge: what goes where, what learns, and what a batch may not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import zoo
from zoo.api import build_module
from zoo.data.sample import Sample
from zoo.errors import ConfigError
from zoo.module import ZooModule
from zoo.recipe import resolve

Shake = Callable[[nn.Module], nn.Module]
RECIPES = ["llava", "llava-1.5", "blip2-opt"]
SMALL = {
    "encoder": {"width": 32, "depth": 3, "heads": 2, "ffn": 48, "image_size": 32, "patch_size": 8},
    "decoder": {"width": 48, "depth": 2, "heads": 4, "ffn": 64},
}
QFORMER = {"width": 24, "depth": 3, "heads": 2, "ffn": 40, "queries": 5}


def small(recipe: str, shake: Shake | None = None, **changes: Any) -> ZooModule:
    values: dict[str, Any] = {**SMALL, "stages": "joint"}
    if recipe.startswith("blip2") and "connector" not in changes:
        values["connector"] = QFORMER
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    module = zoo.build(recipe, scale="tiny", **values)
    if shake is not None:
        shake(module.model)
    return module


def picture(seed: int) -> Image.Image:
    import numpy as np

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 32, 3), dtype=np.uint8))


def samples(texts: list[str], images: list[bool] | None = None) -> list[Sample]:
    shown = images or [True] * len(texts)
    return [Sample(str(i), picture(i) if s else None, (t,)) for i, (t, s) in enumerate(zip(texts, shown, strict=True))]


TEXTS = ["red apple", "a dog", "grinning face with big eyes", "flag: Japan"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_splice_puts_image_tokens_in_their_slots(recipe: str, shake: Shake) -> None:
    model: Any = small(recipe, shake).model.eval()
    batch = model.processor(samples(TEXTS))
    ids, slots = batch["input_ids"], batch["input_ids"] == model.image_token_id
    with torch.no_grad():
        embeds = model._splice(ids, batch["pixel_values"])
        features = model.image_features(batch["pixel_values"])
    assert torch.equal(embeds[slots], features.flatten(0, 1))
    assert torch.equal(embeds[~slots], model.decoder.embed(ids[~slots]))
    assert bool((batch["labels"][slots] == -100).all())
    assert bool((batch["labels"][~batch["attention_mask"]] == -100).all())
    # BLIP-2: the slots stand before BOS, which is a target; LLaVA: BOS first, never a target
    first = ids[0].tolist().index(model.tokenizer.bos_id)
    assert first == (model.connector.tokens if recipe == "blip2-opt" else 0)
    assert (batch["labels"][0, first] != -100) == (recipe == "blip2-opt")


@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_predicts_the_next_token(recipe: str, shake: Shake) -> None:
    module = small(recipe, shake).eval()
    model: Any = module.model
    batch = model.processor(samples(TEXTS))
    with torch.no_grad():
        logits = model.text_logits(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
        loss, report = module.losses(batch)
    labels = batch["labels"]
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    bits = expected * (labels[:, 1:] != -100).sum() / torch.log(torch.tensor(2.0)) / sum(len(t) for t in TEXTS)
    torch.testing.assert_close(report["next-token/bits_per_byte"], bits, atol=1e-4, rtol=0)
    # ids of pads do not matter
    padded = {**batch, "input_ids": batch["input_ids"].masked_fill(~batch["attention_mask"], 9)}
    with torch.no_grad():
        assert torch.equal(module.losses(padded)[0], loss)


def test_wrong_number_of_slots_is_loud() -> None:
    model: Any = small("llava").model
    batch = model.processor(samples(TEXTS))
    with pytest.raises(ConfigError, match="64 image placeholders, but 3 images give 16 tokens each: expected 48"):
        model.text_logits(batch["pixel_values"][:3], batch["input_ids"])
    with pytest.raises(ConfigError, match="64 image placeholders"), torch.no_grad():
        model.text_logits(None, batch["input_ids"])


@pytest.mark.parametrize("images", [[True, False, True, False], [False] * 4])
def test_rows_without_an_image(images: list[bool], shake: Shake) -> None:
    module = small("llava", shake)
    model: Any = module.model
    batch = model.processor(samples(TEXTS, images))
    assert batch["has_image"].tolist() == images
    loss, _ = module.losses(batch)
    loss.backward()
    grads = [p.grad for p in model.connector.parameters()]
    assert all(g is not None for g in grads)  # or distributed training would wait for ever
    assert any(bool((g != 0).any()) for g in grads) == any(images)
    # such a row is what it is alone
    alone = model.processor(samples(TEXTS[1:2], [False]))
    with torch.no_grad():
        hidden = model(batch)["hidden"][1]
        single = model(alone)["hidden"][0]
    torch.testing.assert_close(hidden[: single.shape[0]], single, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["llava", "llava-1.5", "blip2-opt"])
def test_stages_train_what_the_papers_train(recipe: str) -> None:
    module = build_module(resolve(recipe, scale="tiny", values=SMALL), 0)
    for index, stage in enumerate(module.recipe.stages):
        module.set_stage(index)
        module.train()
        learns = {name.split(".")[0] for name, p in module.model.named_parameters() if p.requires_grad}
        assert learns == set(stage.train)
        module.zero_grad(set_to_none=True)
        module.losses(module.model.processor(samples(TEXTS)))[0].backward()
        got = {name.split(".")[0] for name, p in module.model.named_parameters() if p.grad is not None}
        assert got == learns
        assert not module.model.encoder.training  # type: ignore[union-attr]
    trained = [set(s.train) for s in module.recipe.stages]
    expected = [{"connector"}] if recipe == "blip2-opt" else [{"connector"}, {"connector", "decoder"}]
    assert trained == expected


def test_swapping_the_connector_changes_no_other_weight() -> None:
    states = [
        small("llava", connector=name).model.state_dict() for name in ("linear", "mlp", "qformer", "pixel-shuffle")
    ]
    for other in states[1:]:
        same = [k for k in states[0] if not k.startswith("connector.")]
        assert same
        assert all(torch.equal(states[0][k], other[k]) for k in same)


@pytest.mark.parametrize(
    ("connector", "tokens"),
    [("linear", 16), ("mlp", 16), ("qformer", 16), ("perceiver-resampler", 16), ("pixel-shuffle", 4)],
)
@pytest.mark.parametrize("decoder", ["vicuna-7b", "opt-2.7b", "trunk-lm"])
def test_any_connector_with_any_decoder(connector: str, tokens: int, decoder: str) -> None:
    module = zoo.build("llava", scale="tiny", connector=connector, decoder=decoder, stages="joint", options=OPTIONS)
    assert module.model.connector.tokens == tokens  # type: ignore[union-attr]
    loss, report = module.losses(module.model.processor(samples(TEXTS)))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in module.model.parameters())
    assert int(report["next-token/tokens"]) > 8


OPTIONS = {f"{slot}.{key}": value for slot, fields in SMALL.items() for key, value in fields.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_score_text_is_the_logits_sum(recipe: str, shake: Shake) -> None:
    model: Any = small(recipe, shake).model
    images = [picture(i) for i in range(4)]
    scores = model.score_text(images, TEXTS)
    for i, text in enumerate(TEXTS):
        batch = model.processor(samples([text]))
        with torch.no_grad():
            model.eval()
            pixels = model.processor.encode_images(images[i : i + 1])
            p = model.text_logits(pixels, batch["input_ids"]).log_softmax(-1)[0]
        labels = batch["labels"][0].tolist()
        words = model.tokenizer.encode([text + "\n"])[0]
        places = [t for t, label in enumerate(labels) if label != -100 and t and label != model.tokenizer.bos_id]
        assert [labels[t] for t in places] == words
        expected = sum(p[t - 1, labels[t]] for t in places)
        torch.testing.assert_close(scores[i], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("template", ["plain", "blip2", "vicuna_v1"])
@pytest.mark.parametrize("decoder", ["vicuna-7b", "opt-2.7b", "trunk-lm"])
def test_candidates_equal_pairs(template: str, decoder: str, shake: Shake) -> None:
    module = zoo.build(
        "llava",
        scale="tiny",
        decoder=decoder,
        options={**OPTIONS, "wiring.template": template, "decoder.context_length": 256},
    )
    model: Any = module.model
    shake(model)
    images = [picture(i) for i in range(3)]
    candidates = [["red apple", "a", "grinning face"], ["flag: Japan", "dog face", "dog"], ["x", "y", "dog face"]]
    prompts = ["what is it?", "name", "what is it?"] if template != "plain" else None
    ranked = model.score_candidates(images, candidates, prompts)
    pairs = [
        model.score_text([image] * 3, texts, None if prompts is None else [prompt] * 3)
        for image, texts, prompt in zip(images, candidates, prompts or [""] * 3, strict=True)
    ]
    torch.testing.assert_close(ranked, torch.stack(pairs), atol=1e-4, rtol=1e-5)
    assert ranked.std() > 1
    assert model.score_candidates([], []).shape == (0, 0)


@pytest.mark.parametrize("recipe", ["llava", "blip2-opt"])
def test_batches_change_nothing(recipe: str, shake: Shake) -> None:
    model: Any = small(recipe, shake, wiring={"template": "vicuna_v1"}, decoder={"context_length": 256}).model
    images = [picture(i) for i in range(16)]
    prompts = ["what is it?", "name it", "a", "which colour has the thing in this picture?"] * 4
    together = model.generate_text(images, prompts, max_new_tokens=6)
    alone = [model.generate_text([i], [p], max_new_tokens=6)[0] for i, p in zip(images, prompts, strict=True)]
    assert together == alone
    assert len(set(together)) > 2
    sampled = model.generate_text(images, prompts, max_new_tokens=6, temperature=1.0, seed=5)
    assert sampled != together
    assert sampled == model.generate_text(images, prompts, max_new_tokens=6, temperature=1.0, seed=5)
    scores = model.score_text(images, [TEXTS[i % 4] for i in range(16)], prompts)
    one = torch.cat([model.score_text([images[i]], [TEXTS[i % 4]], [prompts[i]]) for i in range(16)])
    torch.testing.assert_close(scores, one, atol=1e-4, rtol=1e-5)


def test_capabilities_restore_the_mode_of_every_module(shake: Shake) -> None:
    module = build_module(resolve("llava", scale="tiny", values=SMALL), 0).train()
    before = [m.training for m in module.model.modules()]
    assert set(before) == {True, False}  # frozen parts stay in eval mode while others train
    model: Any = module.model
    model.generate_text([picture(0)], max_new_tokens=2)
    model.score_text([picture(0)], ["a"])
    assert [m.training for m in module.model.modules()] == before
    with pytest.raises(ConfigError, match="1 images and 2 texts"):
        model.score_text([picture(0)], ["a", "b"])
    with pytest.raises(ConfigError, match="got one string"):
        model.score_text([picture(0)], "a")


def test_layouts_and_example_batch_need_no_weights_and_no_tokenizer() -> None:
    for recipe, slots in (("llava", 256), ("llava-1.5", 576), ("blip2-opt", 32), ("blip2-opt-6.7b", 32)):
        with torch.device("meta"):
            model: Any = zoo.build(recipe).model
            assert model.connector.tokens == slots
            batch = model.example_batch(2)
            outputs = model(batch)
        assert outputs["hidden"].shape == (2, slots + 16, model.decoder.width)
        layout = model.layouts()["decoder"]
        assert layout.kind == "causal"
        assert layout.where("image").stop - layout.where("image").start == slots
        assert layout.where("image").start == (0 if recipe.startswith("blip2") else 1)


def test_llava_15_pads_to_a_square_of_the_mean_colour() -> None:
    transform = small("llava-1.5").model.processor.transform
    assert (transform.mode, transform.size) == ("pad", 32)
    wide = Image.new("RGB", (64, 32), (255, 255, 255))
    values = transform([wide])[0]
    assert values[:, 0, 16].abs().max() < 0.02  # the mean, normalised: 0
    assert small("llava").model.processor.transform.mode == "crop"
    assert small("blip2-opt").model.processor.transform.mode == "squash"


def test_saved_and_loaded_again(tmp_path: Path, shake: Shake) -> None:
    from zoo.weights import load_model, save

    module = small("blip2-opt", shake)
    save(module, module.recipe, tmp_path / "weights")
    assert json.loads((tmp_path / "weights" / "recipe.json").read_text())["model"] == "blip2-opt"
    again, _, report = load_model(tmp_path / "weights")
    assert report.new == []
    model: Any = module.model
    images = [picture(0), picture(1)]
    assert torch.equal(model.score_text(images, TEXTS[:2]), again.score_text(images, TEXTS[:2]))  # type: ignore[operator]
    assert model.generate_text(images, max_new_tokens=4) == again.generate_text(images, max_new_tokens=4)  # type: ignore[operator]


def test_learns(shake: Shake) -> None:
    """Four pictures, four names: after a few steps each picture prefers its own name."""
    module = small("llava", decoder={"width": 64, "heads": 4}).train()
    batch: dict[str, Tensor] = module.model.processor(samples(TEXTS))
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(60):
        loss, _ = module.losses(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model: Any = module.model
    scores = model.score_candidates([picture(i) for i in range(4)], [TEXTS] * 4)
    assert scores.argmax(1).tolist() == [0, 1, 2, 3]
    assert model.generate_text([picture(2)], max_new_tokens=20) == [TEXTS[2]]
