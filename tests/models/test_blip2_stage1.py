"""BLIP-2's first stage: who reads whom, what is drawn and summed, what the second stage takes over; transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo
from zoo.api import build_module
from zoo.connectors.qformer import QFormer, QFormerConfig, Rule
from zoo.data.sample import Sample
from zoo.errors import ConfigError
from zoo.evaluation.metrics import similarity
from zoo.module import ZooModule
from zoo.objectives.contrastive import ContrastiveConfig, similarities
from zoo.part import Features
from zoo.recipe import resolve
from zoo.torchvision_ops import ensure

Shake = Callable[[nn.Module], nn.Module]
SMALL: dict[str, Any] = {
    "encoder": {"width": 32, "depth": 3, "heads": 2, "ffn": 48, "image_size": 32, "patch_size": 8},
    "connector": {"width": 24, "depth": 4, "heads": 2, "ffn": 40, "queries": 5},
}
LM = {"decoder": {"width": 48, "depth": 2, "heads": 4, "ffn": 64}}
TEXTS = ["red apple", "a dog", "grinning face with big eyes", "flag: Japan"]


@pytest.fixture(autouse=True)
def same_draws() -> None:
    torch.manual_seed(0)


def small(recipe: str = "blip2", shake: Shake | None = None, **more: Any) -> ZooModule:
    module = zoo.build(recipe, scale="tiny", **SMALL, **(LM if "opt" in recipe else {}), **more)
    if shake is not None:
        shake(module.model)
        heads = getattr(module.model, "heads", None)
        if heads is not None:
            nn.init.constant_(heads.temperature, 0.2)
    return module


def picture(seed: int) -> Any:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 32, 3), dtype=np.uint8))


def samples() -> list[Sample]:
    return [Sample(str(i), picture(i), (text,)) for i, text in enumerate(TEXTS)]


@pytest.fixture
def qformer(shake: Shake) -> QFormer:
    config = QFormerConfig(
        queries=5, width=24, depth=4, heads=3, ffn=40, dropout=0.0, text=True, vocab_size=61, context_length=20
    )
    built = config.build(in_width=32, in_tokens=7, out_width=0)
    shake(built)
    return built.eval()


# -- who reads whom ------------------------------------------------------------------------------------------------


def read(model: QFormer, rule: Rule, image: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    text = model.embed_text(ids, mask)
    layout = model.layout(text, batch=len(ids), rule=rule)
    with torch.no_grad():
        return model.hidden(Features(image), text, layout=layout)


def test_a_written_text_reads_all_queries_and_its_past_and_no_query_reads_it(qformer: QFormer) -> None:
    image, ids = torch.randn(2, 7, 32), torch.randint(0, 61, (2, 6))
    rows = read(qformer, "generation", image, ids)
    changed = ids.clone()
    changed[:, 3] = (changed[:, 3] + 7) % 61
    after = read(qformer, "generation", image, changed)
    assert torch.equal(rows[:, : 5 + 3], after[:, : 5 + 3])  # queries and earlier text, bit for bit
    assert (rows[:, 5 + 3 :] - after[:, 5 + 3 :]).abs().amax((0, 2)).min() > 1e-3
    with torch.no_grad():
        alone = qformer.hidden(Features(image))
    torch.testing.assert_close(rows[:, :5], alone, atol=1e-6, rtol=1e-6)
    layout = qformer.layout(qformer.embed_text(ids), rule="generation")
    allowed = layout.mask()[0, 0]
    assert allowed[:5, :5].all()
    assert not allowed[:5, 5:].any()
    assert allowed[5:, :5].all()
    assert torch.equal(allowed[5:, 5:], torch.ones(6, 6).tril().bool())
    assert layout.position[0].tolist() == [-1] * 5 + list(range(6))


def test_matching_lets_both_read_both_and_comparing_neither(qformer: QFormer) -> None:
    image, ids = torch.randn(2, 7, 32), torch.randint(0, 61, (2, 6))
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    changed, other = ids.clone(), image.clone()
    changed[:, 2] = (changed[:, 2] + 7) % 61
    other[:, 0] = torch.randn(2, 32)
    both, apart = (read(qformer, rule, image, ids, real) for rule in ("matching", "contrastive"))  # type: ignore[arg-type]
    assert (both[:, :5] - read(qformer, "matching", image, changed, real)[:, :5]).abs().amax((1, 2)).min() > 1e-3
    assert (both[:, 5:7] - read(qformer, "matching", other, ids, real)[:, 5:7]).abs().amax((1, 2)).min() > 1e-3
    assert torch.equal(apart[:, :5], read(qformer, "contrastive", image, changed, real)[:, :5])
    assert torch.equal(apart[:, 5:][real], read(qformer, "contrastive", other, ids, real)[:, 5:][real])
    assert (apart[:, :5] - read(qformer, "contrastive", other, ids, real)[:, :5]).abs().max() > 1e-3
    with torch.no_grad():  # the two passes that are made of it
        queries = qformer.hidden(Features(image))
        text = qformer.hidden(None, qformer.embed_text(ids, real), queries=False)
    torch.testing.assert_close(apart[:, :5], queries, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(apart[:, 5:][real], text[real], atol=1e-6, rtol=1e-6)
    for rule in ("matching", "contrastive", "generation"):  # what stands in a pad is read by nobody
        padded = ids.masked_fill(~real, 3)
        one, two = (read(qformer, rule, image, i, real) for i in (ids, padded))  # type: ignore[arg-type]
        rows = torch.cat([torch.ones(2, 5, dtype=torch.bool), real], 1)
        assert torch.equal(one[rows], two[rows])


def test_written_text_goes_on_from_the_queries_it_finds(shake: Shake) -> None:
    model: Any = small(shake=shake).model.eval()
    batch = model.processor(samples())
    with torch.no_grad():
        outputs = model(batch)
        states, hidden = outputs["query_states"], outputs["writer_hidden"]
        alone = model.connector.hidden(model.encode_images(batch["pixel_values"]))
        text = model.connector.embed_text(model.started(batch["input_ids"]), batch["attention_mask"])
        layout = model.connector.layout(text, rule="generation")
        whole = model.connector.hidden(model.encode_images(batch["pixel_values"]), text, layout=layout)
    assert torch.equal(states, alone)  # whether a text is written or not
    real = batch["attention_mask"]
    torch.testing.assert_close(hidden[real], whole[:, 5:][real], atol=1e-5, rtol=1e-5)
    assert int(real.sum(1).min()) < real.shape[1]


def test_loss_does_not_depend_on_what_stands_in_pads(shake: Shake) -> None:
    module = small(shake=shake).eval()
    batch = module.processor(samples())
    batch |= {"negative_images": torch.tensor([1, 2, 3, 0]), "negative_texts": torch.tensor([3, 0, 1, 2])}
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(~batch["attention_mask"], 77)}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    with torch.no_grad():
        (one, parts), (two, _) = module.losses(batch), module.losses(other)
    assert torch.equal(one, two)
    assert {"contrastive", "matching", "grounded-text"} <= set(parts)


# -- the objectives ------------------------------------------------------------------------------------------------


def test_an_image_is_compared_by_its_nearest_query() -> None:
    images, texts = F.normalize(torch.randn(3, 5, 8), dim=-1), F.normalize(torch.randn(4, 8), dim=-1)
    wanted = torch.stack([torch.stack([(images[i] @ t).max() for t in texts]) for i in range(3)])
    torch.testing.assert_close(similarities(images, texts), wanted)
    torch.testing.assert_close(similarities(texts, images), wanted.T)
    torch.testing.assert_close(similarity(images, texts), wanted)
    torch.testing.assert_close(similarity(texts, images), wanted.T)
    temperature = 0.07
    texts = texts[:3]
    outputs = {"image_embeds": images, "text_embeds": texts, "logit_scale": -torch.tensor(temperature).log()}
    loss, report = ContrastiveConfig(label_smoothing=0.1).build()(None, {}, outputs)
    logits = wanted[:, :3] / temperature
    target = 0.9 * torch.eye(3) + 0.1 / 3
    by_hand = -(target * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1).mean() / 2
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(report["logit_scale"], torch.tensor(1 / temperature))


def test_negatives_are_never_the_own_pair_and_do_not_underflow(shake: Shake) -> None:
    module = small(shake=shake).eval()
    matching: Any = module.objectives["matching"]
    assert (matching.config.exclude, matching.config.floor) == ("before", 0.0)
    batch = module.processor(samples())
    with torch.no_grad():
        outputs = dict(module.model(batch))
        outputs["logit_scale"] = torch.tensor(9.0)  # so sharp that the softmax of all pairs would be one-hot
        outputs["image_embeds"] = outputs["text_embeds"][:, None].expand(-1, 5, -1)
        found = matching.weights(batch, outputs)
        torch.manual_seed(0)
        drawn = [matching._negatives(batch, outputs) for _ in range(20)]
    for weights in found:
        assert not weights.diagonal().any()
        torch.testing.assert_close(weights.sum(1), torch.ones(4))
    own = torch.arange(4)
    assert all(bool((image != own).all() and (text != own).all() and ok.all()) for image, text, ok in drawn)


def test_match_is_the_mean_over_the_queries(shake: Shake) -> None:
    model: Any = small(shake=shake).model.eval()
    batch = model.processor(samples())
    ids, real = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        image = model.encode_images(batch["pixel_values"])
        fused = model.fuse(image, ids, real)
        each = model.heads.matching(fused.tokens)  # [B, 5, 2]
        logits = model.match_logits(batch["pixel_values"], ids, real)
        rows = torch.tensor([2, 0, 2, 1])
        shared = model.fuse(Features(image.tokens), ids, real, rows=rows)
        copied = model.fuse(Features(image.tokens[rows]), ids, real)
    assert each.shape == (4, 5, 2)
    torch.testing.assert_close(logits, each.mean(1))
    torch.testing.assert_close(shared.tokens, copied.tokens, atol=1e-5, rtol=1e-5)
    images = [picture(i) for i in range(4)]
    pairs = torch.tensor([[0, 0], [3, 1], [3, 2], [1, 1]])
    found = model.match_pairs(images, TEXTS, pairs)
    torch.testing.assert_close(
        found, model.match([images[i] for i, _ in pairs], [TEXTS[t] for _, t in pairs]), atol=1e-5, rtol=1e-5
    )
    vectors = model.embed_images(images)
    assert vectors.shape == (4, 5, 128)
    assert model.rerank_similarity


def test_two_ffns_start_equal_in_the_built_model() -> None:
    model: Any = small().model
    for layer in model.connector.trunk.layers:
        text, query = layer.ffn
        assert text is not query
        assert torch.equal(text.up.weight, query.up.weight)
        assert torch.equal(text.down.weight, query.down.weight)
    owners = {int(n.split(".")[3]) for n, _ in model.named_parameters() if ".cross." in n}
    assert owners == {0, 2}
    assert float(model.heads.temperature) == pytest.approx(0.07)


def test_another_connector_or_no_text_branch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"connector\.text=true"):
        zoo.build("blip2", scale="tiny", options={"connector.text": False})
    with pytest.raises(ConfigError, match=r"connector=qformer"):
        zoo.build("llava", scale="tiny", wiring="querying", objective=["contrastive"], stages="joint")


# -- the published models ------------------------------------------------------------------------------------------


def test_published_towers_keep_the_class_token_and_drop_the_last_block() -> None:
    # 188 M in the paper; keys and values of narrower tokens are fewer
    for recipe, blocks, width, learns in (("blip2", 39, 1408, 186.7e6), ("blip2-vit-l", 23, 1024, 183.2e6)):
        with torch.device("meta"):
            module = build_module(resolve(recipe), 0)
        model: Any = module.model
        assert model.encoder.tokens == 257
        assert model.encoder.width == width
        names = {n for n, _ in model.encoder.named_parameters()}
        inside = "trunk.layers." if recipe == "blip2" else "tower.transformer.resblocks."
        assert {int(n.removeprefix(inside).split(".")[0]) for n in names if n.startswith(inside)} == set(range(blocks))
        assert not any("final_norm" in n or "ln_post" in n for n in names)
        owners = {n.split(".")[3] for n, _ in model.named_parameters() if ".cross." in n}
        assert owners == {"0", "2", "4", "6", "8", "10"}
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {"heads.temperature", "connector.ln_vision.weight", "connector.query_tokens"} <= trained
        assert not any(n.startswith("encoder.") for n in trained)
        count = sum(p.numel() for n, p in model.named_parameters() if n in trained)
        assert abs(count - learns) < 0.1e6
        optimizer = module.recipe.stage_optimizer(0)
        assert (optimizer.lr, list(optimizer.betas), optimizer.weight_decay) == (1e-4, [0.9, 0.98], 0.05)
        assert optimizer.warmup == 2000


def test_stage_two_trains_what_the_paper_counts() -> None:
    for recipe in ("blip2-opt", "blip2-opt-staged"):
        with torch.device("meta"):
            module = build_module(resolve(recipe), 0)
        module.set_stage(len(module.recipe.stages) - 1)
        trained = {n: p.numel() for n, p in module.model.named_parameters() if p.requires_grad}
        assert 103e6 < sum(trained.values()) < 108e6  # table 2
        inside = sum(c for n, c in trained.items() if not n.startswith(("connector.proj", "connector.ln_vision")))
        assert abs(inside - 105.1e6) < 0.1e6
        assert not any(n.startswith(("encoder.", "decoder.", "heads.", "connector.text")) for n in trained)
        assert not any(".ffn.0." in n or ".ffn_norm.0." in n for n in trained)


# -- transformers --------------------------------------------------------------------------------------------------


def test_transformers_retrieval_model(shake: Shake, tmp_path: Path) -> None:
    ensure()
    from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28,
            patch_size=7, hidden_act="gelu",
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40, encoder_hidden_size=32,
            vocab_size=61, max_position_embeddings=20, use_qformer_text_input=True,
        ).to_dict(),
        text_config=OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16).to_dict(),
        num_query_tokens=5, image_text_hidden_size=16, image_token_index=None,
    )  # fmt: skip
    theirs = Blip2ForImageTextRetrieval(config).eval()
    shake(theirs)
    stated = {**config.to_dict(), "architectures": ["Blip2ForImageTextRetrieval"]}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    save_file({n: t.contiguous() for n, t in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    module = zoo.from_pretrained(tmp_path)
    assert module.recipe.model == "blip2"
    assert sorted(module.load_report.new) == [
        "heads.temperature", "heads.words.bias", "heads.words.dense.bias", "heads.words.dense.weight",
        "heads.words.norm.bias", "heads.words.norm.weight",
    ]  # fmt: skip
    model: Any = module.model
    pixels, ids = torch.randn(3, 3, 28, 28), torch.randint(0, 61, (3, 7))
    real = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])
    with torch.no_grad():
        match = theirs(pixels, ids, real, use_image_text_matching_head=True).logits_per_image
        contrast = theirs(pixels, ids, real)
        outputs = model({"pixel_values": pixels, "input_ids": ids, "attention_mask": real.bool()})
        torch.testing.assert_close(model.match_logits(pixels, ids, real), match, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs["image_embeds"], contrast.image_embeds, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs["text_embeds"], contrast.text_embeds, atol=1e-5, rtol=1e-5)
        found = similarity(outputs["image_embeds"], outputs["text_embeds"])
        torch.testing.assert_close(found, contrast.logits_per_image, atol=1e-5, rtol=1e-5)
    assert found.std() > 0.01
    assert (match[0] - match[1]).abs().max() > 0.01
