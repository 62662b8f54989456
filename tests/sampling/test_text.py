"""Decoding: what is chosen, where it ends, and that batches change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.decoders.base import Decoder
from zoo.decoders.causal_lm import CausalLMConfig
from zoo.decoders.trunk_lm import TrunkLMConfig
from zoo.errors import ConfigError
from zoo.layout import Segment, TokenBatch, lay_out
from zoo.sampling.guidance import probabilities
from zoo.sampling.text import Decoding, align_right, choose, streams, until_stop, write

TINY: dict[str, Any] = {"width": 32, "depth": 2, "heads": 4, "ffn": 48, "vocab_size": 50, "context_length": 40}


@pytest.fixture(params=["trunk-lm", "llama", "opt"])
def decoder(request: pytest.FixtureRequest, shake: Callable[[nn.Module], nn.Module]) -> Decoder:
    name = request.param
    model: Decoder = (
        TrunkLMConfig(**TINY, kv_heads=2).build() if name == "trunk-lm" else CausalLMConfig(family=name, **TINY).build()
    )
    shake(model)
    with torch.no_grad():  # a sharp, varied output: a tied table would repeat the last token
        if name == "trunk-lm":
            model.lm_head = nn.Linear(32, 50, bias=False)  # type: ignore[assignment]
            model.lm_head.weight.normal_()
        else:
            model.lm.lm_head.weight = nn.Parameter(torch.randn(50, 32))  # type: ignore[union-attr]
    return model.eval()


def layout(real: Tensor) -> Any:
    return lay_out([Segment("text", real.shape[1])], real=real, position="real")


def prompts(decoder: Decoder, lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, 50, (n,), generator=generator) for n in lengths]
    width = max(lengths)
    ids = torch.stack([torch.nn.functional.pad(r, (width - len(r), 0)) for r in rows])
    real = torch.stack([torch.arange(width) >= width - len(r) for r in rows])
    return ids, real, rows


def literal_greedy(decoder: Decoder, row: Tensor, count: int, stops: set[int]) -> list[int]:
    """Run the whole sequence again for every token."""
    out: list[int] = []
    for _ in range(count):
        ids = torch.cat([row, torch.tensor(out, dtype=torch.long)])[None]
        with torch.no_grad():
            hidden = decoder(TokenBatch(decoder.embed(ids), lay_out([Segment("text", ids.shape[1])])))
            out.append(int(decoder.logits(hidden[:, -1]).argmax()))
        if out[-1] in stops:
            break
    return out


def test_greedy_equals_a_literal_loop_whatever_the_batch(decoder: Decoder) -> None:
    lengths = [3, 9, 5, 1, 9, 7, 2, 8, 4, 6, 3, 9, 5, 1, 9, 7]
    ids, real, rows = prompts(decoder, lengths)
    alone = [literal_greedy(decoder, row, 12, set()) for row in rows]
    stop = max({t for o in alone for t in o}, key=lambda t: sum(t in o for o in alone))  # one that ends many rows
    expected = [literal_greedy(decoder, row, 12, {stop}) for row in rows]
    assert len({len(e) for e in expected}) > 1  # rows end at different places
    decoding = Decoding(max_new_tokens=12)
    with torch.no_grad():
        together = write(decoder, decoder.embed(ids), layout(real), decoding, stop_ids=[stop], pad_id=0)
        for i, row in enumerate(rows):
            single = layout(torch.ones(1, len(row), dtype=torch.bool))
            one = write(decoder, decoder.embed(row[None]), single, decoding, stop_ids=[stop], pad_id=0)
            assert one[0].tolist() == expected[i]
            assert together[i, : len(expected[i])].tolist() == expected[i]
            assert not together[i, len(expected[i]) :].any()  # pads behind the stop


def test_samples_depend_on_their_own_row_and_seed(decoder: Decoder) -> None:
    ids, real, _ = prompts(decoder, [6] * 8)
    ids[:] = ids[:1]
    decoding = Decoding(max_new_tokens=6, temperature=1.5, seed=3)
    whole = write(decoder, decoder.embed(ids), layout(real), decoding, stop_ids=[], pad_id=0)
    assert len({tuple(r) for r in whole.tolist()}) > 1  # equal prompts, own streams
    parts = [
        write(
            decoder, decoder.embed(ids[a:b]), layout(real[a:b]), decoding,
            stop_ids=[], pad_id=0, generators=streams(3, a, b - a),
        )
        for a, b in ((0, 3), (3, 8))
    ]  # fmt: skip
    assert torch.equal(torch.cat(parts), whole)
    other = Decoding(max_new_tokens=6, temperature=1.5, seed=4)
    again = write(decoder, decoder.embed(ids), layout(real), other, stop_ids=[], pad_id=0)
    assert not torch.equal(again, whole)


def test_min_new_tokens_and_full_context(decoder: Decoder) -> None:
    ids, real, rows = prompts(decoder, [4])
    first = literal_greedy(decoder, rows[0], 1, set())[0]
    short = write(decoder, decoder.embed(ids), layout(real), Decoding(), stop_ids=[first], pad_id=0)
    assert short.tolist() == [[first]]
    held = write(
        decoder,
        decoder.embed(ids),
        layout(real),
        Decoding(min_new_tokens=3, max_new_tokens=5),
        stop_ids=[first],
        pad_id=0,
    )
    assert held.shape[1] >= 3
    assert first not in held[0, :3].tolist()
    ids, real, _ = prompts(decoder, [38])
    full = write(decoder, decoder.embed(ids), layout(real), Decoding(max_new_tokens=30), stop_ids=[], pad_id=0)
    assert full.shape[1] == 3  # 38 + 2 fed fill the context of 40; the third is only read off
    ids, real, _ = prompts(decoder, [41])
    with pytest.raises(ConfigError, match="41 tokens"):
        write(decoder, decoder.embed(ids), layout(real), Decoding(), stop_ids=[], pad_id=0)


def test_choose() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]]).expand(20001, -1)
    draw = (torch.arange(20001) + 0.5) / 20002
    p = logits[0].softmax(-1)

    def shares(**fields: Any) -> Tensor:
        chosen = choose(logits, Decoding(**fields), draw)
        return torch.bincount(chosen, minlength=4) / len(draw)

    torch.testing.assert_close(shares(temperature=1.0), p, atol=1e-3, rtol=0)
    torch.testing.assert_close(shares(temperature=2.0), (logits[0] / 2).softmax(-1), atol=1e-3, rtol=0)
    two = torch.tensor([0.0, p[1], p[2], 0.0]) / (p[1] + p[2])
    torch.testing.assert_close(shares(temperature=1.0, top_k=2), two, atol=1e-3, rtol=0)
    # the two likeliest hold 0.88: the second crosses 0.7 and stays in, the third is not needed
    torch.testing.assert_close(shares(temperature=1.0, top_p=0.7), two, atol=1e-3, rtol=0)
    assert torch.equal(shares(temperature=1.0, top_p=0.01), torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert choose(logits[:1], Decoding()).tolist() == [1]
    assert choose(logits[:1], Decoding(temperature=1.0, top_k=1), torch.tensor([1 - 1e-12])).tolist() == [1]


@pytest.mark.parametrize(
    "fields", [{"top_k": 7, "top_p": 0.6}, {"top_k": 7}, {"top_p": 0.3}, {"top_k": 100, "top_p": 0.9}]
)
def test_temperature_top_k_and_top_p_are_those_of_transformers(fields: dict[str, Any]) -> None:
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    scores = TemperatureLogitsWarper(0.8)(None, logits)  # type: ignore[arg-type]
    if "top_k" in fields:
        scores = TopKLogitsWarper(fields["top_k"])(None, scores)  # type: ignore[arg-type]
    if "top_p" in fields:
        scores = TopPLogitsWarper(fields["top_p"])(None, scores)  # type: ignore[arg-type]
    decoding = Decoding(temperature=0.8, **fields)
    p = probabilities(logits, decoding)
    torch.testing.assert_close(p, scores.softmax(-1), atol=1e-6, rtol=0)
    assert torch.equal(p > 0, scores > -torch.inf)
    if len(fields) == 2 and fields["top_k"] == 7:  # the mass is that of what top-k left: fewer tokens than of the whole
        whole = probabilities(logits, Decoding(temperature=0.8, top_p=fields["top_p"]))
        assert int((p > 0).sum()) < int((whole > 0).sum())
    for n in range(50):
        draw = torch.full((6,), n / 50)
        assert bool(((p > 0).gather(1, choose(logits, decoding, draw)[:, None])).all())


def test_align_right() -> None:
    x = torch.arange(12).view(2, 6)
    real = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 0]]).bool()
    moved, kept = align_right(x, real)
    assert moved.tolist()[1] == [7, 8, 9, 10]
    assert moved.tolist()[0][1:] == [0, 1, 4]
    assert kept.tolist() == [[False, True, True, True], [True] * 4]
    deep, _ = align_right(x[..., None].expand(-1, -1, 3), real)
    assert torch.equal(deep[..., 2], moved)


def test_until_stop_and_bad_values() -> None:
    assert until_stop([5, 6, 2, 7], [2, 3]) == [5, 6]
    assert until_stop([5, 6], [2]) == [5, 6]
    for fields in (
        {"max_new_tokens": 0},
        {"top_p": 0.0},
        {"temperature": -1.0},
        {"min_new_tokens": 9, "max_new_tokens": 3},
    ):
        with pytest.raises(ConfigError, match="expected"):
            Decoding(**fields)  # type: ignore[arg-type]
