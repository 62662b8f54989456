"""The unified wiring against the released Show-o and Chameleon: rows, masks, logits, losses and written ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.sequences import Image, Text, Words, collate, layout_of, segments_of, write_row
from zoo.decoders.trunk_lm import TrunkLMConfig
from zoo.errors import ConfigError
from zoo.layout import TokenBatch
from zoo.models.unified import Unified, UnifiedConfig
from zoo.objectives.masked_image_tokens import MaskedImageTokensConfig, draw_masks
from zoo.objectives.next_token import NextTokenConfig
from zoo.sampling.codes import CodeDecoding
from zoo.sampling.guidance import image_text_weights, probabilities
from zoo.sampling.guidance import mixed as mixed_logits
from zoo.sampling.guidance import weights as guidance_weights
from zoo.sampling.text import Decoding, ids_seen, penalised
from zoo.tokenizers.base import ImageTokenizer, ImageTokenizerConfig
from zoo.weights.keymaps import chameleon, load_into, phi
from zoo.weights.keymaps.llama import ffn_width

TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
LOSSES = {"atol": 1e-5, "rtol": 1e-5}
HEAD = {"trunk": "decoder.trunk.", "embed": "decoder.embedding.tokens.", "head": "decoder.lm_head."}


@dataclass(frozen=True, kw_only=True)
class PixelCodesConfig(ImageTokenizerConfig):
    """An image tokenizer whose codes stand in the pixels: the first channel of each patch's first pixel."""

    image_size: int = 64
    patch_size: int = 16
    vocab_size: int = 32

    def build(self) -> PixelCodes:
        return PixelCodes(self)


class PixelCodes(ImageTokenizer):
    def __init__(self, config: PixelCodesConfig) -> None:
        super().__init__()
        self.config, self.codes, self.grid = config, config.vocab_size, config.grid

    def encode(self, pixel_values: Tensor) -> Tensor:
        side = self.config.patch_size
        return pixel_values[:, 0, ::side, ::side].flatten(1).long()


def pixels_of(codes: Tensor, grid: int, patch: int = 16) -> Tensor:
    planes = codes.view(-1, 1, grid, grid).float()
    return planes.repeat_interleave(patch, 2).repeat_interleave(patch, 3).expand(-1, 3, -1, -1)


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("show_o")


def phi_config(hf: dict[str, Any], text: int) -> TrunkLMConfig:
    return TrunkLMConfig(
        width=hf["hidden_size"],
        depth=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=0,
        ffn=hf["intermediate_size"],
        norm="layer",
        placement="parallel",
        act="gelu_tanh",
        gated=False,
        bias=True,
        rope_share=hf["partial_rotary_factor"],
        qk_norm="layer",
        tie=False,
        head_bias=True,
        vocab_size=text,
        context_length=64,
    )


@pytest.fixture
def show_o(g: Any) -> Unified:
    c = g.config
    config = UnifiedConfig(style="show-o", text_length=c["max_seq_length"])
    model = Unified(config, phi_config(c["phi"], c["text_tokens"]), PixelCodesConfig(), 0).eval()
    load_into(model, g.weights, phi.keymap(**HEAD).under("showo."), allow_ignored=("mm_projector.{**}",))
    return model


def texts(rows: Tensor) -> list[tuple[int, ...]]:
    return [tuple(i for i in row if i >= 0) for row in rows.tolist()]


def mixed(g: Any, model: Unified, tasks: tuple[str, ...] = ("t2i", "lm", "mmu")) -> dict[str, Tensor]:
    """The recorded batch as the processor would make it, with the recorded draws."""
    c, n = g.config, model.places
    words = Words(bos=39, eos=39, pad=model.vocabulary.id("pad"))
    sizes: dict[str, Any] = {"length": c["max_seq_length"] + 3 + n, "text_length": c["max_seq_length"]}
    dropped = (g.inputs["t2i_dropout_u"] < c["cond_dropout_prob"]).tolist()
    parts: dict[str, list[list[Text | Image]]] = {
        "t2i": [
            [Text(() if drop else t), Image(n)] for t, drop in zip(texts(g.inputs["t2i_text"]), dropped, strict=True)
        ],
        "lm": [[Text(t)] for t in texts(g.inputs["lm_text"])],
        "mmu": [[Image(n), Text(t)] for t in texts(g.inputs["mmu_text"])],
    }
    rows = [
        write_row(model.style, model.vocabulary, words, task, own, **sizes) for task in tasks for own in parts[task]
    ]
    first = model.vocabulary.first_code
    ids = {"t2i": g.inputs["t2i_image_ids"], "mmu": g.inputs["mmu_image_ids"]}
    codes = [
        ids[task] - (first if int(ids[task].max()) >= model.image_tokenizer.codes else 0)
        for task in tasks
        if task != "lm"
    ]
    seen = torch.cat(codes) if codes else torch.zeros(0, n, dtype=torch.long)
    ratio, order = torch.ones(len(seen)), torch.rand(seen.shape, generator=torch.Generator().manual_seed(0))
    if "t2i" in tasks:
        ratio[:4], order[:4] = g.inputs["t2i_ratio_u"], g.inputs["t2i_perm_u"]
    return collate(rows, model.style, model.vocabulary, words.pad) | {
        "pixel_values": pixels_of(seen, c["grid"]),
        "mask_ratio": ratio,
        "mask_order": order,
    }


def test_the_draw_of_hidden_codes_is_the_released_one(g: Any, show_o: Unified) -> None:
    ratio, order = g.inputs["t2i_ratio_u"], g.inputs["t2i_perm_u"]
    torch.testing.assert_close(torch.cos(ratio * torch.pi / 2), g.outputs["t2i_mask_prob"])
    hidden = draw_masks(ratio, order)
    assert torch.equal(hidden, g.outputs["t2i_masked_image_ids"] == show_o.vocabulary.mask_id)
    assert hidden.sum(1).tolist() == [max(1, round(16 * float(p))) for p in g.outputs["t2i_mask_prob"]]
    assert draw_masks(torch.ones(1), order[:1]).sum() == 1  # one code at least
    assert draw_masks(torch.ones(1), order[:1], least=0.5).sum() == 8


@torch.no_grad()
def test_a_mixed_batch_has_the_released_logits_and_losses(g: Any, show_o: Unified) -> None:
    batch = mixed(g, show_o)
    seen: dict[str, Tensor] = {}
    show_o.decoder.register_forward_hook(lambda m, args, out: seen.update(ids=args[0].ids))
    outputs = show_o(batch)
    assert torch.equal(seen["ids"], g.outputs["ids"])
    real = batch["segment"] >= 0
    logits = show_o.decoder.logits(outputs["hidden"])
    torch.testing.assert_close(logits[real], g.outputs["logits"][real], **TOLERANCE)
    weights = g.config["coefficients"]
    masked, report = MaskedImageTokensConfig().build()(show_o, batch, outputs)
    spoken, told = NextTokenConfig(tasks={k: weights[k] for k in ("lm", "mmu")}).build()(show_o, batch, outputs)
    torch.testing.assert_close(masked, g.outputs["loss_t2i"], **LOSSES)
    torch.testing.assert_close(told["lm"], g.outputs["loss_lm"], **LOSSES)
    torch.testing.assert_close(told["mmu"], g.outputs["loss_mmu"], **LOSSES)
    torch.testing.assert_close(weights["t2i"] * masked + spoken, g.outputs["loss_total"], **LOSSES)
    assert int(report["codes"]) == int((g.outputs["labels"][:4, 11:] >= 0).sum())
    # a loss over codes alone, or one without the trivial terms around the image, is another
    trivial = outputs["code_targets"].masked_fill(~batch["image_slots"], -100)
    other, _ = MaskedImageTokensConfig().build()(show_o, batch, {**outputs, "code_targets": trivial})
    assert abs(float(other - masked)) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("tasks", [("t2i", "lm"), ("lm", "mmu"), ("t2i", "mmu"), ("lm",), ("t2i",), ("mmu",)])
def test_a_batch_without_rows_of_a_task(g: Any, show_o: Unified, tasks: tuple[str, ...]) -> None:
    batch = mixed(g, show_o, tasks)
    outputs = show_o(batch)
    masked, _ = MaskedImageTokensConfig().build()(show_o, batch, outputs)
    total, told = NextTokenConfig(tasks={"lm": 0.1}).build()(show_o, batch, outputs)
    for task in ("lm", "mmu"):
        expected = g.outputs[f"loss_{task}"] if task in tasks else torch.tensor(0.0)
        torch.testing.assert_close(told[task], expected, **LOSSES)
    torch.testing.assert_close(masked, g.outputs["loss_t2i"] if "t2i" in tasks else torch.tensor(0.0), **LOSSES)
    torch.testing.assert_close(total, 0.1 * told["lm"] + told["mmu"], **LOSSES)


def test_losses_without_targets_reach_the_weights_with_zeros(g: Any, show_o: Unified) -> None:
    batch = mixed(g, show_o, ("lm",))
    loss, _ = MaskedImageTokensConfig().build()(show_o, batch, show_o(batch))
    loss.backward()
    gradient = show_o.decoder.lm_head.weight.grad
    assert gradient is not None
    assert float(gradient.abs().max()) == 0


@torch.no_grad()
def test_trimmed_pads_change_no_logits(g: Any, show_o: Unified) -> None:
    batch = mixed(g, show_o, ("t2i",))
    ids = g.outputs["ids"][[0, 2]]  # five and eight pads
    real = ids != show_o.vocabulary.id("pad")
    whole = show_o.token_logits(ids)
    trimmed = show_o.token_logits(ids[:, 5:])
    torch.testing.assert_close(trimmed[real[:, 5:]], whole[real], **TOLERANCE)
    torch.testing.assert_close(whole[real], g.outputs["logits"][[0, 2]][real], **TOLERANCE)
    longer = F.pad(ids, (100, 0), value=show_o.vocabulary.id("pad"))
    torch.testing.assert_close(show_o.token_logits(longer)[:, 100:][real], whole[real], **TOLERANCE)
    assert batch["input_ids"].shape == (4, 29)


@torch.no_grad()
def test_answers_are_the_released_ones(g: Any, show_o: Unified) -> None:
    ids = g.inputs["mmu_gen_ids"]
    wanted = g.outputs["mmu_gen_tokens"]
    written = show_o.generate_ids(
        None, ids, decoding=Decoding(max_new_tokens=len(wanted)), stop_ids=[], pad_id=40, any_id=True
    )
    assert written[0].tolist() == wanted.tolist()
    # the same with the image as pixels, and behind a pad
    codes = ids[:, 2:18] - show_o.vocabulary.first_code
    slotted = torch.cat([ids[:, :2], torch.full((1, 16), show_o.image_token_id), ids[:, 18:]], 1)
    padded = F.pad(slotted, (1, 0), value=40)
    written = show_o.generate_ids(
        pixels_of(codes, g.config["grid"]), padded, padded != 40, Decoding(max_new_tokens=len(wanted)),
        stop_ids=[], pad_id=40, any_id=True,
    )  # fmt: skip
    assert written[0].tolist() == wanted.tolist()
    logits = show_o.text_logits(pixels_of(codes, g.config["grid"]), slotted)[:, -1]
    torch.testing.assert_close(logits[0], g.outputs["mmu_gen_last_logits"][0], **TOLERANCE)


@torch.no_grad()
def test_code_columns_alone(g: Any, show_o: Unified) -> None:
    hidden = torch.randn(3, 5, show_o.decoder.width, generator=torch.Generator().manual_seed(1))
    columns = slice(g.config["image_token_offset"], g.config["image_token_offset"] + g.config["codebook_size"])
    torch.testing.assert_close(show_o.code_logits(hidden), show_o.decoder.logits(hidden)[..., columns])
    codes = torch.arange(4)[None]
    assert torch.equal(show_o.code_embeds(codes), show_o.decoder.embed(codes + 50))


def test_codes_of_another_codebook_or_grid(g: Any, show_o: Unified) -> None:
    batch = mixed(g, show_o, ("t2i",))
    del batch["pixel_values"]
    with pytest.raises(ConfigError, match=r"shape \(4, 9\), expected \[images, 16\]"):
        show_o({**batch, "image_codes": torch.zeros(4, 9, dtype=torch.long)})
    with pytest.raises(ConfigError, match="outside a codebook of 32"):
        show_o({**batch, "image_codes": torch.full((4, 16), 32)})
    with pytest.raises(ConfigError, match="image placeholders, but 3 images"):
        show_o({**batch, "image_codes": torch.zeros(3, 16, dtype=torch.long)})


# -- Chameleon ---------------------------------------------------------------------------------------------------------


def chameleon_model(c: dict[str, Any], swin: bool) -> Unified:
    decoder = TrunkLMConfig(
        width=c["hidden_size"], depth=c["layers"], heads=c["heads"], kv_heads=c["kv_heads"],
        ffn=c["intermediate_size"], placement="branch" if swin else "pre", qk_norm="layer", qk_norm_per_head=True,
        tie=False, vocab_size=c["vocab_size"], context_length=64,
    )  # fmt: skip
    config = UnifiedConfig(style="chameleon", places={"boi": c["boi"], "eoi": c["eoi"]}, code_place=4)
    image = PixelCodesConfig(image_size=64, vocab_size=c["vq"]["num_embeddings"])
    return Unified(config, decoder, image, 0).eval()


@torch.no_grad()
@pytest.mark.parametrize(("name", "swin"), [("prenorm", False), ("swin", True)])
def test_chameleon(golden: Callable[[str], Any], name: str, swin: bool) -> None:
    g = golden("chameleon")
    c = g.config
    model = chameleon_model(c, swin)
    assert model.vocabulary.size == c["vocab_size"]
    ignored = ("model.vqmodel.{**}", "official_vqgan.{**}")
    load_into(model, g.weights, chameleon.keymap(**HEAD), allow_ignored=ignored)
    ids, real = g.outputs["ids_with_image"], g.inputs["attention_mask"].bool()
    # the published codes lie in an order of their own inside 4 .. 19: what stands there is an image all the same
    segment = segments_of(ids, real, model.style, model.vocabulary)
    layout = layout_of(segment, model.style)
    torch.testing.assert_close(model.token_logits(ids, layout)[real], g.outputs[f"{name}_logits"][real], **TOLERANCE)
    labels = ids.masked_fill(~real, -100)
    labels[:, 0] = -100
    for row in range(len(ids)):  # the first real token has nobody before it
        labels[row, int(real[row].long().argmax())] = -100
    outputs = {
        "hidden": model.decoder(batch_of(model, ids, layout)),
        "targets": F.pad(labels[:, 1:], (0, 1), value=-100),
    }
    plain, _ = NextTokenConfig().build()(model, {}, outputs)
    torch.testing.assert_close(plain, g.outputs[f"{name}_ce"], **TOLERANCE)
    strict, _ = NextTokenConfig(z_loss=1e-5).build()(model, {}, outputs)
    torch.testing.assert_close(
        (strict - plain).double(), 1e-5 * g.outputs[f"{name}_logz2"].double(), atol=2e-7, rtol=1e-3
    )
    # greedy text over left-padded prompts: no code and no boundary is written
    columns = torch.ones(c["vocab_size"], dtype=torch.bool)
    columns[4:20] = False
    expected = g.outputs[f"{name}_generated"]
    written = write_text(model, ids, real, columns, expected.shape[1])
    assert torch.equal(written, expected)


def batch_of(model: Unified, ids: Tensor, layout: Any) -> Any:
    return TokenBatch(model.decoder.embed(ids), layout)


def write_text(model: Unified, ids: Tensor, real: Tensor, columns: Tensor, count: int) -> Tensor:
    from zoo.models.unified_text import TextState
    from zoo.sampling.text import write

    layout = layout_of(segments_of(ids, real, model.style, model.vocabulary), model.style)
    view: Any = TextState(model.decoder, columns)
    return write(
        view, model.decoder.embed(ids), layout, Decoding(max_new_tokens=count), stop_ids=[], pad_id=1
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("name", "swin"), [("prenorm", False), ("swin", True)])
def test_chameleon_in_its_released_layout(golden: Callable[[str], Any], name: str, swin: bool) -> None:
    g = golden("chameleon_official")
    c = g.config
    sizes = {
        "hidden_size": c["dim"],
        "layers": c["n_layers"],
        "heads": c["n_heads"],
        "kv_heads": c["n_kv_heads"],
        "intermediate_size": ffn_width(c["dim"], c["multiple_of"], c["ffn_dim_multiplier"]),
        "vocab_size": c["vocab_size"],
        "boi": 20,
        "eoi": 21,
        "vq": {"num_embeddings": 16},
    }
    model = chameleon_model(sizes, swin)
    keymap = chameleon.official_keymap(
        heads=c["n_heads"], kv_heads=c["n_kv_heads"], head_dim=c["dim"] // c["n_heads"], per_head=True, **HEAD
    )
    load_into(model, g.weights, keymap)
    ids = g.inputs["ids"][None]
    torch.testing.assert_close(model.token_logits(ids)[0], g.outputs[f"{name}_logits"], **TOLERANCE)
    # the other placement of the norms takes the same weights and is another model
    other = chameleon_model(sizes, not swin)
    load_into(other, g.weights, keymap)
    assert float((other.token_logits(ids)[0] - g.outputs[f"{name}_logits"]).abs().max()) > 0.1


def test_a_vocabulary_that_does_not_hold_the_codes(golden: Callable[[str], Any]) -> None:
    c = golden("chameleon").config
    with pytest.raises(ConfigError, match="do not lie inside a text vocabulary of 12"):
        chameleon_model({**c, "vocab_size": 12}, False)
    with pytest.raises(ConfigError, match="images that are no codes"):
        Unified(replace(UnifiedConfig(), style="transfusion"), TrunkLMConfig(), PixelCodesConfig(), 0)
    with pytest.raises(ConfigError, match=r"leave -3 tokens for text in decoder.context_length = 16"):
        Unified(UnifiedConfig(), TrunkLMConfig(context_length=16), PixelCodesConfig(), 0)


def test_chameleon_s_guidance_and_its_order(golden: Callable[[str], Any]) -> None:
    """Three branches in the published form, then the codes alone, then temperature, then the nucleus."""
    g = golden("chameleon")
    logits = g.inputs["cfg_logits"]
    model = chameleon_model(g.config, False)
    three = mixed_logits(logits, image_text_weights(3.0, 1.2))
    torch.testing.assert_close(three, g.outputs["cfg_mixed"][:2], **TOLERANCE)
    torch.testing.assert_close(
        mixed_logits(logits, guidance_weights(2.5, "scale")), g.outputs["cfg_mixed_two"][:3], **TOLERANCE
    )
    full = mixed_logits(logits, image_text_weights(1.0, 1.0))
    assert torch.equal(full, logits[:2])  # scales of 1 are the plain conditional model
    p = probabilities(three[:, model.vocabulary.code_ids], CodeDecoding(temperature=0.7, top_p=0.9))
    p = p / p.sum(-1, keepdim=True)
    expected = g.outputs["cfg_image_probs"][:2]
    torch.testing.assert_close(p, expected[:, model.vocabulary.code_ids], **TOLERANCE)
    torch.testing.assert_close(expected[:, model.vocabulary.code_ids].sum(-1), torch.ones(2), **TOLERANCE)
    seen = ids_seen(g.inputs["penalty_ids"], logits.shape[1])
    torch.testing.assert_close(penalised(logits, seen, 1.2), g.outputs["repetition_penalised"], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(("name", "swin"), [("prenorm", False), ("swin", True)])
def test_chameleon_draws_the_likeliest_codes(golden: Callable[[str], Any], name: str, swin: bool) -> None:
    g = golden("chameleon")
    model = chameleon_model(g.config, swin)
    load_into(model, g.weights, chameleon.keymap(**HEAD), allow_ignored=("model.vqmodel.{**}", "official_vqgan.{**}"))
    ids = F.pad(g.outputs["ids_with_image"], (0, 1), value=g.config["boi"])
    real = F.pad(g.inputs["attention_mask"].bool(), (0, 1), value=True)
    layout = layout_of(segments_of(ids, real, model.style, model.vocabulary).clamp(max=0), model.style)
    cache, embeds, written = model.decoder.new_cache(), model.decoder.embed(ids), []
    for _ in range(model.places):
        hidden = model.decoder(TokenBatch(embeds, layout), cache)[:, -1]
        codes = model.code_logits(hidden).argmax(-1)  # [B]; no other column is computed
        written.append(codes)
        embeds, layout = model.code_embeds(codes[:, None]), layout.append("text")
    assert torch.equal(torch.stack(written, 1) + model.vocabulary.first_code, g.outputs[f"{name}_image_generated"])
