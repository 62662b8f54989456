"""The Q-Former: equal to transformers', and what makes it more than a few attention layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from zoo.connectors.qformer import QFormer, QFormerConfig
from zoo.errors import ConfigError
from zoo.layout import Segment, lay_out
from zoo.part import Features
from zoo.torchvision_ops import ensure
from zoo.weights.keymaps import load_into, qformer

Shake = Callable[[nn.Module], nn.Module]
SIZES: dict[str, Any] = {"queries": 5, "width": 24, "depth": 5, "heads": 3, "ffn": 40, "dropout": 0.0}


def pair(shake: Shake, text: bool) -> tuple[QFormer, Any]:
    """Our Q-Former with the weights of transformers'."""
    ensure()
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    config = Blip2QFormerConfig(
        hidden_size=24, num_hidden_layers=5, num_attention_heads=3, intermediate_size=40, encoder_hidden_size=32,
        vocab_size=61, max_position_embeddings=20, use_qformer_text_input=text,
    )  # fmt: skip
    theirs = Blip2QFormerModel(config).eval()
    shake(theirs)
    ours = QFormerConfig(**SIZES, text=text, vocab_size=61, context_length=20).build(
        in_width=32, in_tokens=7, out_width=16
    )
    shake(ours)
    own = ("query_tokens", "ln_vision.{p}", "proj.{p}", "text.{**}")
    load_into(ours, theirs.state_dict(), qformer.keymap(text), allow_new=own)
    return ours.eval(), theirs


@pytest.mark.parametrize("text", [False, True])
def test_queries_equal_transformers(shake: Shake, text: bool) -> None:
    ours, theirs = pair(shake, text)
    image = torch.randn(2, 7, 32)
    real = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    with torch.no_grad():
        expected = theirs(
            query_embeds=ours.query_tokens.expand(2, -1, -1),
            encoder_hidden_states=ours.ln_vision(image),
            encoder_attention_mask=real.long(),
        ).last_hidden_state
        got = ours.hidden(Features(image, mask=real))
        out = ours(Features(image, mask=real))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.tokens, ours.proj(expected), atol=1e-5, rtol=1e-5)
    assert out.tokens.shape == (2, 5, 16)


@pytest.mark.parametrize("rule", ["matching", "generation"])
def test_queries_and_text_equal_transformers(shake: Shake, rule: str) -> None:
    ours, theirs = pair(shake, True)
    image, words = torch.randn(2, 7, 32), torch.randn(2, 6, 24)
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    every = torch.cat([real.new_ones(2, 5), real], 1)
    allowed = every[:, None, :] & every[:, :, None]  # [B, S, S]
    layout = None
    if rule == "generation":
        allowed[:, :5, 5:] = False
        allowed[:, 5:, 5:] &= torch.ones(6, 6).tril().bool()
        layout = lay_out(
            [Segment("queries", 5, modality="image", attends="full"), Segment("text", 6, modality="text")], real=every
        )
    allowed |= torch.eye(11, dtype=torch.bool)
    with torch.no_grad():
        expected = theirs(
            query_embeds=torch.cat([ours.query_tokens.expand(2, -1, -1), words], 1),
            query_length=5,
            attention_mask=allowed[:, None],  # 4-D and boolean; a 0/1 float mask would be read as a bias
            encoder_hidden_states=ours.ln_vision(image),
        ).last_hidden_state
        got = ours.hidden(Features(image), Features(words, mask=real), layout=layout)
        alone = ours.hidden(Features(image))
    torch.testing.assert_close(got[every], expected[every], atol=1e-5, rtol=1e-5)
    if rule == "generation":  # queries read no text
        torch.testing.assert_close(got[:, :5], alone, atol=1e-5, rtol=1e-5)
    else:
        assert (got[:, :5] - alone).abs().max() > 0.1


def test_text_sees_the_image_only_through_the_queries(shake: Shake) -> None:
    ours, _ = pair(shake, True)
    ids = torch.randint(0, 61, (2, 6))
    text = ours.embed_text(ids)
    images = [Features(torch.randn(2, 7, 32)) for _ in range(2)]
    with torch.no_grad():
        without = [ours.hidden(image, text, queries=False) for image in images]
        through = [ours.hidden(image, text)[:, 5:] for image in images]
    assert torch.equal(*without)
    assert (through[0] - through[1]).abs().max() > 0.05


def test_cross_attention_in_every_second_layer() -> None:
    model = QFormerConfig().build  # the published sizes, without memory
    with torch.device("meta"):
        ours = model(in_width=1408, in_tokens=257, out_width=2560)
    names = [n for n, _ in ours.named_parameters()]
    assert {int(n.split(".")[2]) for n in names if ".cross." in n} == {0, 2, 4, 6, 8, 10}
    # section 2 of the paper's Table 1: 105.1 M without the text branch
    inside = sum(p.numel() for n, p in ours.named_parameters() if not n.startswith(("proj", "ln_vision")))
    assert abs(inside - 105.1e6) < 0.1e6
    assert ours.tokens == 32


def test_two_ffns_start_equal_and_are_two() -> None:
    ours = QFormerConfig(**SIZES, text=True, vocab_size=61, context_length=20).build(
        in_width=32, in_tokens=7, out_width=16
    )
    for layer in ours.trunk.layers:
        text, query = layer.ffn  # type: ignore[misc]
        assert text is not query
        assert torch.equal(text.up.weight, query.up.weight)  # type: ignore[union-attr]
        assert text.up.weight.data_ptr() != query.up.weight.data_ptr()  # type: ignore[union-attr]


def test_norms_have_the_published_eps() -> None:
    ours = QFormerConfig(**SIZES).build(in_width=32, in_tokens=7, out_width=16)
    assert ours.ln_vision.eps == 1e-5
    assert ours.norm.eps == 1e-12
    inner = [m for m in ours.trunk.modules() if hasattr(m, "eps")]
    assert inner
    assert {m.eps for m in inner} == {1e-12}


def test_without_text_branch_refuses_text() -> None:
    ours = QFormerConfig(**SIZES).build(in_width=32, in_tokens=7, out_width=16)
    with pytest.raises(ConfigError, match="text branch"):
        ours.embed_text(torch.zeros(1, 3, dtype=torch.long))


def test_scaled_sizes_reach_the_module() -> None:
    config = QFormerConfig().scaled({"queries": 3, "width": 32, "depth": 2, "heads": 4, "ffn": 64, "dropout": 0.0})
    ours = config.build(in_width=8, in_tokens=5, out_width=6)
    out = ours(Features(torch.randn(2, 5, 8)))
    assert out.tokens.shape == (2, 3, 6)
    assert len(ours.trunk.layers) == 2
