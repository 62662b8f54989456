"""BLIP-2 with T5: against transformers through saved folders, and what the wiring promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import zoo
from zoo.compare.flops import count_recipe
from zoo.errors import ConfigError
from zoo.layout import TokenBatch, lay_out
from zoo.layout_facts import Segment
from zoo.models.seq2seq_bridge import Seq2SeqBridge
from zoo.objectives.next_token import NextTokenConfig
from zoo.recipe import resolve
from zoo.sampling.text import Decoding, streams
from zoo.torchvision_ops import ensure
from zoo.weights import load_model

SLOTS, IMAGE = 6, 110


def theirs(untied: bool = True, **text: Any) -> Any:
    ensure()
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        T5Config,
    )

    vision = Blip2VisionConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    qformer = Blip2QFormerConfig(
        vocab_size=99, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40,
        encoder_hidden_size=32,
    )  # fmt: skip
    # transformers cannot decode where the decoder is the deeper one: its cache counts the encoder's layers
    sizes = {"d_model": 40, "d_kv": 6, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
    t5 = T5Config(vocab_size=120, decoder_start_token_id=0, **sizes, **text)
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=t5, num_query_tokens=SLOTS, image_token_index=IMAGE
    )
    model = Blip2ForConditionalGeneration(config)
    if untied:
        head = model.language_model.lm_head
        head.weight = nn.Parameter(head.weight.detach().clone())
    return model.eval()


FLAN = {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": False}
KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    "flan, exact gelu": (True, FLAN),
    "flan as google trained it": (True, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5 1.0, tied and scaled": (False, {}),
    "as transformers 5 draws a flan, tied": (False, FLAN),
    "few buckets": (True, {**FLAN, "relative_attention_num_buckets": 6, "relative_attention_max_distance": 9}),
}


def rows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (4, SLOTS + 9), generator=generator)
    ids[:, :SLOTS] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    mask[3, -8:] = 0
    labels = torch.randint(3, 100, (4, 7), generator=generator)
    labels[0, -2:] = -100
    labels[2, -5:] = -100
    pixels = torch.randn(4, 3, 28, 28, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind: str, shake: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    untied, text = KINDS[kind]
    other = theirs(untied, **text)
    shake(other)
    other.save_pretrained(tmp_path)
    ours, _, report = load_model(tmp_path)
    assert isinstance(ours, Seq2SeqBridge)
    ours.eval()
    assert (report.new, report.ignored) == ([], [])
    assert ours.decoder.config.tied is not untied
    given = rows()
    with torch.no_grad():
        expected = other(**given)
        logits = ours.text_logits(
            given["pixel_values"], given["input_ids"], given["attention_mask"], ours.shift_right(given["labels"])
        )
        loss, about = NextTokenConfig().build()(ours, given, ours(given))
    real = given["labels"] != -100
    assert expected.logits[real].std() > (0.05 if "tied" in kind else 0.3)  # large enough that a difference shows
    torch.testing.assert_close(logits[real], expected.logits[real], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    assert int(about["tokens"]) == int(real.sum())
    prompt = {k: given[k] for k in ("pixel_values", "input_ids", "attention_mask")}
    decoding: list[tuple[Decoding, dict[str, Any]]] = [
        (Decoding(max_new_tokens=7), {}),
        (Decoding(max_new_tokens=7, repetition_penalty=1.5), {"repetition_penalty": 1.5}),
        (Decoding(max_new_tokens=7, beams=3, length_penalty=-1.0), {"num_beams": 3, "length_penalty": -1.0}),
        (Decoding(max_new_tokens=7, beams=5, min_new_tokens=2), {"num_beams": 5, "min_new_tokens": 2}),
    ]
    for how, said in decoding:
        new = other.generate(**prompt, max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=2, **said)
        got = ours.generate_ids(*prompt.values(), how, stop_ids=[2], pad_id=0)
        assert torch.equal(new[:, 1 : 1 + got.shape[1]], got), said  # theirs begin with the start token
        assert not new[:, 1 + got.shape[1] :].any()


def small(**changes: Any) -> Any:
    """The recipe at tiny scale, small enough to test with."""
    sizes = {"encoder.depth": 1, "connector.depth": 2, "decoder.depth": 2, "decoder.width": 64, "encoder.width": 64}
    return zoo.build("blip2-flan-t5", scale="tiny", **{**sizes, **changes})


def images(count: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, 64, 64, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(p.numpy()) for p in pixels]


@pytest.mark.parametrize(
    "how", [{}, {"beams": 3}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "beam", "nucleus"]
)
def test_writing_does_not_depend_on_the_batch(how: dict[str, Any], shake: Callable[[nn.Module], nn.Module]) -> None:
    module = small()
    shake(module.model)
    pictures = images(3)
    questions = ["what is it?", "which colour has the small thing in the middle?", ""]
    together = module.generate_text(pictures, questions, max_new_tokens=6, **how)
    assert len(set(together)) == 3
    pairs = list(zip(pictures, questions, strict=True))[: 1 if "temperature" in how else 3]  # samples are numbered
    alone = [module.generate_text([p], [q], max_new_tokens=6, **how)[0] for p, q in pairs]
    assert together[: len(alone)] == alone
    model = module.model.eval()
    rows = model.processor.encode_prompts(questions, 3)
    pixels = model.processor.encode_images(pictures)
    decoding = Decoding(max_new_tokens=6, **how)
    draws = streams(0, 0, 3) if "temperature" in how else None
    usual = model.generate_ids(pixels, rows["input_ids"], rows["attention_mask"], decoding, generators=draws)
    ids, mask = _to_the_right(rows["input_ids"], rows["attention_mask"]), rows["attention_mask"].flip(1)
    assert not torch.equal(mask, rows["attention_mask"])
    draws = streams(0, 0, 3) if "temperature" in how else None
    moved = model.generate_ids(pixels, ids, mask, decoding, generators=draws)
    assert torch.equal(usual, moved)


def _to_the_right(ids: Tensor, mask: Tensor) -> Tensor:
    """Rows with their pads, which stand behind, in front."""
    return torch.stack([row.roll(int((~real).sum())) for row, real in zip(ids, mask, strict=True)])


def test_scores_are_the_loss_of_the_text(shake: Callable[[nn.Module], nn.Module]) -> None:
    module = small()
    shake(module.model)
    model, pictures = module.model.eval(), images(2)
    texts = ["a red apple", "the flag of Japan, waving"]
    scores = module.score_text(pictures, texts, ["what?", "which flag?"])
    rows = model.processor.encode_texts(texts, ["what?", "which flag?"])
    batch = {"pixel_values": model.processor.encode_images(pictures), **rows}
    with torch.no_grad():
        loss, about = NextTokenConfig().build()(model, batch, model(batch))
    torch.testing.assert_close(-scores.sum() / int(about["tokens"]), loss, atol=1e-4, rtol=0)
    # step by step, by hand: the tokens and the end, each given those before it
    ids = [*model.tokenizer.encode(texts[:1])[0], model.tokenizer.eos_id]
    prompt = model.processor.encode_prompts(["what?"], 1)
    read = torch.tensor([[model.decoder_config.start_id, *ids[:-1]]])
    with torch.no_grad():
        logits = model.text_logits(batch["pixel_values"][:1], prompt["input_ids"], None, read)
    by_hand = logits.log_softmax(-1)[0, torch.arange(len(ids)), torch.tensor(ids)].sum()
    torch.testing.assert_close(scores[0], by_hand, atol=1e-4, rtol=0)
    candidates = [[*texts, "x"], [texts[1], texts[0], "an egg"]]
    table = module.score_candidates(pictures, candidates, ["what?", "which flag?"])
    torch.testing.assert_close(torch.stack([table[0, 0], table[1, 0]]), scores, atol=1e-4, rtol=0)


def test_the_language_model_stays_as_it_is(shake: Callable[[nn.Module], nn.Module]) -> None:
    module = small()
    shake(module.model)
    module.train()
    model = module.model
    assert [m.training for m in (model.decoder, model.encoder, model.connector)] == [False, False, True]
    assert not any(p.requires_grad for p in (*model.decoder.parameters(), *model.encoder.parameters()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    module.steps = 2
    optimizer = module.configure_optimizers()["optimizer"]
    batch = model.example_batch(3)
    for _ in range(2):
        loss, _ = module.losses(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is None for p in (*model.decoder.parameters(), *model.encoder.parameters()))
    moved = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"connector"}


def test_trains_on_captions_and_learns_them() -> None:
    """Everything learns, as a recipe without pretrained parts wants: two captions of two images, cut anywhere."""
    from zoo.data.sample import Sample

    module = small(stages="joint")
    module.train()
    said = ["red sun", "wet dog"]
    samples = [Sample(text, image=image, texts=(text,)) for text, image in zip(said, images(2), strict=True)]
    optimizer = torch.optim.AdamW(module.model.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        loss, _ = module.losses(module.processor(samples, train=True, draws=[step, step]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert module.generate_text(images(2), max_new_tokens=6) == said


def test_other_connectors_and_language_models_fit() -> None:
    module = small(connector="mlp")
    batch = module.model.example_batch(2)
    loss, _ = module.losses(batch)
    loss.backward()
    assert module.model.connector.tokens == module.model.encoder.tokens
    assert all(p.grad is not None for p in module.model.connector.parameters())
    other = zoo.build("blip2-flan-t5", scale="tiny", decoder="seq2seq-lm")
    assert other.recipe.parts["decoder"][0] == "seq2seq-lm"
    with pytest.raises(ConfigError, match="an encoder-decoder language model, decoder=opt-2"):
        zoo.build("blip2-flan-t5", scale="tiny", decoder="opt-2.7b")
    with pytest.raises(ConfigError, match="choose prefix or prefix_instructblip"):
        small(**{"wiring.template": "blip2"})


def test_adapters_learn_and_the_language_model_does_not() -> None:
    pytest.importorskip("peft")
    module = small(**{"decoder.lora_rank": 2, "decoder.lora_targets": ["q", "v"]}, stages="joint")
    names = [name for name, p in module.model.decoder.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 3 * 2  # A and B of q and v, three attentions a layer of both stacks, two layers
    assert all("lora_" in name for name in names)
    loss, _ = module.losses(module.model.example_batch(2))
    loss.backward()
    learned = [p.grad for name, p in module.model.decoder.named_parameters() if "lora_B" in name]
    assert all(g is not None and g.abs().max() > 0 for g in learned)


def test_published_sizes_and_flops() -> None:
    with torch.device("meta"):
        xl, xxl = (resolve(name).parts["decoder"][1].build() for name in ("blip2-flan-t5", "blip2-flan-t5-xxl"))
    counts = [sum(p.numel() for p in m.parameters()) for m in (xl, xxl)]
    assert counts == [2_849_757_184, 11_135_332_352]  # google/flan-t5-xl and -xxl
    flops = count_recipe(resolve("blip2-flan-t5", scale="tiny"))[0]
    model = small().model
    assert model.layouts()["encoder"].kind == "full"
    assert model.layouts()["decoder"].kind == "causal"
    assert min(flops.frozen_forward, flops.trainable_forward) > 0
    # the frozen language model costs a backward pass for its inputs, not for its weights
    assert flops.backward < 2 * (flops.frozen_forward + flops.trainable_forward)


def test_what_the_encoder_reads_is_not_causal_and_pads_do_not_count(shake: Callable[[nn.Module], nn.Module]) -> None:
    model = small().model.eval()
    shake(model)
    batch = model.example_batch(1)
    ids, pixels = batch["input_ids"].clone(), torch.randn(1, 3, 64, 64)
    ids[0, -4:] = torch.tensor([9, 8, 7, 6])
    start = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        states = model.decoder.encode(model._splice(ids, pixels))
        changed = ids.clone()
        changed[0, -1] = 5
        other = model.decoder.encode(model._splice(changed, pixels))
        assert (states[0, 0] - other[0, 0]).abs().max() > 1e-3  # the first image token reads the last word
        logits = model.text_logits(pixels, ids, None, start)
        padded = torch.cat([ids, torch.full((1, 3), 77)], 1)
        mask = torch.ones_like(padded)
        mask[0, -3:] = 0
        torch.testing.assert_close(model.text_logits(pixels, padded, mask, start), logits, atol=1e-5, rtol=0)
        # without a context the decoder is a language model of its own
        layout = lay_out([Segment("text", 1)])
        bare = model.decoder.logits(model.decoder(TokenBatch(model.decoder.embed(start), layout)))
        assert (bare - logits).abs().max() > 1e-3


@pytest.mark.parametrize("decoder", ["flan-t5-xl", "bert-decoder"])
def test_a_bridge_into_words_refuses_a_decoder_that_cross_attends(decoder: str) -> None:
    with pytest.raises(ConfigError, match="wiring bridge-seq2seq for a T5"):
        zoo.build("llava", decoder=decoder, scale="tiny")
