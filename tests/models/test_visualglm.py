"""VisualGLM, statement by statement: GLM's block and prefix, its rows, its vision half in the release's names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import zoo
from zoo.api import build_module
from zoo.data.sample import Sample
from zoo.data.templates import lay_out, template
from zoo.data.text import named_tokenizer
from zoo.errors import ConfigError, WeightsError
from zoo.layout import TokenBatch
from zoo.part import Features
from zoo.recipe import resolve
from zoo.weights import load_model
from zoo.weights.formats import file_format
from zoo.weights.keymaps import visualglm
from zoo.weights.keymaps.rotary import axes_to_two_halves

Shake = Callable[[nn.Module], nn.Module]
SIZES = {
    "encoder": {"width": 24, "depth": 2, "heads": 2, "ffn": 40, "image_size": 32, "patch_size": 8},
    "connector": {"width": 24, "depth": 4, "heads": 2, "ffn": 40, "queries": 5, "dropout": 0.0},
    "decoder": {"width": 32, "depth": 3, "heads": 4, "ffn": 48},
}
TEXTS = ["red apple", "a dog", "grinning face with big eyes", "flag: Japan"]


def small(shake: Shake | None = None, **changes: Any) -> Any:
    values = {slot: {**fields, **changes.get(slot, {})} for slot, fields in SIZES.items()}
    module = zoo.build("visualglm-6b", scale="tiny", **values)
    if shake is not None:
        shake(module.model)
    return module


def picture(seed: int) -> Image.Image:
    import numpy as np

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 32, 3), dtype=np.uint8))


def batch_of(model: Any) -> dict[str, Tensor]:
    return model.processor([Sample(str(i), picture(i), (t,)) for i, t in enumerate(TEXTS)])


# -- the language model --------------------------------------------------------------------------------------------


def straight_line(decoder: Any, x: Tensor, hidden: Tensor, position: Tensor) -> Tensor:
    """ChatGLM's layers as its formulas stand (modeling_chatglm.py): x [L, D], hidden [L, L] bool, position [2, L].

    Queries are divided by (layer + 1), hidden scores become -10000, all scores are multiplied by (layer + 1) again.
    """
    c = decoder.config
    head = c.width // c.heads
    frequency = (10000.0 ** (-torch.arange(0, head // 2, 2) / (head // 2))).half().float()

    def turned(rows: Tensor) -> Tensor:
        """[L, heads, head]: the first half of a head by the position, the second by the block position."""
        parts = []
        for axis, part in enumerate(rows.chunk(2, -1)):
            angle = position[axis][:, None].float() * frequency
            angle = torch.cat([angle, angle], -1)[:, None]  # [L, 1, head / 2]
            a, b = part.chunk(2, -1)
            parts.append(part * angle.cos() + torch.cat([-b, a], -1) * angle.sin())
        return torch.cat(parts, -1)

    for number, layer in enumerate(decoder.trunk.layers):
        a = F.layer_norm(x, (c.width,), layer.attn_norm.weight, layer.attn_norm.bias, c.eps)
        q, k, v = (
            F.linear(a, *(axes_to_two_halves(t, head) if name != "v" else t for t in (part.weight, part.bias)))
            for name, part in (("q", layer.attn.q), ("k", layer.attn.k), ("v", layer.attn.v))
        )
        q, k, v = (rows.view(-1, c.heads, head) for rows in (q, k, v))
        q, k = turned(q) / (math.sqrt(head) * (number + 1)), turned(k)
        scores = torch.einsum("qhd,khd->hqk", q, k).masked_fill(hidden, -10000.0) * (number + 1)
        read = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = a * math.sqrt(2 * 28) + layer.attn.out(read)
        m = F.layer_norm(x, (c.width,), layer.ffn_norm.weight, layer.ffn_norm.bias, c.eps)
        x = m * math.sqrt(2 * 28) + layer.ffn.down(F.gelu(layer.ffn.up(m), approximate="tanh"))
    return F.layer_norm(x, (c.width,), decoder.trunk.final_norm.weight, decoder.trunk.final_norm.bias, c.eps)


@torch.no_grad()
def test_blocks_equal_the_published_formulas(shake: Shake) -> None:
    """Residuals carry the norm times sqrt(56), and (layer + 1) cancels."""
    model = small(shake).model.eval()
    ids = batch_of(model)["input_ids"][2:3]
    x, layout = model._splice(ids, torch.randn(1, 3, 32, 32)), model._layout(ids, None)
    ours = model.decoder(TokenBatch(x, layout))[0]
    theirs = straight_line(model.decoder, x[0], ~layout.mask()[0, 0], layout.position[0])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    model.decoder.trunk.layers[0].scale = 1.0  # and neither is without effect
    assert float((model.decoder(TokenBatch(x, layout))[0] - theirs).abs().max()) > 0.1


@torch.no_grad()
def test_prefix_reads_both_ways_and_the_answer_is_causal(shake: Shake) -> None:
    model = small(shake).model.eval()
    batch = batch_of(model)
    ids = batch["input_ids"][2:3, : int(batch["attention_mask"][2].sum())]
    sop = int((ids[0] == model.tokenizer.bos_id).nonzero()[0])
    layout = model._layout(ids, None)
    x = model._splice(ids, batch["pixel_values"][2:3])
    whole = model.decoder(TokenBatch(x, layout))

    def moved(at: int) -> Tensor:
        """[T] bool, the rows that change when the one at ``at`` does."""
        changed = x.clone()
        changed[:, at] += torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(at))
        return (model.decoder(TokenBatch(changed, layout)) - whole)[0].abs().amax(-1) > 0

    assert bool(moved(sop - 1).all())  # the last token of the prompt reaches the first, and the image
    assert bool(moved(0).all())
    for at in (sop, sop + 2):
        assert not bool(moved(at)[:at].any())
        assert bool(moved(at)[at:].all())


def test_two_position_streams() -> None:
    model = small().model
    ids = torch.tensor([[9, 9, model.image_token_id, 8, 7, 6, 1, 5, 5, 2], [0, 0, 9, 8, 6, 1, 5, 5, 5, 2]])
    layout = model._layout(ids, ids != 0)
    assert layout.names == ("prefix", "answer")
    assert layout.position[0].tolist() == [[0, 1, 2, 3, 4, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 0, 1, 2, 3, 4]]
    assert layout.position[1, :, 2:].tolist() == [[0, 1, 2, 2, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3, 4, 5]]
    assert layout.segment[1].tolist() == [-1, -1, 0, 0, 0, 1, 1, 1, 1, 1]
    grown = model.decoder.grow(layout)
    assert grown.position[:, :, -1].tolist() == [[5, 5], [2, 6]]


@torch.no_grad()
def test_text_alone_is_chatglm(shake: Shake) -> None:
    model = small(shake).model.eval()
    ids = torch.tensor([[9, 8, 7, 30, 1, 40, 41]])
    logits = model.text_logits(None, ids)
    alone = model.decoder.logits(model.decoder(TokenBatch(model.decoder.embed(ids), model._layout(ids, None))))
    assert torch.equal(logits, alone)
    hidden = straight_line(model.decoder, model.decoder.embed(ids)[0], torch.ones(7, 7).triu(1).bool() & HIDDEN, PLACES)
    torch.testing.assert_close(logits[0], model.decoder.logits(hidden), atol=1e-4, rtol=1e-4)


HIDDEN = torch.arange(7)[None] >= 4  # sop stands at 4: everybody reads what stands before it
PLACES = torch.tensor([[0, 1, 2, 3, 3, 3, 3], [0, 0, 0, 0, 1, 2, 3]])


# -- rows ----------------------------------------------------------------------------------------------------------


class Bilingual:
    """The embedded tokenizer with a [gMASK] of its own, as ChatGLM's has."""

    def __init__(self) -> None:
        self.plain = named_tokenizer("openmoji-bpe")

    def special_id(self, name: str) -> int | None:
        return 1900 if name == "[gMASK]" else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)


@pytest.mark.parametrize(
    ("name", "ask", "reply"), [("visualglm", "Q:{}\nA:", "\n"), ("visualglm_zh", "问：{}\n答：", "\n")]
)
def test_rows_of_the_release(name: str, ask: str, reply: str) -> None:
    """<img>, 32 slots, </img> and the dialogue, [gMASK], sop, the answer, eop; labels start at sop."""
    tokenizer: Any = Bilingual()
    encode = lambda text: tokenizer.encode([text])[0]  # noqa: E731
    slots = [2000] * 32

    def row(*turns: tuple[str, str | None], images: int = 1) -> tuple[list[int], list[int]]:
        return lay_out(template(name), tokenizer, turns, images, 32, 2000)

    context = [*encode("<img>"), *slots, *encode("</img>" + ask.format("Why?")), 1900]
    ids, labels = row(("Why?", "So"))
    answer = [tokenizer.bos_id, *encode("So"), tokenizer.eos_id]
    assert ids == context + answer
    assert labels == [-100] * len(context) + answer
    assert row(("Why?", None))[0] == [*context, tokenizer.bos_id]
    # history is part of the prefix, and only the last answer starts with sop
    ids, labels = row(("Why?", "So"), ("Sure?", "Yes"))
    text = "</img>" + ask.format("Why?") + "So" + reply + ask.format("Sure?")
    context = [*encode("<img>"), *slots, *encode(text), 1900]
    answer = [tokenizer.bos_id, *encode("Yes"), tokenizer.eos_id]
    assert ids == context + answer
    assert labels == [-100] * len(context) + answer
    assert row(("Why?", None), images=0)[0] == [*encode(ask.format("Why?")), 1900, tokenizer.bos_id]


def test_the_row_does_not_grow_with_the_image(shake: Shake) -> None:
    model = small(shake).model.eval()
    batch = batch_of(model)
    ids, n = batch["input_ids"], model.connector.tokens
    assert n == 5
    assert (ids == model.image_token_id).sum(1).tolist() == [n] * 4
    with torch.no_grad():
        embeds = model._splice(ids, batch["pixel_values"])
    assert embeds.shape[:2] == ids.shape
    bos = (ids == model.tokenizer.bos_id).long()
    assert bos.sum(1).tolist() == [1] * 4
    kept = batch["labels"] != -100
    assert torch.equal(kept.long().argmax(1), bos.argmax(1))  # labels start at sop
    assert bool((kept | ~batch["attention_mask"] | (bos.cumsum(1) == 0)).all())


@torch.no_grad()
def test_scores_of_candidates_over_one_reading_equal_whole_rows(shake: Shake) -> None:
    model = small(shake).model.eval()
    images = [picture(0), picture(1)]
    together = model.score_candidates(images, [TEXTS, TEXTS], ["what is it?"] * 2)
    apart = torch.stack([model.score_text([image] * 4, TEXTS, ["what is it?"] * 4) for image in images])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_writing_over_the_cache_equals_full_passes(beams: int, shake: Shake) -> None:
    model = small(shake).model.eval()
    rows = model.processor.encode_prompts(["what?"], 1)["input_ids"]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    from zoo.sampling.text import Decoding

    found = model.generate_ids(pixels, rows, None, Decoding(max_new_tokens=6, beams=beams), stop_ids=[], pad_id=0)
    ids, scores = rows, torch.zeros(1)
    for _ in range(6):
        log_p = model.text_logits(pixels.repeat(len(ids), 1, 1, 1), ids)[:, -1].log_softmax(-1)
        scores, places = (scores[:, None] + log_p).flatten().topk(beams)
        ids = torch.cat([ids[places // log_p.shape[1]], (places % log_p.shape[1])[:, None]], 1)
    assert torch.equal(found, ids[:1, rows.shape[1] :])


# -- the vision half -----------------------------------------------------------------------------------------------


def sat_names(model: Any, prefix: str) -> dict[str, Tensor]:
    """The model's vision half in SwissArmyTransformer's names."""
    c = model.connector.config
    keymap = visualglm.keymap(model.decoder.config.heads, c.depth, sat=prefix.startswith("mixins"))
    saved, unknown = keymap.save(model.state_dict())
    assert unknown == []
    return {name.removeprefix(prefix): t for name, t in saved.items() if name.startswith(prefix)}


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    p = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (p @ v).transpose(1, 2).flatten(2)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["image_encoder.", "mixins.eva.model."])
def test_vision_half_in_the_names_and_order_of_its_release(prefix: str, shake: Shake) -> None:
    """ViT, ln_vision over all tokens, Q-Former: SwissArmyTransformer's layer_forward, written out.

    Its order "post" norms a layer's input and lets the residual carry that: the first layer's norm is BLIP-2's norm of
    the queries, the final norm is that of the last feed-forward network.
    """
    model = small(shake).model.eval()
    w = sat_names(model, prefix)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def mlp(x: Tensor, name: str) -> Tensor:
        return linear(F.gelu(linear(x, f"{name}.mlp.dense_h_to_4h")), f"{name}.mlp.dense_4h_to_h")

    x = F.conv2d(pixels, w["vit.mixins.patch_embedding.proj.weight"], w["vit.mixins.patch_embedding.proj.bias"], 8)
    cls = w["vit.transformer.word_embeddings.weight"].expand(2, -1, -1)
    x = torch.cat([cls, x.flatten(2).transpose(1, 2)], 1) + w["vit.transformer.position_embeddings.weight"]
    for i in range(2):
        name = f"vit.transformer.layers.{i}"
        q, k, v = linear(norm(x, f"{name}.input_layernorm", 1e-6), f"{name}.attention.query_key_value").chunk(3, -1)
        x = x + linear(attend(q, k, v, 2), f"{name}.attention.dense")
        x = x + mlp(norm(x, f"{name}.post_attention_layernorm", 1e-6), name)
    image = norm(x, "vit.mixins.cls.ln_vision", 1e-5)  # every token, the class token too
    assert image.shape[1] == 17
    x = w["qformer.transformer.word_embeddings.weight"].expand(2, -1, -1)
    for i in range(4):
        name = f"qformer.transformer.layers.{i}"
        a = norm(x, f"{name}.input_layernorm", 1e-12)
        q, k, v = linear(a, f"{name}.attention.query_key_value").chunk(3, -1)
        a = a + linear(attend(q, k, v, 2), f"{name}.attention.dense")
        m = norm(a, f"{name}.post_attention_layernorm", 1e-12)
        if i % 2 == 0:  # is_decoder
            q = linear(m, f"{name}.cross_attention.query")
            k, v = linear(image, f"{name}.cross_attention.key_value").chunk(2, -1)
            m = m + linear(attend(q, k, v, 2), f"{name}.cross_attention.dense")
            m = norm(m, f"{name}.post_cross_attention_layernorm", 1e-12)
        x = m + mlp(m, name)
    x = linear(norm(x, "qformer.transformer.final_layernorm", 1e-12), "glm_proj")
    torch.testing.assert_close(model.image_features(pixels), x, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_ln_vision_is_over_all_tokens_before_the_qformer(shake: Shake) -> None:
    connector = small(shake).model.connector.eval()
    assert connector.ln_vision.eps == 1e-5
    x = torch.randn(1, 17, 24)
    seen: list[Tensor] = []
    handle = connector.ln_vision.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    before = connector(Features(x)).tokens
    handle.remove()
    assert torch.equal(seen[0], x)
    x[:, 0] += torch.randn(24)  # the class token is among them
    assert float((connector(Features(x)).tokens - before).abs().max()) > 1e-4


# -- checkpoints and sizes -----------------------------------------------------------------------------------------


def test_folder_of_the_hub_loads_whole(shake: Shake, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = small(shake).model
    keymap = visualglm.keymap(4, 4)
    saved, unknown = keymap.save(model.state_dict())
    assert unknown == []
    config = {
        "model_type": "chatglm", "hidden_size": 32, "inner_hidden_size": 48, "num_layers": 3, "num_attention_heads": 4,
        "vocab_size": 1024, "max_sequence_length": 128, "bos_token_id": 1, "image_length": 5,
        "eva_config": {
            "num_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "inner_hidden_size": 40,
            "image_size": [32, 32], "patch_size": 8, "layernorm_epsilon": 1e-6,
        },
        "qformer_config": {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 2, "inner_hidden_size": 40},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in saved.items()}, tmp_path / "model.safetensors")
    loaded, recipe, report = load_model(tmp_path)
    assert (recipe.model, report.new, report.ignored) == ("visualglm-6b", [], [])
    own = model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.state_dict().items())


def test_bare_files_by_their_names(shake: Shake) -> None:
    recipe = resolve("visualglm-6b", scale="tiny", values=SIZES)
    model = small(shake).model
    for sat in (False, True):
        state, _ = visualglm.keymap(4, 4, sat=sat).save(model.state_dict())
        official = file_format(recipe, state)
        assert official is not None
        assert official.new == ()
        mapped, unknown = official.keymap.load(state)
        assert (set(mapped), unknown) == (set(model.state_dict()), [])
    language = {k: v for k, v in state.items() if not k.startswith("mixins.eva")}
    official = file_format(recipe, language)
    assert official is not None
    assert official.new == ("encoder.{**}", "connector.{**}")
    assert file_format(recipe, model.state_dict()) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "chatglm"}, "a ChatGLM without eva_config sees no images"),
        ({"model_type": "chatglm", "image_length": 32, "position_encoding_2d": False}, "position_encoding_2d = false"),
        ({"model_type": "chatglm", "eva_config": {"image_size": [224, 448]}}, "expected a square"),
    ],
)
def test_folders_it_does_not_read_are_one_line(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError) as caught:
        load_model(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoder": {"heads": 3}}, "must be a multiple of 4 x heads"),
        ({"decoder": {"sop_id": 5000}}, "sop_id = 5000 must be below vocab_size"),
        ({"wiring": {"template": "visual_glm"}}, "unknown prompt template 'visual_glm'; did you mean visualglm"),
        ({"decoder": {"residual_scal": 1.0}}, "decoder has no field 'residual_scal'"),
        ({"connector": {"queries": 127}}, "image tokens leave no room for text"),
    ],
)
def test_mistakes_are_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        zoo.build("visualglm-6b", scale="tiny", **values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_published_sizes() -> None:
    with torch.device("meta"):
        model: Any = build_module(resolve("visualglm-6b"), 0).model
    count = {name: p.numel() for name, p in model.named_parameters()}
    language = sum(size for name, size in count.items() if name.startswith("decoder."))
    head = count["decoder.lm_head.weight"]
    assert head == 130528 * 4096
    assert round((language - head) / 1e9, 1) == 6.2  # the readme counts the head with the embeddings here
    assert round(sum(count.values()) / 1e9, 1) == 7.8  # and apart from them here
    assert (model.encoder.tokens, model.encoder.width) == (257, 1408)
    assert (model.connector.tokens, model.connector.config.width) == (32, 768)
    assert model.decoder.sop_id == 130004  # without asking a tokenizer
    assert [("c" in block) for block in model.connector.trunk.config.layers] == [True, False] * 6
    assert model.decoder.trunk.config.rope == 128
    assert model.decoder.trunk.config.rope_axes == 2


def test_the_layout_is_shown_as_prefix_and_answer() -> None:
    layout = small().model.layouts()["decoder"]
    assert layout.names == ("before", "image", "text")
    mask = layout.mask()[0, 0]
    assert bool(mask[:6, :6].all())
    assert torch.equal(mask[6:], torch.ones_like(mask).tril()[6:])
    assert not bool(mask[:6, 6:].any())


def test_lora_touches_the_attention_of_layers_0_and_14_alone() -> None:
    pytest.importorskip("peft")
    with torch.device("meta"):
        module: Any = build_module(resolve("visualglm-6b-lora"), 0)
    module.set_stage(0)
    learns = {name for name, p in module.model.named_parameters() if p.requires_grad}
    wanted = {
        f"decoder.trunk.layers.{i}.attn.{part}.lora_{letter}.default.weight"
        for i in (0, 14)
        for part in ("q", "k", "v", "out")
        for letter in "AB"
    }
    assert learns == wanted
    shapes = {tuple(module.model.get_parameter(name).shape) for name in learns}
    assert shapes == {(10, 4096), (4096, 10)}


def test_lora_changes_nothing_at_first_and_then_learns(shake: Shake) -> None:
    pytest.importorskip("peft")
    adapted = {"decoder": {"lora_rank": 3, "lora_alpha": 1.0, "lora_every": 2}}
    plain, module = small(shake), small(**adapted)
    own = {n.replace(".base_layer.", "."): n for n in module.model.state_dict() if ".lora_" not in n}
    state = plain.model.state_dict()
    module.model.load_state_dict({own[name]: tensor for name, tensor in state.items()}, strict=False)
    batch = batch_of(plain.model)
    with torch.no_grad():
        before = plain.model.eval()(batch)["hidden"]
        torch.testing.assert_close(module.model.eval()(batch)["hidden"], before, atol=1e-6, rtol=0)
    module.set_stage(0)
    module.model.decoder.requires_grad_(True)
    loss, _ = module.losses(batch)
    loss.backward()
    layers = module.model.decoder.trunk.layers
    assert torch.count_nonzero(layers[2].attn.q.lora_B["default"].weight.grad) > 0
    assert not hasattr(layers[1].attn.q, "lora_B")
