"""The unified-latent wiring: what reads what, what is learned, and images drawn over cached prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Picture
from torch import Tensor, nn

import zoo
from zoo.data.sample import Sample
from zoo.data.sequences import Image, Text, collate, layout_of, segments_of, write_row
from zoo.diffusion.noising import DDPM, Flow
from zoo.errors import ConfigError
from zoo.layout import TokenBatch
from zoo.sampling.block import Prefix
from zoo.sampling.diffusion import Denoising, denoise, gaussian
from zoo.sampling.text import streams
from zoo.testing.config import shake
from zoo.weights.save import save

SMALL: dict[str, Any] = {
    "decoder": {"width": 32, "depth": 2, "heads": 4, "kv_heads": 4, "ffn": 48},
    "image_tokenizer": {"image_size": 32, "width": 16, "groups": 2, "scaling": 1.0},
}


def made(model: str = "transfusion", **changes: Any) -> Any:
    both = {key: {**SMALL.get(key, {}), **changes.get(key, {})} for key in (*SMALL, *changes) if key != "objective"}
    module = zoo.build(model, scale="tiny", seed=1, **both)
    shake(module.model)
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    return made().model


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Picture.Image:
    generator = torch.Generator().manual_seed(seed)
    return Picture.fromarray(torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).numpy())


def batch_of(model: Any, rows: list[list[Text | Image]], seed: int = 0) -> dict[str, Tensor]:
    """Rows of one batch with random latents, and recorded times and noise."""
    words = model.processor.words
    written = [
        write_row(model.style, model.vocabulary, words, "interleaved", parts, length=model.row_length) for parts in rows
    ]
    batch = collate(written, model.style, model.vocabulary, words.pad)
    images = len(batch["image_given"])
    shape = (images, model.image_tokenizer.channels, *model.image_config.grid)
    generator = torch.Generator().manual_seed(seed)
    batch["image_latents"] = torch.randn(shape, generator=generator)
    batch["image_noise"] = torch.randn(shape, generator=generator)
    batch["image_time"] = torch.randint(100, 900, (images,), generator=generator)
    return batch


def words(*ids: int, trained: bool = True) -> Text:
    return Text(ids, trained)


def shown(model: Any, given: bool = False) -> Image:
    return Image(model.places, given)


# -- who reads whom ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_patches_read_each_other_and_words_read_the_past(model: Any) -> None:
    batch = batch_of(model, [[words(5, 6), shown(model), words(7, 8)]])
    before = model(batch)["hidden"][0]
    moved = {**batch, "image_noise": batch["image_noise"].clone()}
    moved["image_noise"][:, :, -1, -1] += 1  # the last patch alone
    after = (model(moved)["hidden"][0] - before).abs().amax(-1)
    places = batch["image_slots"][0].nonzero()[:, 0]
    assert torch.equal(after[: places[0]], torch.zeros(int(places[0])))  # words before, and BOI
    assert (after[places] > 1e-5).all()  # the first patch reads the last
    assert (after[places[-1] + 1 :] > 1e-6).all()  # EOI and the words behind


@torch.no_grad()
def test_later_images_read_earlier_ones_only(model: Any) -> None:
    batch = batch_of(model, [[words(5), shown(model), words(6), shown(model), words(7)]])
    base = model(batch)["prediction"]
    for changed, other in ((0, 1), (1, 0)):
        moved = {**batch, "image_noise": batch["image_noise"].clone()}
        moved["image_noise"][changed] += 1
        change = (model(moved)["prediction"] - base).abs().amax((1, 2, 3))
        assert change[changed] > 1e-3
        assert (change[other] > 1e-6) == (changed == 0)


# -- what is learned -----------------------------------------------------------------------------------------------


def test_lambda_is_applied_once() -> None:
    for weight in (5.0, 2.0):
        said = {} if weight == 5 else {"objective": {"diffusion": {"weight": weight}}}
        module = zoo.build("transfusion", scale="tiny", seed=1, **SMALL, **said)
        batch = batch_of(module.model, [[words(5, 6), shown(module.model)], [shown(module.model), words(7, 9, 4)]])
        total, report = module.losses(batch)
        error = report["diffusion/error"]
        torch.testing.assert_close(total, report["next-token"] + weight * error)
        assert error > 0.1
        expected = (module.model(batch)["prediction"] - batch["image_noise"]).square().mean((1, 2, 3)).mean()
        torch.testing.assert_close(error, expected)


def test_every_image_has_its_own_time_and_the_limit_holds_before_captions_only() -> None:
    model = made().model.train()
    levels: list[Tensor] = []
    inside = model.patch_codec.encode

    def look(latents: Tensor, level: Tensor) -> Any:
        levels.append(level)
        return inside(latents, level)

    model.patch_codec.encode = look
    rows = [[words(5, 6), shown(model), words(6), shown(model)], [shown(model), words(7, 9)]]
    torch.manual_seed(0)
    for _ in range(150):
        batch = batch_of(model, rows)
        del batch["image_time"], batch["image_noise"]
        assert batch["image_first"].tolist() == [False, False, True]
        with torch.no_grad():
            model(batch)
    drawn = torch.stack(levels)  # [150, 3]
    assert (drawn[:, 0] != drawn[:, 1]).float().mean() > 0.95
    assert drawn[:, 2].max() <= 499
    assert (drawn[:, :2] > 500).float().mean() > 0.4
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(batch)["prediction"], model(batch)["prediction"])


def test_four_of_five_captions_stand_first(model: Any) -> None:
    samples = [Sample(str(n), picture(n % 3), ("a red apple",), {}) for n in range(400)]
    batch = model.processor(samples, train=True)
    assert abs(batch["image_first"].float().mean() - 0.2) < 0.06
    assert "pixel_values" in batch
    # the caption is sometimes left out, for guidance
    alone = (batch["input_ids"][:, 1] == model.vocabulary.id("boi")) & ~batch["image_first"]
    assert 0.04 < alone.float().mean() < 0.14


def test_given_images_stay_clean_and_have_no_loss(model: Any) -> None:
    edit = [shown(model, given=True), words(5, 6, trained=False), shown(model)]
    batch = batch_of(model, [edit])
    with torch.no_grad():
        base = model(batch)
        assert base["noised"].tolist() == [False, True]
        other = {**batch, "image_noise": batch["image_noise"].clone(), "image_time": batch["image_time"].clone()}
        other["image_noise"][0] += 1
        other["image_time"][0] = 3
        assert torch.equal(model(other)["hidden"], base["hidden"])
    targets = base["targets"][0]
    assert (targets[targets >= 0] == torch.tensor([model.vocabulary.id("boi"), model.processor.words.eos])).all()
    module = made()
    loss, report = module.objectives["diffusion"](module.model, batch, module.model(batch))
    error = (module.model(batch)["prediction"] - batch["image_noise"])[1].square().mean()
    torch.testing.assert_close(loss, error)
    assert int(report["noised"]) == 1


def test_batches_without_an_image_train_and_reach_every_parameter() -> None:
    module = made("transfusion-unet", patch_codec={"stem_width": 8, "blocks": 1, "level_width": 8})
    module.train()
    batch = batch_of(module.model, [[words(5, 6, 7)], [words(8, 9)]])
    for key in ("image_time", "image_noise", "image_latents"):
        del batch[key]
    batch["pixel_values"] = torch.zeros(0, 3, 32, 32)
    total, report = module.losses(batch)
    assert report["diffusion"] == 0
    assert torch.isfinite(total)
    total.backward()
    for name, parameter in module.model.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("image_tokenizer."))
    with torch.no_grad():  # a text says the same without and beside images
        module.eval()
        alone = module.model(batch)["hidden"][0, :5]
        beside = module.model(batch_of(module.model, [[words(5, 6, 7)], [words(8), shown(module.model)]]))
        torch.testing.assert_close(beside["hidden"][0, :5], alone, atol=1e-5, rtol=1e-5)


def test_autoencoder_never_learns() -> None:
    module = made().train()
    assert not any(m.training for m in module.model.image_tokenizer.modules())
    batch = batch_of(module.model, [[words(5), shown(module.model)]])
    del batch["image_latents"]
    batch["pixel_values"] = torch.randn(1, 3, 32, 32)
    before = {k: v.clone() for k, v in module.model.image_tokenizer.state_dict().items()}
    module.losses(batch)[0].backward()
    assert all(p.grad is None for p in module.model.image_tokenizer.parameters())
    after = module.model.image_tokenizer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("recipe", ["transfusion", "transfusion-flow", "transfusion-unet"])
def test_both_processes_train_and_draw(recipe: str) -> None:
    """A few steps on one batch; the error of the images and of the words falls."""
    small = {"stem_width": 8, "blocks": 1, "level_width": 8} if recipe == "transfusion-unet" else {}
    module = zoo.build(recipe, scale="tiny", seed=0, patch_codec=small, **SMALL).train()
    model = module.model
    assert isinstance(model.process, Flow if recipe == "transfusion-flow" else DDPM)
    batch = batch_of(model, [[words(5, 6), shown(model)], [words(7), shown(model)], [shown(model), words(8, 9)]] * 3)
    batch["image_latents"] = batch["image_latents"][:3].repeat(3, 1, 1, 1)
    del batch["image_time"], batch["image_noise"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    curve = []
    torch.manual_seed(0)
    for _ in range(60):
        total, report = module.losses(batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        curve.append((float(report["next-token"]), float(report["flow" if "flow" in recipe else "diffusion"])))
    text, image = zip(*curve, strict=True)
    assert sum(text[-5:]) < 0.3 * sum(text[:5])
    assert sum(image[-5:]) < 0.9 * sum(image[:5])
    drawn = module.generate_images(["a", "b"], steps=3)
    assert drawn.shape == (2, 3, 32, 32)
    assert torch.isfinite(drawn).all()


# -- drawing -------------------------------------------------------------------------------------------------------


def uncached(
    model: Any, ids: list[list[int]], latents: Tensor, level: Tensor, features: Tensor | None = None
) -> Tensor:
    """The prediction of the last image of each row, by one forward of the whole sequences, pads behind them."""
    end = model.vocabulary.id("eoi")
    out = []
    for n, row in enumerate(ids):
        whole = torch.tensor([[*row, *[model.vocabulary.slot_id] * model.places, end]])
        tokens, skips = model.patch_codec.encode(latents[n : n + 1], level[n : n + 1])
        patches = tokens if features is None else torch.cat([features[n : n + 1], tokens], 1)
        embeds = model._splice(whole, None, patches.view(-1, model.places, patches.shape[-1]))
        layout = layout_of(segments_of(whole, None, model.style, model.vocabulary), model.style)
        hidden = model.decoder(TokenBatch(embeds, layout))[:, len(row) : len(row) + model.places]
        out.append(model.patch_codec.decode(hidden, skips, level[n : n + 1], model.image_config.grid))
    return torch.cat(out)


@torch.no_grad()
@pytest.mark.parametrize(
    ("recipe", "sampler"),
    [
        ("transfusion", "ddpm"), ("transfusion", "ddim"), ("transfusion-unet", "ddim"), ("transfusion-flow", "euler"),
        ("transfusion-flow", "midpoint"), ("transfusion-flow", "rk45"),
    ],
)  # fmt: skip
def test_drawing_over_the_cache_equals_drawing_without(recipe: str, sampler: str) -> None:
    small = {"stem_width": 8, "blocks": 1, "level_width": 8} if recipe == "transfusion-unet" else {}
    model = zoo.build(recipe, scale="tiny", seed=1, **SMALL, patch_codec=small).model
    with torch.no_grad():
        for name, parameter in sorted(model.decoder.named_parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    texts, boi, bos = ["a red apple", "cat"], model.vocabulary.id("boi"), model.processor.words.bos
    # a tolerance that no step exceeds: else the smallest difference may decide about one
    how = Denoising(sampler=sampler, steps=4, rtol=100.0, atol=100.0)
    noise = gaussian(streams(3, 0, 2), (8, 4, 4), torch.device("cpu"))
    generators = streams(3, 0, 2)
    gaussian(generators, (8, 4, 4), torch.device("cpu"))  # what the drawing has taken before it starts
    rows = [[bos, *model.processor.text_ids(text), boi] for text in texts]

    def predict(x: Tensor, level: Tensor) -> Tensor:
        with_text = uncached(model, rows, x, level)
        without = uncached(model, [[bos, boi]] * 2, x, level)
        return without + 3.0 * (with_text - without)

    expected = denoise(model.process, predict, noise, how, generators)
    ids, segment = model.processor.prompt_rows(texts)
    seen: list[Tensor] = []
    model._pictures = lambda latents: seen.append(latents) or latents
    model._draw(ids, segment, None, how, (3.0, -2.0), streams(3, 0, 2))
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_patches_are_overwritten_and_never_appended(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made().model
    lengths: list[int] = []
    inside = Prefix.block

    def look(self: Prefix, *args: Any, **kwargs: Any) -> Tensor:
        lengths.append(self.length)
        return inside(self, *args, **kwargs)

    monkeypatch.setattr(Prefix, "block", look)
    model.generate_images(["a red apple"], steps=6)
    assert len(lengths) == 6
    assert len(set(lengths)) == 1


@torch.no_grad()
def test_guidance_drops_the_text_and_not_the_patches(model: Any) -> None:
    def draw(text: str, guidance: float, seed: int = 0) -> Tensor:
        return model.generate_images([text], steps=3, guidance=guidance, seed=seed)

    assert torch.equal(draw("a red apple", 0.0), draw("cat", 0.0))  # the branch without text alone
    assert not torch.allclose(draw("a red apple", 0.0), draw("a red apple", 0.0, seed=1), atol=1e-3)
    assert not torch.equal(draw("a red apple", 1.0), draw("cat", 1.0))
    assert not torch.equal(draw("a red apple", 1.0), draw("a red apple", 4.0))


@torch.no_grad()
def test_edits_read_the_clean_image_and_the_instruction(model: Any) -> None:
    images = [picture(0), picture(1, (50, 80))]

    def draw(images: list[Any], told: list[str], guidance: float) -> Tensor:
        return model.edit_images(images, told, steps=3, guidance=guidance)

    out = draw(images, ["make it red", "a"], 2.0)
    assert out.shape == (2, 3, 32, 32)
    torch.testing.assert_close(draw(images[:1], ["make it red"], 2.0), out[:1], atol=1e-5, rtol=1e-5)
    dropped = draw(images, ["make it red", "a"], 0.0)
    torch.testing.assert_close(draw(images, ["x", "y"], 0.0), dropped, atol=1e-5, rtol=1e-5)  # text is dropped
    assert not torch.allclose(out, dropped, atol=1e-3)
    assert not torch.equal(draw(images[::-1], ["x", "x"], 0.0), draw(images, ["x", "x"], 0.0))  # the image is not
    # the whole sequence at once gives the same
    boi, eoi, bos = model.vocabulary.id("boi"), model.vocabulary.id("eoi"), model.processor.words.bos
    slot = [model.vocabulary.slot_id] * model.places
    row = [[bos, boi, *slot, eoi, *model.processor.text_ids("make it red"), boi]]
    features = model._clean(model._encoded(images[:1]))

    def predict(x: Tensor, level: Tensor) -> Tensor:
        return uncached(model, row, x, level, features)

    how = Denoising(sampler="ddim", steps=3)
    latents = denoise(model.process, predict, gaussian(streams(0, 0, 1), (8, 4, 4), torch.device("cpu")), how)
    found = model.edit_images(images[:1], ["make it red"], steps=3, guidance=1.0, sampler="ddim")
    torch.testing.assert_close(found, model._pictures(latents), atol=1e-5, rtol=1e-4)


def scripted(model: Any, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Let the model write ``tokens``, and return the states it would have chosen them by."""
    states: list[Tensor] = []

    def choose(hidden: Tensor, *others: Any) -> int:
        states.append(hidden.clone())
        return tokens[len(states) - 1]

    monkeypatch.setattr(model, "_next_token", choose)
    return states


def test_decoding_switches_between_words_and_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, image, text, image, text in one call; every state is that of the whole sequence with clean images."""
    model = made(decoder={"context_length": 128}).model
    boi, eoi = model.vocabulary.id("boi"), model.vocabulary.id("eoi")
    a, b = model.processor.text_ids("red apple"), model.processor.text_ids("a cat")
    script = [*a, boi, *b, boi, *a, model.processor.words.eos]
    states = scripted(model, script, monkeypatch)
    drawn: list[Tensor] = []
    inside = model._pictures
    monkeypatch.setattr(model, "_pictures", lambda latents: drawn.append(latents) or inside(latents))
    first = picture(5)
    out = model.generate_interleaved([["flag", first]], max_images=3, steps=2, guidance=2.0)[0]
    assert [type(part) for part in out] == [str, Tensor, str, Tensor, str]
    assert [part for part in out if isinstance(part, str)] == ["red apple", "a cat", "red apple"]
    assert all(part.shape == (3, 32, 32) and part.min() >= 0 and part.max() <= 1 for part in out[1::2])
    assert not torch.equal(out[1], out[3])
    with torch.no_grad():
        slot, words_ = [model.vocabulary.slot_id] * model.places, model.processor.words
        row = [words_.bos, *model.processor.text_ids("flag"), boi, *slot, eoi]
        asked = [len(row) - 1]
        for token in script[:-1]:
            row += [token, *slot, eoi] if token == boi else [token]
            asked.append(len(row) - 1)
        latents = torch.cat([model._encoded([first]), *drawn])
        ids = torch.tensor([row])
        layout = layout_of(segments_of(ids, None, model.style, model.vocabulary), model.style)
        embeds = model._splice(ids, None, model._clean(latents))
        expected = model.decoder(TokenBatch(embeds, layout))[0, asked]
    torch.testing.assert_close(torch.cat(states), expected, atol=1e-5, rtol=1e-4)


def test_the_branch_without_text_keeps_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """At guidance 0 an image depends on the images before it, and on no word."""

    def second(text: str, shown: Picture.Image) -> Tensor:
        model = made().model
        scripted(model, [*model.processor.text_ids(text), model.vocabulary.id("boi"), 2], monkeypatch)
        out = model.generate_interleaved([[shown, text]], steps=2, guidance=0.0)[0]
        return next(part for part in out if not isinstance(part, str))

    base = second("red apple", picture(0))
    torch.testing.assert_close(second("a cat", picture(0)), base, atol=1e-6, rtol=0)
    assert (second("red apple", picture(1)) - base).abs().max() > 1e-4


def test_no_image_is_opened_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(decoder={"context_length": 24}).model  # 4 patches an image: room for three
    with torch.no_grad():  # a model that always wants an image
        model.decoder.lm_head.weight.zero_()
    chosen: list[bool] = []
    inside = model._next_token

    def next_token(hidden: Tensor, opens: bool, *others: Any) -> int:
        chosen.append(opens)
        return model.vocabulary.id("boi") if opens else inside(hidden, opens, *others)

    monkeypatch.setattr(model, "_next_token", next_token)
    out = model.generate_interleaved([["cat"]], max_images=9, max_new_tokens=40, steps=1)[0]
    images = [part for part in out if isinstance(part, Tensor)]
    assert 2 <= len(images) <= 3
    assert chosen[-1] is False
    out = model.generate_interleaved([["cat"]], max_images=1, max_new_tokens=3, steps=1)[0]
    assert sum(isinstance(part, Tensor) for part in out) == 1
    out = model.generate_interleaved([["cat"]], max_images=0, max_new_tokens=3)[0]
    assert all(isinstance(part, str) for part in out)


@torch.no_grad()
def test_candidates_share_the_images_keys(model: Any) -> None:
    images = [picture(0), picture(1)]
    texts = ["a red apple", "cat"]
    scores = model.score_candidates(images, [texts, texts])
    torch.testing.assert_close(scores[:, 0], model.score_text(images, [texts[0]] * 2), atol=1e-4, rtol=1e-4)
    row = [model.processor.words.bos, model.vocabulary.id("boi"), *[model.vocabulary.slot_id] * model.places]
    told = [*model.processor.text_ids("cat"), model.processor.words.eos]
    ids = torch.tensor([[*row, model.vocabulary.id("eoi"), *told]])
    logits = model.text_logits(model._pixels(images[:1]), ids)[0, -len(told) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(told)[:, None]).sum()
    torch.testing.assert_close(scores[0, 1], expected, atol=1e-4, rtol=1e-4)
    written = model.generate_text(images, max_new_tokens=5)
    assert all(isinstance(text, str) for text in written)


# -- saving, and mistakes ------------------------------------------------------------------------------------------


def test_a_saved_flow_draws_as_it_did(tmp_path: Path) -> None:
    module = made("transfusion-flow")
    expected = module.generate_images(["cat"], steps=2)
    save(module, module.recipe, tmp_path / "weights")
    again = zoo.from_pretrained(str(tmp_path / "weights"))
    assert isinstance(again.model.process, Flow)
    torch.testing.assert_close(again.generate_images(["cat"], steps=2), expected)


def test_weights_in_16_bits_draw() -> None:
    small = made().model.to(torch.bfloat16)
    with torch.no_grad():
        drawn = small.generate_images(["cat"], steps=2)
        edited = small.edit_images([picture(0)], ["larger"], steps=1)
    assert drawn.dtype == edited.dtype == torch.float32
    assert bool(torch.isfinite(drawn).all())


def test_mistakes_are_one_line(model: Any) -> None:
    with pytest.raises(ConfigError, match="'midpoint' does not fit DDPM: choose ddpm or ddim"):
        model.generate_images(["cat"], sampler="midpoint")
    with pytest.raises(ConfigError, match="steps = 0"):
        model.generate_images(["cat"], steps=0)
    with pytest.raises(ConfigError, match="guidance"):
        model.generate_images(["cat"], guidance=-1.0)
    with pytest.raises(ConfigError, match="shorten"):
        model.generate_images(["cat " * 200])
    with pytest.raises(ConfigError, match="wrap it in a list"):
        model.generate_images("cat")
    with pytest.raises(ConfigError, match="shorten the prompt"):
        model.edit_images([picture(0)], ["cat " * 118])
    with pytest.raises(ConfigError, match="1 images and 2 instructions"):
        model.edit_images([picture(0)], ["a", "b"])
    with pytest.raises(ConfigError, match="wrap it in a list"):
        model.generate_interleaved(["cat"])
    batch = batch_of(model, [[words(5), shown(model)]])
    with pytest.raises(ConfigError, match="image latents have shape"):
        model({**batch, "image_latents": torch.zeros(1, 8, 8, 8)})
    with pytest.raises(ConfigError, match="placeholder"):
        model({**batch, "image_latents": torch.zeros(2, 8, 4, 4)})
    assert model.generate_images([]).shape == (0, 3, 32, 32)
    assert model.generate_interleaved([]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": ["next-token", "diffusion", "flow"]}, "choose one of the objectives"),
        ({"image_tokenizer": "vq"}, "makes codes"),
        ({"wiring": {"style": "chameleon"}}, "choose wiring=unified"),
        ({"wiring": {"sampler": "dpm"}}, "unknown sampler"),
        ({"patch_codec": {"patch": 3}}, "patch = 3"),
        ({"decoder": {"context_length": 20}}, "tokens for text"),
        ({"image_tokenizer": {"image_size": 24, "width": 16, "groups": 2}}, "do not divide into patches"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo.build("transfusion", scale="tiny", **changes)


def test_gains_and_biases_of_these_tests_matter(model: Any) -> None:
    norms = [p for name, p in model.decoder.named_parameters() if "norm" in name]
    assert norms
    assert all((p - 1).abs().max() > 0.1 for p in norms)
    assert isinstance(model.decoder.lm_head, nn.Linear)
