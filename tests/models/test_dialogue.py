"""Dialogues through whole bridges: templates by stage, several images, what a batch may not change, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import zoo
from zoo.api import build_module
from zoo.data.sample import Sample
from zoo.errors import ConfigError, DataError
from zoo.module import ZooModule
from zoo.recipe import Recipe, resolve
from zoo.sampling.text import Decoding

Shake = Callable[[nn.Module], nn.Module]
SMALL = {
    "encoder": {"width": 32, "depth": 3, "heads": 2, "ffn": 48, "image_size": 32, "patch_size": 8},
    "decoder": {"width": 48, "depth": 2, "heads": 4, "ffn": 64, "context_length": 256},
}
QFORMER = {"width": 24, "depth": 3, "heads": 2, "ffn": 40, "queries": 5}
FAMILIES = ["llava", "llava-1.5", "instructblip-vicuna-7b", "minigpt4-7b", "minigpt4-llama2"]


def small(recipe: str, shake: Shake, **changes: Any) -> ZooModule:
    values: dict[str, Any] = dict(SMALL)
    if "llava" not in recipe and "llama2" not in recipe:
        values["connector"] = QFORMER
    module = zoo.build(recipe, scale="tiny", **{**values, **changes})
    shake(module.model)
    return module


def finished(recipe: str, shake: Shake, **changes: Any) -> Any:
    module = small(recipe, shake, **changes)
    module.set_stage(len(module.recipe.stages) - 1)
    return module.eval().model


def picture(seed: int) -> Image.Image:
    import numpy as np

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 32, 3), dtype=np.uint8))


QUESTIONS = ["what is it?", "name it", "a", "which colour has the thing in this picture?"]
ANSWERS = ["red apple", "a dog", "grinning face with big eyes", "flag: Japan"]


@pytest.mark.parametrize("recipe", FAMILIES)
def test_answers_change_neither_with_the_batch_nor_with_the_side_of_pads(recipe: str, shake: Shake) -> None:
    model = finished(recipe, shake)
    images, prompts = [picture(100 + i) for i in range(16)], QUESTIONS * 4  # no two likeliest tokens tie to 1e-6
    together = model.generate_text(images, prompts, max_new_tokens=6)
    alone = [model.generate_text([i], [p], max_new_tokens=6)[0] for i, p in zip(images, prompts, strict=True)]
    assert together == alone
    assert len(set(together)) > 2
    scores = model.score_text(images, ANSWERS * 4, prompts)
    one = torch.cat([model.score_text([images[i]], [(ANSWERS * 4)[i]], [prompts[i]]) for i in range(16)])
    torch.testing.assert_close(scores, one, atol=1e-4, rtol=1e-5)
    pixels = model.processor.encode_images(images)
    written = []
    for side in ("left", "right"):
        rows = model.processor.encode_prompts(prompts, 16, side)
        assert not bool(rows["attention_mask"].all())
        written.append(model.generate_ids(pixels, decoding=Decoding(max_new_tokens=6), **rows))
    assert torch.equal(*written)
    # the loss of a batch padded on the left is that of one padded on the right
    samples = [Sample(str(i), images[i], (), {"turns": [[QUESTIONS[i], ANSWERS[i]]]}) for i in range(4)]
    logits = []
    for side in ("left", "right"):
        model.processor.padding = side
        batch = model.processor(samples)
        asked = {k: v for k, v in batch.items() if k.startswith("instruction")}
        with torch.no_grad():
            out = model.text_logits(batch["pixel_values"], batch["input_ids"], batch["attention_mask"], **asked)
        logits.append(out[batch["attention_mask"]])
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("recipe", FAMILIES)
@pytest.mark.parametrize("shown", [[True, False, True, False], [False] * 4])
def test_text_alone_trains_with_the_connector_in_the_graph(recipe: str, shown: list[bool], shake: Shake) -> None:
    module = small(recipe, shake)
    module.set_stage(len(module.recipe.stages) - 1)
    model: Any = module.train().model
    samples = [
        Sample(str(i), picture(i) if s else None, (), {"turns": [[QUESTIONS[i], ANSWERS[i]]]})
        for i, s in enumerate(shown)
    ]
    batch = model.processor(samples)
    loss, _ = module.losses(batch)
    loss.backward()
    learns = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in learns.values())  # or distributed training would wait for ever
    touched = [n for n, p in learns.items() if n.startswith("connector") and bool((p.grad != 0).any())]
    assert bool(touched) == any(shown)


@pytest.mark.parametrize("recipe", FAMILIES)
def test_encoded_images_may_stand_in_for_pixels(recipe: str, shake: Shake) -> None:
    model = finished(recipe, shake)
    samples = [Sample(str(i), picture(i), (), {"turns": [[QUESTIONS[i], ANSWERS[i]]]}) for i in range(4)]
    batch = model.processor(samples)
    with torch.no_grad():
        tokens = model.encoder(batch["pixel_values"]).tokens
        expected = model(batch)["hidden"]
        pixels = batch.pop("pixel_values")
        got = model({**batch, "image_tokens": tokens})["hidden"]
        other = model({**batch, "image_tokens": tokens.flip(0)})["hidden"]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert (other - expected).abs().max() > 1e-3
    assert pixels.shape[0] == 4


# -- a template of its own for each stage ------------------------------------------------------------------------------

STAGES = {
    "llava": ["plain", "llava_v1"],
    "llava-1.5": ["plain", "vicuna_v1"],
    "llava-1.5-13b": ["plain", "vicuna_v1"],
    "minigpt4": ["minigpt4_caption", "minigpt4"],
    "minigpt4-7b": ["minigpt4_caption", "minigpt4"],
    "minigpt4-llama2": ["minigpt4_caption", "minigpt4_llama_2"],
    "instructblip-vicuna-7b": ["instructblip"],
    "instructblip-vicuna-13b": ["instructblip"],
}


@pytest.mark.parametrize("recipe", list(STAGES))
def test_templates_of_published_stages(recipe: str) -> None:
    resolved = resolve(recipe)
    own: list[Any] = [resolved.stage_wiring(i) for i in range(len(resolved.stages))]
    assert [w.template for w in own] == STAGES[recipe]
    assert all(w.preamble for w in own)
    assert Recipe.from_plain(resolved.to_plain()) == resolved
    tiny: Any = resolve(recipe, scale="tiny").wiring[1]
    assert not tiny.preamble  # 128 tokens of context have no room for it


def test_each_stage_writes_with_its_template_and_a_loaded_model_with_the_last(shake: Shake, tmp_path: Path) -> None:
    from zoo.weights import save

    module = small("llava-1.5", shake)
    model: Any = module.model
    sample = Sample("a", picture(0), (), {"turns": [["what is it?", "dog"]]})
    plain = model.processor([sample])["input_ids"]
    module.set_stage(1)
    asked = model.processor([sample])["input_ids"]
    assert asked.shape[1] > plain.shape[1]
    assert model.tokenizer.decode(asked[0][asked[0] != model.image_token_id].tolist()).startswith("USER: ")
    save(module, module.recipe, tmp_path / "w")
    again = zoo.from_pretrained(tmp_path / "w")
    assert again.processor.layout.name == "vicuna_v1"
    texts = again.generate_text([picture(0)], ["what is it?"], max_new_tokens=5)
    assert texts == model.generate_text([picture(0)], ["what is it?"], max_new_tokens=5)
    # what the user wrote wins over the published stages
    chosen = zoo.build("llava-1.5", scale="tiny", options={"wiring.template": "llava_v0"}, **SMALL)
    for stage in range(2):
        chosen.set_stage(stage)
        assert chosen.model.processor.layout.name == "llava_v0"
    assert zoo.build("llava-1.5", scale="tiny", stages="joint", **SMALL).model.processor.layout.name == "plain"


def test_stages_may_not_set_what_weights_depend_on() -> None:
    stages = [{"name": "a", "train": ["connector"], "wiring": {"image_id": 3}}]
    with pytest.raises(ConfigError, match=r"stage 'a' sets wiring\.image_id, which a stage of 'bridge' cannot"):
        resolve("llava", values={"stages": stages})
    stages[0]["wiring"] = {"template": "vicuna"}
    with pytest.raises(ConfigError, match="unknown prompt template 'vicuna'") as error:
        resolve("llava", values={"stages": stages})
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="unknown prompt template 'lava_v1'"):
        resolve("llava", values={"wiring": {"template": "lava_v1"}})


def test_a_stage_without_a_wiring_leaves_a_recipe_as_it_was_written() -> None:
    plain = resolve("blip2-opt").to_plain()
    assert all("wiring" not in stage for stage in plain["stages"])
    assert build_module(resolve("llava", scale="tiny", values=SMALL), 0).model.processor.layout.name == "plain"


# -- several images, and bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", FAMILIES)
def test_rows_of_no_one_and_two_images_share_a_batch(recipe: str, shake: Shake) -> None:
    model = finished(recipe, shake)
    two = [picture(1), picture(2)]
    samples = [
        Sample("none", None, (), {"turns": [["hello", "hi"]]}),
        Sample("two", two[0], (), {"turns": [["is <image> like <image>?", "no"]], "images": two}),
        Sample("one", picture(3), (), {"turns": [["what is it?", "a dog"], ["why?", "it barks"]]}),
    ]
    batch = model.processor(samples)
    slots = batch["input_ids"] == model.image_token_id
    assert (slots.sum(1) // model.connector.tokens).tolist() == [0, 2, 1]
    assert batch["pixel_values"].shape[0] == 3
    assert "has_image" not in batch
    assert bool((batch["labels"][slots] == -100).all())
    with torch.no_grad():
        hidden = model(batch)["hidden"]
        for i, sample in enumerate(samples):
            alone = model.processor([sample])
            real = int(alone["attention_mask"].sum())
            torch.testing.assert_close(hidden[i, :real], model(alone)["hidden"][0, :real], atol=1e-4, rtol=1e-4)


def test_augmentation_of_several_images_is_each_ones_own(shake: Shake) -> None:
    model = finished("llava", shake, wiring={"augment": "random-resized-crop"})
    same = picture(0)
    sample = Sample("a", same, (), {"turns": [["is <image> like <image>?", "yes"]], "images": [same, same]})
    first, again = (model.processor([sample], train=True, draws=[4])["pixel_values"] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, model.processor([sample], train=True, draws=[5])["pixel_values"])


@pytest.mark.parametrize("recipe", FAMILIES)
def test_bad_input_is_one_clear_line(recipe: str, shake: Shake) -> None:
    model = finished(recipe, shake)
    image = picture(0)
    calls: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (DataError, "place 1 images with <image> and the row shows 2",
         lambda: model.generate_text([[image, image]], ["what is <image>?"])),
        (DataError, "place 2 images with <image> and the row shows 1",
         lambda: model.generate_text([image], ["is <image> like <image>?"])),
        (DataError, "place 1 images with <image> and the row shows 0",
         lambda: model.processor([Sample("a", None, (), {"turns": [["what is <image>?", "a"]]})])),
        (DataError, "the prompt has .* tokens, image tokens included, and the model reads 256",
         lambda: model.generate_text([[image] * 60], ["what?"])),
        (ConfigError, "1 images and 2 prompts", lambda: model.generate_text([image], ["a", "b"])),
    ]  # fmt: skip
    for kind, message, call in calls:
        with pytest.raises(kind, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    batch = model.processor([Sample("a", image, (), {"turns": [["what?", "a"]]})])
    for pixels in (batch["pixel_values"].repeat(2, 1, 1, 1), batch["pixel_values"][:0]):
        with pytest.raises(ConfigError, match="image placeholders"), torch.no_grad():
            model({**batch, "pixel_values": pixels})


def test_a_dialogue_goes_on_from_what_was_said(shake: Shake) -> None:
    model = finished("llava-1.5", shake)
    image = picture(0)
    first = model.generate_text([image], ["what is it?"], max_new_tokens=4)[0]
    talk = [("what is it?", first), ("why?", None)]
    on = model.generate_text([image], [talk], max_new_tokens=8)[0]
    other = model.generate_text([image], [[("what is it?", "a grinning face with big eyes"), ("why?", None)]])[0]
    assert on != other
    scores = model.score_text([image] * 2, ["because", "it is"], [talk, "why?"])
    ranked = model.score_candidates([image], [["because", "it is"]], [talk])
    torch.testing.assert_close(ranked[0, 0], scores[0], atol=1e-4, rtol=1e-5)
    assert bool((scores < 0).all())
