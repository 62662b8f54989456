"""A language model that draws: against the released losses of MiniGPT-5, and what its card calls traps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import zoo
from zoo.data.sample import Sample
from zoo.diffusion.noising import DDPM
from zoo.errors import ConfigError, DataError
from zoo.models.llm_draws import LLMDraws
from zoo.module import ZooModule
from zoo.objectives.denoising import snr_weights
from zoo.part import Features
from zoo.recipe import resolve
from zoo.registry import parse
from zoo.sampling.block import Prefix
from zoo.sampling.text import streams
from zoo.testing.config import shake
from zoo.weights.keymaps import load_into, minigpt5

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
SMALL = {
    "decoder.depth": 2, "encoder.depth": 1, "text_encoder.depth": 1, "wiring.drawing_steps": 2, "wiring.vokens": 4,
    "output_connector.depth": 1,
}  # fmt: skip


def built(model: str = "llm-draws", **options: Any) -> ZooModule:
    fields = {**SMALL, **options}
    if fields.get("output_connector") in ("linear", "mlp"):
        del fields["output_connector.depth"]
    choices = {key: fields.pop(key) for key in ("output_connector", "stages") if key in fields}
    module = zoo.build(model, scale="tiny", seed=3, options=fields, **choices)
    shake(module.model, 1)
    return module


@cache
def plain() -> ZooModule:
    return built().eval()


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def pair(n: int) -> Sample:
    return Sample(f"p{n}", picture(n), (("red apple", "green tree", "blue car")[n % 3],))


def story(frames: int = 3) -> Sample:
    texts = [f"the cat sees {n} birds" for n in range(frames)]
    parts = tuple(part for n, text in enumerate(texts) for part in (text, n))
    images = tuple(picture(n) for n in range(frames))
    return Sample("s", images[0], (". ".join(texts),), {"parts": parts, "images": images})


def set_(module: ZooModule, **fields: Any) -> None:
    import dataclasses

    module.model.reconfigure(dataclasses.replace(module.model.config, **fields))


# -- the released code -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_losses_of_the_release(golden: Callable[[str], Any]) -> None:
    """States, condition and all losses of model.py, by the parts and objectives of the recipe ``minigpt5``."""
    g = golden("minigpt5")
    c = g.config
    recipe = resolve("minigpt5")
    mapper = recipe.parts["output_connector"][1]
    assert (mapper.act, mapper.depth, mapper.heads, mapper.queries) == ("relu", 4, 8, 77)
    small = parse(type(mapper), {"width": c["sd_hidden"], "heads": c["nhead"], "ffn": c["ffn"]}, "mapper")
    connector = small.build(in_width=c["llm_hidden"], in_tokens=c["vokens"], out_width=c["sd_hidden"]).eval()
    load_into(connector, g.weights, minigpt5.keymap())
    vokens = torch.arange(100, 100 + c["vokens"])
    hidden = g.inputs["hidden"]
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long)
    for row, start in enumerate(g.inputs["voken_start"].tolist()):
        tokens = vokens[: ids.shape[1] - start - 1]  # the state of the last one is not read
        ids[row, start + 1 : start + 1 + len(tokens)] = tokens
    known: Any = SimpleNamespace(
        voken_ids=tuple(vokens.tolist()), output_connector=connector, config=SimpleNamespace(vokens=c["vokens"])
    )
    states = LLMDraws._states(known, ids, hidden, len(ids))
    states = states.masked_fill(g.inputs["dropped"][:, None, None], 0.0)
    feature = connector(states).tokens
    torch.testing.assert_close(feature, g.outputs["mapping_feature"], **TOLERANCE)

    objectives = {name: config.build() for name, config in recipe.objectives.items()}
    process = recipe.objectives["diffusion"].process()
    assert isinstance(process, DDPM)
    assert (process.schedule, process.prediction) == ("scaled_linear", "epsilon")
    times = g.inputs["snr_t"]
    torch.testing.assert_close(process.snr(times), g.outputs["snr"], rtol=1e-4, atol=1e-5)
    weights = snr_weights(process.snr(times), 5.0, "epsilon")
    torch.testing.assert_close(weights, g.outputs["min_snr_weight"], **TOLERANCE)
    assert float(weights.max()) <= 1
    assert bool((weights[process.snr(times) <= 5] == 1).all())
    level = g.inputs["t"]
    noisy = process.corrupt(g.inputs["latents"] * 0.18215, g.inputs["noise"], level)
    drift = (feature.mean(1) @ g.inputs["unet_map"])[..., None, None] + level[:, None, None, None] / 1000
    outputs = {
        "prediction": 0.3 * noisy + drift,
        "denoising_target": g.inputs["noise"],
        "noised": torch.ones(3, dtype=torch.bool),
        "level": level,
        "aligned": feature,
        "alignment_target": g.inputs["caption_states"],
        "has_target": torch.ones(3, dtype=torch.bool),
    }
    image, caption = (objectives[name](None, {}, outputs)[0] for name in ("diffusion", "alignment"))
    torch.testing.assert_close(image, g.outputs["image_loss"], **TOLERANCE)
    torch.testing.assert_close(caption, g.outputs["caption_loss"], **TOLERANCE)
    factors = {name: config.weight for name, config in recipe.objectives.items()}
    text = factors["next-token"] * g.inputs["text_loss"]
    total = text + factors["diffusion"] * image + factors["alignment"] * caption
    torch.testing.assert_close(total, g.outputs["total_loss"], **TOLERANCE)
    torch.testing.assert_close(text + image, g.outputs["total_loss_without_caption"], **TOLERANCE)
    assert recipe.stages[1].objectives == ["next-token", "diffusion"]
    without = {**outputs, "has_target": torch.zeros(3, dtype=torch.bool)}
    assert float(objectives["alignment"](None, {}, without)[0]) == 0


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_and_labels() -> None:
    """Pairs in three ways; which of an image's tokens are learned; nothing of a prompt is."""
    module = built()
    first = module.model.voken_ids[0]
    for kind, images, drawn in (("image", 0, 1), ("both", 0, 1), ("text", 1, 0)):
        set_(module, answers={kind: 1.0})
        batch = module.processor([pair(0)], train=True)
        assert (len(batch["pixel_values"]), len(batch["drawn_values"])) == (images, drawn)
        learned = batch["labels"][batch["labels"] != -100].tolist()
        assert (first in learned) == bool(drawn)
        assert len(learned) > (1 if kind == "image" else 3)
    set_(module, answers={"image": 1.0})
    for targets, kept in (("official", [0, 3]), ("first", [0]), ("all", [0, 1, 2, 3])):
        set_(module, voken_targets=targets)
        labels = module.processor([pair(0)], train=True)["labels"]
        assert [int(id) - first for id in labels[labels >= first]] == kept


def test_stories() -> None:
    """What was before is shown, oldest left out where it does not fit; captions belong to what is drawn."""
    module = built(**{"wiring.scenes": 0, "connector": "mlp"})
    seen = set()
    for draw in range(12):
        set_(module, answers={"both": 1.0})
        batch = module.processor([story()], train=True, draws=[draw])
        given, drawn = len(batch["pixel_values"]), len(batch["drawn_values"])
        assert 1 <= given + drawn <= 3
        vokens = int((batch["input_ids"] == module.model.voken_ids[0]).sum())
        assert vokens == drawn >= 1
        assert int((batch["input_ids"] == module.model.image_token_id).sum()) == 16 * given
        assert batch["caption_mask"].shape == (drawn, module.model.output_connector.outputs)
        seen.add((given, drawn))
    assert len(seen) > 2
    set_(module, answers={"text": 1.0})
    batch = module.processor([story()], train=True, draws=[0])
    assert len(batch["drawn_values"]) == 0
    dialogue = Sample("d", picture(0), ("x",), {"turns": (("show a cat", "here<draw>"), ("<image> what?", "a dog"))})
    with pytest.raises(DataError, match="marks 1 images and draws 1"):
        module.processor([dialogue])
    both = Sample("d", None, ("x",), {"images": (picture(0), picture(1)), "turns": dialogue.meta["turns"]})
    batch = module.processor([both])
    assert (len(batch["pixel_values"]), len(batch["drawn_values"])) == (1, 1)
    assert not bool(batch["has_caption"].any())


# -- gradients ---------------------------------------------------------------------------------------------------------


def batch_of(module: ZooModule, kind: str = "image", count: int = 3) -> dict[str, Tensor]:
    set_(module, answers={kind: 1.0})
    batch: dict[str, Tensor] = module.processor([pair(n) for n in range(count)], train=True)
    return batch


def test_old_rows_and_frozen_parts_stay_to_the_bit() -> None:
    """Stage 1 of MiniGPT-5 with its weight decay: new rows, fc, mapper and queries learn, and nothing else moves."""
    module = built("minigpt5", **{"wiring.vokens": 8, "optimizer.weight_decay": 0.5, "optimizer.warmup": 0.0})
    module.expect(4)
    module.set_stage(0)
    before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    optimizer = module.configure_optimizers()["optimizer"]
    batch = batch_of(module)
    for _ in range(2):
        optimizer.zero_grad()
        module.losses(batch)[0].backward()
        optimizer.step()
    moved = {n for n, t in module.model.state_dict().items() if not torch.equal(t, before[n])}
    assert {name.split(".")[0] for name in moved} == {"decoder", "output_connector"}
    assert {name for name in moved if name.startswith("decoder")} == {"decoder.input_rows", "decoder.output_rows"}
    assert {"output_connector.queries.weight", "output_connector.fc.0.weight"} <= moved
    module.set_stage(1)
    learning = {name for name, p in module.model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("output_connector.fc", "output_connector.queries")) for name in learning)
    assert {"output_connector.encoder.layers.0.attn.q.weight", "decoder.input_rows"} <= learning
    adapters = {name for name in learning if "lora" in name}
    assert adapters
    assert all("q_proj" in name or "v_proj" in name for name in adapters)
    module.zero_grad(set_to_none=True)
    module.losses(batch_of(module, "both"))[0].backward()
    reached = {name.split(".")[0] for name, p in module.model.named_parameters() if p.grad is not None}
    assert reached == {"decoder", "output_connector"}


def test_who_learns_from_what() -> None:
    """Text reaches no connector; through the frozen denoiser the connector and the language model learn."""
    module = built()
    batch = batch_of(module)
    for objective, reached in (
        ("next-token", set()),
        ("alignment", {"output_connector"}),
        ("diffusion", {"output_connector"}),
    ):
        module.zero_grad(set_to_none=True)
        outputs = module.model(batch)
        module.objectives[objective](module.model, batch, outputs)[0].backward()
        tops = {n.split(".")[0] for n, p in module.model.named_parameters() if p.grad is not None}
        assert tops == {"decoder", *reached}
        assert float(module.model.decoder.input_rows.grad.abs().max()) > 0 or objective == "next-token"


def test_a_batch_that_draws_nothing() -> None:
    module = built()
    batch = batch_of(module, "text")
    outputs = module.model(batch)
    assert len(outputs["aligned"]) == len(outputs["prediction"]) == 0
    total, report = module.losses(batch)
    total.backward()
    assert float(report["alignment"]) == float(report["diffusion"]) == 0
    torch.testing.assert_close(total.detach(), report["next-token"], **TOLERANCE)
    own = [p for n, p in module.model.named_parameters() if n.startswith("output_connector") and p.requires_grad]
    assert all(p.grad is not None and not bool(p.grad.any()) for p in own)


# -- guidance ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_branch_without_condition() -> None:
    """Each system's own: the connector of zeros, the empty caption, a blank image's features."""
    model = plain().model
    zeros = model.output_connector(torch.zeros(1, 4, model.decoder.width)).tokens
    torch.testing.assert_close(model.no_condition().tokens, zeros)
    assert float(zeros.abs().max()) > 0.1
    projected = built(output_connector="projection").eval().model
    torch.testing.assert_close(projected.no_condition().tokens, projected._empty_text())
    regressed = built(output_connector="query-resampler").eval().model
    blank = regressed.encode_images(torch.zeros(1, 3, 64, 64)).tokens[:, -16:]
    wanted = regressed.output_connector.condition(regressed.output_connector.target(blank)).tokens
    torch.testing.assert_close(regressed.no_condition().tokens, wanted)


@torch.no_grad()
def test_dropped_conditions() -> None:
    module = plain()
    batch = batch_of(module)
    batch["drop_draw"] = torch.tensor([0.0, 0.5, 0.09])
    out = module.model(batch)
    none, empty = module.model.no_condition().tokens[0], module.model._empty_text()[0]
    for row, dropped in enumerate((True, False, True)):
        assert torch.allclose(out["aligned"][row], none, atol=1e-5) == dropped
        assert torch.allclose(out["alignment_target"][row], empty, atol=1e-5) == dropped
    del batch["drop_draw"]
    kept = module.model(batch)["aligned"]
    torch.testing.assert_close(kept[1], out["aligned"][1])
    assert not torch.allclose(kept[0], none, atol=1e-3)
    module.train()
    set_(module, drop=0.999, answers={"image": 1.0})
    assert torch.allclose(module.model(batch)["aligned"], none.expand(3, -1, -1), atol=1e-5)
    set_(module, drop=0.1)
    module.eval()


@torch.no_grad()
def test_guidance_draws_with_the_branch_without_condition() -> None:
    """At scale 0 the image is that of no condition, whatever the text."""
    module = plain()
    texts = ["red apple", "blue car"]
    none = module.generate_images(texts, seed=5, guidance=0.0)
    full, more = (module.generate_images(texts, seed=5, guidance=g) for g in (1.0, 3.0))
    assert float((full - more).abs().max()) > 1e-3
    direct = module.model.draw(Features(module.model.no_condition().tokens.repeat(2, 1, 1)), seed=5, guidance=1)
    torch.testing.assert_close(none, direct, atol=1e-4, rtol=1e-4)


# -- writing -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("connector", ["mapper", "projection"])
def test_forced_tokens_in_one_pass_equal_single_steps(connector: str) -> None:
    """Also which states they are: from the one before the first token on, or those of the tokens."""
    model = built(output_connector=connector).eval().model
    rows = model.prompt_rows(["red apple"])
    ids = rows["input_ids"]
    together = model.condition(rows).tokens
    prompt = ids[:, : -len(model.voken_ids)]
    prefix = Prefix(model.decoder, model.decoder.embed(prompt), model._layout(prompt, None))
    states = [prefix.hidden[:, None]]
    for voken in model.voken_ids:
        states.append(prefix.block(model.decoder.embed(torch.tensor([[voken]])), "sequence", keep=True))
    joined = torch.cat(states, 1)
    kept = joined[:, :-1] if connector == "mapper" else joined[:, 1:] + model.decoder.embed(ids[:, -4:])
    assert kept.shape[1] == 4
    torch.testing.assert_close(model.output_connector(kept).tokens, together, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_texts_and_images_in_one_call() -> None:
    """A turn of text has no image; one that opens an image has both; the text goes on behind it."""
    module = built(**{"wiring.ask": ""}).eval()
    model = module.model
    rows = model.decoder.output_rows
    start = rows[0].clone()
    rows[0] = -1e3 * model.decoder(_states(model, "red apple"))[0, -1]
    alone = module.generate_interleaved([["red apple"]], max_new_tokens=5)
    assert [type(piece) for piece in alone[0]] == [str]
    rows[0] = start
    forced = module.generate_interleaved([["red apple"]], max_new_tokens=5, force=True, max_images=1)
    assert sum(isinstance(piece, Tensor) for piece in forced[0]) == 1
    rows[0] = 1e3 * model.decoder(_states(model, "red apple"))[0, -1]
    both = module.generate_interleaved([["red apple"]], max_new_tokens=5, max_images=1, seed=2)[0]
    assert [type(piece) for piece in both] == [Tensor, str]
    drawn = module.generate_images(["red apple"], seed=2)[0]  # the same row, states and noise
    torch.testing.assert_close(both[0], drawn, atol=1e-4, rtol=1e-4)
    none = module.generate_interleaved([["red apple"]], max_new_tokens=5, max_images=0, force=True)
    assert [type(piece) for piece in none[0]] == [str]
    rows[0] = start
    text = module.generate_text([picture(0)], max_new_tokens=6)[0]
    assert isinstance(text, str)
    shown = module.generate_interleaved([["a cat", picture(0), "and"]], max_new_tokens=3, max_images=0)
    assert len(shown) == 1


def _states(model: Any, text: str) -> Any:
    from zoo.layout import TokenBatch

    ids = model.processor.encode_turn([text])
    return TokenBatch(model.decoder.embed(ids), model._layout(ids, None))


# -- image features ----------------------------------------------------------------------------------------------------


def test_the_detokenizer_learns_from_images() -> None:
    """SEED-X: features of the image itself draw it; neither the language model nor the regression learns then."""
    stages = [
        {
            "name": "detokenizer",
            "train": ["output_connector.adapter"],
            "objectives": ["diffusion"],
            "wiring": {"condition_from": "image"},
        },
        {
            "name": "regression",
            "train": ["decoder", "output_connector.resampler"],
            "objectives": ["next-token", "alignment"],
        },
    ]
    module = built(output_connector="query-resampler", stages=stages)
    batch = batch_of(module)
    set_(module, condition_from="image")
    module.losses(batch)[0].backward()
    reached = {n.rpartition(".adapter.")[0] for n, p in module.model.named_parameters() if p.grad is not None}
    assert reached == {"output_connector"}
    out = module.model(batch)
    assert out["aligned"].shape == out["alignment_target"].shape == (3, 16, module.model.encoder.width)
    module.set_stage(1)
    module.zero_grad(set_to_none=True)
    module.losses(batch)[0].backward()
    tops = {".".join(n.split(".")[:2]) for n, p in module.model.named_parameters() if p.grad is not None}
    assert "output_connector.resampler" in tops
    assert "output_connector.adapter" not in tops


# -- two stages --------------------------------------------------------------------------------------------------------


def test_a_caption_that_is_drawn_is_the_two_stage_baseline() -> None:
    """The text encoder's states of the caption are the condition: no state of the language model reaches the image."""
    module = built().eval()
    model = module.model
    batch = batch_of(module)
    set_(module, condition_from="text")
    out = model(batch)
    expected = model.diffuse(
        {"pixel_values": batch["drawn_values"]},
        Features(model._caption_states(batch["caption_ids"], batch["caption_mask"])),
    )
    torch.testing.assert_close(out["prediction"], expected["prediction"])
    torch.testing.assert_close(
        model.generate_images(["red apple"], seed=1, guidance=2.0),
        model._pictures(
            model._latents(
                model.condition_of(["red apple"]),
                model.condition_of([""]),
                model._way(None, None, 2.0, None, None),
                streams(1, 0, 1),
            )
        ),
    )
    with torch.no_grad():  # an answer draws what it says: other words, another image; other vokens, the same
        said, drawn = model.generate_interleaved([["red apple"]], max_new_tokens=4, force=True, seed=2)[0]
        again = model._pictures(
            model._latents(model.condition_of([said]), None, model._way(None, None, None, None, None), streams(2, 0, 1))
        )[0]
        torch.testing.assert_close(drawn, again)
        model.decoder.input_rows += torch.randn(
            model.decoder.input_rows.shape, generator=torch.Generator().manual_seed(4)
        )
        _, other = model.generate_interleaved([["red apple"]], max_new_tokens=4, force=True, seed=2)[0]
    torch.testing.assert_close(other, drawn)


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_starts_from_a_language_model_without_the_tokens() -> None:
    module = built()
    decoder = module.model.decoder
    stored = {n.removeprefix("base."): t + 1 for n, t in decoder.state_dict().items() if n.startswith("base.")}
    taken = decoder.adopt(stored)
    table = next(n for n, p in decoder.named_parameters() if p is decoder.base.tables()[0])
    torch.testing.assert_close(taken["input_rows"], taken[table].float().mean(0).expand(4, -1))
    assert set(taken) >= {f"base.{name}" for name in stored}
    assert decoder.adopt(taken) is taken
    ids = torch.tensor([[1, decoder.first, decoder.first + 3]])
    torch.testing.assert_close(decoder.embed(ids)[0, 1:], decoder.input_rows[[0, 3]])
    logits = decoder.logits(torch.ones(1, decoder.width))
    assert logits.shape[-1] == decoder.vocab_size == decoder.first + 4
    torch.testing.assert_close(decoder.logits_of(torch.ones(1, decoder.width), slice(0, 9)), logits[..., :9])


def test_pads_of_captions() -> None:
    """All pads are read where the denoiser reads them; else a caption is its last state again behind its end."""
    model = plain().model
    rows = model.processor.encode_captions(["red apple", "a very long caption " * 9])
    assert rows["caption_ids"].shape == (2, 16)
    assert int(rows["caption_mask"][1].sum()) == 16
    states = model._caption_states(rows["caption_ids"], rows["caption_mask"])
    count = int(rows["caption_mask"][0].sum())
    torch.testing.assert_close(states[0, count:], states[0, count - 1].expand(16 - count, -1))
    filled = built(**{"wiring.pad_id": 0}).eval().model
    padded = filled._caption_states(rows["caption_ids"], rows["caption_mask"])
    torch.testing.assert_close(padded, filled.text_encoder(rows["caption_ids"]).tokens)
    assert float((padded[0, -1] - padded[0, count - 1]).abs().max()) > 1e-3


def test_bad_input() -> None:
    module = plain()
    for call, words in (
        (lambda: module.generate_interleaved("red apple"), "wrap it in a list"),
        (lambda: module.generate_interleaved(["red apple"]), "wrap it in a list"),
        (lambda: module.generate_interleaved([["a"]], max_images=99), "expected 0 to 32"),
        (lambda: module.generate_interleaved([["an <image> here"]]), "give images themselves"),
        (lambda: module.generate_images(["word " * 400]), "context_length"),
        (lambda: built(output_connector="query-resampler", **{"wiring.vokens": 5}), "square grid"),
        (lambda: built(**{"wiring.condition_from": "image"}), "query-resampler"),
        (lambda: built(**{"wiring.condition_from": "nowhere"}), "must be one of language, image, text"),
        (lambda: built(**{"wiring.answers": {"picture": 1.0}}), "unknown kind 'picture'"),
        (lambda: built(**{"wiring.vokens": 0}), "vokens of 1 or more"),
        (lambda: built(**{"objective.alignment.form": "l3"}), "must be one of mse, euclidean, cosine"),
        (lambda: built(**{"output_connector.queries": 500}), "the text encoder reads 128"),
        (lambda: zoo.build("llm-draws", scale="tiny", denoiser="unet-sdxl"), "pooled vector"),
        (lambda: zoo.build("llm-draws", scale="tiny", image_tokenizer="vq"), "latents"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    batch = dict(batch_of(module))
    batch["drawn_values"] = batch["drawn_values"][:2]
    with pytest.raises(ConfigError, match="tokens of 3 images"):
        module.model(batch)["aligned"]
