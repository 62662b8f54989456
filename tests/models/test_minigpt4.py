"""MiniGPT-4 against what the released code computed, and what its card asks of any implementation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import zoo
from zoo.data.processor import PromptProcessor
from zoo.data.sample import Sample
from zoo.layout import TokenBatch
from zoo.models.bridge import Bridge
from zoo.module import ZooModule
from zoo.objectives.next_token import NextTokenConfig
from zoo.sampling.text import Decoding, write
from zoo.weights.keymaps import instructblip as maps
from zoo.weights.keymaps import load_into

Golden = Callable[[str], Any]
Shake = Callable[[nn.Module], nn.Module]
RECIPES = {"minigpt4": "minigpt4-7b", "minigpt4_llama2": "minigpt4-llama2"}
FEATURES = {"atol": 2e-5, "rtol": 1e-5}
LOGITS = {"atol": 1e-4, "rtol": 0.0}


def released(g: Any, name: str) -> Bridge:
    """The golden's weights in the recipe's parts at the golden's sizes."""
    c = g.config
    values: dict[str, Any] = {
        "encoder": {
            "width": c["vit_width"], "heads": c["vit_heads"], "depth": c["vit_depth_kept"], "image_size": c["img_size"],
            "ffn": int(c["vit_width"] * c["vit_mlp_ratio"]), "patch_size": c["patch_size"],
        },
        "decoder": {
            "width": c["hidden"], "ffn": c["ffn"], "depth": c["layers"], "heads": c["heads"], "vocab_size": c["vocab"],
            "options": {"rms_norm_eps": c["rms_norm_eps"]},
        },
    }  # fmt: skip
    if c["has_qformer"]:
        values["connector"] = {
            "width": c["qf_hidden"], "depth": c["qf_layers"], "heads": c["qf_heads"], "ffn": c["qf_ffn"],
            "queries": c["num_query"], "cross_every": c["qf_cross_attention_freq"],
        }  # fmt: skip
    module = zoo.build(RECIPES[name], **values)
    depth = c["vit_depth_kept"]
    load_into(module.model, g.weights, maps.lavis(depth, depth, "llama", text=False))
    assert isinstance(module.model, Bridge)
    module.eval()
    return module.model


def rows(model: Bridge, g: Any, *pieces: tuple[str, bool], pad_to: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, labels and mask of [BOS; pieces], where a piece is "image", "bos", "end", or a golden's input (-1 = none)
    and may be trained."""
    slots = [model.image_token_id] * model.connector.tokens
    ids, labels = torch.zeros(2, pad_to, dtype=torch.long), torch.full((2, pad_to), -100)
    mask = torch.zeros(2, pad_to, dtype=torch.bool)
    for i in range(2):
        row, label = [1], [-100]
        for name, trained in pieces:
            special = {"image": slots, "bos": [1], "end": [4]}
            new = special[name] if name in special else [t for t in g.inputs[name][i].tolist() if t >= 0]
            row += new
            label += new if trained else [-100] * len(new)
        row, label = row[:pad_to], label[:pad_to]  # max_txt_len cuts the last answer of the conversation
        ids[i, : len(row)], labels[i, : len(row)] = torch.tensor(row), torch.tensor(label)
        mask[i, : len(row)] = True
    return ids, labels, mask


ROWS: dict[str, tuple[tuple[str, bool], ...]] = {
    "stage1": (("image", False), ("answer", True), ("end", True)),
    "stage2": (("stage2_seg0", False), ("image", False), ("stage2_seg1", False), ("answer", True), ("end", True)),
    "conv": (
        ("conv_q0_seg0", False), ("image", False), ("conv_q0_seg1", False), ("conv_a0", True), ("end", True),
        ("bos", False), ("conv_q1", False), ("conv_a1", True), ("end", True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(RECIPES))
def test_released_code(name: str, golden: Golden) -> None:
    g = golden(name)
    model = released(g, name)
    image = g.inputs["image"]
    with torch.no_grad():
        encoded = model.encoder(image)
        normed = model.connector.ln_vision(encoded.tokens)  # type: ignore[operator]
        visual = model.image_features(image)
    torch.testing.assert_close(encoded.tokens, g.outputs["vit_tokens"], **FEATURES)
    torch.testing.assert_close(normed, g.outputs["image_embeds"], **FEATURES)
    torch.testing.assert_close(visual, g.outputs["visual_tokens"], **FEATURES)
    for kind, pieces in ROWS.items():
        labels = g.outputs[f"{kind}_labels"]
        ids, own, mask = rows(model, g, *pieces, pad_to=labels.shape[1])
        assert torch.equal(own, labels)
        assert torch.equal(mask, g.outputs[f"{kind}_attention_mask"].bool())
        embeds = model._splice(ids, image)
        torch.testing.assert_close(embeds[mask], g.outputs[f"{kind}_inputs_embeds"][mask], **FEATURES)
        logits = model.text_logits(image, ids, mask)
        torch.testing.assert_close(logits[mask], g.outputs[f"{kind}_logits"][mask], **LOGITS)
        batch = {"pixel_values": image, "input_ids": ids, "attention_mask": mask, "labels": own}
        loss = NextTokenConfig().build()(model, batch, model(batch))[0]
        torch.testing.assert_close(loss.detach(), g.outputs[f"{kind}_loss"], atol=2e-5, rtol=0)
        if kind == "stage2":
            model.zero_grad()
            loss.backward()
            for parameter in ("weight", "bias"):
                grad = getattr(model.connector.proj, parameter).grad  # type: ignore[union-attr]
                torch.testing.assert_close(grad, g.outputs[f"grad/llama_proj.{parameter}"], **LOGITS)
    # two images in one prompt of generation, and what is written behind it
    slots = torch.full((model.connector.tokens,), model.image_token_id)
    segments = [g.inputs[f"context_seg{i}"] for i in range(3)]
    prompt = torch.cat([torch.tensor([1]), segments[0], slots, segments[1], slots, segments[2]])[None]
    with torch.no_grad():
        context = model._splice(prompt, image)
    torch.testing.assert_close(context, g.outputs["context_embeds_two_images"], **FEATURES)
    new = model.generate_ids(image, prompt, None, Decoding(max_new_tokens=8), stop_ids=[2], pad_id=0)
    assert torch.equal(new, g.outputs["greedy_ids"][:, : new.shape[1]])


@pytest.mark.parametrize("name", list(RECIPES))
def test_released_file_of_the_linear_map_alone(name: str, golden: Golden, tmp_path: Path) -> None:
    """A .pth of the release holds ``llama_proj`` under ``model``; the rest is new."""
    from zoo.recipe import resolve
    from zoo.weights import load
    from zoo.weights.formats import file_format

    g = golden(name)
    alone = {k: v for k, v in g.weights.items() if k.startswith("llama_proj")}
    torch.save({"model": alone, "iteration": 7}, tmp_path / "prerained.pth")
    recipe, state, report = load(tmp_path / "prerained.pth", RECIPES[name])
    assert (set(state), report.form) == ({"connector.proj.weight", "connector.proj.bias"}, "MiniGPT-4")
    official = file_format(recipe, alone)
    assert official is not None
    assert {"encoder.{**}", "decoder.{**}", "connector.trunk.{**}", "connector.query_tokens"} <= set(official.new)
    assert "connector.proj.{**}" not in official.new
    assert resolve(RECIPES[name]).model == recipe.model


# -- what the card asks ------------------------------------------------------------------------------------------------

SMALL = {
    "encoder": {"width": 32, "depth": 2, "heads": 2, "ffn": 48, "image_size": 32, "patch_size": 8},
    "decoder": {"width": 48, "depth": 2, "heads": 4, "ffn": 64, "context_length": 192},
}
QFORMER = {"width": 24, "depth": 3, "heads": 2, "ffn": 40, "queries": 5}


def small(recipe: str, shake: Shake, **changes: Any) -> ZooModule:
    connector = {} if recipe.endswith("llama2") else {"connector": QFORMER}
    module = zoo.build(recipe, scale="tiny", **{**SMALL, **connector, **changes})
    shake(module.model)
    return module


def picture(seed: int) -> Image.Image:
    import numpy as np

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 32, 3), dtype=np.uint8))


def captions(count: int) -> list[Sample]:
    return [Sample(str(i), picture(i), ("a dog" if i % 2 else "red apple with a leaf",)) for i in range(count)]


@pytest.mark.parametrize("recipe", ["minigpt4", "minigpt4-7b", "minigpt4-llama2"])
def test_exactly_two_tensors_learn_and_the_rest_stays_in_eval_mode(recipe: str, shake: Shake) -> None:
    module = small(recipe, shake)
    model: Any = module.model
    for stage in range(2):
        module.set_stage(stage)
        module.train()
        learns = [n for n, p in model.named_parameters() if p.requires_grad]
        assert sorted(learns) == ["connector.proj.bias", "connector.proj.weight"]
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        module.losses(model.processor(captions(3), train=True))[0].backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(learns)
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == set(learns)
        module.zero_grad(set_to_none=True)
        frozen = [model.encoder, model.decoder, model.connector.ln_vision]
        if recipe != "minigpt4-llama2":
            frozen += [model.connector.trunk, model.connector.norm]
        assert not any(m.training for part in frozen for m in part.modules())
        active = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0]
        assert not active


def test_published_sizes() -> None:
    for recipe, tokens, weights in (
        ("minigpt4-7b", 32, 768 * 4096 + 4096), ("minigpt4", 32, 768 * 5120 + 5120),
        ("minigpt4-llama2", 64, 5632 * 4096 + 4096),
    ):  # fmt: skip
        with torch.device("meta"):
            module = zoo.build(recipe)
        model: Any = module.model
        assert model.connector.tokens == tokens
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == weights
        if recipe == "minigpt4-llama2":
            assert model.connector.proj.in_features == 5632
            names = set(model.connector.state_dict())
            assert names == {"ln_vision.weight", "ln_vision.bias", "proj.weight", "proj.bias"}


@pytest.mark.parametrize("recipe", ["minigpt4-7b", "minigpt4-llama2"])
def test_rows_of_both_stages(recipe: str, shake: Shake) -> None:
    module = small(recipe, shake)
    model: Any = module.model
    tokenizer, n = model.tokenizer, model.connector.tokens
    slots = [model.image_token_id] * n
    batch = model.processor(captions(2), train=True)
    answer = tokenizer.encode(["red apple with a leaf\n"])[0]
    # stage 1: no instruction
    assert batch["input_ids"][0].tolist() == [tokenizer.bos_id, *slots, *answer]
    assert batch["labels"][0].tolist() == [-100] * (n + 1) + answer
    # stage 2: one of four lines around the image, between <Img> and </Img>
    module.set_stage(1)
    batch = model.processor(captions(8), train=True)
    chat = recipe == "minigpt4-llama2"
    before, after = ("[INST] <Img>", " [/INST] ") if chat else ("###Human: <Img>", " ###Assistant: ")
    seen = set()
    for i, sample in enumerate(captions(8)):
        ids = batch["input_ids"][i][batch["attention_mask"][i]].tolist()
        labels = batch["labels"][i][batch["attention_mask"][i]].tolist()
        assert ids.count(tokenizer.bos_id) == 1
        assert ids[0] == tokenizer.bos_id
        start = ids.index(model.image_token_id)
        assert ids[1:start] == tokenizer.encode([before])[0]
        assert ids[start : start + n] == slots
        end = [tokenizer.eos_id] if chat else []
        answer = tokenizer.encode([sample.texts[0] + ("" if chat else "###")])[0] + end
        assert ids[-len(answer) :] == answer  # nothing between prompt and answer, also beside longer rows
        assert labels == [-100] * (len(ids) - len(answer)) + answer  # the end is trained
        line = tokenizer.decode(ids[start + n : -len(answer)])
        assert line.startswith("</Img> ")
        assert line.endswith(after)
        seen.add(line.removeprefix("</Img> ").removesuffix(after))
    assert len(seen) > 1
    assert seen <= set(model.processor.layout.instructions)
    assert len(model.processor.layout.instructions) == 4


def test_later_turns_start_with_bos_and_all_answers_are_trained(shake: Shake) -> None:
    module = small("minigpt4-7b", shake)
    module.set_stage(1)
    model: Any = module.model
    tokenizer = model.tokenizer
    turns = [["What is it?", "a dog"], ["And its colour?", "red"]]
    batch = model.processor([Sample("a", picture(0), (), {"turns": turns})])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids.count(tokenizer.bos_id) == 2
    kept = [t for t in labels if t != -100]
    assert kept == [*tokenizer.encode(["a dog###"])[0], *tokenizer.encode(["red###"])[0]]
    second = ids.index(tokenizer.bos_id, 1)
    assert ids[second - len(tokenizer.encode(["a dog###"])[0]) : second] == tokenizer.encode(["a dog###"])[0]
    assert ids[second + 1 :] == [
        *tokenizer.encode(["###Human: And its colour? ###Assistant: "])[0], *tokenizer.encode(["red###"])[0]
    ]  # fmt: skip


@pytest.mark.parametrize("recipe", ["minigpt4-7b", "minigpt4-llama2"])
def test_two_images_at_two_places_in_training_and_generation(recipe: str, shake: Shake) -> None:
    module = small(recipe, shake)
    module.set_stage(1)
    model: Any = module.eval().model
    n = model.connector.tokens
    images = [picture(0), picture(1)]
    turns = [["Compare <image> with <image> please.", "one is red"]]
    batch = model.processor([Sample("a", images[0], (), {"turns": turns, "images": images})])
    assert batch["pixel_values"].shape[0] == 2
    slots = (batch["input_ids"][0] == model.image_token_id).tolist()
    first = slots.index(True)
    assert slots[first : first + n] == [True] * n
    second = slots.index(True, first + n)
    assert second > first + n
    assert sum(slots) == 2 * n
    module.losses(batch)[0].backward()
    assert model.connector.proj.weight.grad.abs().max() > 0
    swapped = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    with torch.no_grad():
        assert (module.losses(batch)[0] - module.losses(swapped)[0]).abs() > 1e-5
    prompt = "Compare <image> with <image> please."
    texts = model.generate_text([images, images[::-1]], [prompt] * 2, max_new_tokens=6)
    assert [model.generate_text([images], [prompt], max_new_tokens=6)[0]] == texts[:1]


def test_generation_stops_at_both_spellings(shake: Shake) -> None:
    """A decoder whose next token is fixed by the last one writes each spelling; a row ends where its own comes."""
    module = small("minigpt4-7b", shake)
    module.set_stage(1)
    processor: PromptProcessor = module.model.processor
    assert processor.stop_ids == {processor.tokenizer.eos_id, *(s[0] for s in processor._stops if len(s) == 1)}
    alone = tuple(processor.tokenizer.encode(["###"])[0])
    assert alone in processor._stops

    class Chain(nn.Module):
        """What follows each id, as a decoder."""

        vocab_size, context_length = 12, 0

        def embed(self, ids: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(ids, 12).float()

        def forward(self, batch: TokenBatch, cache: Any = None) -> Tensor:
            follows = torch.tensor([0, 3, 3, 5, 7, 6, 9, 8, 10, 9, 10, 11])
            return torch.nn.functional.one_hot(follows[batch.embeds.argmax(-1)], 12).float()

        def logits(self, hidden: Tensor) -> Tensor:
            return hidden

        def new_cache(self) -> None:
            return None

        def grow(self, layout: Any) -> Any:
            return layout.append(layout.names[-1])

    from zoo.layout import Segment, lay_out

    chain: Any = Chain()
    prompt = torch.tensor([[1], [4], [2]])
    layout = lay_out([Segment("sequence", 1, predicted=True)], 3)
    new = write(
        chain, chain.embed(prompt), layout, Decoding(max_new_tokens=6), stop_ids=[8], stop_sequences=[(6, 9)], pad_id=0
    )
    # 1 -> 3 5 6 9 (the pair ends it), 4 -> 7 8 (the id ends it)
    assert new.tolist() == [[3, 5, 6, 9], [7, 8, 0, 0], [3, 5, 6, 9]]
    tail = processor.tokenizer.encode(["a dog###Human: more"])[0]
    assert processor.decode(tail) == "a dog"


def test_chat_template_opens_with_the_system_text(shake: Shake) -> None:
    module = small("minigpt4-7b", shake, wiring={"template": "minigpt4_chat", "preamble": True})
    model: Any = module.model
    tokenizer = model.tokenizer
    row = model.processor.encode_prompts(["What is it?"], 1)["input_ids"][0].tolist()
    start = row.index(model.image_token_id)
    head = tokenizer.decode(row[1:start])
    assert head.startswith("Give the following image: <Img>ImageContent</Img>. You will be able to see the image once")
    assert head.endswith("Please answer my questions.###Human: <Img>")
    assert tokenizer.decode(row[start + 5 :]) == "</Img> What is it?###Assistant: "
    assert row.count(tokenizer.bos_id) == 1
    # a dialogue that goes on
    talk = [("What is it?", "a dog"), ("Why?", None)]
    longer = model.processor.encode_prompts([talk], 1)["input_ids"][0].tolist()
    assert longer[: len(row)] == row
    assert tokenizer.decode(longer[len(row) :]) == "a dog######Human: Why?###Assistant: "
    assert isinstance(model.generate_text([picture(0)], [talk], max_new_tokens=3)[0], str)
