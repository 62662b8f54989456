"""A prefix computed once and blocks against it equal one forward over the whole sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.decoders.base import Decoder
from zoo.decoders.causal_lm import CausalLMConfig
from zoo.decoders.trunk_lm import TrunkLMConfig
from zoo.errors import ConfigError
from zoo.layout import ALL, PAST, Layout, TokenBatch
from zoo.sampling.block import Prefix, distinct

TINY = {"width": 32, "depth": 2, "heads": 4, "ffn": 48, "vocab_size": 50, "context_length": 40}
TABLE = [[PAST, PAST], [PAST, ALL]]
NAMES = ["text", "image"]


def decoder(name: str) -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = (
            TrunkLMConfig(**TINY, kv_heads=2, qk_norm="layer").build()
            if name == "trunk-lm"
            else CausalLMConfig(family=name, **TINY, options={"qk_layernorm": True}).build()
        )
        for parameter in built.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return built.eval()


def laid_out(segment: Tensor) -> Layout:
    return Layout.from_ids(segment, TABLE, names=NAMES, position=((segment >= 0).long().cumsum(1) - 1).clamp(min=0))


def whole(built: Decoder, ids: Tensor, segment: Tensor) -> Tensor:
    return built(TokenBatch(built.embed(ids), laid_out(segment)))


def drawn(*shape: int) -> Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("name", ["trunk-lm", "phi"])
@torch.no_grad()
def test_blocks_equal_the_whole_sequence(name: str) -> None:
    built, text, image, after = decoder(name), drawn(3, 7), drawn(3, 6), drawn(3, 2)
    segment = torch.zeros(3, 7, dtype=torch.long)
    segment[0, :3] = segment[2, :5] = -1  # left pads
    with_image = torch.cat([segment, torch.ones(3, 6, dtype=torch.long)], 1)
    with_text = torch.cat([with_image, torch.zeros(3, 2, dtype=torch.long)], 1)
    prefix = Prefix(built, built.embed(text), laid_out(segment))
    for number in range(3):  # the image changes, the prefix does not
        changed = (image + number) % 50
        expected = whole(built, torch.cat([text, changed], 1), with_image)[:, 7:]
        torch.testing.assert_close(prefix.block(built.embed(changed), "image"), expected, atol=1e-5, rtol=1e-5)
        assert prefix.length == 7
    prefix.block(built.embed(image), "image", keep=True)
    together = prefix.block(built.embed(after), 0)
    expected = whole(built, torch.cat([text, image, after], 1), with_text)
    torch.testing.assert_close(prefix.hidden, expected[:, 12], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, expected[:, 13:], atol=1e-5, rtol=1e-5)
    one_by_one = [prefix.block(built.embed(after[:, i : i + 1]), "text", keep=True) for i in range(2)]
    torch.testing.assert_close(torch.cat(one_by_one, 1), expected[:, 13:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_equal_prefixes_are_computed_once() -> None:
    built, image = decoder("trunk-lm"), drawn(5, 4)
    text = drawn(2, 6)[[0, 1, 0, 1, 1]]
    segment = torch.tensor([[0] * 6, [-1, -1, 0, 0, 0, 0]])[[0, 1, 0, 1, 1]]
    first, rows = distinct(text, segment)
    assert first.tolist() == [0, 1]
    assert rows.tolist() == [0, 1, 0, 1, 1]
    prefix = Prefix(built, built.embed(text[first]), laid_out(segment[first]), rows)
    expected = whole(built, torch.cat([text, image], 1), torch.cat([segment, torch.ones_like(image)], 1))
    torch.testing.assert_close(prefix.block(built.embed(image), 1), expected[:, 6:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prefix.hidden, expected[:, 5], atol=1e-5, rtol=1e-5)
    prefix.select(torch.tensor([4, 0]))
    torch.testing.assert_close(prefix.block(built.embed(image[[4, 0]]), 1), expected[[4, 0], 6:], atol=1e-5, rtol=1e-5)
    assert prefix.batch == 2


def test_distinct_tells_rows_apart_by_every_column() -> None:
    ids = torch.tensor([[9, 1], [2, 2], [9, 1], [2, 2]])
    segment = torch.tensor([[0, 0], [0, 0], [0, 0], [-1, 0]])
    first, rows = distinct(ids, segment)
    assert first.tolist() == [0, 1, 3]
    assert torch.equal(ids[first][rows], ids)
    assert torch.equal(segment[first][rows], segment)


@torch.no_grad()
def test_rows_that_write_nothing_are_passed_over() -> None:
    """Row 1 pauses while row 0 goes on; afterwards it is where it was."""
    built, text, more = decoder("trunk-lm"), drawn(2, 5), drawn(2, 4)
    real = torch.tensor([[True] * 4, [False, True, True, False]])
    prefix = Prefix(built, built.embed(text), laid_out(torch.zeros(1, 5, dtype=torch.long)))
    for i in range(4):
        prefix.block(built.embed(more[:, i : i + 1]), "text", keep=True, real=real[:, i : i + 1])
    alone = torch.cat([text[1], more[1, 1:3]])[None]
    expected = whole(built, alone, torch.zeros_like(alone))[:, -1]
    torch.testing.assert_close(prefix.hidden[1:], expected, atol=1e-5, rtol=1e-5)
    all_of_it = torch.cat([text[0], more[0]])[None]
    expected = whole(built, all_of_it, torch.zeros_like(all_of_it))[:, -1]
    torch.testing.assert_close(prefix.hidden[:1], expected, atol=1e-5, rtol=1e-5)
    last = prefix.block(built.embed(more[:, :1]), "text")
    alone = torch.cat([alone, more[1:, :1]], 1)
    expected = whole(built, alone, torch.zeros_like(alone))[:, -1:]
    torch.testing.assert_close(last[1:], expected, atol=1e-5, rtol=1e-5)


def test_a_sequence_that_does_not_fit() -> None:
    built = decoder("trunk-lm")
    with pytest.raises(ConfigError, match="41 tokens"):
        Prefix(built, torch.zeros(1, 41, 32), laid_out(torch.zeros(1, 41, dtype=torch.long)))
    prefix = Prefix(built, torch.zeros(1, 30, 32), laid_out(torch.zeros(1, 30, dtype=torch.long)))
    with pytest.raises(ConfigError, match="46 tokens, image tokens included"):
        prefix.block(torch.zeros(1, 16, 32), "image")
    with pytest.raises(ConfigError, match="no segment named 'picture'"):
        prefix.block(torch.zeros(1, 4, 32), "picture")
