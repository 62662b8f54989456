"""The unified wirings draw: what a call promises, and what caches, batches and guidance must not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.api import build_module
from zoo.capabilities import capabilities_of
from zoo.data.sequences import layout_of, segments_of
from zoo.errors import ConfigError
from zoo.layout import TokenBatch
from zoo.models.unified import MaskedUnified, Unified
from zoo.recipe import resolve
from zoo.sampling.block import Prefix
from zoo.sampling.codes import CodeDecoding, CodeStreams
from zoo.sampling.guidance import image_text_weights, probabilities
from zoo.sampling.masked import MaskedDecoding, Streams, decode
from zoo.sampling.text import Decoding, streams

TEXTS = ["a red apple", "two cats beside a big blue house with a green door", "dog"]
Shake = Callable[[nn.Module], nn.Module]


def built(name: str, **wiring: Any) -> Any:
    model: Any = build_module(resolve(name, scale="tiny"), 0).model
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.decoder.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.config = replace(model.config, drawing_steps=5, **wiring)
    return model.eval()


@pytest.fixture(scope="module")
def show_o() -> MaskedUnified:
    return built("show-o")


@pytest.fixture(scope="module")
def chameleon() -> Unified:
    return built("chameleon")


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def codes_drawn(model: Any, monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Tensor:
    """The codes whose pixels a call shows."""
    seen: list[Tensor] = []
    shown = type(model).shown

    def spy(codes: Tensor, grid: tuple[int, int]) -> Tensor:
        seen.append(codes)
        return shown(model, codes, grid)

    monkeypatch.setattr(model, "shown", spy)
    call()
    monkeypatch.undo()
    return torch.cat(seen)


def test_capabilities(show_o: MaskedUnified, chameleon: Unified) -> None:
    assert {"generate_images", "inpaint_images", "generate_interleaved"} <= set(capabilities_of(show_o))
    assert "generate_images" in capabilities_of(chameleon)
    assert "inpaint_images" not in capabilities_of(chameleon)  # codes one after the other know only what is before


@pytest.mark.parametrize("name", ["show_o", "chameleon"])
def test_images_depend_on_seed_and_text_alone(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue(name)

    def drawn(texts: list[str], seed: int) -> Tensor:
        return codes_drawn(model, monkeypatch, lambda: model.generate_images(texts, seed=seed))

    together = drawn(TEXTS, 3)
    assert torch.equal(together, drawn(TEXTS, 3))
    for row in range(len(TEXTS)):  # row n draws from stream (seed, n): put it there among others
        others = ["x"] * row + [TEXTS[row]] + ["another text"] * 2
        assert torch.equal(drawn(others, 3)[row], together[row])
    assert (together != drawn(TEXTS, 4)).any(1).all()
    assert (together != drawn([*TEXTS[1:], "cow"], 3)).any(1).all()


@torch.no_grad()
def test_masked_codes_cached_and_uncached(show_o: MaskedUnified) -> None:
    """Ids equal those of whole forwards of both branches through the training-time layout, with the whole head."""
    model, v = show_o, show_o.vocabulary
    ids, segment = model.prompt_rows(TEXTS)
    how, count = MaskedDecoding(steps=6, guidance=1.3), len(TEXTS)
    codes, unknown = torch.zeros(count, model.places, dtype=torch.long), torch.ones(count, model.places).bool()
    cached = model.masked_codes(ids, segment, codes, unknown, how, Streams(streams(0, 0, count)))

    def predict(codes: Tensor, unknown: Tensor) -> Tensor:
        image = torch.where(unknown, v.mask_id, codes + v.first_code).repeat(2, 1)
        ends = [torch.full((2 * count, 1), v.id(name)) for name in ("soi", "eoi")]
        rows = torch.cat([ids, ends[0], image, ends[1]], 1)
        real = torch.cat([segment >= 0, torch.ones_like(rows[:, ids.shape[1] :], dtype=torch.bool)], 1)
        layout = layout_of(segments_of(rows, real, model.style, v), model.style)
        logits = model.decoder.logits(model.decoder(TokenBatch(model.decoder.embed(rows), layout)))
        c, u = logits[:, -model.places - 1 : -1, v.code_ids].chunk(2)
        return (2.3 * c - 1.3 * u)[unknown]

    assert torch.equal(cached, decode(codes, unknown, predict, how, Streams(streams(0, 0, count))))


@torch.no_grad()
def test_next_codes_cached_and_uncached(chameleon: Unified) -> None:
    model, v = chameleon, chameleon.vocabulary
    ids, segment = model.prompt_rows(TEXTS)
    how, count = CodeDecoding(temperature=0.8, top_p=0.9, guidance=2.0), len(TEXTS)
    cached = model.next_codes(ids, segment, model.places, how, CodeStreams(streams(0, 0, count)))
    draws, written = CodeStreams(streams(0, 0, count)), torch.zeros(count, 0, dtype=torch.long)
    for number in range(model.places):
        rows = torch.cat([ids, (written + v.first_code).repeat(2, 1)], 1)
        real = torch.nn.functional.pad(segment >= 0, (0, number), value=True)
        layout = layout_of(torch.where(real, 0, -1), model.style)
        logits = model.decoder.logits(model.decoder(TokenBatch(model.decoder.embed(rows), layout))[:, -1])
        c, u = logits[:, v.code_ids].chunk(2)
        written = torch.cat([written, draws.code(number, probabilities(u + 2 * (c - u), how))[:, None]], 1)
    assert torch.equal(cached, written)


def test_without_guidance_the_empty_prompt_is_not_computed(show_o: MaskedUnified, chameleon: Unified) -> None:
    for model, none in ((show_o, 0.0), (chameleon, 1.0)):
        rows: list[int] = []
        hook = model.decoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0].embeds)))  # noqa: B023
        plain = model.generate_images(TEXTS, guidance=none)
        assert set(rows) == {3}
        rows.clear()
        guided = model.generate_images(TEXTS, guidance=2.0)
        hook.remove()
        assert rows[0] == 4  # three prompts and one empty one
        assert set(rows[1:]) == {6}
        assert not torch.equal(plain, guided)


def test_inpainting_keeps_what_is_known(show_o: MaskedUnified, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(n) for n in range(3)]
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    masks[0, :32] = True
    masks[1] = True
    before = show_o._encode(show_o._pixels(images))
    call: Any = lambda: show_o.inpaint_images(images, masks, TEXTS, seed=2)  # noqa: E731
    after = codes_drawn(show_o, monkeypatch, call)
    assert torch.equal(after[0, 8:], before[0, 8:])
    assert (after[0, :8] != before[0, :8]).any()
    assert torch.equal(after[2], before[2])
    alone = codes_drawn(show_o, monkeypatch, lambda: show_o.inpaint_images(images[:1], masks[:1], TEXTS[:1], seed=2))
    assert torch.equal(alone, after[:1])
    everything = codes_drawn(show_o, monkeypatch, lambda: show_o.generate_images(TEXTS[:2], seed=2))
    assert torch.equal(after[1], everything[1])


def test_an_eye_of_its_own_does_not_read_what_is_inpainted() -> None:
    model: Any = built("show-o-clip-vit")
    images = [picture(n) for n in range(2)]
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    codes = model.image_tokenizer.encode(model.processor.encode_images(images))
    assert model.eye_config.mean != model.image_config.mean
    expected = model.shown(codes, model.image_tokenizer.grid)
    torch.testing.assert_close(model.inpaint_images(images, masks, TEXTS[:2], steps=1), expected)
    assert not torch.equal(model._encode(model._pixels(images)), codes)


def test_extrapolation_in_four_directions(show_o: MaskedUnified, monkeypatch: pytest.MonkeyPatch) -> None:
    images, side = [picture(0), picture(1)], show_o.image_tokenizer.grid[0]
    before = show_o._encode(show_o._pixels(images)).view(2, side, side)
    for directions, (rows, columns), (down, right) in (
        (["right"], (4, 6), (0, 0)),
        (["left", "left"], (4, 8), (0, 4)),
        (["up", "down"], (8, 4), (2, 0)),
        (["right", "down"], (6, 6), (0, 0)),
    ):
        call: Any = lambda d=directions: show_o.extrapolate_images(images, TEXTS[:2], d, seed=1)  # noqa: E731
        assert call().shape == (2, 3, 16 * rows, 16 * columns)
        wide = codes_drawn(show_o, monkeypatch, call).view(2, rows, columns)
        assert torch.equal(wide[:, down : down + side, right : right + side], before)


def test_bad_calls(show_o: MaskedUnified, chameleon: Unified) -> None:
    images, masks = [picture(0)], torch.ones(1, 64, 64, dtype=torch.bool)
    long = "a very long text " * 60
    for call, told in (
        (lambda: show_o.generate_images("a cat"), "wrap it in a list"),
        (lambda: show_o.generate_images(["a cat", long]), "shorten"),
        (lambda: chameleon.generate_images([long]), "shorten"),
        (lambda: show_o.generate_images(["a cat"], steps=0), "steps = 0"),
        (lambda: show_o.generate_images(["a cat"], guidance=-1.0), "guidance"),
        (lambda: chameleon.generate_images(["a cat"], steps=4), "leave steps out"),
        (lambda: show_o.inpaint_images(images, masks[:, :32], ["a"]), "32x64 pixels, images are drawn at 64x64"),
        (lambda: show_o.inpaint_images(images, masks.float(), ["a"]), "expected bool"),
        (lambda: show_o.inpaint_images(images, masks, ["a", "b"]), "1 images and 2 texts"),
        (lambda: show_o.extrapolate_images(images, ["a"], ["north"]), "expected one of left, right, up, down"),
        (lambda: show_o.extrapolate_images(images, ["a"], "left"), "expected a list"),
        (lambda: show_o.generate_interleaved(["a cat"]), "wrap"),
        (lambda: show_o.generate_interleaved([["a cat"]], max_images=99), "max_images = 99"),
        (lambda: chameleon.generate_interleaved([[long]]), "shorten"),
    ):
        with pytest.raises(ConfigError, match=told) as error:
            call()
        assert "\n" not in str(error.value)
    assert show_o.generate_images([]).shape == (0, 3, 64, 64)


def test_stored_codes_cannot_be_drawn(show_o: MaskedUnified, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show_o.image_tokenizer, "stored", True)
    with pytest.raises(ConfigError, match="stores codes and draws no pixels"):
        show_o.generate_images(["a cat"])


def test_fields_of_the_wiring_are_checked() -> None:
    for field in ("drawing_steps=0", "mask_annealing=cosine", "mask_start=all", "drawing_top_p=0.0", "guidance=-2.0"):
        name, value = field.split("=")
        known: Any = value if value.isalpha() else float(value) if "." in value else int(value)
        with pytest.raises(ConfigError, match=name.removeprefix("drawing_").removeprefix("mask_")):
            resolve("show-o", scale="tiny", values={"wiring": {name: known}})


# -- texts and images in turns -----------------------------------------------------------------------------------------


def eager(model: Any, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The model begins an image after every so many words."""
    start, own, words = model.vocabulary.id(model.style.start), type(model)._next_token, [0]

    def next_token(hidden: Tensor, begins: bool, *rest: Any) -> int:
        if begins and words[0] == after:
            words[0] = 0
            return start
        words[0] += 1
        token = own(model, hidden, False, *rest)
        return token if token != model.processor.words.eos else 9

    monkeypatch.setattr(model, "_next_token", next_token)


@pytest.mark.parametrize("name", ["show_o", "chameleon"])
@torch.no_grad()
def test_turns_reuse_what_was_computed(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After images were drawn, the state that predicts the next word is that of one forward over all of it."""
    model = request.getfixturevalue(name)
    eager(model, monkeypatch, after=3)
    seen: list[Any] = []
    block = type(model)._next_image
    monkeypatch.setattr(model, "_next_image", lambda prefix, *rest: seen.append(prefix) or block(model, prefix, *rest))
    (pieces,) = model.generate_interleaved([["a cat", picture(0), "and"]], max_images=2, max_new_tokens=8, seed=1)
    assert [isinstance(p, str) for p in pieces] == [True, False, True, False, True]
    assert all(p.shape == (3, 64, 64) for p in pieces if not isinstance(p, str))
    assert seen[0] is seen[1]
    prefix, ids = seen[0], told(model, monkeypatch, name)
    assert prefix.length == ids.shape[1]
    layout = layout_of(segments_of(ids, None, model.style, model.vocabulary), model.style)
    hidden = model.decoder(TokenBatch(model.decoder.embed(ids), layout))[:, -1]
    torch.testing.assert_close(prefix.hidden, hidden, atol=2e-5, rtol=1e-4)


def told(model: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> Tensor:
    """The whole row of that call as ids, read off what is embedded."""
    monkeypatch.undo()
    eager(model, monkeypatch, after=3)
    rows: list[Tensor] = []
    embed = type(model.decoder).embed
    keeps: list[bool] = []
    real_block, real_init = Prefix.block, Prefix.__init__
    main: list[Any] = []

    def init(self: Any, decoder: Any, embeds: Tensor, *rest: Any) -> None:
        if not main:
            main.append(self)
            rows.append(embeds)
        real_init(self, decoder, embeds, *rest)

    def block(self: Any, embeds: Tensor, segment: Any, keep: bool = False, **rest: Any) -> Tensor:
        if keep and self is main[0]:
            rows.append(embeds)
            keeps.append(keep)
        return real_block(self, embeds, segment, keep, **rest)

    monkeypatch.setattr(Prefix, "__init__", init)
    monkeypatch.setattr(Prefix, "block", block)
    model.generate_interleaved([["a cat", picture(0), "and"]], max_images=2, max_new_tokens=8, seed=1)
    monkeypatch.undo()
    table = embed(model.decoder, torch.arange(model.vocabulary.size))
    assert keeps
    return torch.cdist(torch.cat(rows, 1), table[None]).argmin(-1)


@pytest.mark.parametrize("name", ["show_o", "chameleon"])
def test_turns_of_a_prompt_do_not_depend_on_the_others(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    prompts: Any = [["a cat"], ["a dog", picture(1)], []]
    call: Any = lambda rows: model.generate_interleaved(  # noqa: E731
        rows, max_images=1, max_new_tokens=5, seed=4, temperature=1.0
    )
    together, alone = call(prompts), call(prompts[:1])
    assert len(together) == 3
    assert [p for p in together[0] if isinstance(p, str)] == [p for p in alone[0] if isinstance(p, str)]


def test_an_image_begins_only_where_there_is_room(chameleon: Unified, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = chameleon, []
    own = type(model)._next_token

    def next_token(hidden: Tensor, begins: bool, *rest: Any) -> int:
        asked.append(begins)
        return model.vocabulary.id("boi") if begins else own(model, hidden, begins, *rest)

    monkeypatch.setattr(model, "_next_token", next_token)
    room = (model.decoder.context_length - 2 - len(model.processor.text_ids("a cat"))) // (model.places + 2)
    (pieces,) = model.generate_interleaved([["a cat"]], max_images=20, max_new_tokens=1)
    assert sum(not isinstance(p, str) for p in pieces) == room
    assert asked[:room] == [True] * room
    assert not asked[room]


def test_the_text_state_writes_no_code(chameleon: Unified) -> None:
    model, generators = chameleon, streams(0, 0, 1)
    hidden = 3 * torch.randn(1, model.decoder.width, generator=torch.Generator().manual_seed(0))
    start = model.vocabulary.id("boi")
    ids = [model._next_token(hidden, True, Decoding(temperature=50.0), generators) for _ in range(300)]
    allowed = {*model.text_columns.nonzero().flatten().tolist(), start}
    assert set(ids) <= allowed
    assert len(set(ids)) > 20
    ids = [model._next_token(hidden, False, Decoding(temperature=50.0), generators) for _ in range(300)]
    assert start not in ids


def test_three_branches_of_guidance(chameleon: Unified) -> None:
    """With images before, text and images have weights of their own; (1, 1) is the full prompt alone."""
    model = chameleon
    history = [torch.arange(model.places)[None]]
    rows, weights = model._branches(history, CodeDecoding(guidance=3.0))
    assert weights == image_text_weights(3.0, 1.2)
    v = model.vocabulary
    boi, eoi, bos = v.id("boi"), v.id("eoi"), model.processor.words.bos
    assert rows[0].tolist() == [[bos, boi, *(history[0][0] + v.first_code).tolist(), eoi, boi]]
    assert rows[1].tolist() == [[bos, boi]]
    plain = model.config
    try:
        model.config = replace(plain, image_guidance=1.0)
        assert model._branches(history, CodeDecoding(guidance=1.0)) == ([], (1.0, 0.0, 0.0))
    finally:
        model.config = plain
    assert model._branches([], CodeDecoding(guidance=1.0))[0] == []
    (row,), weights = model._branches([], CodeDecoding(guidance=3.0))
    assert row.tolist() == [[bos, boi]]
    assert weights == (3.0, -2.0)
