"""BLIP against its released code: encoder and decoder of one BERT, ITC, ITM, captions over a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError, WeightsError
from zoo.layout import Layout, Segment, lay_out
from zoo.nn import KVCache, MLMHead, PatchEmbedding, TokenEmbedding, Trunk, share_
from zoo.weights.keymaps import bert, blip, load_into, vit

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


class BLIP(nn.Module):
    """The pre-training model as its parts."""

    def __init__(self, c: dict[str, Any], bert_config: dict[str, Any]) -> None:
        super().__init__()
        width, vision = c["text_width"], c["vision_width"]
        self.stem = PatchEmbedding(vision, c["image"], c["patch"])
        self.vit = Trunk(vit.trunk_config(width=vision, depth=c["vision_layers"], heads=c["vision_heads"]))
        config = bert.trunk_config(bert_config, context_width=vision)
        self.encoder, self.decoder = Trunk(config), Trunk(config)
        share_(self.decoder, self.encoder)
        rows = bert_config["max_position_embeddings"]
        self.embed = TokenEmbedding(c["vocab_size"], width, positions=rows, norm="layer")
        self.lm = MLMHead(width, c["vocab_size"])
        self.vision_proj, self.text_proj = nn.Linear(vision, c["embed_dim"]), nn.Linear(width, c["embed_dim"])
        self.itm_head, self.temp = nn.Linear(width, 2), nn.Parameter(torch.zeros(()))

    def image(self, pixels: Tensor) -> Tensor:
        return self.vit(self.stem(pixels))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm(hidden, self.embed.tokens.weight)


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("blip")


@pytest.fixture
def model(g: Any) -> BLIP:
    built = BLIP(g.config, g.info["bert_config"]).eval()
    load_into(built, g.weights, blip.keymap(), allow_ignored=blip.MOMENTUM)
    return built


def words(real: Tensor, attends: str = "full") -> Layout:
    return lay_out([Segment("text", real.shape[1], attends=attends)], real=real)


def started(ids: Tensor, first: int) -> Tensor:
    return torch.cat([torch.full_like(ids[:, :1], first), ids[:, 1:]], 1)


def test_eps_and_shared_units(model: BLIP) -> None:
    assert model.vit.config.eps == 1e-6
    assert {module.eps for module in model.encoder.modules() if isinstance(module, nn.LayerNorm)} == {1e-12}
    assert model.embed.norm.eps == model.lm.norm.eps == 1e-12
    for mine, other in zip(model.decoder.layers, model.encoder.layers, strict=True):
        assert mine.cross is other.cross
        assert mine.ffn is other.ffn
        assert not torch.equal(mine.attn.q.weight, other.attn.q.weight)


@torch.no_grad()
def test_itc(g: Any, model: BLIP) -> None:
    image, real = model.image(g.inputs["image"]), g.inputs["attention_mask"].bool()
    torch.testing.assert_close(image, g.outputs["image_embeds"], **TOLERANCE)
    text = model.encoder(model.embed(g.inputs["input_ids"]), words(real))
    torch.testing.assert_close(text[real], g.outputs["text_hidden"][real], **TOLERANCE)
    image_feat = F.normalize(model.vision_proj(image[:, 0]), dim=-1)
    text_feat = F.normalize(model.text_proj(text[:, 0]), dim=-1)
    torch.testing.assert_close(image_feat, g.outputs["image_feat"], **TOLERANCE)
    torch.testing.assert_close(text_feat, g.outputs["text_feat"], **TOLERANCE)
    torch.testing.assert_close(image_feat @ text_feat.T, g.outputs["blip_itm/itc_similarity"], **TOLERANCE)


@torch.no_grad()
def test_itm(g: Any, model: BLIP) -> None:
    image, real = model.image(g.inputs["image"]), g.inputs["attention_mask"].bool()
    ids = started(g.inputs["input_ids"], g.config["enc_id"])
    assert torch.equal(ids, g.outputs["encoder_input_ids"])
    other_image, other_text = g.inputs["itm_image_neg_idx"], g.inputs["itm_text_neg_idx"]
    ids3, real3 = torch.cat([ids, ids, ids[other_text]]), torch.cat([real, real, real[other_text]])
    hidden = model.encoder(model.embed(ids3), words(real3), context=torch.cat([image, image[other_image], image]))
    torch.testing.assert_close(hidden[: len(ids)][real], g.outputs["multimodal_hidden_pos"][real], **TOLERANCE)
    logits = model.itm_head(hidden[:, 0])
    torch.testing.assert_close(logits, g.outputs["itm_logits"], **TOLERANCE)
    torch.testing.assert_close(F.cross_entropy(logits, g.outputs["itm_labels"]), g.outputs["loss_itm"], **TOLERANCE)
    with_cls = model.encoder(model.embed(g.inputs["input_ids"]), words(real), context=image)
    torch.testing.assert_close(model.itm_head(with_cls[:, 0]), g.outputs["blip_itm/itm_logits_cls_slot0"], **TOLERANCE)
    for i, one in enumerate(image):  # every image with every text, as retrieval scores them
        pairs = model.encoder(model.embed(ids), words(real), context=one.expand(len(ids), -1, -1))
        scores = model.itm_head(pairs[:, 0])[:, 1]
        torch.testing.assert_close(scores, g.outputs["retrieval/itm_logit1"][i], **TOLERANCE)


@torch.no_grad()
def test_decoder_logits(g: Any, model: BLIP) -> None:
    image = model.image(g.inputs["image"])
    for name, wanted in (("", "lm_logits"), ("caption_", "caption/lm_logits")):
        ids = started(g.inputs[f"{name}input_ids"], g.config["dec_id"])
        real = g.inputs[f"{name}attention_mask"].bool()
        layout = words(real, "causal")
        assert layout.kind == "causal"
        logits = model.logits(model.decoder(model.embed(ids), layout, context=image))
        torch.testing.assert_close(logits[real], g.outputs[wanted][real], **TOLERANCE)
        targets = g.outputs["decoder_targets" if not name else "caption/targets"][:, 1:].flatten()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, label_smoothing=0.1)
        torch.testing.assert_close(loss, g.outputs["loss_lm" if not name else "caption/loss"], **TOLERANCE)


@torch.no_grad()
def test_cached_greedy_captions(g: Any, model: BLIP) -> None:
    c, image = g.config, model.image(g.inputs["image"])
    ids = torch.tensor([[c["dec_id"], *c["prompt_words"]]]).repeat(len(image), 1)
    cache, layout = KVCache(), lay_out([Segment("text", ids.shape[1])], len(image))
    done, new = torch.zeros(len(image), dtype=torch.bool), ids
    while ids.shape[1] < c["gen_max"] and not done.all():
        place = torch.arange(ids.shape[1] - new.shape[1], ids.shape[1])[None]
        hidden = model.decoder(model.embed(new, position=place), layout, context=image, cache=cache)
        scores = model.logits(hidden[:, -1])
        if ids.shape[1] < c["gen_min"]:
            scores[:, c["sep_id"]] = -torch.inf
        new = scores.argmax(-1, keepdim=True).masked_fill(done[:, None], c["pad_id"])
        ids, done = torch.cat([ids, new], 1), done | (new[:, 0] == c["sep_id"])
        layout = layout.append("text")
    assert torch.equal(
        F.pad(ids, (0, c["gen_max"] - ids.shape[1]), value=c["pad_id"]), g.outputs["generate/greedy_ids"]
    )


@torch.no_grad()
def test_momentum_copies(g: Any, model: BLIP) -> None:
    """The copies load through the same map; the features come after one step of the moving average."""
    slow = BLIP(g.config, g.info["bert_config"]).eval()
    parts = ("stem", "vit", "encoder", "embed", "vision_proj", "text_proj")
    momentum = blip.encoder_keymap("_m").load(g.weights)[0]
    assert set(momentum) == {name for name in slow.state_dict() if name.split(".")[0] in parts}
    slow.load_state_dict(momentum, strict=False)
    saved, _ = blip.encoder_keymap("_m").save(slow.state_dict())
    assert set(saved) == {name for name in g.weights if "_m." in name}
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
    online = dict(model.named_parameters())
    for name, parameter in slow.named_parameters():
        parameter.lerp_(online[name], 1 - g.config["momentum"])
    image, real = slow.image(g.inputs["image"]), g.inputs["attention_mask"].bool()
    text = slow.encoder(slow.embed(g.inputs["input_ids"]), words(real))
    image_feat = F.normalize(slow.vision_proj(image[:, 0]), dim=-1)
    torch.testing.assert_close(image_feat, g.outputs["image_feat_m"], **TOLERANCE)
    torch.testing.assert_close(F.normalize(slow.text_proj(text[:, 0]), dim=-1), g.outputs["text_feat_m"], **TOLERANCE)


def test_saving_gives_the_official_names_back(g: Any, model: BLIP) -> None:
    saved, unknown = blip.keymap().save(model.state_dict())
    assert unknown == []
    left = {name for name in g.weights if name not in saved}
    assert {name for name in left if "_m." not in name} == {"image_queue", "text_queue", "queue_ptr"}
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)


@pytest.mark.parametrize("part", ["text_encoder", "text_decoder"])
def test_one_stack_alone_has_a_map(g: Any, model: BLIP, part: str) -> None:
    keymap = blip.encoder_keymap() if part == "text_encoder" else blip.decoder_keymap()
    state = {name: t for name, t in g.weights.items() if name.startswith(("visual_encoder.", part + "."))}
    mapped, unknown = keymap.load(state)
    own = model.state_dict()
    assert unknown == []
    assert all(torch.equal(tensor, own[name]) for name, tensor in mapped.items())
    assert keymap.save(mapped)[0].keys() == state.keys()


def test_stacks_that_differ_are_refused(g: Any, model: BLIP) -> None:
    changed = dict(g.weights)
    name = "text_decoder.bert.encoder.layer.0.crossattention.self.value.weight"
    changed[name] = changed[name] + 1
    with pytest.raises(WeightsError, match=r"value\.weight differs"):
        blip.keymap().load(changed)
    state = dict(model.state_dict())
    state["decoder.layers.0.ffn.up.bias"] = state["decoder.layers.0.ffn.up.bias"] + 1
    with pytest.raises(WeightsError, match="one parameter"):
        blip.keymap().save(state)


def test_trunks_that_do_not_match_cannot_share(g: Any) -> None:
    config = bert.trunk_config(g.info["bert_config"], context_width=g.config["vision_width"])
    text = bert.trunk_config({**g.info["bert_config"], "add_cross_attention": False})
    with pytest.raises(ConfigError, match="cannot share"):
        share_(Trunk(config), Trunk(replace(config, depth=1, blocks=("scf",))))
    with pytest.raises(ConfigError, match="no unit 'cross'"):
        share_(Trunk(config), Trunk(text))
