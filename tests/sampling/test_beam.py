"""Beam search: parity with transformers, a literal reference, and that neither cache nor batch changes anything."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.decoders.base import Decoder
from zoo.decoders.bert_decoder import BertDecoder, BertDecoderConfig
from zoo.decoders.causal_lm import CausalLM, CausalLMConfig
from zoo.errors import ConfigError
from zoo.layout import Segment, TokenBatch, lay_out
from zoo.sampling.text import Decoding, choose, ids_seen, penalised, write

STOP, PAD = 3, 0
TINY: dict[str, Any] = {"width": 32, "depth": 2, "heads": 4, "ffn": 48, "vocab_size": 40, "context_length": 40}


@pytest.fixture(params=["llama", "gpt2"])
def lm(request: pytest.FixtureRequest, shake: Callable[[nn.Module], nn.Module]) -> CausalLM:
    model = CausalLMConfig(family=request.param, **TINY).build()
    shake(model)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        head = 0.4 * torch.randn(40, 32, generator=generator)
        model.lm.lm_head.weight = nn.Parameter(head)  # type: ignore[union-attr]
    return model.eval()


@pytest.fixture
def bert(shake: Callable[[nn.Module], nn.Module]) -> BertDecoder:
    model = BertDecoderConfig(**{**TINY, "vocab_size": 42}).build(24)
    shake(model, 3)
    return model.eval()


def rows(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts with pads in front, and which of them are real."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths])
    return torch.randint(5, 40, real.shape, generator=generator).masked_fill(~real, PAD), real


def run(decoder: Decoder, ids: Tensor, real: Tensor, decoding: Decoding, stop: int = STOP, **more: Any) -> Tensor:
    layout = lay_out([Segment("text", ids.shape[1])], real=real, position="real")
    return write(decoder, decoder.embed(ids), layout, decoding, stop_ids=[stop], pad_id=PAD, prompt_ids=ids, **more)


@pytest.mark.parametrize(
    ("beams", "changes"),
    [
        (3, {}),
        (5, {"length_penalty": 0.0}),
        (2, {"length_penalty": 2.0, "min_new_tokens": 4}),
        (3, {"repetition_penalty": 1.3}),
    ],
)
def test_parity_with_transformers(lm: CausalLM, beams: int, changes: dict[str, Any]) -> None:
    ids, real = rows([4, 7, 1, 6, 7, 2, 5, 3])
    if "repetition_penalty" in changes:  # transformers counts pads as seen
        ids, real = ids[:, -1:], real[:, -1:]
    # a stop that half of the rows write
    free = run(lm, ids, real, Decoding(max_new_tokens=12, beams=beams, **changes))
    stop = int(free[len(free) // 2, 6])
    ours = run(lm, ids, real, Decoding(max_new_tokens=12, beams=beams, **changes), stop=stop)
    theirs = lm.lm.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=real.long(), num_beams=beams, max_new_tokens=12, do_sample=False,
        eos_token_id=stop, pad_token_id=PAD, **changes,
    )[:, ids.shape[1] :]  # fmt: skip
    ends = (theirs == stop).cumsum(1) - (theirs == stop).long() > 0  # behind a stop transformers fills with the stop
    theirs = theirs.masked_fill(ends, PAD)
    assert ours.shape == theirs.shape
    assert torch.equal(ours, theirs)
    if not changes:
        assert len({int((row != PAD).sum()) for row in ours}) > 1  # rows end at different places


def test_a_row_is_the_same_alone_and_in_a_batch(lm: CausalLM) -> None:
    ids, real = rows([4, 7, 1, 6])
    decoding = Decoding(max_new_tokens=9, beams=3)
    together = run(lm, ids, real, decoding)
    for row, here, out in zip(ids, real, together, strict=True):
        alone = run(lm, row[None, here], here[None, here], decoding)[0]
        assert torch.equal(out[: len(alone)], alone)
        assert not out[len(alone) :].any()


def log_p(decoder: Decoder, ids: Tensor, more: dict[str, Tensor]) -> Tensor:
    """log p [T, V] of what follows each token of one row, in one pass without a cache."""
    with torch.no_grad():
        hidden = decoder(TokenBatch(decoder.embed(ids[None]), lay_out([Segment("text", len(ids))])), **more)
        return decoder.logits(hidden)[0].log_softmax(-1)


@pytest.mark.parametrize("length", ["new", "whole"])
def test_all_beams_find_the_best_of_all_texts(bert: BertDecoder, length: str) -> None:
    """With as many beams as there are texts of two tokens nothing is pruned: a literal maximum over all of them."""
    context = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0))
    bert.head.bias.data[6:] = -100.0  # six tokens left
    prompt, more = torch.tensor([[40, 17, 9]]), {"context": context}
    scores: dict[tuple[int, ...], float] = {}
    for text in product(range(6), repeat=3):
        if STOP in text[:-1]:
            continue
        whole = torch.cat([prompt[0], torch.tensor(text)])
        table = log_p(bert, whole, more)
        total = sum(float(table[2 + i, token]) for i, token in enumerate(text))
        scores[text] = total / (3 if length == "new" else 3 + 3 - (text[-1] == STOP))
        for n in (1, 2):
            short = (*text[: n - 1], STOP)
            total = sum(float(table[2 + i, token]) for i, token in enumerate(text[: n - 1]))
            total += float(table[2 + n - 1, STOP])
            scores[short] = total / (n if length == "new" else 3 + n - 1)
    best = max(scores, key=lambda text: scores[text])
    real = torch.ones_like(prompt, dtype=torch.bool)
    found = run(bert, prompt, real, Decoding(max_new_tokens=3, beams=14, length=length), context=context)
    assert tuple(found[0].tolist()) == best


def test_cached_equals_uncached_and_beats_greedy(bert: BertDecoder) -> None:
    """A literal beam search that runs every sequence again from its start; its score is at least greedy's."""
    context = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
    prompt = torch.full((3, 1), 40)
    real = torch.ones_like(prompt, dtype=torch.bool)
    decoding = Decoding(max_new_tokens=6, min_new_tokens=6, beams=3)  # no stop: plain beams
    found = run(bert, prompt, real, decoding, context=context)
    greedy = run(bert, prompt, real, Decoding(max_new_tokens=6, min_new_tokens=6), context=context)
    better = 0
    for row in range(3):
        more = {"context": context[row : row + 1]}
        beams: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(6):
            grown = []
            for score, text in beams:
                table = log_p(bert, torch.tensor([40, *text]), more)[-1]
                table[STOP] = -torch.inf
                grown += [(score + float(table[t]), [*text, t]) for t in table.topk(3).indices.tolist()]
            beams = sorted(grown, reverse=True)[:3]
        assert found[row].tolist() == beams[0][1]
        table = log_p(bert, torch.cat([prompt[row], greedy[row]]), more)
        alone = sum(float(table[i, t]) for i, t in enumerate(greedy[row].tolist()))
        assert beams[0][0] >= alone - 1e-5
        better += beams[0][0] > alone + 1e-3
    assert better  # a case in which greedy is not the best


def test_min_new_tokens_blocks_the_stop(bert: BertDecoder) -> None:
    context = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    bert.head.bias.data[STOP] += 50.0
    prompt = torch.full((2, 1), 40)
    real = torch.ones_like(prompt, dtype=torch.bool)
    for beams in (1, 3):
        now = run(bert, prompt, real, Decoding(max_new_tokens=8, beams=beams), context=context)
        assert now.tolist() == [[STOP], [STOP]]
        later = run(bert, prompt, real, Decoding(max_new_tokens=8, min_new_tokens=4, beams=beams), context=context)
        assert later.shape == (2, 5)
        assert not (later[:, :4] == STOP).any()
        assert (later[:, 4] == STOP).all()


def test_the_context_is_read_through_the_cache(bert: BertDecoder) -> None:
    context = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    prompt = torch.full((2, 1), 40)
    real = torch.ones_like(prompt, dtype=torch.bool)
    decoding = Decoding(max_new_tokens=6, min_new_tokens=6, beams=2)
    both = run(bert, prompt, real, decoding, context=context, context_mask=mask)
    cut = run(bert, prompt[1:], real[1:], decoding, context=context[1:, :3])
    assert torch.equal(both[1:], cut)
    assert not torch.equal(both[0], both[1])


def test_repetition_penalty_weighs_what_was_there() -> None:
    seen = ids_seen(torch.tensor([[1, 3, 99, 0], [2, 2, 0, 0]]), 5, torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool())
    assert seen.tolist() == [[False, True, False, True, False], [False, False, True, False, False]]
    logits = torch.tensor([[1.0, 2.0, -1.0, -3.0, 0.5]])
    assert penalised(logits, seen[:1], 2.0).tolist() == [[1.0, 1.0, -1.0, -6.0, 0.5]]


def test_nucleus_with_repetition_penalty_equals_a_literal_loop(bert: BertDecoder) -> None:
    context = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0))
    prompt, real = torch.tensor([[40, 7]]), torch.ones(1, 2, dtype=torch.bool)
    decoding = Decoding(max_new_tokens=8, min_new_tokens=8, temperature=1.0, top_p=0.9, repetition_penalty=1.5, seed=5)
    found = run(bert, prompt, real, decoding, context=context)[0].tolist()
    generator = torch.Generator().manual_seed(5 * 1_000_003)
    text = prompt[0].tolist()
    for _ in range(8):
        with torch.no_grad():
            ids = torch.tensor([text])
            layout = lay_out([Segment("text", len(text))])
            logits = bert.logits(bert(TokenBatch(bert.embed(ids), layout), context=context)[:, -1])
        for token in set(text):
            logits[0, token] = logits[0, token] / 1.5 if logits[0, token] > 0 else logits[0, token] * 1.5
        logits[0, STOP] = -torch.inf
        draw = torch.rand((), generator=generator, dtype=torch.float64)[None]
        text.append(int(choose(logits, decoding, draw)))
    assert found == text[2:]


def test_what_cannot_be_decoded_is_refused(bert: BertDecoder) -> None:
    for wrong in ({"beams": 0}, {"beams": 2, "temperature": 1.0}, {"length": "old"}, {"repetition_penalty": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Decoding(**wrong)
    with pytest.raises(ConfigError, match="vocabulary"):
        run(bert, torch.tensor([[40]]), torch.ones(1, 1, dtype=torch.bool), Decoding(beams=30))
