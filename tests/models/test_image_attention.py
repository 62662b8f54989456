"""Images that read their past alone, as an option of the unified wirings: one layout for training, scoring, drawing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import zoo
from zoo.data.sequences import STYLES, Text, collate, layout_of, segments_of, style, write_row
from zoo.data.sequences import Image as Places
from zoo.errors import ConfigError
from zoo.layout import TokenBatch
from zoo.sampling.diffusion import Denoising, denoise, gaussian
from zoo.sampling.masked import MaskedDecoding, Streams, decode
from zoo.sampling.text import streams
from zoo.testing.config import shake
from zoo.weights.save import save

TEXTS = ["a red apple", "two cats beside a big blue house with a green door"]
SMALL: dict[str, Any] = {
    "transfusion": {"image_tokenizer": {"image_size": 32, "width": 16, "groups": 2, "scaling": 1.0}},
    "show-o": {},
}


def made(name: str, attention: str, **wiring: Any) -> Any:
    decoder = {"width": 32, "depth": 2, "heads": 4, "kv_heads": 4, "ffn": 48}
    wiring = {"image_attention": attention, "drawing_steps": 3, **wiring}
    module = zoo.build(name, scale="tiny", seed=1, decoder=decoder, wiring=wiring, **SMALL[name])
    shake(module.model)
    module.eval()
    return module


@pytest.fixture(scope="module", params=["transfusion", "show-o"])
def causal(request: pytest.FixtureRequest) -> Any:
    return made(request.param, "causal").model


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def states(model: Any, embeds: Tensor, ids: Tensor, real: Tensor | None = None) -> Tensor:
    """States [B, T, D] of whole rows, in the layout of training."""
    layout = layout_of(segments_of(ids, real, model.style, model.vocabulary), model.style)
    hidden: Tensor = model.decoder(TokenBatch(embeds, layout))
    return hidden


@torch.no_grad()
@pytest.mark.parametrize("name", ["transfusion", "show-o"])
@pytest.mark.parametrize("attention", ["", "full", "causal"])
def test_the_first_patch_reads_the_last_unless_images_are_causal(name: str, attention: str) -> None:
    model = made(name, attention).model
    words = model.processor.words
    row = write_row(
        model.style, model.vocabulary, words, "interleaved",
        [Text((5, 6)), Places(model.places), Text((7, 8)), Places(model.places), Text((9,))], length=model.row_length,
    )  # fmt: skip
    batch = collate([row], model.style, model.vocabulary, words.pad)
    ids, places = batch["input_ids"], batch["image_slots"][0].nonzero()[:, 0]
    embeds = torch.randn(1, ids.shape[1], model.decoder.width, generator=torch.Generator().manual_seed(0))
    before = states(model, embeds, ids)
    changed = embeds.clone()
    last = int(places[model.places - 1])
    changed[0, last] = changed[0, last].flip(0)  # the last patch of the first image; a shift would be normed away
    moved = (states(model, changed, ids) - before).abs().amax(-1)[0]
    assert torch.equal(moved[: int(places[0]) - 1], torch.zeros(int(places[0]) - 1))  # words before
    if attention == "causal":
        assert torch.equal(moved[:last], torch.zeros(last))
    else:
        assert (moved[places[: model.places]] > 1e-5).all()
    assert (moved[last + 1 :] > 1e-7).all()  # all that follows reads it


def test_only_the_layout_changes() -> None:
    for one in STYLES:
        causal = one.with_image_attention("causal")
        v = one.vocabulary(40, 8 if one.images != "none" else 0)
        start, end, slot = v.id(one.start), v.id(one.end), v.slot_id
        ids = torch.tensor([[1, 5, start, slot, slot, end, 6, start, slot, slot, end, 7]])
        segment = segments_of(ids, None, one, v)
        assert torch.equal(segments_of(ids, None, causal, v), segment)
        layout = layout_of(segment, causal)
        length = ids.shape[1]
        assert layout.kind == "causal"
        assert torch.equal(layout.mask()[0, 0], torch.ones(length, length).tril().bool())
        if one.full != "none":
            assert layout.names == layout_of(segment, one).names  # drawing names its images as before
            assert layout_of(segment, one.with_image_attention("full")).kind == "table"
            assert torch.equal(
                layout_of(segment, one.with_image_attention("full")).mask(), layout_of(segment, one).mask()
            )
        assert one.with_image_attention("") == one


def test_an_understood_image_is_causal_too() -> None:
    """Show-o's ``mmu`` rows, and the text before features that elsewhere reads ahead."""
    for name in ("show-o", "show-o-features"):
        one = style(name).with_image_attention("causal")
        v = one.vocabulary(40, 8)
        ids = torch.tensor([[v.id("mmu"), 5, v.id("soi"), v.slot_id, v.slot_id, v.id("eoi"), 1, 6]])
        layout = layout_of(segments_of(ids, None, one, v), one)
        assert torch.equal(layout.mask()[0, 0], torch.ones(8, 8).tril().bool())
        whole = layout_of(segments_of(ids, None, style(name), v), style(name)).mask()[0, 0]
        assert whole[1, 4]


@torch.no_grad()
def test_causal_latents_cached_and_uncached() -> None:
    model = made("transfusion", "causal").model
    boi, eoi, bos = model.vocabulary.id("boi"), model.vocabulary.id("eoi"), model.processor.words.bos
    how, start = Denoising(sampler="ddim", steps=4), (8, 4, 4)

    def alone(row: list[int], x: Tensor, level: Tensor) -> Tensor:
        ids = torch.tensor([[*row, *[model.vocabulary.slot_id] * model.places, eoi]])
        tokens, skips = model.patch_codec.encode(x, level)
        hidden = states(model, model._splice(ids, None, tokens), ids)[:, len(row) : len(row) + model.places]
        out: Tensor = model.patch_codec.decode(hidden, skips, level, model.image_config.grid)
        return out

    def predict(x: Tensor, level: Tensor) -> Tensor:
        rows = [[bos, *model.processor.text_ids(text), boi] for text in TEXTS]
        told = torch.cat([alone(row, x[n : n + 1], level[n : n + 1]) for n, row in enumerate(rows)])
        free = torch.cat([alone([bos, boi], x[n : n + 1], level[n : n + 1]) for n in range(2)])
        return free + 3.0 * (told - free)

    expected = denoise(model.process, predict, gaussian(streams(3, 0, 2), start, torch.device("cpu")), how)
    seen: list[Tensor] = []
    inside, model._pictures = model._pictures, lambda latents: seen.append(latents) or latents
    ids, segment = model.processor.prompt_rows(TEXTS)
    model._draw(ids, segment, None, how, (3.0, -2.0), streams(3, 0, 2))
    model._pictures = inside
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_causal_codes_cached_and_uncached() -> None:
    model = made("show-o", "causal").model
    v, count = model.vocabulary, len(TEXTS)
    ids, segment = model.prompt_rows(TEXTS)
    how = MaskedDecoding(steps=5, guidance=1.3)
    codes, unknown = torch.zeros(count, model.places, dtype=torch.long), torch.ones(count, model.places).bool()
    cached = model.masked_codes(ids, segment, codes, unknown, how, Streams(streams(0, 0, count)))

    def predict(codes: Tensor, unknown: Tensor) -> Tensor:
        image = torch.where(unknown, v.mask_id, codes + v.first_code).repeat(2, 1)
        ends = [torch.full((2 * count, 1), v.id(name)) for name in ("soi", "eoi")]
        rows = torch.cat([ids, ends[0], image, ends[1]], 1)
        real = torch.cat([segment >= 0, torch.ones_like(rows[:, ids.shape[1] :], dtype=torch.bool)], 1)
        logits = model.decoder.logits(states(model, model.decoder.embed(rows), rows, real))
        c, u = logits[:, -model.places - 1 : -1, v.code_ids].chunk(2)
        return (2.3 * c - 1.3 * u)[unknown]

    assert torch.equal(cached, decode(codes, unknown, predict, how, Streams(streams(0, 0, count))))


@torch.no_grad()
def test_text_is_scored_as_in_whole_rows(causal: Any) -> None:
    """Candidates share the image's keys and values; the whole row through the layout says the same."""
    images = [picture(0), picture(1)]
    scores = causal.score_candidates(images, [TEXTS, TEXTS])
    torch.testing.assert_close(scores[:, 1], causal.score_text(images, [TEXTS[1]] * 2), atol=1e-4, rtol=1e-4)
    full = made("transfusion" if hasattr(causal, "patch_codec") else "show-o", "full").model
    assert (full.score_text(images, [TEXTS[1]] * 2) - scores[:, 1]).abs().min() > 1e-4


def test_causal_models_draw_write_and_are_saved(causal: Any, tmp_path: Any) -> None:
    drawn = causal.generate_images(TEXTS, seed=1)
    torch.testing.assert_close(causal.generate_images(TEXTS[:1], seed=1), drawn[:1], atol=1e-5, rtol=1e-5)
    pieces = causal.generate_interleaved([["a story", picture(2)]], max_images=1, max_new_tokens=4)
    assert len(pieces) == 1
    name = "transfusion" if hasattr(causal, "patch_codec") else "show-o"
    module = made(name, "causal")
    assert "wiring.image_attention=causal" in module.recipe.name
    save(module, module.recipe, tmp_path / "weights")
    again = zoo.from_pretrained(str(tmp_path / "weights"))
    assert again.model.style.causal
    torch.testing.assert_close(again.generate_images(TEXTS, seed=1), module.generate_images(TEXTS, seed=1))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="predicted one after the other"):
        zoo.build("chameleon", scale="tiny", wiring={"image_attention": "full"})
    with pytest.raises(ConfigError, match="'casual'; did you mean causal"):
        zoo.build("transfusion", scale="tiny", wiring={"image_attention": "casual"})
    model = zoo.build("chameleon", scale="tiny", wiring={"image_attention": "causal"}).model
    assert model.layouts()["t2i"].kind == "causal"
