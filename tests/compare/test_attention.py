"""Layouts read back from a manifest's text, in words and as pictures."""

from __future__ import annotations

import re

import torch

from zoo.compare.attention import Drawn, picture, read_layouts
from zoo.layout import Layout, Segment, lay_out


def drawn(layout: Layout, most: int = 64) -> Drawn:
    (found,), rest = read_layouts(f"decoder\n{layout.draw(most=most)}")
    assert rest == ""
    return found


def area(svg: str) -> float:
    """Filled area of a picture, in its own units: the shoelace formula over the polygons of the reads."""
    total = 0.0
    (outline,) = re.findall(r'<path d="([^"]*)" style="fill: var\(--s0\)', svg)
    for path in outline.split("z"):
        corners = [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)]
        pairs = zip(corners, [*corners[1:], *corners[:1]], strict=True)
        total += abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs)) / 2
    return total / 270**2


def test_a_layout_is_read_back_with_every_token() -> None:
    layout = lay_out([Segment("image", 4, 1, "full"), Segment("text", 3)], relation={("image", "text"): "all"})
    found = drawn(layout)
    assert found.name == "decoder"
    assert (found.tokens, found.kind) == (7, "table")
    assert found.segments == (("image", 4), ("text", 3))
    assert found.reads == (("all", "all"), ("past", "past"))
    assert found.pieces == (("image", 4), ("text", 3))
    mask = layout.mask()
    assert mask is not None
    assert [[c == "■" for c in row] for row in found.cells] == mask[0, 0].tolist()
    assert found.words == "image reads all of itself and text; text reads image and its own past"
    assert abs(area(picture(found, "t")) - mask.float().mean().item()) < 0.01


def test_a_long_layout_keeps_the_order_of_its_stretches() -> None:
    segment = torch.tensor([[0] + [1] * 100 + [0] * 99])
    layout = Layout.from_ids(segment, torch.tensor([[1, 1], [1, 2]]), names=["text", "image 1"])
    found = drawn(layout)
    assert found.cells == ()
    assert found.pieces == (("text", 1), ("image 1", 100), ("text", 99))
    svg = picture(found, "who reads whom")
    assert 'aria-label="who reads whom"' in svg
    for text in ("image 1 (100)", "text (99)"):
        assert f">{text}</text>" in svg
    filled = area(svg)
    assert 0.5 < filled < 0.75  # the lower triangle and the upper one of the image
    plain = drawn(Layout.from_ids(segment, torch.tensor([[1, 1], [1, 1]]), names=["text", "image 1"]))
    assert abs(area(picture(plain, "t")) - 0.5) < 0.01


def test_long_and_short_layouts_of_one_table_look_alike() -> None:
    segments = [Segment("image", 8, 1, "full"), Segment("text", 8)]
    layout = lay_out(segments, relation={("image", "text"): "never"})
    dense, short = drawn(layout), drawn(layout, most=4)
    assert short.pieces == (("image", 8), ("text", 8))
    assert abs(area(picture(dense, "t")) - area(picture(short, "t"))) < 0.05
    assert dense.words == short.words == "image reads all of itself; text reads image and its own past"


def test_what_is_no_layout_stays_text() -> None:
    layout = lay_out([Segment("text", 3)])
    for text in (
        "",
        "decoder",
        "<b>\n3 tokens",
        "decoder\n3 tokens, 0 pads, attention: x. Rows read columns:\n a\nb (3)  so",
    ):
        found, rest = read_layouts(text)
        assert found == []
        assert rest == text
    found, rest = read_layouts(f"one\n{layout.draw()}\n\nanything\nelse\n\ntwo\n{layout.draw(most=1)}")
    assert [f.name for f in found] == ["one", "two"]
    assert rest == "anything\nelse"


def test_several_layouts_keep_their_own_cells() -> None:
    layouts = {"image": lay_out([Segment("image", 5, 1, "full")]), "text": lay_out([Segment("text", 4)])}
    found, rest = read_layouts("\n\n".join(f"{name}\n{layout.draw()}" for name, layout in layouts.items()))
    assert rest == ""
    assert [(f.name, f.kind, len(f.cells)) for f in found] == [("image", "full", 5), ("text", "causal", 4)]
    assert abs(area(picture(found[0], "t")) - 1) < 0.01
    assert abs(area(picture(found[1], "t")) - 10 / 16) < 0.01
