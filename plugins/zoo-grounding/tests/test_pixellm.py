"""PixelLM as one model: tokens of targets in a row, masks in order of mention, padded images, several targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import zoo
from zoo.data.sample import Sample
from zoo.recipe import resolve

SIDE = 64
SMALL = {"context_length": 192}


def sample(id: str, size: tuple[int, int] = (SIDE, SIDE), targets: int = 2) -> Sample:
    """A picture of coloured squares and a question for some of them, in an order that is not theirs."""
    width, height = size
    pixels = np.full((height, width, 3), 200, np.uint8)
    masks = []
    for place in range(targets):
        mask = np.zeros((height, width), bool)
        left = (targets - 1 - place) * width // 4
        mask[height // 4 : height // 2, left : left + width // 4] = True
        pixels[mask] = (60 * place, 30, 90)
        masks.append(mask)
    named = " and ".join(f"the {word} {{seg}}" for word in ("cat", "dog", "cup", "hat")[:targets])
    return Sample(
        id, Image.fromarray(pixels), ("squares",), {"turns": [("what is there?", f"{named}.")], "masks": masks}
    )


@pytest.fixture(scope="module")
def module() -> Any:
    return zoo.build("pixellm", scale="tiny", seed=1, decoder=SMALL).eval()


@pytest.fixture(scope="module")
def model(module: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.1 if parameter.ndim < 2 else 0.03) * noise)
    return module.model


def test_two_targets_take_twice_the_tokens_in_order_of_mention(model: Any) -> None:
    batch = model.processor([sample("a", targets=1), sample("b", targets=2), sample("c", targets=0)], train=True)
    codes = torch.tensor(model.processor.target_ids)
    assert len(codes) == 6
    assert torch.isin(batch["input_ids"], codes).sum(1).tolist() == [6, 12, 0]
    assert batch["prompt_places"].shape == (3, 6)
    assert batch["mask_row"].tolist() == [0, 1, 1]
    assert batch["mask_question"].tolist() == [0, 1, 1]
    for row, places in zip(batch["mask_row"], batch["prompt_places"], strict=True):
        assert torch.equal(batch["input_ids"][row, places], codes)  # [SEG0] ... [SEG5], each target anew
    assert torch.equal(batch["masks"][1:].bool(), torch.from_numpy(np.stack(sample("b").meta["masks"])))
    assert (batch["labels"] == codes[0]).sum(1).tolist() == [1, 2, 0]  # the codebook is learned as text


def test_masks_follow_the_states_before_their_tokens(model: Any) -> None:
    batch = model.processor([sample("a"), sample("b", targets=3)], train=True)
    read: list[Tensor] = []
    hook = model.text_hidden.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    try:
        outputs = model(batch)
    finally:
        hook.remove()
    states = outputs["hidden"][batch["mask_row"][:, None], batch["prompt_places"] - 1]
    torch.testing.assert_close(read[0], states)
    assert outputs["mask_logits"].shape == (5, SIDE, SIDE)
    swapped = dict(batch)
    swapped["prompt_places"] = batch["prompt_places"].clone()
    swapped["prompt_places"][[0, 1]] = batch["prompt_places"][[1, 0]]
    other = model(swapped)["mask_logits"]
    torch.testing.assert_close(other[[1, 0]], outputs["mask_logits"][:2], atol=1e-5, rtol=1e-4)
    assert float((other[0] - outputs["mask_logits"][0]).abs().max().detach()) > 1e-5


def test_the_language_model_sees_a_quarter_of_the_patches() -> None:
    with torch.device("meta"):
        published = resolve("pixellm-7b")
        encoder = published.parts["encoder"][1].build()
        connector = published.parts["connector"][1].build(in_width=1024, in_tokens=encoder.tokens, out_width=4096)
    assert (encoder.tokens, encoder.grid, connector.tokens) == (1024, (32, 32), 256)
    assert connector.proj[0].out_features == 8192


def test_gradients_of_masks_reach_the_language_model_and_both_layers(module: Any, model: Any) -> None:
    batch = model.processor([sample("a"), sample("b", targets=3)], train=True)
    outputs = model(batch)
    loss = sum(module.objectives[name](model, batch, outputs)[0] for name in ("mask-refinement", "mask-dice"))
    model.zero_grad()
    loss.backward()
    for part in (
        model.text_hidden,
        model.connector.proj,
        model.decoder,
        model.mask_decoder.image_proj,
        model.encoder.trunk,
    ):
        assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in part.parameters())
    unread = [name for name, p in model.mask_decoder.named_parameters() if p.grad is None]
    assert not unread
    model.zero_grad()


@torch.no_grad()
def test_padding_changes_neither_text_nor_masks(model: Any) -> None:
    wide = sample("wide", (SIDE, SIDE // 2))
    batch = model.processor([wide, sample("square")], train=True)
    assert batch["resized"].tolist() == [[SIDE // 2, SIDE], [SIDE, SIDE]]
    pixels = batch["pixel_values"]
    assert not pixels[0, :, SIDE // 2 :].any()
    other = dict(batch)
    other["pixel_values"] = pixels.clone()
    patch = SIDE // model.encoder.grid[0]
    below = other["pixel_values"][0, :, SIDE // 2 :]
    below += 1
    below[:, ::patch, ::patch] = 0  # the pixel that says that a patch is padding
    one, two = model(batch), model(other)
    real = batch["attention_mask"][0]
    slots = batch["input_ids"][0] == model.image_token_id
    torch.testing.assert_close(one["hidden"][0][real & ~slots], two["hidden"][0][real & ~slots])
    first = batch["mask_row"] == 0
    torch.testing.assert_close(one["mask_logits"][first], two["mask_logits"][first])
    assert one["mask_shown"][first][:, SIDE // 2 :].sum() == 0  # scored at the picture's own size
    alone = model(model.processor([wide], train=True))
    torch.testing.assert_close(
        alone["mask_logits"][:, : SIDE // 2], one["mask_logits"][first][:, : SIDE // 2], atol=1e-5, rtol=1e-4
    )


class Written:
    """A language model's head that writes a given answer."""

    def __init__(self, vocab: int, answer: list[int]) -> None:
        self.vocab, self.answer, self.at = vocab, answer, 0

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(*hidden.shape[:-1], self.vocab)
        logits[..., self.answer[min(self.at, len(self.answer) - 1)]] = 9.0
        self.at += 1
        return logits


@torch.no_grad()
def test_an_answer_of_several_targets_over_the_cache(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of what was written token by token are those of one pass over the whole answer."""
    processor = model.processor
    shown = sample("a", (SIDE, SIDE // 2), targets=3)
    ((question, _),) = shown.meta["turns"]
    batch = processor([shown])
    taught = model(batch)["mask_logits"]
    written = batch["labels"][batch["labels"] >= 0].tolist()  # the answer as it is taught, its end too
    monkeypatch.setattr(model.decoder, "logits", Written(model.decoder.vocab_size, written))
    passes: list[int] = []
    hook = model.decoder.register_forward_pre_hook(lambda module, inputs: passes.append(inputs[0].embeds.shape[1]))
    try:
        found = model.segment(shown.image, question, max_new_tokens=64)
    finally:
        hook.remove()
    assert passes[0] > 16
    assert passes[1 : len(written)] == [1] * (len(written) - 1)  # one row a token: the rest is in the cache
    assert found.masks.shape == (3, SIDE // 2, SIDE)
    assert len(found.phrases) == len(found.scores) == 3
    assert [f"[{n}]" in found.text for n in (1, 2, 3, 4)] == [True, True, True, False]
    assert "cat" in found.phrases[0]
    assert "cup" in found.phrases[2]
    clear = taught.abs() > 1e-4
    assert torch.equal(found.masks[clear], (taught > 0)[clear])
    assert clear.float().mean() > 0.95
    assert 0 < found.masks.float().mean() < 1


@torch.no_grad()
def test_an_answer_that_breaks_a_target_off_has_no_mask(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    processor, tokenizer = model.processor, model.processor.tokenizer
    ids = list(processor.target_ids)
    for answer, count in ((ids + ids[:3], 0), (ids + ids, 2), ([], 0)):
        written = Written(model.decoder.vocab_size, [*answer, tokenizer.eos_id])
        monkeypatch.setattr(model.decoder, "logits", written)
        found = model.segment(sample("a").image, "what is there?", max_new_tokens=20)
        assert found.masks.shape == (count, SIDE, SIDE)


@pytest.mark.slow
def test_losses_fall_in_a_few_steps() -> None:
    module = zoo.build("pixellm", scale="tiny", seed=0, decoder=SMALL)
    samples = [sample(str(n), targets=1 + n % 2) for n in range(4)]
    batch = module.model.processor(samples, train=True)
    optimizer = torch.optim.AdamW(module.model.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        loss, _ = module.losses(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < 0.5 * losses[0]


def test_recipe_has_the_published_losses_and_no_sam() -> None:
    recipe = resolve("pixellm-7b")
    assert {name: o.weight for name, o in recipe.objectives.items()} == {
        "next-token": 1.0,
        "mask-refinement": 2.0,
        "mask-dice": 0.5,
    }
    assert recipe.objectives["mask-refinement"].alpha == 2.0
    decoder: Any = recipe.parts["decoder"][1]
    assert (decoder.lora_rank, decoder.lora_alpha, decoder.lora_targets) == (8, 16.0, ["q_proj", "v_proj"])
    assert recipe.parts["mask_decoder"][0] == "pixel-decoder"
    release = resolve("pixellm-7b", choices={"objective": ["next-token", "mask-bce", "mask-dice"]})
    assert {name: o.weight for name, o in release.objectives.items()}["mask-bce"] == 2.0
