"""Show-o's whole loops (text to image, inpainting, extrapolation) over one prefix: every step's ids as released."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.data.sequences import style
from zoo.decoders.base import Decoder
from zoo.layout import TokenBatch
from zoo.models.drawing import DrawingFields, InpaintsImages
from zoo.nn import KVCache, TokenEmbedding, Trunk
from zoo.sampling.canvas import extended
from zoo.sampling.masked import MaskedDecoding, Recorded, Streams
from zoo.sampling.text import streams
from zoo.weights.keymaps import load_into, phi

PAD = 40


class Phi(Decoder):
    """The golden's language model behind the decoder interface; counts the tokens it is given."""

    def __init__(self, g: Any) -> None:
        super().__init__()
        trunk = Trunk(phi.trunk_config(g.config["phi"]))
        self.width, self.vocab_size, self.context_length = trunk.config.width, g.config["vocab_size"], 2048
        parts = {
            "trunk": trunk,
            "embed": TokenEmbedding(self.vocab_size, self.width),
            "head": nn.Linear(self.width, self.vocab_size),
        }
        self.parts = nn.ModuleDict(parts)
        own = {name: t for name, t in g.weights.items() if name.startswith("showo.")}
        load_into(self.parts, own, phi.keymap().under("showo."))
        self.forwarded: list[tuple[int, int]] = []
        self.heads: list[tuple[int, int]] = []
        self.eval()

    def embed(self, ids: Tensor) -> Tensor:
        return self.parts["embed"](ids)

    def forward(self, batch: TokenBatch, cache: Any = None) -> Tensor:
        self.forwarded.append(tuple(batch.embeds.shape[:2]))
        return self.parts["trunk"](batch.embeds, batch.layout, cache=cache)

    def logits_of(self, hidden: Tensor, columns: slice) -> Tensor:
        self.heads.append((len(hidden), columns.stop - columns.start))
        head = self.parts["head"]
        return nn.functional.linear(hidden, head.weight[columns], head.bias[columns])

    def logits(self, hidden: Tensor) -> Tensor:
        return self.parts["head"](hidden)

    def new_cache(self) -> KVCache:
        return KVCache()

    def select_cache(self, cache: Any, index: Tensor) -> Any:
        cache.reorder(index)
        return cache

    def cut_cache(self, cache: Any, length: int) -> Any:
        cache.truncate(length)
        return cache


class Painter(InpaintsImages):
    """What the drawing code asks of a model, and no more."""

    def __init__(self, g: Any) -> None:
        super().__init__()
        c = g.config
        self.decoder, self.style, self.config = Phi(g), style("show-o"), DrawingFields()
        self.vocabulary = self.style.vocabulary(c["text_tokens"], c["codebook_size"])
        self.device = torch.device("cpu")

    def code_logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits_of(hidden, self.vocabulary.code_ids)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        yield


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("show_o")


@pytest.fixture
def painter(g: Any) -> Painter:
    built = Painter(g)
    assert built.vocabulary.mask_id == g.config["mask_token_id"]
    assert built.vocabulary.first_code == g.config["image_token_offset"]
    assert built.vocabulary.size == g.config["vocab_size"]
    return built


def rows(g: Any, name: str, guided: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts of both branches, their segments, and the codes with what is unknown of them."""
    cond, first = g.inputs[f"{name}_cond_ids"], g.config["max_seq_length"] + 1
    ids = torch.cat([cond, g.inputs[f"{name}_uncond_ids"]]) if guided else cond
    ids, image = ids[:, :first], cond[:, first + 1 : -1]
    assert torch.equal(image, g.inputs[f"{name}_uncond_ids"][:, first + 1 : -1] if guided else image)
    return (
        ids,
        torch.where(ids == PAD, -1, 0),
        image - g.config["image_token_offset"],
        image == g.config["mask_token_id"],
    )


def recorded(g: Any, name: str) -> Recorded:
    return Recorded(g.inputs[f"{name}_exp_noise"], g.inputs[f"{name}_uniform"])


def rules(g: Any, name: str) -> MaskedDecoding:
    c = g.config | (g.config["gen_nocfg"] if name == "gen_nocfg" else {})
    steps = c["extrapolation_steps"] if name.startswith("extrap") else c["steps"]
    return MaskedDecoding(steps=steps, guidance=c["guidance_scale"], temperature=c["temperature0"])


@pytest.mark.parametrize("name", ["gen", "gen_nocfg", "inpaint", "extrap_left", "extrap_right", "extrap_up"])
def test_whole_loops(g: Any, painter: Painter, name: str) -> None:
    c, how = g.config, rules(g, name)
    ids, segment, codes, unknown = rows(g, name, guided=name != "gen_nocfg")
    seen: list[tuple[Tensor, Tensor]] = []
    final = painter.masked_codes(
        ids, segment, codes, unknown, how, recorded(g, name), lambda step, ids, again: seen.append((ids, again))
    )
    assert torch.equal(final, g.outputs[f"{name}_final_ids"])
    assert torch.equal(final[~unknown], codes[~unknown])
    inputs, drawn, before = g.outputs[f"{name}_step_input_ids"], g.outputs[f"{name}_drawn_ids"], unknown
    for step, (now, again) in enumerate(seen):
        assert torch.equal(now[before], drawn[step][before])
        if step + 1 < how.steps:
            shown = (now + c["image_token_offset"]).masked_fill(again, c["mask_token_id"])
            assert torch.equal(shown, inputs[step + 1][:, -17:-1])
        before = again


def test_only_what_is_needed_is_computed(g: Any, painter: Painter) -> None:
    """The prefix once, the empty prompt once for both images, the head on unknown slots and codes."""
    ids, segment, codes, unknown = rows(g, "gen")
    masked: list[int] = [int(unknown.sum())]
    painter.masked_codes(
        ids, segment, codes, unknown, rules(g, "gen"), recorded(g, "gen"),
        lambda step, ids, again: masked.append(int(again.sum())),
    )  # fmt: skip
    assert painter.decoder.forwarded == [(3, 11)] + [(4, 18)] * 6
    assert painter.decoder.heads == [(2 * count, 32) for count in masked[:-1]]
    assert masked[1] < masked[0]


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 1.75])
def test_cached_equals_uncached(g: Any, painter: Painter, guidance: float) -> None:
    """Own random numbers; the reference runs whole sequences, padded as released, and whole heads, in every step."""
    ids, segment, codes, unknown = rows(g, "gen", guided=guidance > 0)
    codes, unknown = codes[:2], unknown[:2]
    how = MaskedDecoding(steps=7, guidance=guidance, temperature=2.0)
    cached = painter.masked_codes(ids, segment, codes, unknown, how, Streams(streams(1, 0, 2)))

    class Whole(Painter):
        def prefix(self, *args: Any) -> Any:
            outer, layout = self, self.layout_with(segment, [18])

            class Uncached:
                def block(self, embeds: Tensor, segment: str) -> Tensor:
                    x = torch.cat([outer.decoder.embed(ids), embeds], 1)
                    return outer.decoder(TokenBatch(x, layout))[:, ids.shape[1] :]

            return Uncached()

        def code_logits(self, hidden: Tensor) -> Tensor:
            return self.decoder.logits(hidden)[..., self.vocabulary.code_ids]

    whole = Whole(g)
    uncached = whole.masked_codes(ids, segment, codes, unknown, how, Streams(streams(1, 0, 2)))
    assert torch.equal(cached, uncached)
    assert whole.decoder.forwarded == [(len(ids), 29)] * 7


@pytest.mark.parametrize("name", ["extrap_left", "extrap_right", "extrap_up"])
def test_wide_grids(g: Any, painter: Painter, name: str) -> None:
    start = g.inputs[f"{name}_image_ids"].view(1, 4, 4) - g.config["image_token_offset"]
    ids, segment, window, fresh = rows(g, name)

    def draw(codes: Tensor, unknown: Tensor) -> Tensor:
        assert torch.equal(unknown, fresh)
        assert torch.equal(codes[~unknown], window[~fresh])
        return painter.masked_codes(ids, segment, codes, unknown, rules(g, name), recorded(g, name))

    wide = extended(start, name.removeprefix("extrap_"), (4, 4), draw, g.config["extrapolation_offset"])
    assert torch.equal(wide, g.outputs[f"{name}_wide_ids"])


def test_down_knows_the_lower_half(g: Any, painter: Painter) -> None:
    """The released code has no working ``down``."""
    start = g.inputs["extrap_up_image_ids"].view(1, 4, 4) - g.config["image_token_offset"]
    ids, segment, _, _ = rows(g, "extrap_up")
    shown: list[Tensor] = []

    def draw(codes: Tensor, unknown: Tensor) -> Tensor:
        shown.append(torch.where(unknown, -1, codes))
        return painter.masked_codes(ids, segment, codes, unknown, rules(g, "extrap_up"), recorded(g, "extrap_up"))

    down = extended(start, "down", (4, 4), draw)
    assert torch.equal(shown[0].view(4, 4)[:2], start[0, 2:])
    assert bool((shown[0].view(4, 4)[2:] == -1).all())
    assert torch.equal(down[:, :4], start)
    assert down.shape == (1, 6, 4)


def test_pads_change_nothing(g: Any, painter: Painter) -> None:
    ids, segment, codes, unknown = rows(g, "gen")
    more = torch.nn.functional.pad(ids, (100, 0), value=PAD)
    padded = torch.nn.functional.pad(segment, (100, 0), value=-1)
    how = replace(rules(g, "gen"), steps=4)
    plain = painter.masked_codes(ids, segment, codes, unknown, how, Streams(streams(0, 0, 2)))
    assert torch.equal(plain, painter.masked_codes(more, padded, codes, unknown, how, Streams(streams(0, 0, 2))))
