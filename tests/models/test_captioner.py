"""CoCa's statements (coca.md, last section): what reads what, one pass of every part, both losses, captions."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

import zoo
from zoo.errors import ConfigError
from zoo.layout import Segment, lay_out
from zoo.models.captioning import Halves
from zoo.objectives.contrastive import ContrastiveConfig
from zoo.objectives.next_token import NextTokenConfig
from zoo.part import Features
from zoo.recipe import resolve
from zoo.sampling.text import Decoding
from zoo.testing.config import shake

SMALL = {
    "encoder": {"width": 32, "depth": 2, "heads": 2, "ffn": 64, "image_size": 32},
    "connector": {"queries": 7, "heads": 2},
    "text_encoder": {"width": 32, "depth": 2, "heads": 2, "ffn": 64, "context_length": 12},
    "decoder": {"width": 32, "depth": 2, "heads": 2, "ffn": 64, "context_length": 12},
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def build(model: str = "coca", **changes: Any) -> Any:
    module = zoo.build(model, scale="tiny", seed=0, **{**SMALL, **changes})
    shake(module.model)
    return module


@pytest.fixture(scope="module")
def module() -> Any:
    return build()


def draw(rows: int = 3, lengths: tuple[int, ...] = (9, 5, 7), size: int = 32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 1024, (rows, 12), generator=generator)
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    pixels = torch.randn(rows, 3, size, size, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("model", ["coca", "coca-base"])
def test_the_lower_half_does_not_see_the_image_and_the_upper_does(model: str) -> None:
    own = build(model).model
    batch, other = draw(), {**draw(), "pixel_values": draw(seed=1)["pixel_values"]}
    one, two = own(batch), own(other)
    assert torch.equal(one["text_embeds"], two["text_embeds"])
    kept = one["targets"] != -100
    moved = (own.decoder.logits(one["hidden"]) - own.decoder.logits(two["hidden"])).abs().amax(-1)
    assert (moved[kept] > 1e-2).all()


@torch.no_grad()
def test_the_class_token_is_learned_stands_last_and_sees_no_pads(module: Any) -> None:
    model, batch = module.model, draw()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    before = model.text_features(ids, mask)
    encoder = model.text_encoder
    assert isinstance(encoder.cls, torch.nn.Parameter)
    assert encoder.embed_tokens.positions.num_embeddings == encoder.context_length + 1
    assert torch.equal(model.text_features(ids.masked_fill(~mask, 9), mask), before)
    assert_close(model.text_features(ids), before, **CLOSE)  # pads are found by their id too
    assert_close(model.text_features(ids[:, :9], mask[:, :9]), before, **CLOSE)
    # every token of the text is seen by it; it is seen by none of them
    for place in range(5):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 5) % 1000 + 4
        assert ((model.text_features(changed, mask) - before).abs().amax(1) > 1e-3).all()
    states = encoder(ids, mask).tokens
    kept = encoder.cls.clone()
    encoder.cls.copy_(10 * kept.flip(0))  # no shift, which the norms would take out
    moved = model.text_features(ids, mask)
    after = encoder(ids, mask).tokens
    encoder.cls.copy_(kept)
    assert ((moved - before).abs().amax(1) > 1e-3).all()
    real = mask[:, : states.shape[1]]
    assert torch.equal(after[real], states[real])


@torch.no_grad()
@pytest.mark.parametrize("model", ["coca", "coca-base"])
def test_no_logit_depends_on_a_later_token_in_either_half(model: str) -> None:
    own, batch = build(model).model, draw(lengths=(12, 12, 12))
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    logits, states = own.text_logits(pixels, ids), own._states(ids)
    for place in (1, 6, 11):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 5) % 1000 + 4
        after, lower = own.text_logits(pixels, changed), own._states(changed)
        for a, b in ((logits, after), (states, lower)):
            assert torch.equal(a[:, :place], b[:, :place])
            assert ((a - b)[:, place].abs().amax(-1) > 1e-3).all()
        swapped = states.clone()  # the upper half alone
        swapped[:, place] = states[:, place].flip(-1)  # no shift, which the norms would take out
        image = own.read_image(pixels).tokens
        a, b = own.read_on(states, image), own.read_on(swapped, image)
        assert torch.equal(a[:, :place], b[:, :place])
        assert ((a - b)[:, place].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("model", ["coca", "coca-base"])
def test_a_training_step_runs_every_part_once_for_both_losses(model: str) -> None:
    module = build(model).train()
    calls: Counter[str] = Counter()
    handles = [
        child.register_forward_hook(lambda *_, path=path: calls.update([path]))
        for path, child in module.model.named_modules()
        if next(child.parameters(), None) is not None
    ]
    loss = module.training_step(draw(), 0)
    for handle in handles:
        handle.remove()
    assert set(module.active) == {"contrastive", "next-token"}
    parts = ("", "encoder", "connector", "text_encoder", "decoder", "image_projection", "text_projection")
    assert {path: calls[path] for path in parts} == dict.fromkeys(parts, 1)
    trunks = ("text_encoder.trunk", "decoder.trunk", "decoder.lm_head", "connector.captions")
    assert {path: calls[path] for path in trunks} == dict.fromkeys(trunks, 1)
    assert set(calls.values()) == {1}  # and so does every module inside them that has weights
    loss.backward()
    for name, parameter in module.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_total_is_one_contrast_and_two_captions_and_pads_do_not_count(module: Any) -> None:
    module.eval()
    batch = draw()
    out = module.model(batch)
    contrast, _ = ContrastiveConfig().build()(module.model, batch, out)
    caption, report = NextTokenConfig().build()(module.model, batch, out)
    total, _ = module.losses(batch)
    assert_close(total, contrast + 2 * caption, **CLOSE)
    assert int(report["tokens"]) == 9 + 5 + 7 - 3
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = module.model.text_logits(batch["pixel_values"], ids)[:, :-1]
    by_hand = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][mask[:, 1:]].mean()
    assert logits.std() > 0.1
    assert_close(caption, by_hand, **CLOSE)
    # more pads in the batch, and other ids in them
    alone = {k: v[1:2] for k, v in batch.items()}
    short = {**alone, "input_ids": ids[1:2, :5], "attention_mask": mask[1:2, :5]}
    longer = {**alone, "input_ids": ids[1:2].masked_fill(~mask[1:2], 77)}
    reference = NextTokenConfig().build()(module.model, short, module.model(short))[0]
    for more in (alone, longer):
        assert_close(NextTokenConfig().build()(module.model, more, module.model(more))[0], reference, **CLOSE)


def test_labels_say_what_is_trained(module: Any) -> None:
    batch = draw()
    labels = batch["input_ids"].masked_fill(~batch["attention_mask"], -100)
    labels[:, :4] = -100
    targets = module.model({**batch, "labels": labels})["targets"]
    assert torch.equal(targets, labels[:, 1:9])
    assert int((module.model(batch)["targets"] != -100).sum()) == 9 + 5 + 7 - 3


@torch.no_grad()
def test_image_tokens_come_from_the_pooler_whatever_the_order_of_the_patches(module: Any) -> None:
    model = module.model
    features = model.encoder(draw()["pixel_values"])
    order = torch.randperm(features.tokens.shape[1], generator=torch.Generator().manual_seed(0))
    one, two = model.connector(features), model.connector(Features(features.tokens[:, order]))
    assert_close(one.tokens, two.tokens, **CLOSE)
    assert_close(one.pooled, two.pooled, **CLOSE)
    assert one.tokens.shape[1] == model.connector.tokens == SMALL["connector"]["queries"] - 1
    assert one.tokens.flatten(1).std(0).max() > 0.1  # pictures differ


def test_published_poolers_give_255_and_256_tokens() -> None:
    counts = {}
    with torch.device("meta"):
        for name in ("coca", "coca-vit-l-14", "coca-base", "coca-large", "coca-2b"):
            recipe = resolve(name)
            counts[name] = recipe.wiring[1].build(recipe.parts, 0).connector.tokens
    assert counts == {"coca": 255, "coca-vit-l-14": 255, "coca-base": 256, "coca-large": 256, "coca-2b": 256}


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["cascade", "parallel"])
def test_the_second_pooler_reads_the_first_or_the_encoder(pooling: str) -> None:
    model = build(connector={"pooling": pooling, "queries": 7, "heads": 2}).model
    features = model.encoder(draw()["pixel_values"])
    contrast, captions = model.connector.contrast, model.connector.captions
    assert contrast.k.in_features == (32 if pooling == "parallel" else captions.out.out_features)
    out = model.connector(features)
    source = out.tokens if pooling == "cascade" else features.tokens
    assert_close(out.pooled, contrast(source)[:, 0], **CLOSE)
    captions.query_tokens.add_(1.0 * torch.randn_like(captions.query_tokens))
    moved = bool(((model.connector(features).pooled - out.pooled).abs() > 1e-4).any())
    assert moved == (pooling == "cascade")


def test_the_temperature_learns_and_stays_below_a_hundred() -> None:
    module = build()
    loss, _ = module.losses(draw())
    loss.backward()
    assert module.model.logit_scale.grad.abs() > 0
    with torch.no_grad():
        module.model.logit_scale.fill_(9.0)
    module.on_train_batch_end(None, None, 0)
    assert module.model.logit_scale.item() == pytest.approx(math.log(100))
    fresh = zoo.build("coca", scale="tiny", **SMALL)
    assert fresh.model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_the_output_matrix_and_every_other_weight_start_finite() -> None:
    module = zoo.build("coca", scale="tiny")
    head = module.model.decoder.lm_head.weight
    assert head.std().item() == pytest.approx(128**-0.5, rel=0.02)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    text = module.model.text_encoder
    assert text.embed_tokens.tokens.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert text.embed_tokens.positions.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert text.cls.std().item() == pytest.approx(0.01, rel=0.3)
    with torch.no_grad():
        first = module.losses(module.model.example_batch(4))[1]["next-token/next_token"]
    assert first < 2 * math.log(1024)


def test_published_sizes_have_the_published_numbers_of_parameters() -> None:
    """Table 1 of the paper, and open_clip's own counts. The paper cuts 1.18B and 2.19B to 1.1B and 2.1B: layers that
    give 297M and 484M exactly cannot give less."""
    counts: dict[str, dict[str, float]] = {}
    with torch.device("meta"):
        for name in ("coca-base", "coca-large", "coca-2b", "coca", "coca-vit-l-14"):
            recipe = resolve(name)
            parts = recipe.wiring[1].build(recipe.parts, 0).parts()
            counts[name] = {k: sum(p.numel() for p in part.parameters()) / 1e6 for k, part in parts.items()}
    total = {name: sum(parts.values()) for name, parts in counts.items()}
    text = {name: parts["text_encoder"] + parts["decoder"] for name, parts in counts.items()}
    assert total["coca-base"] == pytest.approx(383, rel=0.02)
    assert total["coca-large"] == pytest.approx(787, rel=0.02)
    assert text["coca-base"] == pytest.approx(297, abs=0.5)
    assert text["coca-large"] == pytest.approx(484, abs=0.5)
    assert counts["coca-base"]["encoder"] == pytest.approx(86, abs=0.5)
    assert counts["coca-large"]["encoder"] == pytest.approx(303, abs=1)
    assert counts["coca-2b"]["encoder"] == pytest.approx(1009, rel=0.01)
    assert 1100 < text["coca-2b"] < 1200
    assert 2100 < total["coca-2b"] - counts["coca-2b"]["connector"] < 2200
    assert total["coca"] == pytest.approx(253.56, abs=0.01)
    assert total["coca-vit-l-14"] == pytest.approx(638.45, abs=0.01)


def test_there_is_no_matching_head_queue_or_momentum() -> None:
    for name in ("coca", "coca-base"):
        module = zoo.build(name, scale="tiny")
        assert {key.split(".")[0] for key in module.model.state_dict()} == {
            "encoder", "connector", "text_encoder", "decoder", "image_projection", "text_projection", "logit_scale",
        }  # fmt: skip
        words = ("queue", "momentum", "itm", "match", "_m.")
        assert not [key for key in module.state_dict() if any(word in key for word in words)]
        assert not list(module.model.buffers())


@torch.no_grad()
@pytest.mark.parametrize("model", ["coca", "coca-base"])
def test_writing_over_a_cache_equals_the_whole_row_and_keeps_its_rules(model: str) -> None:
    own = build(model).eval().model
    pixels = draw()["pixel_values"]
    prompts = torch.full((3, 1), 1)
    written = own.generate_ids(pixels, prompts, decoding=Decoding(max_new_tokens=8), stop_ids=[2000], pad_id=0)
    whole = prompts
    for _ in range(8):
        whole = torch.cat([whole, own.text_logits(pixels, whole)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(written, whole[:, 1:])
    assert written.unique().numel() > 3
    alone = [
        own.generate_ids(pixels[i : i + 1], prompts[:1], decoding=Decoding(max_new_tokens=8), stop_ids=[2000], pad_id=0)
        for i in range(3)
    ]
    assert torch.equal(torch.cat(alone), written)
    # prompts of other lengths share a batch, pads in front
    ids = torch.tensor([[0, 0, 1], [1, 40, 41], [0, 1, 50]])
    mixed = own.generate_ids(pixels, ids, ids != 0, Decoding(max_new_tokens=4), stop_ids=[2000], pad_id=0)
    for row in range(3):
        prompt = ids[row][ids[row] != 0][None]
        one = own.generate_ids(pixels[row : row + 1], prompt, None, Decoding(max_new_tokens=4), stop_ids=[2000])
        assert torch.equal(mixed[row : row + 1], one)
    stop = int(written[0, 2])
    first = written[0].tolist().index(stop)
    stopped = own.generate_ids(pixels[:1], prompts[:1], decoding=Decoding(max_new_tokens=8), stop_ids=[stop], pad_id=0)
    assert torch.equal(stopped, written[:1, : first + 1])
    least = Decoding(max_new_tokens=6, min_new_tokens=5)
    kept = own.generate_ids(pixels, prompts, decoding=least, stop_ids=written[:, 0].tolist(), pad_id=0)
    assert not torch.isin(kept[:, :5], written[:, 0]).any()
    assert kept.shape[1] <= 6
    full = own.generate_ids(pixels, prompts, decoding=Decoding(max_new_tokens=99), stop_ids=[2000], pad_id=0)
    assert full.shape[1] == own.text_encoder.context_length  # the start and eleven more are read, one is written last


@torch.no_grad()
def test_beams_find_likelier_captions_through_both_caches(module: Any) -> None:
    own = module.eval().model
    pixels, prompts = draw()["pixel_values"], torch.full((3, 1), 1)

    def log_p(ids: Tensor) -> Tensor:
        whole = torch.cat([prompts, ids], 1)
        log = own.text_logits(pixels, whole)[:, :-1].log_softmax(-1)
        return log.gather(-1, ids[..., None])[..., 0].sum(1)

    greedy, beams = (
        own.generate_ids(
            pixels, prompts, decoding=Decoding(max_new_tokens=5, beams=n, length_penalty=0.0), stop_ids=[2000], pad_id=0
        )
        for n in (1, 6)
    )
    assert (log_p(beams) >= log_p(greedy) - 1e-5).all()
    assert not torch.equal(beams, greedy)


@torch.no_grad()
def test_both_halves_cached_give_the_hidden_states_of_one_pass(module: Any) -> None:
    from zoo.layout import TokenBatch

    own, batch = module.eval().model, draw(lengths=(12, 12, 12))
    image = own.read_image(batch["pixel_values"]).tokens
    ids = batch["input_ids"]
    expected = own.read_on(own._states(ids), image)
    halves = Halves(own.text_encoder, own.decoder)
    cache, whole = halves.new_cache(), lay_out([Segment("text", 12)])
    rows = []
    for start, stop in ((0, 4), (4, 5), (5, 12)):
        tokens = TokenBatch(halves.embed(ids[:, start:stop]), whole.truncate(stop))
        rows.append(halves(tokens, cache, **({"context": image} if start == 0 else {})))
    assert_close(torch.cat(rows, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def images() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, 256, (32, 40, 3), generator=generator, dtype=torch.uint8) for _ in range(3)]
    return [Image.fromarray(pixels.numpy()) for pixels in drawn]


def test_scores_are_the_log_likelihood_of_text_and_end(module: Any, images: list[Any]) -> None:
    model = module.model
    texts = ["red apple", "a cat", "flag: Japan"]
    for prompts in (None, ["an icon of", "", "it shows a"]):
        scores = module.score_text(images, texts, prompts)
        rows = model.processor.encode_texts(texts, prompts)
        with torch.no_grad():
            logits = model.text_logits(model.processor.encode_images(images), rows["input_ids"])[:, :-1]
        wanted = rows["labels"][:, 1:]
        nats = logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
        assert_close(scores, (nats * (wanted != -100)).sum(1), atol=1e-4, rtol=1e-5)
        table = module.score_candidates(images, [texts] * 3, prompts)
        for column, text in enumerate(texts):
            assert_close(table[:, column], module.score_text(images, [text] * 3, prompts), atol=1e-4, rtol=1e-5)
        assert table.std(0).min() > 1e-4
    assert module.score_candidates(images, [[], [], []]).shape == (3, 0)
    with pytest.raises(ConfigError, match="same number"):
        module.score_candidates(images, [["a"], ["a", "b"], ["a"]])


def test_captions_are_targets_and_prompts_are_not(module: Any) -> None:
    processor = module.model.processor
    rows = processor.encode_texts(["red apple", "a very long name " * 9], ["an icon of", ""])
    ids, labels, mask = rows["input_ids"], rows["labels"], rows["attention_mask"]
    assert ids.shape == labels.shape == mask.shape == (2, 12)
    start = len(processor.tokenizer.encode(["an icon of"])[0]) + 1
    end = int(mask[0].sum())
    assert (labels[0, :start] == -100).all()
    assert torch.equal(labels[0, start:end], ids[0, start:end])
    assert (labels[0, end:] == -100).all()
    assert labels[0, end - 1] == ids[1, -1] == processor.tokenizer.eos_id
    assert processor.decode(ids[0, start:].tolist()) == "red apple"
    assert rows["text_bytes"].tolist() == [9, 153]
    prompts = processor.encode_prompts(["an icon of", ""], 2)
    assert torch.equal(prompts["input_ids"][0], ids[0, :start])
    assert prompts["attention_mask"][1].tolist() == [False] * (start - 1) + [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder": "clip-text-512"}, "text_encoder=coca-text-512"),
        ({"decoder": "trunk-lm"}, "decoder=coca-decoder-512"),
        ({"decoder": {"width": 64}}, "text_encoder.width = 128 and decoder.width = 64"),
        ({"decoder": {"vocab_size": 2000}}, "decoder.vocab_size = 2000"),
        ({"connector": {"heads": 3}}, "connector.heads = 3"),
        ({"connector": {"queries": 1}}, "queries = 1"),
        ({"connector": "linear"}, "encoder.pool=true"),
        ({"text_encoder": {"cls_mask": "late"}}, "cls_mask = 'late'"),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        zoo.build("coca", scale="tiny", **changes)
    assert "\n" not in str(caught.value)


def test_another_connector_takes_the_image_vector_from_the_encoder() -> None:
    module = build(connector="linear", encoder={**SMALL["encoder"], "pool": True})
    out = module.model(draw())
    assert out["image_tokens"].shape[1] == module.model.encoder.tokens
    assert_close(out["image_embeds"].norm(dim=-1), torch.ones(3))


def test_a_text_that_is_too_long_is_refused(module: Any) -> None:
    with pytest.raises(ConfigError, match="13 tokens, the text encoder reads 12"):
        module.model.text_features(torch.ones(1, 13, dtype=torch.long))
