"""Images written behind a class or a caption: what the condition, the positions, the cache and the guidance do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import zoo
from zoo.connectors.caption_mlp import CaptionMLPConfig
from zoo.data.conditions import CaptionedProcessor, ClassProcessor
from zoo.data.images import ImageTransform
from zoo.data.sample import Sample
from zoo.data.text import named_tokenizer
from zoo.decoders.code_lm import CodeLMConfig
from zoo.encoders.t5 import T5EncoderConfig
from zoo.errors import ConfigError, DataError
from zoo.layout import TokenBatch
from zoo.models.conditioned import CaptionedConfig, CaptionedImageLM, ClassedConfig, ClassedImageLM
from zoo.objectives.next_token import NextTokenConfig
from zoo.recipe import resolve
from zoo.sampling.codes import CodeDecoding, CodeStreams
from zoo.sampling.text import streams
from zoo.tokenizers.stored import write_codes
from zoo.tokenizers.vq import VQConfig
from zoo.weights.save import save
from zoo.weights.start import start_from

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
DECODER = CodeLMConfig(width=32, depth=2, heads=4, ffn=64, dropout=0.0)
CODES = 24


def images(side: int = 4) -> VQConfig:
    return VQConfig(image_size=16 * side, vocab_size=CODES, width=32, blocks=0, code_width=4)


@pytest.fixture
def classed(shake: Callable[[nn.Module], nn.Module]) -> Callable[..., Any]:
    def built(side: int = 4, decoder: CodeLMConfig = DECODER, **fields: Any) -> Any:
        return shake(ClassedImageLM(ClassedConfig(**{"classes": 5, **fields}), decoder, images(side), 0)).eval()

    return built


@pytest.fixture
def captioned(shake: Callable[[nn.Module], nn.Module]) -> Callable[..., Any]:
    def built(**fields: Any) -> Any:
        text = T5EncoderConfig(
            tokenizer="openmoji-bpe", vocab_size=1024, context_length=12, width=16, depth=1, heads=2, head_dim=8,
            ffn=32, dropout=0.0,
        )  # fmt: skip
        config = CaptionedConfig(**{"prefix_tokens": 12, **fields})
        return shake(CaptionedImageLM(config, text, CaptionMLPConfig(), DECODER, images(), 0)).eval()

    return built


def codes(model: Any, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(0, CODES, (count, model.cells), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.decoder.logits(model(batch)["hidden"])
    return found


# -- positions and targets ---------------------------------------------------------------------------------------------


def test_condition_rows_have_no_rotation_and_axes_are_not_exchangeable(classed: Callable[..., Any]) -> None:
    model = classed()
    batch = {"classes": torch.tensor([1, 3]), "image_codes": codes(model)}
    wanted, layout = logits(model, batch), model.layout(1)
    assert layout.position[0, :, 0].tolist() == [-1, -1]
    assert layout.position[0, :, 1:].T.tolist() == [[row, column] for row in range(4) for column in range(4)]

    def with_position(position: Tensor) -> Tensor:
        changed = dataclasses.replace(layout, position=position)
        embeds = torch.cat([model.classes(batch["classes"])[:, None], model.decoder.embed(batch["image_codes"])], 1)
        with torch.no_grad():
            hidden = model.decoder(TokenBatch(embeds[:, :-1], changed.truncate(model.cells)))
        found: Tensor = model.decoder.logits(hidden)
        return found

    torch.testing.assert_close(with_position(layout.position), wanted, **CLOSE)
    assert (with_position(layout.position.clamp(min=0)) - wanted).abs().max() > 0.05
    assert (with_position(layout.position.flip(1)) - wanted).abs().max() > 0.05


def test_every_code_is_predicted_from_what_stands_before_it(classed: Callable[..., Any]) -> None:
    model = classed()
    batch = {"classes": torch.tensor([1, 3]), "image_codes": codes(model)}
    out, before = model(batch), logits(model, batch)
    assert out["hidden"].shape[1] == out["targets"].shape[1] == model.cells
    assert torch.equal(out["targets"], batch["image_codes"])
    changed = batch["image_codes"].clone()
    changed[:, 5] = (changed[:, 5] + 1) % CODES
    after = logits(model, {**batch, "image_codes": changed})
    torch.testing.assert_close(after[:, :6], before[:, :6], **CLOSE)  # code 5 itself is predicted from 0 to 4
    assert (after[:, 6:] - before[:, 6:]).abs().amax(-1).min() > 1e-4
    other = logits(model, {**batch, "classes": torch.tensor([2, 3])})
    assert (other[0, 0] - before[0, 0]).abs().max() > 1e-3  # the first code reads the class


def test_a_fresh_model_finds_every_code_equally_likely() -> None:
    model = ClassedImageLM(ClassedConfig(classes=5), DECODER, images(), 0).eval()
    batch = {"classes": torch.tensor([1, 3]), "image_codes": codes(model)}
    assert torch.count_nonzero(logits(model, batch)) == 0
    loss, _ = NextTokenConfig().build()(model, batch, model(batch))
    torch.testing.assert_close(loss, torch.tensor(float(CODES)).log())


# -- conditions --------------------------------------------------------------------------------------------------------


def test_pads_before_a_caption_change_nothing(captioned: Callable[..., Any]) -> None:
    model = captioned()
    features = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    real = torch.tensor([[False, False, True, True, True], [True] * 5])
    features = features * real[..., None]
    batch = {"caption_features": features, "caption_mask": real, "image_codes": codes(model)}
    longer = {
        **batch,
        "caption_features": nn.functional.pad(features, (0, 0, 7, 0)),
        "caption_mask": nn.functional.pad(real, (7, 0)),
    }
    torch.testing.assert_close(logits(model, longer), logits(model, batch), **CLOSE)
    moved = features.clone()
    moved[0, 2] += 1.0
    assert (logits(model, {**batch, "caption_features": moved})[0] - logits(model, batch)[0]).abs().max() > 1e-3


def test_ids_are_read_as_their_features_are(captioned: Callable[..., Any]) -> None:
    model = captioned()
    rows = model.processor.encode_texts(["red apple", "a cat with wry smile"])
    batch = {**rows, "image_codes": codes(model)}
    with torch.no_grad():
        features = model.text_encoder(rows["input_ids"], rows["attention_mask"]).tokens
    count = rows["attention_mask"].sum(1)
    width = int(count.max())
    left, real = torch.zeros(2, width, 16), torch.zeros(2, width, dtype=torch.bool)
    for row, n in enumerate(count.tolist()):
        left[row, width - n :], real[row, width - n :] = features[row, :n], True
    assert count[0] != count[1]
    given = {"caption_features": left, "caption_mask": real, "image_codes": batch["image_codes"]}
    torch.testing.assert_close(logits(model, batch), logits(model, given), **CLOSE)


@pytest.mark.parametrize("kind", ["class", "caption"])
def test_conditions_are_dropped_in_training_only(
    classed: Callable[..., Any], captioned: Callable[..., Any], kind: str
) -> None:
    model = classed(drop=0.4) if kind == "class" else captioned(drop=0.4)
    count = 200
    batch: dict[str, Tensor] = {"image_codes": codes(model, 1).expand(count, -1)}
    if kind == "class":
        batch["classes"] = torch.full((count,), 2)
    else:
        features = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1)).expand(count, -1, -1)
        batch |= {"caption_features": features, "caption_mask": torch.ones(count, 4)}
    kept = logits(model, batch)
    assert (kept - kept[:1]).abs().max() < 1e-5
    none = logits(model, {**batch, "drop_draw": torch.zeros(count)})[0]
    assert (none - kept[0]).abs().max() > 1e-2
    torch.manual_seed(0)
    drawn = logits(model.train(), batch)
    dropped = (drawn - none).abs().amax((1, 2)) < 1e-4
    assert 0.3 * count < int(dropped.sum()) < 0.5 * count
    assert ((drawn - kept[0]).abs().amax((1, 2)) < 1e-4).sum() == count - int(dropped.sum())


def test_features_of_no_caption_are_stored_and_never_trained(captioned: Callable[..., Any]) -> None:
    model = captioned()
    assert "unconditional" in model.state_dict()
    assert "unconditional" not in dict(model.named_parameters())
    assert model.unconditional.shape == (12, 16)


def test_samples_that_are_not_valid_count_for_nothing(captioned: Callable[..., Any]) -> None:
    model = captioned()
    rows = model.processor.encode_texts(["red apple", "a cat", "flag: Japan"])
    whole = {**rows, "image_codes": codes(model, 3), "valid": torch.tensor([True, False, True])}
    objective = NextTokenConfig().build()
    loss, report = objective(model, whole, model(whole))
    part = {name: value[[0, 2]] for name, value in whole.items()}
    torch.testing.assert_close(loss, objective(model, part, model(part))[0], **CLOSE)
    assert int(report["tokens"]) == 2 * model.cells
    nothing = {**whole, "valid": torch.zeros(3, dtype=torch.bool)}
    assert float(objective(model, nothing, model(nothing))[0].detach()) == 0.0


# -- drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [0, 2, 1])
def test_cached_codes_equal_those_of_whole_passes(classed: Callable[..., Any], kv_heads: int) -> None:
    side = 24 if kv_heads == 0 else 8  # 576 codes: the published 384 px
    model = classed(side, dataclasses.replace(DECODER, kv_heads=kv_heads))
    classes = torch.tensor([1, 3])
    seen: list[Tensor] = []
    decoding = CodeDecoding(temperature=0.0, guidance=1.7)
    written = model.generate_codes({"classes": classes}, decoding, tell=lambda n, guided, _: seen.append(guided))
    assert written.shape == (2, side * side)
    batch = {"classes": classes, "image_codes": written}
    given, none = logits(model, batch), logits(model, {**batch, "drop_draw": torch.zeros(2)})
    guided = none + 1.7 * (given - none)
    torch.testing.assert_close(torch.stack(seen, 1), guided, atol=2e-4, rtol=1e-4)
    assert torch.equal(written, guided.argmax(-1))
    cache = model.decoder.new_cache()
    with torch.no_grad():
        model.decoder(TokenBatch(model.decoder.embed(written), model.layout(1).truncate(side * side)), cache)
    assert cache.get(0)[0].shape[2] == (kv_heads or DECODER.heads)  # the cache has as many heads as are stored


def test_guidance_reads_no_condition_once_and_leaves_after_its_interval(
    classed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classed()
    batches: list[int] = []
    forward = type(model.decoder).forward

    def counted(self: Any, batch: TokenBatch, cache: Any = None) -> Tensor:
        batches.append(len(batch.embeds))
        return forward(self, batch, cache)

    monkeypatch.setattr(type(model.decoder), "forward", counted)
    decoding = CodeDecoding(temperature=0.0, guidance=2.0, interval=3)
    model.generate_codes({"classes": torch.tensor([1, 3, 1])}, decoding)
    # class 1, class 3 and no class are read; codes 0 to 4 are guided: 4 steps of both branches, then one of them
    assert batches == [3] + [6] * 4 + [3] * (model.cells - 5)
    batches.clear()
    model.generate_codes({"classes": torch.tensor([1, 3])}, CodeDecoding(temperature=0.0), samples=3)
    assert batches == [2] + [6] * (model.cells - 1)  # samples of one class share what is read


def test_top_p_is_taken_of_what_top_k_leaves(classed: Callable[..., Any]) -> None:
    model = classed()
    rows, n = {"classes": torch.tensor([1])}, 400
    seen: list[Tensor] = []
    model.generate_codes(rows, CodeDecoding(temperature=0.0), tell=lambda i, guided, _: seen.append(guided))
    p = (seen[0][0] / 0.7).softmax(-1).sort(descending=True)
    kept = p.values[:4] / p.values[:4].sum()
    top_p = float(kept[0] + kept[1] / 2)  # two codes hold it once top_k has left four
    decoding = CodeDecoding(temperature=0.7, top_k=4, top_p=top_p)
    drawn = model.generate_codes(rows, decoding, CodeStreams(streams(0, 0, n)), samples=n)[:, 0]
    assert set(drawn.tolist()) == set(p.indices[:2].tolist())
    share = float((drawn == p.indices[0]).float().mean())
    assert abs(share - float(kept[0] / kept[:2].sum())) < 0.1


def test_images_of_captions_do_not_depend_on_their_company(captioned: Callable[..., Any]) -> None:
    model = captioned(guidance=3.0, top_k=5)
    texts = ["red apple", "a cat with wry smile", "red apple"]
    drawn = model.generate_images(texts, seed=4)
    assert drawn.shape == (3, 3, 64, 64)
    assert float(drawn.min()) >= 0.0
    assert float(drawn.max()) <= 1.0
    torch.testing.assert_close(model.generate_images(texts[:1], seed=4), drawn[:1])
    assert not torch.equal(drawn[0], drawn[2])  # the same text, another stream
    several = model.generate_images(texts[:2], seed=4, samples=2)
    assert several.shape[0] == 4
    torch.testing.assert_close(several[:1], drawn[:1])
    assert not torch.equal(several[0], several[1])


def test_a_class_is_drawn_by_its_name(classed: Callable[..., Any]) -> None:
    model = classed(labels=["flag", "cat face", "*"], classes=0)
    assert model.classes.num_embeddings == 4  # the last is no class
    drawn = model.generate_images(["flag", "Flag: Japan", "1"], seed=2, temperature=0.0)
    torch.testing.assert_close(drawn[0], drawn[1])
    torch.testing.assert_close(model.generate_images(["a cat face!"], temperature=0.0)[0], drawn[2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"texts": "flag"}, "got one string"),
        ({"texts": ["flag"], "steps": 8}, "steps = 8: this model writes an image in 16 steps"),
        ({"texts": ["flag"], "samples": 0}, "samples = 0"),
        ({"texts": ["flag"], "guidance": -1.0}, "guidance = -1.0"),
        ({"texts": ["flag"], "top_p": 0.0}, "top_p = 0.0"),
        ({"texts": ["5"]}, "'5' names no class: expected a number below 5 or a label"),
        ({"texts": ["dog"]}, "'dog' names no class"),
    ],
)
def test_bad_calls_of_a_class_model(classed: Callable[..., Any], call: dict[str, Any], message: str) -> None:
    model = classed(labels=["flag", "cat"])
    with pytest.raises(ConfigError, match=message):
        model.generate_images(call.pop("texts"), **call)


def test_a_text_that_does_not_fit_and_codes_of_another_grid(captioned: Callable[..., Any]) -> None:
    model = captioned()
    with pytest.raises(ConfigError, match=r"has \d+ tokens, the model is conditioned on 12 at most"):
        model.generate_images(["a very long story about a cat and a dog and a house and a tree and a flag of Japan"])
    rows = model.processor.encode_texts(["red apple"])
    with pytest.raises(ConfigError, match=r"image_codes have shape \(1, 9\), the model writes 16 codes"):
        model({**rows, "image_codes": torch.zeros(1, 9, dtype=torch.long)})
    with pytest.raises(ConfigError, match="caption_features have shape"):
        model(
            {
                "caption_features": torch.zeros(1, 13, 16),
                "caption_mask": torch.ones(1, 13),
                "image_codes": codes(model, 1),
            }
        )
    with pytest.raises(ConfigError, match="neither pixel_values nor image_codes"):
        model(rows)


# -- samples -----------------------------------------------------------------------------------------------------------


def sample(text: str, image: bool = True, **meta: Any) -> Sample:
    return Sample(text, Image.new("RGB", (64, 64), "red") if image else None, (text,), meta)


def test_captions_are_written_with_their_end_and_pads_behind() -> None:
    tokenizer = named_tokenizer("openmoji-bpe")
    transform = ImageTransform(size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    processor = CaptionedProcessor(transform, tokenizer, 8, bos=False)
    batch = processor([sample("red apple"), sample("a cat with wry smile and much else", image=False)])
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    assert batch["valid"].tolist() == [True, False]
    count = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape[1] == int(count.max()) == 8  # cut, and its end kept
    for row, n in zip(batch["input_ids"], count.tolist(), strict=True):
        assert int(row[n - 1]) == tokenizer.eos_id
        assert tokenizer.bos_id not in row.tolist()
    assert int(CaptionedProcessor(transform, tokenizer, 8).encode_texts(["red"])["input_ids"][0, 0]) == tokenizer.bos_id


def test_the_class_of_a_sample() -> None:
    transform = ImageTransform(size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    processor = ClassProcessor(transform, 4, ["cat", "cat face", "flag", "*"])
    batch = processor(
        [sample("x", label="flag"), sample("x", label=1), sample("the Cat sits"), sample("cat-face"), sample("x")]
    )
    assert batch["classes"].tolist() == [2, 1, 0, 1, 3]
    strict = ClassProcessor(transform, 1000, [])
    assert strict([sample("207")])["classes"].tolist() == [207]
    with pytest.raises(DataError, match=r"sample 'tench': 'tench' names no class"):
        strict([sample("tench")])
    with pytest.raises(DataError, match="has no image"):
        processor([sample("cat", image=False)])


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "count"),
    [("b", 111e6), ("l", 343e6), ("xl", 775e6), ("xxl", 1.4e9), ("xxxl", 3.9e9), ("1b", 1.2e9), ("3b", 3.1e9),
     ("7b", 6.6e9)],
)  # fmt: skip
def test_published_sizes(size: str, count: float) -> None:
    recipe = resolve("llamagen-c2i", choices={"decoder": f"llamagen-{size}"})
    with torch.device("meta"):
        model = recipe.wiring[1].build(recipe.parts, 0)
    own = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("image_tokenizer."))
    assert abs(own / count - 1) < 0.01


@pytest.mark.parametrize(
    ("model", "tokenizer", "grid"),
    [
        ("llamagen-c2i", "llamagen-vq-16", 16),
        ("llamagen-c2i", "llamagen-vq-8", 32),
        ("llamagen-c2i-b-384", "llamagen-vq-16-384", 24),
        ("llamagen-t2i-512", "llamagen-vq-16-512", 32),
    ],
)
def test_grids_of_both_tokenizers(model: str, tokenizer: str, grid: int) -> None:
    recipe = resolve(model, choices={"image_tokenizer": tokenizer})
    with torch.device("meta"):
        built: Any = recipe.wiring[1].build(recipe.parts, 0)
    prefix = 120 if "t2i" in model else 1
    assert built.grid == (grid, grid)
    assert built.decoder.vocab_size == 16384
    assert built.decoder.context_length == prefix + grid * grid
    assert built.layout(prefix).length == prefix + grid * grid


def test_a_text_encoder_or_connector_may_be_exchanged() -> None:
    module = zoo.build("llamagen-t2i-joint", scale="tiny", text_encoder="clip-text-512", connector="mlp")
    assert module.generate_images(["red apple"], seed=1).shape == (1, 3, 64, 64)


def test_codes_that_are_stored_are_learned_and_cannot_be_drawn(tmp_path: Path) -> None:
    ids, path = ["a", "b"], tmp_path / "codes.safetensors"
    write_codes(path, ids, torch.arange(32).view(2, 16), 1024)
    module = zoo.build("llamagen-c2i", scale="tiny", image_tokenizer={"name": "stored-codes", "path": str(path)})
    picture = Image.new("RGB", (64, 64))
    batch = module.model.processor([Sample(id, picture, ("flag",), {}) for id in ids])
    assert batch["image_codes"].tolist() == torch.arange(32).view(2, 16).tolist()
    assert torch.equal(module.model(batch)["targets"], batch["image_codes"])
    with pytest.raises(ConfigError, match="stored-codes cannot draw images"):
        module.generate_images(["flag"])
    with pytest.raises(ConfigError, match=r"set wiring\.augment=none"):
        zoo.build(
            "llamagen-c2i", scale="tiny", image_tokenizer={"name": "stored-codes", "path": str(path)},
            wiring={"augment": "flip"},
        )  # fmt: skip


def test_the_image_tokenizer_comes_from_a_run_of_its_own(tmp_path: Path) -> None:
    trained = zoo.build("llamagen-vq-16", scale="tiny", seed=3)
    save(trained.model, trained.recipe, tmp_path / "vq")
    module = zoo.build("llamagen-c2i", scale="tiny", seed=4)
    report = start_from(module.model, tmp_path / "vq")
    wanted = trained.model.image_tokenizer.state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in module.model.image_tokenizer.state_dict().items())
    assert {name.split(".")[0] for name in report.new} == {"classes", "decoder"}


def test_a_continuous_image_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="an image LM writes codes, and the image tokenizer has none"):
        zoo.build("llamagen-c2i", scale="tiny", image_tokenizer="kl")
