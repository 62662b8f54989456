"""BLIP-2's first stage against the released code, its file read by the real loader: losses, gradients, negatives,
captions, re-ranking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.errors import WeightsError
from zoo.evaluation.metrics import similarity
from zoo.module import ZooModule
from zoo.part import Features
from zoo.recipe import resolve
from zoo.sampling.text import Decoding
from zoo.weights.formats import file_format
from zoo.weights.keymaps import blip2_stage1 as maps

CLOSE = {"atol": 2e-5, "rtol": 1e-5}
LOGITS = {"atol": 1e-4, "rtol": 1e-5}
LOSSES = {"contrastive": "itc", "matching": "itm", "grounded-text": "lm"}


class Tokens:
    """The golden's ids, which stand for no text."""

    def __init__(self, c: dict[str, Any]) -> None:
        self.bos_id, self.eos_id, self.pad_id = c["cls_id"], c["sep_id"], 0
        self.vocab_size, self.image_token_id = c["qf_vocab"], None


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("blip2_qformer")


@pytest.fixture
def module(g: Any, tmp_path: Path) -> ZooModule:
    """The golden's weights, written as the release writes them and read back; heads cannot be seen in tensors."""
    path = tmp_path / "model.pth"
    torch.save({"model": dict(g.weights)}, path)
    heads = {"encoder": {"heads": g.config["vit_heads"]}, "connector": {"heads": g.config["qf_heads"]}}
    loaded = zoo.from_pretrained(path, model="blip2", **heads)
    assert not loaded.load_report.new
    assert not loaded.load_report.ignored
    loaded.model.tokenizer = Tokens(g.config)
    return loaded


def batch_of(g: Any, prefix: str = "") -> dict[str, Tensor]:
    i = g.inputs
    batch = {
        "pixel_values": i["image"],
        "input_ids": i["text_ids"],
        "attention_mask": i["text_attention_mask"].bool(),
        "negative_images": i[f"{prefix}neg_image_index"],
        "negative_texts": i[f"{prefix}neg_text_index"],
    }
    return {**batch, "image_ids": i["image_id"].flatten()} if prefix else batch


def losses(module: ZooModule, batch: dict[str, Tensor], outputs: Any) -> dict[str, Tensor]:
    return {name: module.objectives[name](module.model, batch, outputs)[0] for name in LOSSES}  # type: ignore[operator]


def test_step(g: Any, module: ZooModule) -> None:
    model: Any = module.model
    batch = batch_of(g)
    outputs = model(batch)
    for name, key in (
        ("image_tokens", "vit_tokens"),
        ("query_states", "query_output"),
        ("image_embeds", "image_feats"),
        ("text_embeds", "text_feat"),
    ):
        torch.testing.assert_close(outputs[name].detach(), g.outputs[key], **CLOSE)
    scale = model.logit_scale.exp().detach()
    images, texts = outputs["image_embeds"].detach(), outputs["text_embeds"].detach()
    torch.testing.assert_close(scale * similarity(images, texts), g.outputs["sim_i2t"], **CLOSE)
    torch.testing.assert_close(scale * similarity(texts, images), g.outputs["sim_t2i"], **CLOSE)
    real = batch["attention_mask"]
    hidden = outputs["writer_hidden"].detach()
    torch.testing.assert_close(hidden[real], g.outputs["itg_text_hidden"][real], **CLOSE)
    torch.testing.assert_close(model.writer.logits(hidden)[real], g.outputs["itg_logits"][real], **LOGITS)
    assert torch.equal(model.started(batch["input_ids"]), g.outputs["itg_decoder_input_ids"])
    assert torch.equal(outputs["writer_targets"], F.pad(g.outputs["itg_labels"][:, 1:], (0, 1), value=-100))
    found = losses(module, batch, outputs)
    for name, key in LOSSES.items():
        torch.testing.assert_close(found[name].detach(), g.outputs[f"loss_{key}"], **CLOSE)
    total, report = module.eval().losses(batch)
    torch.testing.assert_close(total.detach(), g.outputs["loss"], **CLOSE)
    assert {"contrastive", "matching", "grounded-text", "matching/accuracy"} <= set(report)
    total.backward()  # type: ignore[no-untyped-call]
    named = dict(model.named_parameters())
    official, unknown = maps.lavis(2, 3).save(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
    )
    assert not unknown
    gradients = {n.removeprefix("grad/"): t for n, t in g.outputs.items() if n.startswith("grad/")}
    assert len(gradients) == 10
    for name, gradient in gradients.items():
        torch.testing.assert_close(official[name], gradient, **LOGITS)
    assert all(p.grad is None for p in model.encoder.parameters())


def test_negatives_are_drawn_by_similarity(g: Any, module: ZooModule) -> None:
    matching: Any = module.objectives["matching"]
    for prefix, of in (("", ""), ("imgid_", "imgid_")):
        batch = batch_of(g, prefix)
        with torch.no_grad():
            outputs = module.model(batch)
            found = matching.weights(batch, outputs)
        for weights, way in zip(found, ("t2i", "i2t"), strict=True):
            torch.testing.assert_close(weights, g.outputs[f"{of}neg_weights_{way}"], **CLOSE)
            assert not weights.diagonal().any()
    same = batch["image_ids"][:, None] == batch["image_ids"]
    assert int(same.sum()) > len(same)
    assert not found[0][same].any()


def test_step_that_knows_whose_image_it_is(g: Any, module: ZooModule) -> None:
    batch = batch_of(g, "imgid_")
    with torch.no_grad():
        found = losses(module, batch, module.model(batch))
    for name, key in (("contrastive", "itc"), ("matching", "itm")):
        torch.testing.assert_close(found[name], g.outputs[f"imgid_loss_{key}"], **CLOSE)
    torch.testing.assert_close(sum(found.values()), g.outputs["imgid_loss"], **CLOSE)


@torch.no_grad()
def test_captions(g: Any, module: ZooModule) -> None:
    c, model = g.config, module.model
    tokens, _ = model.read(g.inputs["image"])
    begun = torch.full((len(tokens), 1), c["qf_vocab"])
    assert model.start_id == c["qf_vocab"]
    for name, least in (("caption_ids_greedy", 1), ("caption_ids_greedy_minlen", c["gen_min_length"])):
        decoding = Decoding(max_new_tokens=c["gen_max_length"] - 1, min_new_tokens=least - 1)
        ids = torch.cat([begun, model.write_ids(tokens, begun, decoding=decoding)], 1)
        wanted = g.outputs[name]
        assert torch.equal(F.pad(ids, (0, wanted.shape[1] - ids.shape[1])), wanted)
    assert not torch.equal(g.outputs["caption_ids_greedy"], g.outputs["caption_ids_greedy_minlen"])
    beams = model.write_ids(tokens, begun, decoding=Decoding(max_new_tokens=6, beams=3))
    alone = model.write_ids(tokens[:1], begun[:1], decoding=Decoding(max_new_tokens=6, beams=3))
    assert torch.equal(beams[:1, : alone.shape[1]], alone)


@torch.no_grad()
def test_candidates_ordered_again(g: Any, module: ZooModule) -> None:
    model: Any = module.model
    ids, real = g.inputs["retrieval_text_ids"], g.inputs["retrieval_text_attention_mask"].bool()
    tokens = model.encode_images(g.inputs["image"]).tokens
    images = F.normalize(model.image_features(g.inputs["image"]), dim=-1)
    cosine = similarity(images, F.normalize(model.text_features(ids, real), dim=-1))  # [B, Nt]
    pairs = torch.cartesian_prod(torch.arange(len(tokens)), torch.arange(len(ids)))
    fused = model.fuse(Features(tokens), ids[pairs[:, 1]], real[pairs[:, 1]], rows=pairs[:, 0])
    scores = model.matching_logits(fused)[:, 1].view_as(cosine) + cosine
    for name, wanted, dim in (
        ("i2t", g.outputs["retrieval_score_i2t"], 1),
        ("t2i", g.outputs["retrieval_score_t2i"].T, 0),
    ):
        best = torch.zeros_like(cosine, dtype=torch.bool)
        best.scatter_(dim, cosine.topk(g.info["k_test"], dim=dim).indices, True)
        assert torch.equal(best, wanted != -100), name
        torch.testing.assert_close(torch.where(best, scores, -100.0), wanted, **LOGITS)


def test_last_block_of_the_tower_is_dropped(g: Any, golden: Callable[[str], Any]) -> None:
    dropped = {n.removeprefix("dropped_block/"): t for n, t in g.inputs.items() if n.startswith("dropped_block/")}
    assert dropped
    mapped, unknown = maps.lavis(2, 3).load({**g.weights, **dropped})
    assert not unknown
    assert not any(".layers.2." in name for name in mapped if name.startswith("encoder."))
    assert any(".layers.1." in name for name in mapped if name.startswith("encoder."))
    for model, width, tower, blocks in (
        ("blip2", 1408, "blocks", 40),
        ("blip2-vit-l", 1024, "transformer.resblocks", 24),
    ):
        clip = model == "blip2-vit-l"
        with torch.device("meta"):
            state = {n: torch.empty(t.shape) for n, t in g.weights.items() if not n.startswith("visual_encoder.")}
            state["visual_encoder." + ("conv1.weight" if clip else "patch_embed.proj.weight")] = torch.empty(
                width, 3, 14, 14
            )
            state["visual_encoder." + ("positional_embedding" if clip else "pos_embed")] = torch.empty(257, width)
            for i in range(blocks):
                up = "mlp.c_fc.weight" if clip else "mlp.fc1.weight"
                state[f"visual_encoder.{tower}.{i}.{up}"] = torch.empty(6144 if not clip else 4096, width)
        official = file_format(resolve(model), state)
        assert official is not None
        encoder: Any = official.recipe.parts["encoder"][1]
        assert encoder == resolve(model).parts["encoder"][1]
        ours = official.keymap.load({n: t for n, t in state.items() if "Qformer.cls" not in n})[0]
        kept = {
            int(n.split(".")[3 if not clip else 4])
            for n in ours
            if (".layers." in n and n.startswith("encoder")) or "resblocks" in n
        }
        assert kept == set(range(blocks - 1))


def test_a_file_of_stage_two_is_refused_in_one_line(g: Any, tmp_path: Path) -> None:
    state = {n: t for n, t in g.weights.items() if "embeddings.word" not in n and "cls" not in n}
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"no Q-Former with a text branch.*model=blip2-opt"):
        zoo.from_pretrained(tmp_path / "model.pth", model="blip2")
    torch.save({"model": dict(g.weights)}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"do not tell encoder\.heads"):
        zoo.from_pretrained(tmp_path / "model.pth", model="blip2")


def test_stage_two_starts_from_the_released_file(g: Any, module: ZooModule, tmp_path: Path) -> None:
    first: Any = module.recipe.parts["encoder"][1]
    sizes = ("width", "depth", "heads", "ffn", "image_size", "patch_size")
    encoder = {name: getattr(first, name) for name in sizes}
    qformer: Any = module.recipe.parts["connector"][1]
    connector = {name: getattr(qformer, name) for name in ("queries", "width", "depth", "heads", "ffn", "cross_every")}
    decoder = {"width": 32, "depth": 1, "heads": 4, "ffn": 32}
    path = tmp_path / "model.pth"  # written for the first stage
    second = zoo.build("blip2-opt", scale="tiny", encoder=encoder, connector=connector, decoder=decoder, init=path)
    report: Any = second.load_report
    assert report.started_new == ("connector.proj", "decoder")
    assert {"temp", "itm_head", "Qformer.bert.encoder.layer.*.intermediate.dense"} <= set(report.dropped)
    model: Any = second.eval().model
    with torch.no_grad():
        states = model.connector.hidden(model.encode_images(g.inputs["image"]))
    torch.testing.assert_close(states, g.outputs["query_output"], **CLOSE)
