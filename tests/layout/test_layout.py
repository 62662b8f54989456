"""The mask rule against a slow literal reading of it, on random layouts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from zoo.errors import ConfigError
from zoo.layout import ALL, NEVER, PAST, Layout, Segment, TokenBatch, lay_out

FAST = settings(max_examples=60, deadline=None)


def literal(layout: Layout) -> Tensor:
    """Return the dense mask [B, T, T] by the rule, one pair at a time."""
    segment, relation = layout.segment.tolist(), layout.relation.tolist()
    document = [[0] * layout.length] * layout.batch if layout.document is None else layout.document.tolist()
    out = torch.zeros(layout.batch, layout.length, layout.length, dtype=torch.bool)
    for b in range(layout.batch):
        table = relation[b if len(relation) > 1 else 0]
        for q in range(layout.length):
            for k in range(layout.length):
                sq, sk = segment[b][q], segment[b][k]
                if sq < 0 or sk < 0:
                    out[b, q, k] = q == k
                else:
                    r = table[sq][sk]
                    out[b, q, k] = document[b][q] == document[b][k] and (r == ALL or (r == PAST and k <= q))
    return out


def evaluate(layout: Layout, first: int = 0) -> Tensor:
    """Return what mask_mod says [B, T - first, T]."""
    b = torch.arange(layout.batch)[:, None, None]
    q = torch.arange(layout.length - first)[None, :, None]
    k = torch.arange(layout.length)[None, None]
    b, q, k = torch.broadcast_tensors(b, q, k)
    return layout.mask_mod(first)(b, torch.zeros_like(b), q, k)


def check(layout: Layout) -> None:
    truth = literal(layout)
    dense = layout.mask().expand(layout.batch, 1, -1, -1)[:, 0]
    assert torch.equal(dense, truth)
    assert torch.equal(evaluate(layout), truth)
    assert truth.any(-1).all(), "a row reads nothing"
    first = layout.length // 2
    rows = layout.mask(slice(first, None)).expand(layout.batch, 1, -1, -1)[:, 0]
    assert torch.equal(rows, truth[:, first:])
    assert torch.equal(evaluate(layout, first), truth[:, first:])
    real = layout.real
    if layout.kind == "full":
        assert truth.all()
    if layout.kind == "causal":  # on real rows; pad rows are nobody's business
        triangle = torch.ones(layout.length, layout.length, dtype=torch.bool).tril().expand_as(truth)
        assert torch.equal(truth[real], triangle[real])
    if layout.spans is not None:
        routes = torch.cat([torch.full((b - a,), m) for a, b, m in layout.spans])
        assert torch.equal(routes.expand(layout.batch, -1), layout.modality)
        assert all(x[2] != y[2] for x, y in zip(layout.spans, layout.spans[1:], strict=False))


@st.composite
def segment_layouts(draw: st.DrawFn) -> Layout:
    count = draw(st.integers(1, 4))
    segments = [
        Segment(f"s{i}", draw(st.integers(0, 4)), draw(st.integers(0, 2)), draw(st.sampled_from(["causal", "full"])))
        for i in range(count)
    ]
    length = sum(s.length for s in segments)
    if length == 0:
        segments[0] = dataclasses.replace(segments[0], length=2)
        length = 2
    pairs = st.tuples(st.sampled_from(range(count)), st.sampled_from(range(count)))
    entries = draw(st.dictionaries(pairs, st.sampled_from(["never", "past", "all"]), max_size=4))
    relation = {(f"s{i}", f"s{j}"): r for (i, j), r in entries.items() if i != j or r != "never"}
    batch = draw(st.integers(1, 3))
    real = None
    how = draw(st.sampled_from(["none", "right", "left", "any"]))
    if how == "any":
        real = torch.tensor(
            draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch))
        )
    elif how != "none":
        keep = torch.tensor(draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch)))[:, None]
        at = torch.arange(length)
        real = at < keep if how == "right" else at >= length - keep
    return lay_out(segments, batch, real=real, relation=relation)


@st.composite
def id_layouts(draw: st.DrawFn) -> Layout:
    count, batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rows = st.lists(st.integers(-1, count - 1), min_size=length, max_size=length)
    segment = torch.tensor(draw(st.lists(rows, min_size=batch, max_size=batch)))
    tables = draw(st.sampled_from([1, batch]))
    cells = st.lists(st.lists(st.integers(0, 2), min_size=count, max_size=count), min_size=count, max_size=count)
    relation = torch.tensor(draw(st.lists(cells, min_size=tables, max_size=tables)), dtype=torch.uint8)
    diagonal = torch.arange(count)
    relation[:, diagonal, diagonal] = relation[:, diagonal, diagonal].clamp(min=PAST)
    modality = torch.tensor(
        draw(st.lists(st.lists(st.integers(0, 2), min_size=length, max_size=length), min_size=batch, max_size=batch))
    )
    return Layout.from_ids(segment, relation, modality=modality)


@FAST
@given(segment_layouts())
def test_laid_out_segments_follow_the_rule(layout: Layout) -> None:
    check(layout)
    assert layout.length == layout.mask().shape[-1]


@FAST
@given(id_layouts())
def test_token_by_token_layouts_follow_the_rule(layout: Layout) -> None:
    check(layout)
    assert layout.relation.shape[0] in (1, layout.batch)


@FAST
@given(segment_layouts(), st.data())
def test_packing_hiding_and_decoding_keep_the_rule(layout: Layout, data: st.DataObject) -> None:
    document = torch.randint(
        0, 3, (layout.batch, layout.length), generator=torch.Generator().manual_seed(layout.length)
    )
    packed = layout.separate(document)
    check(packed)
    check(packed.append(0, 2))
    check(packed.truncate(layout.length // 2 + 1))
    check(packed.select(torch.arange(layout.batch).flip(0)))
    halves = torch.arange(layout.length)[None] >= layout.length // 2  # documents inside documents
    check(packed.separate(halves))
    assert torch.equal(packed.separate(halves).mask(), packed.mask() & (layout.separate(halves).mask()))
    same = document[:, :, None] == document[:, None, :]
    itself = torch.eye(layout.length, dtype=torch.bool) & ~layout.real[:, :, None]
    assert torch.equal(packed.mask()[:, 0], (literal(layout) & same) | itself)

    grown = layout.append(data.draw(st.integers(0, len(layout.names) - 1)), data.draw(st.integers(1, 3)))
    check(grown)
    cut = grown.truncate(layout.length)
    assert torch.equal(cut.segment, layout.segment)
    assert cut.spans == layout.spans
    check(cut)
    index = torch.arange(layout.batch).flip(0).repeat(2)
    check(layout.select(index))
    assert torch.equal(
        layout.select(index).mask().expand(len(index), -1, -1, -1),
        layout.mask().expand(layout.batch, -1, -1, -1)[index],
    )


def test_a_hidden_key_is_read_by_nobody_and_its_row_lives_on() -> None:
    layout = lay_out([Segment("patches", 6, attends="full")], 2)
    keys = torch.zeros(2, 6, dtype=torch.bool)
    keys[0, 2] = keys[1, 4:] = True
    hidden = layout.hide(keys)
    check(hidden)
    assert torch.equal(hidden.mask()[:, 0], ~keys[:, None, :].expand(2, 6, 6))
    with pytest.raises(ConfigError, match="would read nothing"):
        layout.hide(torch.ones(2, 6, dtype=torch.bool))


@pytest.mark.parametrize("pads", ["none", "left", "right"])
def test_flex_attention_equals_sdpa(pads: str) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(0)
    real = torch.ones(2, 23, dtype=torch.bool)
    if pads == "left":
        real[0, :5] = False
    if pads == "right":
        real[1, 20:] = False
    layout = lay_out(
        [Segment("text", 9), Segment("image", 8, 1, "full"), Segment("query", 6, attends="full")],
        2,
        real=None if pads == "none" else real,
        relation={("query", "text"): "never", ("text", "image"): "all"},
    )
    q, k, v = (torch.randn(2, 3, 23, 16) for _ in range(3))
    expected = scaled_dot_product_attention(q, k, v, attn_mask=layout.mask())
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=layout.block_mask()), expected, atol=1e-5, rtol=1e-5)
    rows = slice(15, 23)
    some = flex_attention(q[:, :, rows], k, v, block_mask=layout.block_mask(rows))
    torch.testing.assert_close(some, expected[:, :, rows], atol=1e-5, rtol=1e-5)


def test_kinds_are_found_from_static_facts() -> None:
    text, image = Segment("text", 4), Segment("image", 3, 1, "full")
    assert lay_out([text]).kind == "causal"
    assert lay_out([image]).kind == "full"
    assert lay_out([text, Segment("more", 3)]).kind == "causal"
    assert lay_out([Segment("bos", 1, attends="full"), text]).kind == "causal"
    assert lay_out([image, text]).kind == "table"
    assert lay_out([image, text], relation={("text", "text"): "all", ("image", "text"): "all"}).kind == "full"
    right = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert lay_out([text], real=right).kind == "causal"
    assert lay_out([text], real=right).padding == "right"
    assert lay_out([text], real=right.flip(1)).kind == "table"
    assert lay_out([text], real=torch.ones(2, 4)).padding == "none"
    assert lay_out([Segment("image", 4, attends="full")], real=right).kind == "table"
    assert lay_out([text], real=right).append("text").kind == "table"
    assert lay_out([text]).append("text", 2).kind == "causal"
    assert Layout.from_ids(torch.zeros(2, 5), [[PAST]]).kind == "causal"
    assert Layout.from_ids(torch.zeros(2, 5), [[ALL]]).kind == "full"
    assert Layout.from_ids(torch.tensor([[0, 0, 1, 1]]), [[PAST, NEVER], [NEVER, PAST]]).kind == "table"


def test_attend_asks_for_no_mask_where_none_is_needed() -> None:
    causal = lay_out([Segment("text", 6)], 2)
    assert causal.attend() == (None, True)
    assert causal.attend(1) == (None, False)
    mask, is_causal = causal.attend(3)
    assert mask is not None
    assert not is_causal
    assert torch.equal(mask[0, 0], torch.ones(6, 6, dtype=torch.bool).tril()[3:])
    assert lay_out([Segment("image", 6, attends="full")]).attend(2) == (None, False)
    padded = lay_out([Segment("text", 3)], real=torch.tensor([[1, 1, 0]]))
    assert padded.attend() == (None, True)
    mask, _ = padded.attend(1)
    assert mask is not None
    assert mask.flatten().tolist() == [False, False, True]


def test_positions() -> None:
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert lay_out([Segment("a", 5)], 2).position.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert lay_out([Segment("a", 5)], real=real, position="real").position.tolist() == [
        [0, 0, 0, 1, 2],
        [0, 1, 2, 3, 3],
    ]
    axes = torch.arange(10).view(1, 2, 5)
    grown = lay_out([Segment("a", 5)], 2, position=axes).append("a", 2)
    assert grown.position.shape == (2, 2, 7)
    assert grown.position[0, :, -3:].tolist() == [[4, 5, 6], [9, 10, 11]]


def test_mistakes_are_refused_when_the_layout_is_built() -> None:
    text = Segment("text", 3)
    with pytest.raises(ConfigError, match="two segments are named 'text'"):
        lay_out([text, text])
    with pytest.raises(ConfigError, match="did you mean text"):
        lay_out([text], relation={("txt", "text"): "never"})
    with pytest.raises(ConfigError, match="expected never, past or all"):
        lay_out([text], relation={("text", "text"): "future"})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="would read nothing"):
        lay_out([text], relation={("text", "text"): "never"})
    with pytest.raises(ConfigError, match=r"token 1 of batch row 1 .*would read nothing"):
        Layout.from_ids(torch.tensor([[0, 0], [0, 1]]), [[PAST, PAST], [NEVER, NEVER]])
    with pytest.raises(ConfigError, match=r"expected -1 \(pad\)"):
        Layout.from_ids(torch.tensor([[0, 2]]), [[PAST]])
    with pytest.raises(ConfigError, match=r"expected \[batch, 3\]"):
        lay_out([text], real=torch.ones(2, 4))
    with pytest.raises(ConfigError, match="modality 'depth'"):
        lay_out([Segment("x", 2, "depth")])
    with pytest.raises(ConfigError, match="length -1"):
        Segment("x", -1)
    with pytest.raises(ConfigError, match="no segment named 'tex'; did you mean text"):
        lay_out([text]).append("tex")
    assert lay_out([Segment("x", 2, "depth")], modalities={"depth": 3}).spans == ((0, 2, 3),)


def test_moving_to_another_device_keeps_the_static_facts() -> None:
    layout = lay_out([Segment("text", 3, predicted=True), Segment("image", 2, 1, "full")], 2)
    batch = TokenBatch(torch.zeros(2, 5, 4), layout, ids=torch.zeros(2, 5, dtype=torch.long)).to("meta")
    assert batch.layout.segment.device.type == "meta"
    assert batch.ids is not None
    assert batch.ids.device.type == "meta"
    assert batch.layout.mask().device.type == "meta"
    assert (batch.layout.kind, batch.layout.spans, batch.layout.predicted) == (
        "table",
        ((0, 3, 0), (3, 5, 1)),
        ("text",),
    )
    assert layout.where("image") == slice(3, 5)


def test_the_picture_shows_table_and_tokens() -> None:
    layout = lay_out(
        [Segment("query", 2, 1, "full"), Segment("text", 3)],
        real=torch.tensor([[1, 1, 1, 1, 0]]),
        relation={("query", "text"): "never"},
    )
    lines = layout.draw().splitlines()
    assert lines[0] == "5 tokens, 1 pads, attention: table. Rows read columns:"
    assert lines[2].split() == ["query", "(2)", "all", "-"]
    assert lines[3].split() == ["text", "(2)", "past", "past"]
    assert [line.split()[-1] for line in lines[5:]] == ["■■···", "■■···", "■■■··", "■■■■·", "····■"]
    assert "■" not in layout.draw(most=4)
    assert layout.draw(most=4).splitlines()[-1] == "order: query (2) | text (2) | pad (1)"
