"""BEiT-3 through the real loader, wirings and objectives, against numbers of its released code and of timm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo
from zoo.errors import WeightsError
from zoo.models.masked_experts import MaskedExperts
from zoo.objectives.contrastive import ContrastiveConfig
from zoo.objectives.masked_captioning import MaskedCaptioningConfig
from zoo.sampling.text import Decoding

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
GRADIENTS = {"atol": 5e-5, "rtol": 1e-4}
MODELS = {
    "retrieval": "beit3-retrieval",
    "captioning": "beit3-captioning",
    "vqa": "beit3-vqa",
    "nlvr2": "beit3-nlvr2",
    "classification": "beit3-in1k",
}


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("beit3")


def state_of(g: Any, task: str) -> dict[str, Tensor]:
    owned = g.info["weight_owners"][task]
    return {n: t.contiguous() for n, t in g.weights.items() if n.startswith("beit3.") or n in owned}


@pytest.fixture
def load(g: Any, tmp_path: Path) -> Callable[..., Any]:
    """The golden's weights of one task as a bare file, read by ``zoo.from_pretrained``."""

    def loaded(task: str, model: str | None = None, **changes: Any) -> Any:
        file = tmp_path / f"{task}.safetensors"
        save_file(state_of(g, task), file)
        trunk = {"heads": g.config["heads"], **changes.pop("trunk", {})}
        return zoo.from_pretrained(file, model=model or MODELS[task], trunk=trunk, **changes)

    return loaded


@pytest.fixture
def batch(g: Any) -> dict[str, Tensor]:
    return {
        "pixel_values": g.inputs["image"],
        "input_ids": g.inputs["text_ids"],
        "attention_mask": g.inputs["text_padding"] == 0,
    }


@torch.no_grad()
def test_states_of_an_image_a_text_and_a_pair(g: Any, load: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    model = load("captioning").model
    pixels, ids, real = batch.values()
    hidden = g.inputs["vision_masked_position"].bool()
    torch.testing.assert_close(model.read_image(pixels).tokens, g.outputs["vision/hidden"], **TOLERANCE)
    masked = model.read_image(pixels, hidden).tokens
    torch.testing.assert_close(masked, g.outputs["vision/hidden_masked_patches"], **TOLERANCE)
    text = model.read_text(ids, real).tokens
    torch.testing.assert_close(text[real], g.outputs["text/hidden"][real], **TOLERANCE)
    for name, place in (("joint/hidden", None), ("joint/hidden_masked_patches", hidden)):
        image, text = model.read_pair(model.trunk.embed_image(pixels, place), model.trunk.embed_text(ids), real)
        expected = g.outputs[name]
        torch.testing.assert_close(image.tokens, expected[:, : model.trunk.tokens], **TOLERANCE)
        torch.testing.assert_close(text.tokens[real], expected[:, model.trunk.tokens :][real], **TOLERANCE)
        assert torch.equal(image.pooled, image.tokens[:, 0])  # the pair's first row is the image's class token


def test_retrieval_its_loss_and_gradients(g: Any, load: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    model = load("retrieval").model
    out = model(batch)
    torch.testing.assert_close(out["image_embeds"], g.outputs["retrieval/vision_cls"], **TOLERANCE)
    torch.testing.assert_close(out["text_embeds"], g.outputs["retrieval/language_cls"], **TOLERANCE)
    loss, _ = ContrastiveConfig().build()(model, batch, out)
    torch.testing.assert_close(loss, g.outputs["retrieval/loss"], **TOLERANCE)
    loss.backward()
    from zoo.weights.keymaps import beit3

    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    official, _ = beit3.model_keymap("masked").save(found)
    wanted = {n.removeprefix("grad_retrieval/"): t for n, t in g.outputs.items() if n.startswith("grad_")}
    assert len(wanted) == 7
    for name, expected in wanted.items():
        torch.testing.assert_close(official[name], expected, **GRADIENTS)
    for table in (model.trunk.stem.positions.grad[0], model.trunk.text.positions.weight.grad):
        assert torch.count_nonzero(table[:2]) == 0  # the first token of either kind reads row 2
        assert torch.count_nonzero(table[2]) > 0


@torch.no_grad()
def test_heads_of_the_fine_tuned_files(g: Any, load: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    pixels, ids, real = batch.values()
    vqa = load("vqa").model
    torch.testing.assert_close(vqa.label_logits(pixels, ids, real), g.outputs["vqa/logits"], **TOLERANCE)
    in1k = load("classification").model
    torch.testing.assert_close(in1k.label_logits(pixels), g.outputs["classification/logits"], **TOLERANCE)
    nlvr2 = load("nlvr2").model
    both = torch.stack([pixels, g.inputs["image_b"]], 1)
    torch.testing.assert_close(nlvr2.label_logits(both, ids, real), g.outputs["nlvr2/logits"], **TOLERANCE)


@torch.no_grad()
def test_caption_logits_and_loss(g: Any, load: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    model = load("captioning").model
    ids, real = g.inputs["caption_masked_ids"], batch["attention_mask"]
    image = model.trunk.embed_image(batch["pixel_values"])
    _, text = model.read_pair(image, model.trunk.embed_text(ids), real, causal=True)
    torch.testing.assert_close(
        model.word_logits(text.tokens)[real], g.outputs["captioning/logits_all"][real], **TOLERANCE
    )
    chosen = g.inputs["language_masked_pos"].bool()
    labels = batch["input_ids"].masked_fill(~chosen, -100)
    drawn = {**batch, "input_ids": ids, "masked_ids": ids, "masked_labels": labels}
    objective = MaskedCaptioningConfig(drop_after=2).build()
    loss, report = objective(model, drawn, model(drawn))
    torch.testing.assert_close(loss, g.outputs["captioning/loss"], **TOLERANCE)
    assert int(report["words"]) == int(chosen.sum())
    for _ in range(3):
        objective.after_step(model)
    loss, _ = objective(model, drawn, model(drawn))
    torch.testing.assert_close(loss, g.outputs["captioning/loss_drop_worst"], **TOLERANCE)


def special(g: Any) -> dict[str, int]:
    c = g.config
    return {"cls": c["bos_id"], "pad": c["pad_id"], "eos": c["sep_id"], "mask": c["mask_id"]}


def test_captions_are_those_of_the_release(g: Any, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    c = g.config
    model = load("captioning").model
    monkeypatch.setattr(MaskedExperts, "special_ids", property(lambda self: special(g)))
    begin = torch.full((c["batch"], 1), c["bos_id"])
    limit = c["max_len"] - 3  # behind bos; the release throws the word at its limit away, then writes mask and sep
    ids = model.generate_ids(g.inputs["image"], begin, Decoding(max_new_tokens=limit))
    for row, wanted in zip(ids.tolist(), g.outputs["captioning/beam1_ids"].tolist(), strict=True):
        words = [i for i in wanted if i not in special(g).values()]
        assert [i for i in row if i not in special(g).values()] == words


def test_beams_of_the_release(g: Any, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    c = g.config
    model = load("captioning").model
    monkeypatch.setattr(MaskedExperts, "special_ids", property(lambda self: special(g)))
    for beams in (1, 3):
        captions, scores = model.captions_as_released(
            g.inputs["image"], torch.full((c["batch"], 1), c["bos_id"]), beams=beams, max_length=c["max_len"] - 1
        )
        for words, wanted in zip(captions, g.outputs[f"captioning/beam{beams}_ids"].tolist(), strict=True):
            row = [c["bos_id"], *words, c["mask_id"], c["sep_id"]]
            assert row + [c["pad_id"]] * (c["max_len"] - len(row)) == wanted
        if beams == 3:
            torch.testing.assert_close(scores, g.outputs["captioning/beam3_logprob"], **TOLERANCE)


@torch.no_grad()
def test_cached_captions_equal_the_whole_sequence_read_anew(
    g: Any, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    c = g.config
    model = load("captioning").model
    monkeypatch.setattr(MaskedExperts, "special_ids", property(lambda self: special(g)))
    ids = torch.full((c["batch"], 1), c["bos_id"])
    cached = model.generate_ids(g.inputs["image"], ids, Decoding(max_new_tokens=6, min_new_tokens=6))
    image = model.trunk.embed_image(g.inputs["image"])
    for step in range(6):
        whole = torch.cat([ids, torch.full((c["batch"], 1), c["mask_id"])], 1)
        _, text = model.read_pair(image, model.trunk.embed_text(whole), causal=True)
        logits = model.word_logits(text.tokens[:, -1])
        logits[:, c["sep_id"]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(ids[:, 1:], cached[:, : step + 1])


@pytest.mark.parametrize("task", list(MODELS))
def test_saving_gives_the_official_names_back(g: Any, load: Callable[..., Any], task: str) -> None:
    from zoo.weights.keymaps import beit3

    module = load(task)
    kind = getattr(module.recipe.wiring[1], "reads", "masked")
    saved, unknown = beit3.model_keymap(kind).save(module.model.state_dict())
    official = state_of(g, task)
    for name, tensor in official.items():
        assert torch.equal(saved[name], tensor)
    new = set(module.load_report.new)
    assert all(name in new for name in unknown if not name.startswith("image_tokenizer"))
    heads = {"vision_head", "language_head", "logit_scale", "mlm_head", "mim_head"}
    assert {name.split(".")[0] for name in set(saved) - set(official)} <= heads
    assert task not in ("vqa", "nlvr2", "classification", "retrieval") or not new


def test_pretraining_file_fills_both_heads(g: Any, tmp_path: Path) -> None:
    state = state_of(g, "captioning")
    width = g.config["width"]
    state |= {"mim_head.weight": torch.randn(40, width), "mim_head.bias": torch.randn(40)}
    torch.save({"model": state}, tmp_path / "beit3_base_patch16_224.pth")
    heads = {"heads": g.config["heads"]}
    module = zoo.from_pretrained(tmp_path / "beit3_base_patch16_224.pth", model="beit3", trunk=heads)
    assert torch.equal(module.model.codes.weight, state["mim_head.weight"])
    assert torch.equal(module.model.words.decoder.bias, state["mlm_head.bias"])
    assert module.model.image_tokenizer.codes == 40
    tops = {name.split(".")[0] for name in module.load_report.new}
    assert tops == {"contrast", "image_tokenizer", "logit_scale"}


def test_foreign_and_damaged_files_are_refused(g: Any, load: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="model='beit3-vqa'"):
        load("vqa", model="beit3")
    file = tmp_path / "beit3.safetensors"
    save_file(state_of(g, "retrieval"), file)
    with pytest.raises(WeightsError, match=r"trunk=\{'heads'"):
        zoo.from_pretrained(file, model="beit3-retrieval")
    state = state_of(g, "retrieval")
    del state["beit3.encoder.embed_positions.A.weight"]
    save_file(state, file)
    with pytest.raises(WeightsError, match="is it whole"):
        zoo.from_pretrained(file, model="beit3-retrieval", trunk={"heads": 4})


@torch.no_grad()
def test_another_image_size_keeps_three_rows_and_says_so(g: Any, load: Callable[..., Any]) -> None:
    size = 2 * g.config["image"]
    module = load("retrieval", trunk={"image_size": size})
    table, stored = module.model.trunk.stem.positions[0], g.weights["beit3.encoder.embed_positions.A.weight"]
    assert torch.equal(table[:3], stored[:3])
    side = g.config["image"] // g.config["patch"]
    grid = stored[3:].view(1, side, side, -1).permute(0, 3, 1, 2)
    larger = F.interpolate(grid, scale_factor=2, mode="bicubic", align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(table[3:], larger, **TOLERANCE)
    assert "trunk.stem.positions" in module.load_report.resized


@torch.no_grad()
def test_image_path_equals_timm(shake: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    from zoo.torchvision_ops import ensure

    ensure()
    import timm
    from timm.models.vision_transformer import VisionTransformer

    assert "beit3_base_patch16_224" in timm.list_models("beit3*")
    torch.manual_seed(0)
    reference = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=12, num_classes=7, global_pool="avg",
        scale_attn_norm=True, scale_mlp_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5), fc_norm=True,
    )  # fmt: skip
    reference = shake(reference).eval()
    module = zoo.build(
        "beit3-in1k",
        trunk={
            "image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "heads": 12, "ffn": 192, "vocab_size": 20,
        },
        wiring={"classes": 7},
    ).eval()  # fmt: skip
    theirs = reference.state_dict()
    official: dict[str, Tensor] = {}
    pairs = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm", "attn.norm": "self_attn.inner_attn_ln"}
    pairs |= {"attn.proj": "self_attn.out_proj", "mlp.fc1": "ffn.fc1", "mlp.fc2": "ffn.fc2"}
    pairs |= {"mlp.norm": "ffn.ffn_layernorm"}
    for i in range(3):
        for kind in ("weight", "bias"):
            for new, old in pairs.items():
                stem, _, last = old.rpartition(".")
                inner = f"{stem}.A.{last}" if stem == "ffn" else f"{old}.A"
                official[f"beit3.encoder.layers.{i}.{inner}.{kind}"] = theirs[f"blocks.{i}.{new}.{kind}"]
            for part, rows in zip("qkv", theirs[f"blocks.{i}.attn.qkv.{kind}"].chunk(3), strict=True):
                official[f"beit3.encoder.layers.{i}.self_attn.{part}_proj.A.{kind}"] = rows
    table = F.pad(theirs["pos_embed"][0], (0, 0, 2, 0))
    official |= {"beit3.encoder.embed_positions.A.weight": table, "beit3.vision_embed.cls_token": theirs["cls_token"]}
    official |= {f"beit3.vision_embed.proj.{k}": theirs[f"patch_embed.proj.{k}"] for k in ("weight", "bias")}
    official |= {n: theirs[n] for n in ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")}
    from zoo.weights.keymaps import beit3

    ours, unknown = beit3.model_keymap("image").load(official)
    assert unknown == []
    report = module.model.load_state_dict(ours, strict=False)
    assert report.unexpected_keys == []
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(module.model.label_logits(pixels), reference(pixels), **TOLERANCE)
