"""BLIP's own statements: what is shared, which id reaches which branch, who reads whom, what the losses are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from zoo.api import build_module
from zoo.errors import ConfigError
from zoo.models.med import MED
from zoo.module import ZooModule
from zoo.nn import Trunk
from zoo.part import Features
from zoo.recipe import resolve

TINY: dict[str, Any] = {
    "encoder": {"width": 48, "heads": 2, "ffn": 64, "depth": 2, "image_size": 32},
    "text_encoder": {"width": 32, "heads": 2, "ffn": 48, "depth": 2},
    "decoder": {"width": 32, "heads": 2, "ffn": 48, "depth": 2},
    "objective": {"momentum-contrastive": {"queue_size": 12}},
}


@pytest.fixture
def blip(shake: Callable[[nn.Module], nn.Module]) -> ZooModule:
    module = build_module(resolve("blip", scale="tiny", values={**TINY, "stages": "joint"}), 0)
    shake(module.model)
    return module


def batch(count: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 1000, (count, 7), generator=generator)
    ids[:, 0] = 1
    mask = torch.arange(7) < torch.tensor([7, 5, 6, 4])[:count, None]
    ids[torch.arange(count), mask.sum(1) - 1] = 2
    return {
        "pixel_values": torch.randn(count, 3, 32, 32, generator=generator),
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask,
    }


def test_encoder_and_decoder_share_all_but_self_attention(blip: ZooModule) -> None:
    model: Any = blip.model
    assert model.decoder.embed_tokens.tokens.weight.data_ptr() == model.text_encoder.embed.tokens.weight.data_ptr()
    for mine, other in zip(model.decoder.trunk.layers, model.text_encoder.trunk.layers, strict=True):
        for unit in ("cross", "cross_norm", "ffn", "ffn_norm"):
            for a, b in zip(getattr(mine, unit).parameters(), getattr(other, unit).parameters(), strict=True):
                assert a.data_ptr() == b.data_ptr()
        for a, b in zip(mine.attn.parameters(), other.attn.parameters(), strict=True):
            assert a.data_ptr() != b.data_ptr()
        assert mine.attn_norm is not other.attn_norm
    names = [id(p) for p in model.parameters()]
    assert len(names) == len(set(names))
    apart = build_module(
        resolve("blip", scale="tiny", values={**TINY, "stages": "joint", "wiring": {"share": False}}), 0
    )
    shared = sum(p.numel() for p in model.text_encoder.parameters())
    own = sum(
        p.numel()
        for layer in model.text_encoder.trunk.layers
        for p in (*layer.attn.parameters(), *layer.attn_norm.parameters())
    )
    assert sum(p.numel() for p in apart.model.parameters()) == sum(p.numel() for p in model.parameters()) + shared - own


def test_each_tensor_is_in_the_optimizer_once_and_the_caption_loss_moves_the_encoder(blip: ZooModule) -> None:
    blip.steps = 1
    optimizer = blip.configure_optimizers()["optimizer"]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == sum(p.requires_grad for p in blip.model.parameters())
    model: Any = blip.model
    before = model.text_encoder.trunk.layers[0].ffn.up.weight.detach().clone()
    data = batch()
    loss, _ = blip.objectives["next-token"](model, data, model(data))
    loss.backward()
    optimizer.step()
    assert not torch.equal(before, model.text_encoder.trunk.layers[0].ffn.up.weight)
    assert model.text_encoder.trunk.layers[0].attn.q.weight.grad is None


def test_three_first_ids_reach_the_three_branches(blip: ZooModule, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = blip.model.eval()
    vocab = model.text_config.vocab_size
    assert (model.text_config.added, vocab, model.start_id) == (2, 1026, 1024)
    seen: list[Tensor] = []
    embed, tokens = model.text_encoder.embed, model.text_encoder.embed.tokens
    monkeypatch.setattr(tokens, "forward", lambda ids: seen.append(ids) or F.embedding(ids, tokens.weight))
    data = batch()
    outputs = model(data)
    model.fuse(Features(outputs["image_tokens"]), data["input_ids"], data["attention_mask"])
    assert outputs["hidden"].shape == (4, 7, 32)
    assert [int(ids[0, 0]) for ids in seen] == [1, vocab - 1, vocab - 2]
    for ids in seen:
        assert torch.equal(ids[:, 1:], data["input_ids"][:, 1:])
    assert embed is model.decoder.embed_tokens


def test_the_contrast_does_not_see_the_image_and_matching_does(blip: ZooModule) -> None:
    model: Any = blip.model.eval()
    data = batch()
    other = {**data, "pixel_values": data["pixel_values"].flip(0)}
    with torch.no_grad():
        one, two = model(data), model(other)
        assert torch.equal(one["text_embeds"], two["text_embeds"])
        assert not torch.allclose(one["hidden"], two["hidden"])
        judged = [model.match_logits(d["pixel_values"], d["input_ids"], d["attention_mask"]) for d in (data, other)]
    assert not torch.allclose(*judged)


def test_the_decoder_ignores_what_comes_later_and_the_encoder_does_not(blip: ZooModule) -> None:
    model: Any = blip.model.eval()
    data = batch()
    changed = {**data, "input_ids": data["input_ids"].clone()}
    changed["input_ids"][:, 3] = 77
    with torch.no_grad():
        a, b = model(data), model(changed)
        torch.testing.assert_close(a["hidden"][:, :3], b["hidden"][:, :3])
        assert not torch.allclose(a["hidden"][:, 3], b["hidden"][:, 3])
        alone = [model.encode(d)["text_tokens"][:, 0] for d in (data, changed)]
        assert not torch.allclose(*alone)


def test_the_caption_loss_is_smoothed_shifted_and_ignores_pads(blip: ZooModule) -> None:
    model: Any = blip.model.eval()
    data = batch()
    outputs = model(data)
    loss, report = blip.objectives["next-token"](model, data, outputs)
    logits = model.decoder.logits(outputs["hidden"])[:, :-1]
    targets = data["input_ids"][:, 1:].masked_fill(~data["attention_mask"][:, 1:], -100)
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, wanted)
    assert int(report["tokens"]) == int((targets != -100).sum())
    assert bool((targets == 2).any(1).all())  # [SEP] is learned: it ends what is written


def test_a_prompt_carries_no_loss() -> None:
    values = {"encoder": TINY["encoder"], "decoder": TINY["decoder"], "wiring": {"prompt": "a picture of"}}
    module = build_module(resolve("blip-caption", scale="tiny", values=values), 0)
    rows = module.model.processor.encode_texts(["red apple", "a cat with wry smile"])
    prompt = module.model.tokenizer.encode(["a picture of"])[0]
    assert rows["input_ids"][0, 1 : 1 + len(prompt)].tolist() == prompt
    assert bool((rows["labels"][:, : 1 + len(prompt)] == -100).all())
    assert rows["labels"][0, 1 + len(prompt)] == rows["input_ids"][0, 1 + len(prompt)] != -100
    assert module.model.begin(None, 1) == [[1024, *prompt]]
    outputs = module.model({**rows, "pixel_values": torch.zeros(2, 3, 32, 32)})
    assert bool((outputs["targets"][:, : len(prompt)] == -100).all())


def test_soft_targets_ramp_over_two_of_twenty_epochs(blip: ZooModule) -> None:
    blip.momentum.steps = 20 * 50  # type: ignore[union-attr]
    config = blip.recipe.objectives["momentum-contrastive"]
    for epochs, wanted in ((0, 0.0), (1, 0.2), (2, 0.4), (7, 0.4)):
        blip.momentum.step.fill_(50 * epochs)  # type: ignore[union-attr]
        assert float(blip.momentum.share(config)) == pytest.approx(wanted)  # type: ignore[union-attr]


def test_every_negative_of_pretraining_can_be_drawn(blip: ZooModule) -> None:
    """Off the diagonal no weight is zero in pre-training, however cold the softmax; retrieval adds no floor."""
    rows = torch.eye(4)
    outputs = {"image_embeds": rows, "text_embeds": rows, "logit_scale": torch.tensor(1000.0).log()}
    own = torch.eye(4, dtype=torch.bool)
    retrieval = resolve("blip-retrieval").objectives["matching"].build()
    for objective, positive in ((blip.objectives["matching"], True), (retrieval, False)):
        objective.__dict__["momentum"] = None
        for weights in objective.weights(batch(), outputs):
            assert not weights[own].any()
            assert bool((weights[~own] > 0).all()) == positive


def test_negatives_are_read_again_from_their_ids(blip: ZooModule, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = blip.model.eval()
    seen: list[Tensor] = []
    fuse = MED.fuse
    monkeypatch.setattr(
        MED, "fuse", lambda self, image, ids, mask, **more: seen.append(ids) or fuse(self, image, ids, mask, **more)
    )
    read: list[Tensor] = []
    trunk: Trunk = model.text_encoder.trunk
    monkeypatch.setattr(model.text_encoder, "trunk", _Spy(trunk, read))
    data = {**batch(), "negative_images": torch.tensor([1, 2, 3, 0]), "negative_texts": torch.tensor([3, 0, 1, 2])}
    loss, _ = blip.objectives["matching"](model, data, model(data))
    assert bool(torch.isfinite(loss))
    assert seen[0].shape == (12, 7)
    assert torch.equal(seen[0][8:], data["input_ids"][[3, 0, 1, 2]])
    assert torch.equal(read[-1], model.text_encoder.embed(model.text_encoder.reading(seen[0])))


def test_texts_that_share_an_image_read_it_as_if_each_had_its_own(blip: ZooModule) -> None:
    model: Any = blip.model.eval()
    data = batch()
    tokens = model.encoder(data["pixel_values"]).tokens
    rows = torch.tensor([2, 0, 2, 1])
    ids, mask = data["input_ids"], data["attention_mask"]
    shared = model.fuse(Features(tokens), ids, mask, rows=rows).tokens
    own = model.fuse(Features(tokens[rows]), ids, mask).tokens
    torch.testing.assert_close(shared, own)
    weight = model.text_encoder.trunk.layers[0].cross.k.weight
    for result in (shared, own):
        result.square().sum().backward(retain_graph=True)
    assert weight.grad is not None
    both = weight.grad.clone()
    weight.grad = None
    own.square().sum().backward()
    torch.testing.assert_close(both, 2 * weight.grad, atol=1e-4, rtol=1e-4)


class _Spy(nn.Module):
    def __init__(self, inner: nn.Module, seen: list[Tensor]) -> None:
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, x: Tensor, *args: Any, **more: Any) -> Any:
        self.seen.append(x)
        return self.inner(x, *args, **more)


def pictures(count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        Image.fromarray(torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy())
        for _ in range(count)
    ]


def test_captions_are_the_same_alone_and_together(blip: ZooModule) -> None:
    images = pictures(3)
    for how in ({}, {"beams": 1}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 3}):
        together = blip.generate_text(images, max_new_tokens=6, **how)
        if "temperature" in how:
            assert together == blip.generate_text(images, max_new_tokens=6, **how)
            assert together != blip.generate_text(images, max_new_tokens=6, **{**how, "seed": 4})
            continue
        assert together == [blip.generate_text([image], max_new_tokens=6, **how)[0] for image in images]
    prompted = blip.generate_text(images, ["red", "a cat", "two"], max_new_tokens=4)
    assert len(prompted) == 3


def test_scores_are_log_probabilities_of_whole_texts(blip: ZooModule) -> None:
    """Over all texts of one token and its end the probabilities add up to that of ending after one token."""
    images = pictures(2)
    model: Any = blip.model
    texts = ["red apple", "a"]
    scores = blip.score_text(images, texts)
    model.eval()
    with torch.no_grad():
        tokens = model.encoder(model.processor.encode_images(images)).tokens
        for n, text in enumerate(texts):
            ids = torch.tensor([[1024, *model.tokenizer.encode([text])[0], 2]])
            table = model.decoder.logits(model.decode(ids, None, tokens[n : n + 1])).log_softmax(-1)[0]
            wanted = sum(float(table[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1))
            assert float(scores[n]) == pytest.approx(wanted, abs=1e-4)
    ranked = blip.score_candidates(images, [texts, texts], prompts=["a", "two"])
    pairs = [blip.score_text(images, [text] * 2, prompts=["a", "two"]) for text in texts]
    torch.testing.assert_close(ranked, torch.stack(pairs, 1), atol=1e-4, rtol=1e-4)
    assert math.isfinite(float(ranked.sum()))


def test_parts_that_cannot_share_are_refused_in_one_line() -> None:
    wrong = {**TINY, "decoder": {**TINY["decoder"], "ffn": 64}, "stages": "joint"}
    with pytest.raises(ConfigError, match=r"ffn 64.*cannot share"):
        build_module(resolve("blip", scale="tiny", values=wrong), 0)
    with pytest.raises(ConfigError, match="vocab_size"):
        build_module(
            resolve("blip", scale="tiny", values={**TINY, "decoder": {"vocab_size": 1100, **TINY["decoder"]}}), 0
        )
    with pytest.raises(ConfigError, match="decoder=bert-decoder"):
        build_module(resolve("blip", choices={"decoder": "trunk-lm"}, scale="tiny", values={"stages": "joint"}), 0)


def test_answers_read_the_question_and_never_the_image(shake: Callable[[nn.Module], nn.Module]) -> None:
    values = {slot: TINY[slot] for slot in ("encoder", "text_encoder", "decoder")}
    values["wiring"] = {"rank_smoothing": 0.0}
    module = build_module(resolve("blip-vqa", scale="tiny", values=values), 0)
    model: Any = shake(module.model).eval()  # type: ignore[attr-defined]
    assert model.decoder.context_width == 32 != model.encoder.width
    read: list[Tensor] = []
    layer = model.decoder.trunk.layers[0].cross
    layer.k.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    data = {**batch(), "question_ids": batch(seed=1)["input_ids"], "question_mask": batch(seed=1)["attention_mask"]}
    data["labels"] = data["input_ids"].masked_fill(~data["attention_mask"], -100)
    with torch.no_grad():
        model(data)
        states = model.asked(data["pixel_values"], data["question_ids"], data["question_mask"])
    torch.testing.assert_close(read[0], states)
    images = pictures(3)
    asked = ["what is this?", "which colour has it?", "who?"]
    assert module.score_text(images, ["a", "b", "c"], asked).shape == (3,)
    listed = ["red", "a cat", "two", "green"]
    answers = model.choose_answers(images, asked, listed, k=4)
    scores = torch.stack([module.score_text(images, [a] * 3, asked) for a in listed], 1)
    assert answers == [listed[i] for i in scores.argmax(1).tolist()]
    assert answers[:1] == model.choose_answers(images[:1], asked[:1], listed, k=4)


def test_two_images_are_compared_and_half_of_the_statements_are_true(
    shake: Callable[[nn.Module], nn.Module],
) -> None:
    values = {**{slot: TINY[slot] for slot in ("encoder", "text_encoder")}, "wiring": {"augment": "none"}}
    module = build_module(resolve("blip-nlvr", scale="tiny", values=values), 0)
    model: Any = module.model
    first, second = model.text_encoder.trunk.layers[0].cross.first, model.text_encoder.trunk.layers[0].cross.second
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert [layer.cross.merge is None for layer in model.text_encoder.trunk.layers] == [True, False]
    shake(model).eval()
    data = {**model.example_batch(2), **{k: v[:2] for k, v in batch().items()}}
    data["other_pixel_values"] = batch(seed=5)["pixel_values"][:2]
    swapped = {**data, "pixel_values": data["other_pixel_values"], "other_pixel_values": data["pixel_values"]}
    assert not torch.allclose(model(data)["verdict_logits"], model(swapped)["verdict_logits"], atol=1e-3)
    from zoo.data.sample import Sample

    samples = [Sample(str(n), image, (f"word {n}",)) for n, image in enumerate(pictures(16))]
    rows = model.processor(samples, True, [0] * 16)
    own = model.processor.encode_images([s.image for s in samples])
    for n, true in enumerate(rows["labels"].tolist()):
        here, there = (rows[k][n] for k in ("pixel_values", "other_pixel_values"))
        assert torch.equal(here if true else there, own[n])
    assert 0 < int(rows["labels"].sum()) < 16
    again = model.processor(samples, True, [0] * 16)
    assert torch.equal(again["labels"], rows["labels"])
    assert torch.equal(again["pixel_values"], rows["pixel_values"])
    with pytest.raises(ConfigError, match="blip-twin-bert"):
        build_module(resolve("blip-nlvr", choices={"text_encoder": "blip-bert"}, scale="tiny"), 0)


@pytest.mark.parametrize(("share", "millions"), [(True, 252), (False, 361)])
def test_sharing_gives_the_papers_parameter_counts(share: bool, millions: int) -> None:
    """Table 3: all layers but self-attention shared, and none."""
    recipe = resolve("blip", values={"wiring": {"share": share}})
    with torch.device("meta"):
        model = recipe.wiring[1].build(recipe.parts, 0)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
