"""The wiring of ALBEF: who reads whom, pairs judged together, maps of where a text is, and the second stage."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import zoo
from zoo.data.sample import Sample
from zoo.errors import ConfigError
from zoo.evaluation.retrieval import RetrievalConfig
from zoo.models.fusion import Fusion
from zoo.models.grounding import grounding_maps, watched

TEXTS = ["red apple", "a cat with wry smile", "flag: Japan", "keycap 7", "apple"]


def made(**options: Any) -> Fusion:
    model = zoo.build("albef", scale="tiny", options=options).model
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temperature":
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.3 if parameter.ndim < 2 else 0.1) * noise)
    assert isinstance(model, Fusion)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Fusion:
    return made()


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 64, 64, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(p.numpy()) for p in pixels]


def test_only_the_upper_half_owns_cross_attention(model: Fusion) -> None:
    assert [layer.cross is not None for layer in model.text_encoder.trunk.layers] == [False, False, True, True]
    with torch.device("meta"):
        layers = zoo.build("albef").model.text_encoder.trunk.layers
    assert [layer.cross is not None for layer in layers] == [False] * 6 + [True] * 6


def test_text_alone_is_blind_and_fusion_sees(model: Fusion) -> None:
    ids, mask = model._ids(TEXTS[:2])
    with torch.no_grad():
        one, two = (model.encoder(model._pixels(pictures(2, seed))) for seed in (0, 1))
        alone = model({"pixel_values": model._pixels(pictures(2)), "input_ids": ids, "attention_mask": mask})
        torch.testing.assert_close(model.text_encoder(ids, mask).tokens, alone["text_tokens"])
        first, second = (model.fuse(image, ids, mask).pooled for image in (one, two))
    assert float((first - second).abs().max()) > 1e-2


def test_fusion_from_states_equals_fusion_from_ids(model: Fusion) -> None:
    ids, mask = model._ids(TEXTS[:3])
    with torch.no_grad():
        image = model.encoder(model._pixels(pictures(3)))
        whole = model.fuse(image, ids, mask)
        onward = model.fuse(image, ids, mask, text_tokens=model.text_encoder(ids, mask).tokens)
    torch.testing.assert_close(whole.tokens[mask], onward.tokens[mask])


def test_pads_are_read_by_nobody(model: Fusion) -> None:
    ids, mask = model._ids(["apple", TEXTS[1]])
    assert not bool(mask.all())
    changed = torch.where(mask, ids, 77)
    with torch.no_grad():
        image = model.encoder(model._pixels(pictures(2)))
        for read in (lambda i: model.text_encoder(i, mask), lambda i: model.fuse(image, i, mask)):
            torch.testing.assert_close(read(ids).tokens[mask], read(changed).tokens[mask])


def test_texts_start_with_cls_and_have_no_end(model: Fusion) -> None:
    ids = model.processor.encode_texts(["red apple"])["input_ids"][0].tolist()
    tokenizer = model.tokenizer
    assert ids == [tokenizer.bos_id, *tokenizer.encode(["red apple"])[0]]
    assert tokenizer.eos_id not in ids
    assert made(**{"wiring.end": True}).processor.encode_texts(["red apple"])["input_ids"][0, -1] == tokenizer.eos_id
    assert model.processor.encode_texts([" ".join(["apple"] * 60)])["input_ids"].shape == (1, 25)


def test_masks_come_from_the_tokenizer(model: Fusion) -> None:
    special = model.special_ids
    assert special == {"cls": 1, "pad": 0, "mask": model.tokenizer.image_token_id}


def test_pairs_judged_together_equal_pairs_judged_alone(model: Fusion) -> None:
    images = pictures(3)
    pairs = torch.tensor([[0, 4], [2, 1], [1, 1], [2, 0], [0, 0]])
    together = model.match_pairs(images, TEXTS, pairs)
    alone = model.match([images[i] for i, _ in pairs.tolist()], [TEXTS[t] for _, t in pairs.tolist()])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert float(together.std()) > 1e-3
    with pytest.raises(ConfigError, match="3 images and 5 texts"):
        model.match(images, TEXTS)


# -- grounding ---------------------------------------------------------------------------------------------------------


def test_watched_attention_computes_the_same(model: Fusion) -> None:
    ids, mask = model._ids(TEXTS[:2])
    pixels = model._pixels(pictures(2))
    with torch.no_grad():
        fast = model.match_logits(pixels, ids, mask)
        with watched(model.text_encoder.trunk.layers[2].cross) as seen:
            slow = model.match_logits(pixels, ids, mask)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    assert seen[0].shape == (2, 4, ids.shape[1], 17)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 4, ids.shape[1]))


def test_map_is_attention_times_its_positive_gradient(model: Fusion) -> None:
    """Against layer-by-layer arithmetic for one text, with the gradient by a finite difference."""
    ids, mask = model._ids(["red apple"])
    pixels = model._pixels(pictures(1))
    trunk = model.text_encoder.trunk
    block = trunk.layers[3]
    with torch.no_grad():
        image = model.encoder(pixels).tokens
        below = trunk(model.text_encoder.embed(ids), context=image, layers=slice(0, 3))
        x = block.attn_norm(below + block.attn(below, _reading(), 0))

        def heads(rows: Tensor) -> Tensor:
            return rows.unflatten(-1, (4, -1)).transpose(1, 2)

        q, k, v = heads(block.cross.q(x)), heads(block.cross.k(image)), heads(block.cross.v(image))
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)

        def logit(weights: Tensor) -> Tensor:
            read = block.cross.out((weights @ v).transpose(1, 2).flatten(2))
            y = block.cross_norm(x + read)
            y = block.ffn_norm(y + block.ffn(y))
            return model.matching_head(y[:, 0])[0, 1]

        gradient = torch.zeros_like(weights)
        for place in (weights > -1).nonzero():
            step = torch.zeros_like(weights)
            step[tuple(place)] = 1e-2
            gradient[tuple(place)] = (logit(weights + step) - logit(weights - step)) / 2e-2
        wanted = (weights * gradient.clamp(min=0))[..., 1:].mean(1).mean(1).view(1, 4, 4)
    found = grounding_maps(model, pixels, ids, mask, layer=3)
    torch.testing.assert_close(found, wanted, atol=2e-3 * float(wanted.max()), rtol=5e-2)
    assert float(wanted.max()) > 0


def _reading() -> Any:
    from zoo.nn.attention import Reading

    return Reading()


def test_grounding_maps_of_images(model: Fusion) -> None:
    images = pictures(2)
    maps = model.grounding(images, TEXTS[:2])
    assert maps.shape == (2, 4, 4)
    assert bool((maps >= 0).all())
    torch.testing.assert_close(maps[:1], model.grounding(images[:1], TEXTS[:1]), atol=1e-6, rtol=1e-3)
    assert float((maps[0] - model.grounding(images[:1], TEXTS[1:2])[0]).abs().max()) > 0
    with pytest.raises(ConfigError, match="reads no image: choose one from 2 to 3"):
        model.grounding(images, TEXTS[:2], layer=1)


# -- the second stage --------------------------------------------------------------------------------------------------


class Icons:
    """Six images with captions of their own."""

    name, version = "icons", "1"

    def ids(self, split: str) -> list[str]:
        return [str(i) for i in range(6)]

    def sample(self, id: str) -> Sample:
        return Sample(id, pictures(6)[int(id)], (f"caption {id}",))


class Judge:
    """A model whose similarities and matching logits are given."""

    def __init__(self, similar: Tensor, logits: Tensor, adds: bool = False) -> None:
        self.similar, self.logits, self.rerank_similarity = similar, logits, adds
        self.asked: list[tuple[int, int]] = []
        self.seen = 0

    def embed_images(self, images: Any) -> Tensor:
        self.seen += len(images)
        return self.similar[self.seen - len(images) : self.seen]

    def embed_texts(self, texts: Any) -> Tensor:
        return torch.eye(6)[[int(t.split()[1]) for t in texts]]

    def match(self, images: Any, texts: Any) -> Tensor:
        every = [list(p.getdata())[:4] for p in pictures(6)]
        rows = [every.index(list(image.getdata())[:4]) for image in images]
        columns = [int(t.split()[1]) for t in texts]
        self.asked += list(zip(rows, columns, strict=True))
        return self.logits[rows, columns]


def metrics_of(judge: Judge, rerank: int, score: str = "published") -> dict[str, float]:
    return RetrievalConfig(rerank=rerank, rerank_score=score, batch_size=4).build().run(judge, Icons(), "test").metrics


def test_reranking_orders_the_nearest_by_the_matching_logit_alone() -> None:
    similar = torch.zeros(6, 6)
    for i in range(6):  # the right one is second, but for image 5, where it is last
        similar[i, i] = 0.5 if i < 5 else -0.9
        similar[i, (i + 1) % 6] = 0.6
    judge = Judge(similar, torch.eye(6) * 3)
    found = metrics_of(judge, 2)
    assert found["i2t_r1"] == 0
    assert found["i2t_r1_reranked"] == pytest.approx(5 / 6)  # image 5 never gets to the second stage
    k = similar.topk(2, 1).indices, similar.topk(2, 0).indices
    wanted = {(i, int(t)) for i in range(6) for t in k[0][i]} | {(int(i), t) for t in range(6) for i in k[1][:, t]}
    assert set(judge.asked) == wanted
    assert len(judge.asked) == len(wanted)  # nothing is judged twice
    assert found["i2t_median_rank_reranked"] == 1
    wrong = metrics_of(Judge(similar, -torch.eye(6) * 3), 2)
    assert wrong["i2t_r1_reranked"] == 0


def test_entries_outside_the_first_stage_rank_last() -> None:
    similar = torch.full((6, 6), 0.1)
    similar[torch.arange(6), (torch.arange(6) + 1) % 6] = 0.9
    found = metrics_of(Judge(similar, torch.full((6, 6), -50.0)), 1)  # even a very low logit is above -100
    assert found["i2t_r1_reranked"] == 0
    assert found["i2t_r5_reranked"] == 0  # the right one ties with all that were left out, and ties count against it


def test_blip_adds_the_similarity() -> None:
    similar = torch.zeros(6, 6)
    for i in range(6):
        similar[i, i], similar[i, (i + 1) % 6] = 0.6, 0.1
    logits = torch.zeros(6, 6)
    logits[torch.arange(6), (torch.arange(6) + 1) % 6] = 0.3
    assert metrics_of(Judge(similar, logits), 2)["i2t_r1_reranked"] == 0
    assert metrics_of(Judge(similar, logits, adds=True), 2)["i2t_r1_reranked"] == 1


def test_posterior_adds_the_similarity_over_the_temperature() -> None:
    similar = torch.zeros(6, 6)
    for i in range(6):
        similar[i, i], similar[i, (i + 1) % 6] = 0.6, 0.5
    logits = torch.zeros(6, 6)
    logits[torch.arange(6), (torch.arange(6) + 1) % 6] = 0.9  # worth 0.9 at temperature 0.1, the similarity 1.0
    judge = Judge(similar, logits)
    judge.logit_scale = torch.tensor(10.0).log()  # type: ignore[attr-defined]
    assert metrics_of(judge, 2, "posterior")["i2t_r1_reranked"] == 1
    assert metrics_of(Judge(similar, logits), 2)["i2t_r1_reranked"] == 0
    with pytest.raises(ValueError, match="must be one of published, posterior"):
        RetrievalConfig(rerank_score="prior")


def test_without_a_second_stage_nothing_is_judged() -> None:
    judge = Judge(torch.eye(6), torch.eye(6))
    found = metrics_of(judge, 0)
    assert not judge.asked
    assert not any(name.endswith("_reranked") for name in found)


def test_items_hold_what_the_reranked_metrics_are_means_of(model: Fusion) -> None:
    result = RetrievalConfig(rerank=3).build().run(model, Icons(), "test")
    for way in ("i2t", "t2i"):
        for k in (1, 5, 10):
            mean = sum(item[f"{way}_hits_{k}_reranked"] for item in result.items) / 6
            assert result.metrics[f"{way}_r{k}_reranked"] == pytest.approx(mean)


def test_long_texts_do_not_slow_the_short_ones(model: Fusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of unequal texts is read in two parts, with the same states and gradients."""
    from zoo.encoders import bert

    generator = torch.Generator().manual_seed(0)
    lengths = torch.cat([torch.randint(3, 7, (34,), generator=generator), torch.tensor([20, 18])])
    mask = torch.arange(20) < lengths[torch.randperm(36, generator=generator)][:, None]
    ids = torch.randint(4, 1000, (36, 20), generator=generator).where(mask, 0)
    image = torch.randn(9, 17, 128, generator=generator).double()
    reader = copy.deepcopy(model.text_encoder).double()
    rows = torch.randint(9, (36,), generator=generator)
    assert bert.short_texts(mask) == 6
    assert bert.short_texts(mask[:8]) is None
    assert bert.short_texts(mask.flip(1)) is None  # pads in front are another matter
    weights = torch.randn(36, 20, 128, generator=generator) * mask[..., None]
    found = []
    for cut in (bert.short_texts, lambda mask: None):
        monkeypatch.setattr(bert, "short_texts", cut)
        reader.zero_grad()
        alone = reader(ids, mask)
        fused = reader(ids, mask, context=image, context_rows=rows)
        onward = reader(ids, mask, context=image[rows], states=alone.tokens)
        ((alone.tokens + fused.tokens + onward.tokens) * weights).sum().backward()
        gradients = [p.grad.clone() for p in reader.parameters() if p.grad is not None]
        found.append([*(f.tokens[mask] for f in (alone, fused, onward)), fused.pooled, *gradients])
    assert len(found[0]) > 40
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9)
