"""Checkpoints of LlamaGen, Show-o and Chameleon, and of the text models they start from, in their own layouts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo.errors import WeightsError
from zoo.weights.files import locate
from zoo.weights.formats import llamagen
from zoo.weights.start import start_from

TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
SMALL_VQ: dict[str, Any] = {"width": 64, "groups": 4, "encoder_blocks": [1] * 5, "decoder_blocks": [1] * 5}


# -- LlamaGen ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def released(golden: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A file as LlamaGen's training writes it, with the golden's weights."""
    g = golden("llamagen")
    monkeypatch.setitem(llamagen.HEADS, g.config["dim"], g.config["n_head"])

    def written(kind: str, *, wrapped: str = "model") -> Path:
        state = {name.removeprefix(f"{kind}/"): t for name, t in g.weights.items() if name.startswith(f"{kind}/")}
        content: dict[str, Any] = {wrapped: state, "steps": 3, "args": argparse.Namespace(lr=1e-4)}
        path = tmp_path / f"{kind}_B_256.pt"
        torch.save(content if wrapped else state, path)
        return path

    return written


IMAGES = {"image_tokenizer": {**SMALL_VQ, "image_size": 64}}
CAPTIONS = {"text_encoder": {"depth": 1, "heads": 2, "ffn": 16, "vocab_size": 64}}


@pytest.mark.parametrize("wrapped", ["model", "ema", ""])
def test_llamagen_class_file(released: Callable[..., Path], golden: Callable[[str], Any], wrapped: str) -> None:
    g = golden("llamagen")
    module = zoo.from_pretrained(released("c2i", wrapped=wrapped), model="llamagen-c2i", **IMAGES)
    batch = {"classes": g.inputs["c2i_cond"], "image_codes": g.inputs["c2i_ids"]}
    with torch.no_grad():
        logits = module.model.eval().decoder.logits(module.model(batch)["hidden"])
    torch.testing.assert_close(logits, g.outputs["c2i_logits"], **TOLERANCE)
    assert all(name.startswith("image_tokenizer.") for name in module.load_report.new)
    assert not module.load_report.ignored


def test_llamagen_caption_file(released: Callable[..., Path], golden: Callable[[str], Any]) -> None:
    g = golden("llamagen")
    module = zoo.from_pretrained(released("t2i"), model="llamagen-t2i", **IMAGES, **CAPTIONS)
    batch = {
        "caption_features": g.inputs["t2i_cond"],
        "caption_mask": g.inputs["t2i_emb_mask"],
        "image_codes": g.inputs["t2i_ids"],
    }
    with torch.no_grad():
        logits = module.model.eval().decoder.logits(module.model(batch)["hidden"])
    torch.testing.assert_close(logits, g.outputs["t2i_logits"], **TOLERANCE)
    assert module.model.prefix_tokens == g.config["t2i_tokens"]
    assert {name.split(".")[0] for name in module.load_report.new} == {"image_tokenizer", "text_encoder"}


def test_llamagen_files_of_another_kind_or_width_are_refused(
    released: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, golden: Callable[[str], Any]
) -> None:
    with pytest.raises(WeightsError, match="a t2i model of LlamaGen, llamagen-c2i is not"):
        zoo.from_pretrained(released("t2i"), model="llamagen-c2i", **IMAGES)
    monkeypatch.delitem(llamagen.HEADS, golden("llamagen").config["dim"])
    with pytest.raises(WeightsError, match="width 32, which no published LlamaGen has"):
        zoo.from_pretrained(released("c2i"), model="llamagen-c2i", **IMAGES)


def test_a_file_of_a_hub_repository_is_had_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert locate("FoundationVision/LlamaGen/c2i_B_256.pt") == tmp_path / "c2i_B_256.pt"
    assert asked == [("FoundationVision/LlamaGen", "c2i_B_256.pt")]


def test_a_repository_without_safetensors_gives_its_pickled_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted: list[list[str]] = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        wanted.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("showlab/show-o") == tmp_path
    assert ["pytorch_model.bin" in patterns for patterns in wanted] == [False, True]


# -- Show-o ------------------------------------------------------------------------------------------------------------


def show_o_folder(g: Any, folder: Path, *, clip: bool = False, pickled: bool = False, **changes: Any) -> Path:
    c = g.config
    config = {
        "_class_name": "Showo",
        "llm_vocab_size": c["text_tokens"],
        "num_new_special_tokens": 10,
        "codebook_size": c["codebook_size"],
        "num_vq_tokens": c["num_vq_tokens"],
        "vocab_size": c["vocab_size"],
        "w_clip_vit": clip,
        "llm_model_path": "microsoft/phi-1_5",
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    state = {name: t for name, t in g.weights.items() if clip or not name.startswith("mm_projector")}
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "pytorch_model.safetensors")
    return folder


@pytest.fixture
def show_o(golden: Callable[[str], Any]) -> Any:
    return golden("show_o")


SMALL_LFQ = {"image_tokenizer": {"width": 32, "groups": 4, "encoder_blocks": [1] * 5, "decoder_blocks": [1] * 5}}


@pytest.mark.parametrize("pickled", [False, True])
def test_show_o_folder(show_o: Any, tmp_path: Path, pickled: bool) -> None:
    module = zoo.from_pretrained(show_o_folder(show_o, tmp_path / "show-o", pickled=pickled), **SMALL_LFQ)
    model = module.model.eval()
    c = show_o.config
    assert module.recipe.model == "show-o"
    assert model.vocabulary.id("soi") == c["special_ids"]["soi"]
    assert model.vocabulary.first_code == c["image_token_offset"]
    assert model.vocabulary.mask_id == c["mask_token_id"]
    assert model.image_tokenizer.grid == (c["grid"], c["grid"])
    ids, t2i = show_o.outputs["ids"], slice(0, c["batch"]["t2i"])
    with torch.no_grad():
        logits = model.token_logits(ids)
    real = ids != c["special_ids"]["pad"]
    torch.testing.assert_close(logits[t2i][real[t2i]], show_o.outputs["logits"][t2i][real[t2i]], **TOLERANCE)
    assert all(name.startswith("image_tokenizer.") for name in module.load_report.new)


def test_show_o_with_clip(show_o: Any, tmp_path: Path) -> None:
    folder = show_o_folder(show_o, tmp_path / "clip", clip=True)
    eye = {"width": show_o.config["clip_width"], "depth": 2, "heads": 2, "ffn": 16, "image_size": 28}
    module = zoo.from_pretrained(folder, encoder=eye, decoder={"context_length": 128}, **SMALL_LFQ)
    assert module.recipe.model == "show-o-clip-vit"
    features = show_o.inputs["clip_feats"]
    wanted = torch.nn.functional.gelu(
        features @ show_o.weights["mm_projector.0.weight"].T + show_o.weights["mm_projector.0.bias"]
    )
    wanted = wanted @ show_o.weights["mm_projector.2.weight"].T + show_o.weights["mm_projector.2.bias"]
    from zoo.part import Features

    with torch.no_grad():
        torch.testing.assert_close(module.model.connector(Features(features)).tokens, wanted, **TOLERANCE)
    assert {name.split(".")[0] for name in module.load_report.new} == {"image_tokenizer", "encoder"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 31}, "do not make vocab_size"),
        ({"num_vq_tokens": 15}, "no square grid"),
        ({"llm_vocab_size": 50, "vocab_size": 93}, "embedding of 83 rows; expected 50 text ids"),
        ({"w_clip_vit": True}, "lacks mm_projector"),
    ],
)
def test_show_o_whose_numbers_do_not_fit(show_o: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = show_o_folder(show_o, tmp_path / "wrong", **changes)
    with pytest.raises(WeightsError, match=message):
        zoo.from_pretrained(folder)


def test_show_o_at_512_pixels_is_its_own_recipe(show_o: Any, tmp_path: Path) -> None:
    module = zoo.from_pretrained(show_o_folder(show_o, tmp_path / "512", num_vq_tokens=1024), **SMALL_LFQ)
    assert module.recipe.model == "show-o-512"
    assert module.model.places == 1024


# -- Chameleon ---------------------------------------------------------------------------------------------------------


def chameleon_folder(g: Any, folder: Path, *, swin: bool, decoder: bool, **changes: Any) -> Path:
    c = g.config
    config = {
        "model_type": "chameleon",
        "architectures": ["ChameleonForConditionalGeneration"],
        "hidden_size": c["hidden_size"],
        "intermediate_size": c["intermediate_size"],
        "num_hidden_layers": c["layers"],
        "num_attention_heads": c["heads"],
        "num_key_value_heads": c["kv_heads"],
        "vocab_size": c["vocab_size"],
        "max_position_embeddings": 64,
        "rms_norm_eps": c["rms_norm_eps"],
        "rope_theta": c["rope_theta"],
        "swin_norm": swin,
        "vocabulary_map": c["vocabulary_map"],
        "vq_config": c["vq"],
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | changes))
    state = {n: t for n, t in g.weights.items() if not n.startswith("official_vqgan.")}
    if decoder:
        drawn = {n.replace("official_vqgan.", "model.vqmodel."): t for n, t in g.weights.items()}
        state |= {n: t for n, t in drawn.items() if n.startswith("model.vqmodel.decoder.")}
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("swin", [False, True])
def test_chameleon_folder(golden: Callable[[str], Any], tmp_path: Path, swin: bool) -> None:
    g = golden("chameleon")
    c = g.config
    folder = chameleon_folder(g, tmp_path / "chameleon", swin=swin, decoder=True)
    module = zoo.from_pretrained(folder, image_tokenizer={"groups": 8})
    model = module.model.eval()
    assert (model.vocabulary.id("boi"), model.vocabulary.id("eoi")) == (c["boi"], c["eoi"])
    assert not module.load_report.new
    with torch.no_grad():
        ids = model.image_tokenizer.encode(g.inputs["pixels"]) + model.vocabulary.first_code
        assert torch.equal(ids, g.outputs["image_token_ids"])  # the released ids of codes are in no order
        drawn = model.image_tokenizer.decode(ids - model.vocabulary.first_code)
        torch.testing.assert_close(drawn, g.outputs["pixels_decoded"], atol=1e-5, rtol=1e-5)
        written, real = g.outputs["ids_with_image"], g.inputs["attention_mask"].bool()
        logits = model.token_logits(written, model._layout(written, real))
    wanted = g.outputs["swin_logits" if swin else "prenorm_logits"]
    torch.testing.assert_close(logits[real], wanted[real], **TOLERANCE)


def test_chameleon_without_the_decoder_of_its_tokenizer(golden: Callable[[str], Any], tmp_path: Path) -> None:
    folder = chameleon_folder(golden("chameleon"), tmp_path / "chameleon", swin=False, decoder=False)
    module = zoo.from_pretrained(folder, image_tokenizer={"groups": 8})
    new = module.load_report.new
    assert new
    assert all(name.startswith("image_tokenizer.decoder.") for name in new)


def test_chameleon_whose_codes_leave_gaps(golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("chameleon")
    named = dict(g.config["vocabulary_map"])
    named["IMGIMGAZ"] = 30
    folder = chameleon_folder(g, tmp_path / "gaps", swin=False, decoder=False, vocabulary_map=named)
    with pytest.raises(WeightsError, match="image codes leave gaps"):
        zoo.from_pretrained(folder)
    del named["<eoss>"]
    folder = chameleon_folder(g, tmp_path / "lost", swin=False, decoder=False, vocabulary_map=named)
    with pytest.raises(WeightsError, match="has no <eoss>"):
        zoo.from_pretrained(folder)


@pytest.mark.parametrize("swin", [False, True])
def test_chameleon_release(golden: Callable[[str], Any], tmp_path: Path, swin: bool) -> None:
    g, vq = golden("chameleon_official"), golden("chameleon")
    c, images = g.config, 16
    folder = tmp_path / "models" / "7b"
    folder.mkdir(parents=True)
    torch.save(g.weights, folder / "consolidated.pth")
    params = {name: c[name] for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta")}
    (folder / "params.json").write_text(json.dumps({"model": {**params, "swin_norm": swin}}))
    (tmp_path / "tokenizer").mkdir()
    vocab = {n: i for n, i in vq.config["vocabulary_map"].items() if i < c["vocab_size"]}
    text = {"model": {"vocab": vocab}, "added_tokens": []}
    (tmp_path / "tokenizer" / "text_tokenizer.json").write_text(json.dumps(text))
    drawn = {n.removeprefix("model.vqmodel."): t for n, t in vq.weights.items() if n.startswith("model.vqmodel.")}
    drawn |= {n.removeprefix("official_vqgan."): t for n, t in vq.weights.items() if n.startswith("official_vqgan.")}
    torch.save({"state_dict": drawn}, tmp_path / "tokenizer" / "vqgan.ckpt")
    module = zoo.from_pretrained(folder, image_tokenizer={"groups": 8, "image_size": 8}, decoder={"context_length": 64})
    model = module.model.eval()
    assert model.image_tokenizer.codes == images
    assert not module.load_report.new
    with torch.no_grad():
        logits = model.token_logits(g.inputs["ids"][None])
        ids = model.image_tokenizer.encode(vq.inputs["pixels"]) + model.vocabulary.first_code
    torch.testing.assert_close(logits[0], g.outputs["swin_logits" if swin else "prenorm_logits"], **TOLERANCE)
    assert torch.equal(ids, vq.outputs["image_token_ids"])


# -- text models to start from -----------------------------------------------------------------------------------------


def rows(table: Tensor, state: dict[str, Tensor], name: str, count: int) -> bool:
    return torch.equal(table[:count], state[name][:count])


@pytest.mark.parametrize("kind", ["phi", "phi-qk", "llama"])
def test_a_unified_decoder_starts_from_a_text_model(tmp_path: Path, kind: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 1040,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": False,
    }
    text: Any
    if kind != "llama":
        text = PhiForCausalLM(PhiConfig(**sizes, hidden_act="gelu_new", qk_layernorm=kind == "phi-qk"))
    else:
        text = LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=1e-5))
    with torch.no_grad():
        for name, parameter in text.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (parameter.ndim == 1 and "bias" not in name))
    text.save_pretrained(tmp_path / kind)
    own = {"width": 32, "depth": 2, "heads": 2, "kv_heads": 2, "ffn": 64}
    if kind != "llama":
        model = zoo.build("show-o", scale="tiny", decoder=own).model.eval()
    else:
        model = zoo.build("chameleon", scale="tiny", decoder=own | {"qk_norm": "none", "placement": "pre"}).model.eval()
    before = model.decoder.embedding.tokens.weight.detach().clone()
    report = start_from(model, tmp_path / kind)
    state = text.state_dict()
    table = model.decoder.embedding.tokens.weight
    assert len(table) > 1040
    assert rows(table, state, "model.embed_tokens.weight", 1040)
    assert torch.equal(table[1040:], before[1040:])
    assert rows(model.decoder.lm_head.weight, state, "lm_head.weight", 1040)
    assert not any(name.startswith("decoder.trunk") and "_norm" not in name for name in report.new)
    if kind != "phi":  # text alone is read as the text model reads it
        ids = torch.randint(4, 1000, (2, 9))
        with torch.no_grad():
            wanted = text.eval()(input_ids=ids).logits
            got = model.token_logits(ids)[..., :1040]
        torch.testing.assert_close(got, wanted, **TOLERANCE)
    else:
        assert {name.split(".")[-2] for name in report.new if name.startswith("decoder.trunk")} == {"q_norm", "k_norm"}


def test_a_text_model_with_too_few_ids_is_refused(tmp_path: Path) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    PhiForCausalLM(config).save_pretrained(tmp_path)
    model = zoo.build(
        "show-o", scale="tiny", decoder={"width": 32, "depth": 1, "heads": 2, "kv_heads": 0, "ffn": 64}
    ).model
    with pytest.raises(WeightsError, match=r"has 100 ids, decoder\.vocab_size is 1024"):
        start_from(model, tmp_path)
