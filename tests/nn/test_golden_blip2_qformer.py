"""EVA ViT and the Q-Former of BLIP-2 against the released code (LAVIS)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layout import Layout, Segment, lay_out
from zoo.nn import KVCache, PatchEmbedding, TokenEmbedding, Trunk, copy_expert_, resize_positions
from zoo.weights.keymaps import KeyMap, bert, drop, eva, load_into, rename

TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
LOGITS = {"atol": 1e-4, "rtol": 1e-5}
KEYMAP = (
    eva.keymap("vit.", "stem.").under("visual_encoder.")
    + bert.qformer_keymap("qformer.", "embed.", "lm.").under("Qformer.")
    + KeyMap(
        rename("query_tokens", "query.weight", lambda t: t[0], lambda t: t[None]),
        rename("ln_vision.{p}", "ln_vision.{p}"),
        rename("vision_proj.{p}", "vision_proj.{p}"),
        rename("text_proj.{p}", "text_proj.{p}"),
        rename("itm_head.{p}", "itm_head.{p}"),
        drop("temp"),
    )
)


class Head(nn.Module):
    def __init__(self, width: int, vocab: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab))


class Stage1(nn.Module):
    """The first stage of BLIP-2 as its parts and layouts."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, vision = c["qf_hidden"], c["vit_width"]
        ffn = int(vision * c["vit_mlp_ratio"])
        self.stem = PatchEmbedding(vision, c["img_size"], c["patch_size"])
        self.vit = Trunk(eva.trunk_config(width=vision, depth=c["vit_depth_kept"], heads=c["vit_heads"], ffn=ffn))
        self.ln_vision = nn.LayerNorm(vision, eps=1e-5)
        self.query = nn.Embedding(c["num_query"], width)
        self.embed = TokenEmbedding(c["qf_vocab"] + 1, width, positions=c["qf_max_pos"], norm="layer")
        self.qformer = Trunk(
            bert.qformer_config(
                width=width, depth=c["qf_layers"], heads=c["qf_heads"], ffn=c["qf_ffn"], context_width=vision
            )
        )
        self.lm = Head(width, c["qf_vocab"] + 1)
        self.vision_proj, self.text_proj = nn.Linear(width, c["embed_dim"]), nn.Linear(width, c["embed_dim"])
        self.itm_head = nn.Linear(width, 2)

    def queries(self, batch: int) -> Tensor:
        return self.query.weight.expand(batch, -1, -1)

    def rows(self, ids: Tensor) -> Tensor:
        return self.embed(ids, prefix=self.queries(ids.shape[0]))

    def logits(self, hidden: Tensor) -> Tensor:
        hidden = self.lm.norm(F.gelu(self.lm.dense(hidden)))
        return hidden @ self.embed.tokens.weight.T + self.lm.bias


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("blip2_qformer")


@pytest.fixture
def model(g: Any) -> Stage1:
    built = Stage1(g.config).eval()
    load_into(built, g.weights, KEYMAP)
    return built


def queries_and_text(g: Any, real: Tensor, kind: str) -> Layout:
    """The three masks of the first stage, section 3.1 of the paper, as layouts of [queries; text]."""
    count, length = g.config["num_query"], real.shape[1]
    query = Segment("query", count, 1, "full")
    there = torch.cat([torch.ones(len(real), count, dtype=torch.bool), real.bool()], 1)
    if kind == "itm":  # everybody reads everybody
        relation = {("query", "text"): "all", ("text", "query"): "all"}
        return lay_out([query, Segment("text", length, 0, "full")], real=there, relation=relation)
    if kind == "itg":  # text reads queries and earlier text
        return lay_out([query, Segment("text", length)], real=there, relation={("query", "text"): "never"})
    relation = {("query", "text"): "never", ("text", "query"): "never"}  # itc: they do not meet
    return lay_out([query, Segment("text", length, 0, "full")], real=there, relation=relation)


@torch.no_grad()
def test_vision(g: Any, model: Stage1) -> None:
    assert model.vit.config.eps == 1e-6
    assert "layers.0.attn.k.bias" not in model.vit.state_dict()
    tokens = model.vit(model.stem(g.inputs["image"]))
    torch.testing.assert_close(tokens, g.outputs["vit_tokens"], **TOLERANCE)
    torch.testing.assert_close(model.ln_vision(tokens), g.outputs["image_embeds"], **TOLERANCE)
    resized = resize_positions(g.inputs["pos_embed_source"], (4, 4), (2, 2))
    torch.testing.assert_close(resized, g.outputs["pos_embed_interpolated"], **TOLERANCE)


@torch.no_grad()
def test_itc_in_two_passes_and_in_one(g: Any, model: Stage1) -> None:
    image, ids, real = g.outputs["image_embeds"], g.inputs["text_ids"], g.inputs["text_attention_mask"].bool()
    batch, count = len(ids), g.config["num_query"]
    queries = lay_out([Segment("query", count, 1, "full")], batch)
    assert queries.kind == "full"
    seen = model.qformer(model.embed.finish(model.queries(batch)), queries, context=image)
    torch.testing.assert_close(seen, g.outputs["query_output"], **TOLERANCE)
    text = lay_out([Segment("text", ids.shape[1], 0, "full")], real=real)
    additive = g.outputs["mask_itc_text"][:, 0, 0] == 0
    assert torch.equal(text.mask()[:, 0][real], additive[:, None].expand(-1, ids.shape[1], -1)[real])
    read = model.qformer(model.embed(ids), text)
    torch.testing.assert_close(read[real], g.outputs["text_output"][real], **TOLERANCE)
    feats = F.normalize(model.vision_proj(seen), dim=-1)
    torch.testing.assert_close(feats, g.outputs["image_feats"], **TOLERANCE)
    torch.testing.assert_close(F.normalize(model.text_proj(read[:, 0]), dim=-1), g.outputs["text_feat"], **TOLERANCE)

    both = model.qformer(model.rows(ids), queries_and_text(g, real, "itc"), context=image)
    torch.testing.assert_close(both[:, :count], g.outputs["query_output"], **TOLERANCE)
    torch.testing.assert_close(both[:, count:][real], g.outputs["text_output"][real], **TOLERANCE)


@torch.no_grad()
def test_itm(g: Any, model: Stage1) -> None:
    image, ids, real = g.outputs["image_embeds"], g.inputs["text_ids"], g.inputs["text_attention_mask"]
    negative_image, negative_text = g.inputs["neg_image_index"], g.inputs["neg_text_index"]
    ids3, real3 = torch.cat([ids, ids, ids[negative_text]]), torch.cat([real, real, real[negative_text]])
    layout = queries_and_text(g, real3, "itm")
    rows = layout.real
    expected = (g.outputs["mask_itm"][:, 0] == 0).expand(-1, layout.length, -1)
    assert torch.equal(layout.mask()[:, 0][rows], expected[rows])
    hidden = model.qformer(model.rows(ids3), layout, context=torch.cat([image, image[negative_image], image]))
    torch.testing.assert_close(hidden[rows], g.outputs["itm_hidden"][rows], **TOLERANCE)
    logits = model.itm_head(hidden[:, : g.config["num_query"]]).mean(1)
    torch.testing.assert_close(logits, g.outputs["itm_logits"], **LOGITS)


@torch.no_grad()
def test_itg_in_one_pass_and_over_cached_queries(g: Any, model: Stage1) -> None:
    image, ids, real = g.outputs["image_embeds"], g.outputs["itg_decoder_input_ids"], g.inputs["text_attention_mask"]
    count, words = g.config["num_query"], real.bool()
    layout = queries_and_text(g, real, "itg")
    rows = layout.real
    assert torch.equal(layout.mask()[:, 0][rows], (g.outputs["mask_itg_onepass"][:, 0] == 0)[rows])
    text_rows = layout.mask(slice(count, None))[:, 0]
    assert torch.equal(text_rows[words], (g.outputs["mask_itg_cached"][:, 0] == 0)[words])

    hidden = model.qformer(model.rows(ids), layout, context=image)
    torch.testing.assert_close(hidden[:, :count], g.outputs["itg_onepass_query_hidden"], **TOLERANCE)
    torch.testing.assert_close(hidden[:, count:][words], g.outputs["itg_text_hidden"][words], **TOLERANCE)
    torch.testing.assert_close(model.logits(hidden[:, count:])[words], g.outputs["itg_onepass_logits"][words], **LOGITS)

    cache = KVCache()
    model.qformer(model.embed.finish(model.queries(len(ids))), layout.truncate(count), context=image, cache=cache)
    hidden = model.qformer(model.embed(ids), layout, cache=cache)
    torch.testing.assert_close(hidden[words], g.outputs["itg_text_hidden"][words], **TOLERANCE)
    torch.testing.assert_close(model.logits(hidden)[words], g.outputs["itg_logits"][words], **LOGITS)


@torch.no_grad()
def test_cached_greedy_captions(g: Any, model: Stage1) -> None:
    c, image = g.config, g.outputs["image_embeds"]
    batch, cache = len(image), KVCache()
    layout = lay_out(
        [Segment("query", c["num_query"], 1, "full"), Segment("text", 0)], batch, relation={("query", "text"): "never"}
    )
    model.qformer(model.embed.finish(model.queries(batch)), layout, context=image, cache=cache)
    ids = torch.full((batch, 1), c["qf_vocab"])
    done = torch.zeros(batch, dtype=torch.bool)
    while ids.shape[1] < c["gen_max_length"] and not done.all():
        layout = layout.append("text", modality=0)
        place = torch.full((batch, 1), ids.shape[1] - 1)
        hidden = model.qformer(model.embed(ids[:, -1:], position=place), layout, cache=cache)
        new = model.logits(hidden[:, -1]).argmax(-1).masked_fill(done, 0)
        ids, done = torch.cat([ids, new[:, None]], 1), done | (new == c["sep_id"])
    expected = g.outputs["caption_ids_greedy"]
    assert torch.equal(F.pad(ids, (0, expected.shape[1] - ids.shape[1])), expected)


def test_caption_gradients_flow_through_the_cached_queries(g: Any, model: Stage1) -> None:
    ids, layout = g.outputs["itg_decoder_input_ids"], queries_and_text(g, g.inputs["text_attention_mask"], "itg")
    count, image = g.config["num_query"], g.outputs["image_embeds"]
    target = g.outputs["itg_labels"][:, 1:].flatten()

    def gradient(hidden: Tensor) -> Tensor:
        logits = model.logits(hidden)[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, target, label_smoothing=0.1)
        torch.testing.assert_close(loss, g.outputs["loss_lm"], **LOGITS)
        return torch.autograd.grad(loss, model.query.weight)[0]

    one = gradient(model.qformer(model.rows(ids), layout, context=image)[:, count:])
    cache = KVCache()
    model.qformer(model.embed.finish(model.queries(len(ids))), layout.truncate(count), context=image, cache=cache)
    two = gradient(model.qformer(model.embed(ids), layout, cache=cache))
    assert one.abs().max() > 1e-3
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_query_ffn_starts_as_the_text_ffn(g: Any, model: Stage1) -> None:
    copy_expert_(model.qformer, source=0, target=1)
    for layer in model.qformer.layers:
        for text, query in zip(layer.ffn[0].parameters(), layer.ffn[1].parameters(), strict=True):
            assert torch.equal(text, query)
            assert text is not query


def test_saving_gives_the_official_names_back(g: Any, model: Stage1) -> None:
    saved, unknown = KEYMAP.save(model.state_dict())
    assert unknown == []
    assert set(g.weights) - set(saved) == {"temp", "Qformer.bert.embeddings.position_ids"}
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
