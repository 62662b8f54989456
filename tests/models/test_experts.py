"""The wiring of one trunk with heads: stages, what a step computes, matching, and released files of other kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo.api import build_module
from zoo.capabilities import Match, capabilities_of
from zoo.errors import ConfigError, WeightsError
from zoo.objectives.matching import Matching
from zoo.recipe import resolve
from zoo.testing.config import shake
from zoo.weights import load_model
from zoo.weights.formats.vlmo import from_state, relative_sizes

SIZES: dict[str, Any] = {
    "width": 32, "depth": 4, "heads": 4, "ffn": 64, "image_size": 32, "patch_size": 8, "context_length": 12,
    "text_rows": 16, "drop_path": 0.0,
}  # fmt: skip

PICTURE = {"image_size": 32, "patch_size": 8, "width": 32, "vocab_size": 64}


def module_of(model: str = "vlmo") -> Any:
    picture = {"image_tokenizer": PICTURE} if model == "vlmo-staged" else {}
    module = build_module(resolve(model, values={"trunk": SIZES, **picture}, scale="tiny"), 0)
    shake(module.model)
    return module


def set_stage(module: Any, name: str) -> None:
    module.set_stage([stage.name for stage in module.recipe.stages].index(name))


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 1000, (6, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 7, 5, 9, 4, 6])[:, None]
    pixels = torch.randn(6, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """Record what a model's trunk reads."""

    def recorded(model: Any) -> list[str]:
        seen: list[str] = []
        plain = model.trunk.forward

        def forward(image: Any = None, text: Any = None, *rest: Any, **options: Any) -> Any:
            kind = "pair" if image is not None and text is not None else "image" if text is None else "text"
            rows = image if image is not None else text
            seen.append(f"{kind}:{rows.shape[0]}{':upper' if options.get('pair') else ''}")
            return plain(image, text, *rest, **options)

        monkeypatch.setattr(model.trunk, "forward", forward)
        return seen

    return recorded


def test_text_stage_trains_what_the_release_trains(batch: dict[str, Tensor]) -> None:
    module = module_of("vlmo-staged")
    set_stage(module, "text")
    learns = {name for name, p in module.model.named_parameters() if p.requires_grad}
    text = {name for name in dict(module.model.named_parameters()) if name.startswith(("trunk.text.", "words."))}
    experts = {n for n in dict(module.model.named_parameters()) if ".ffn.0." in n or ".ffn_norm.0." in n}
    others = {"trunk.kinds.weight", "trunk.trunk.rel_bias", "trunk.trunk.final_norm.weight"}
    assert len(experts) == 4 * (4 + 2)
    assert learns == text | experts | others | {"trunk.trunk.final_norm.bias"}
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in module.model.parameters() if p.requires_grad], lr=1e-2)
    loss, report = module.losses(batch)
    loss.backward()
    optimizer.step()
    assert set(report) == {
        "loss", "masked-text", "masked-text/masked_lm", "masked-text/accuracy", "masked-text/words"
    }  # fmt: skip
    changed = {name for name, p in module.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= learns
    assert experts <= changed
    assert not any("attn" in name or ".ffn.1." in name or ".ffn.2." in name for name in changed)


def test_a_step_computes_what_its_stage_reads_and_no_more(
    batch: dict[str, Tensor], calls: Callable[[Any], list[str]]
) -> None:
    """Images alone, texts alone; for pairs each side once, its pair experts once more, 3B pairs to match, B to fill."""
    module = module_of("vlmo-staged")
    seen = calls(module.model)
    torch.manual_seed(0)
    for stage, kind in (("tokenizer", []), ("image", ["image:6"]), ("text", ["text:6"])):
        set_stage(module, stage)
        module.losses(batch)
        assert seen == kind
        seen.clear()
    set_stage(module, "pairs")
    module.losses(batch)
    below_and_above = ["image:6", "image:6", "text:6", "text:6"]
    assert sorted(seen) == sorted([*below_and_above, "image:6:upper", "text:6:upper", "pair:18", "pair:6"])


def test_three_stages_each_train_their_own_experts(batch: dict[str, Tensor]) -> None:
    """vlmo-staged: image stage, text stage, pair stage; each leaves what it does not read as it was, bit by bit."""
    module = module_of("vlmo-staged")
    recipe = module.recipe
    assert [stage.name for stage in recipe.stages] == ["tokenizer", "image", "text", "pairs"]
    assert isinstance(module.model, Match)
    inside = {"image": ".ffn.1.", "text": ".ffn.0.", "pairs": ".ffn.2."}
    for index, stage in enumerate(recipe.stages):
        if stage.name == "tokenizer":
            continue
        module.set_stage(index)
        before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
        optimizer = torch.optim.SGD([p for p in module.model.parameters() if p.requires_grad], lr=0.1)
        torch.manual_seed(0)
        loss, _ = module.losses(batch)
        loss.backward()
        optimizer.step()
        module.zero_grad(set_to_none=True)
        changed = {name for name, p in module.model.named_parameters() if not torch.equal(p, before[name])}
        assert any(inside[stage.name] in name for name in changed)
        if stage.name == "image":
            assert any("attn.q.weight" in name for name in changed)
            assert {"codes.weight", "trunk.stem.mask_token"} <= changed
            assert not any(".ffn.0." in n or ".ffn.2." in n or n.startswith(("trunk.text", "words")) for n in changed)
        if stage.name == "text":
            assert not any("attn" in n or ".ffn.1." in n or n.startswith("trunk.stem") for n in changed)
        assert not any(name.startswith("image_tokenizer") for name in changed)


def test_each_contrast_has_its_own_temperature(batch: dict[str, Tensor]) -> None:
    module = module_of()
    model = module.model
    outputs = model(batch)
    for name, own, other in (
        ("contrastive", model.logit_scale, model.pair_logit_scale),
        ("pair-contrastive", model.pair_logit_scale, model.logit_scale),
    ):
        loss, _ = module.objectives[name](model, batch, outputs)
        mine, foreign = torch.autograd.grad(loss, [own, other], retain_graph=True, allow_unused=True)
        assert float(mine.abs()) > 1e-6
        assert foreign is None
        own.data.fill_(9.0)
        module.objectives[name].after_step(model)
        assert float(own.detach()) == 9.0  # the release has its clamp commented out
    assert not torch.equal(outputs["image_embeds"], outputs["pair_image_embeds"])


def test_negatives_are_drawn_by_the_scaled_similarities(
    batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of()
    module.model.logit_scale.data.fill_(2.0)
    outputs = module.model(batch)
    objective: Matching = module.objectives["matching"]
    of_text, of_image = objective.weights(batch, outputs)
    assert torch.equal(of_text.diagonal(), torch.zeros(6))
    assert torch.equal(of_image.diagonal(), torch.zeros(6))
    scores = (torch.tensor(2.0).exp() * outputs["text_embeds"] @ outputs["image_embeds"].T).softmax(-1)
    off = ~torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(of_text[off], (scores + objective.config.floor)[off])
    heads: list[Tensor] = []
    plain = module.model.matching_logits
    monkeypatch.setattr(module.model, "matching_logits", lambda fused: heads.append(fused.pooled) or plain(fused))
    for seed in range(20):
        torch.manual_seed(seed)
        objective(module.model, batch, outputs)
    assert {len(pooled) for pooled in heads} == {18}
    assert not any(torch.equal(p[:6], p[6:12]) or torch.equal(p[:6], p[12:]) for p in heads)


def test_outputs_keep_the_modes_of_their_forward_pass(batch: dict[str, Tensor]) -> None:
    model = module_of().model
    outputs = model(batch)
    with torch.no_grad():
        first = outputs["image_embeds"]
    assert first.requires_grad
    assert outputs["image_embeds"] is first
    with torch.no_grad():
        silent = model(batch)
    assert not silent["image_embeds"].requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(batch)
    plain = model(batch)
    assert mixed["image_tokens"].dtype == torch.bfloat16 or not torch.equal(mixed["text_states"], plain["text_states"])


def test_compiling_reaches_the_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """``forward`` only promises its outputs, so that compiling it would compile nothing."""
    model = module_of().model
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(model.trunk, "compile", lambda **options: asked.append(options))
    model.compile(backend="eager")
    assert asked == [{"backend": "eager"}]
    assert model._compiled_call_impl is None


def test_dual_encoder_needs_no_pairwise_pass(calls: Callable[[Any], list[str]]) -> None:
    """N + M items give the N x M matrix; matching reads every pair."""
    module = module_of()
    seen = calls(module.model)
    images = [Image.new("RGB", (40, 40), (i * 30, 90, 200 - 20 * i)) for i in range(5)]
    texts = ["red apple", "a cat with wry smile", "flag: Japan"]
    similarity = module.embed_images(images) @ module.embed_texts(texts).T
    assert similarity.shape == (5, 3)
    assert not any(call.startswith("pair") for call in seen)
    assert sum(int(c.split(":")[1]) for c in seen) == 2 * (5 + 3)  # each passes the lower and the upper layers
    seen.clear()
    judged = module.match(images[:3], texts)
    assert seen == ["pair:3"]
    rows = module.model.processor.encode_texts(texts)
    with torch.no_grad():
        pixels = module.model.processor.encode_images(images[:3])
        logits = module.model.match_logits(pixels, rows["input_ids"], rows["attention_mask"])
    torch.testing.assert_close(judged, logits[:, 1], atol=1e-5, rtol=1e-4)
    assert module.model.rerank_similarity  # as the release adds it
    pairs = torch.tensor([[0, 2], [4, 1], [2, 2], [0, 0]])
    many = module.match_pairs(images, texts, pairs)
    one_by_one = module.match([images[i] for i, _ in pairs.tolist()], [texts[j] for _, j in pairs.tolist()])
    torch.testing.assert_close(many, one_by_one, atol=1e-5, rtol=1e-4)
    assert many.std() > 1e-3


def test_heads_that_are_not_there() -> None:
    recipe = resolve(
        "vlmo",
        choices={"objective": "contrastive"},
        values={"stages": "joint", "wiring": {"match": False, "pair_contrast": False, "words": "none"}},
        scale="tiny",
    )
    model = build_module(recipe, 0).model
    assert not isinstance(model, Match)
    assert capabilities_of(model) == ("embed_images", "embed_texts")
    fused = model.read_text(torch.full((1, 4), 5))
    for call, what in ((model.matching_logits, "matching head"), (model.word_logits, "head over words")):
        with pytest.raises(ConfigError, match=what):
            call(fused)
    with pytest.raises(ConfigError, match="head over image codes"):
        model.code_logits(fused.tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trunk": {"pair_layers": 0}}, "needs pair experts: set trunk.pair_layers"),
        ({"wiring": {"codes": 64}}, "needs a vector for hidden patches: set trunk.mask_token=true"),
        ({"wiring": {"words": "deep"}}, "words = 'deep' must be one of"),
        ({"trunk": {"vocab_size": 100}}, None),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], message: str | None) -> None:
    if message is None:  # found where the tokenizer meets the table
        module = build_module(resolve("vlmo", values=changes, scale="tiny"), 0)
        with pytest.raises(ConfigError, match=r"has 1024 ids, more than trunk\.vocab_size = 100"):
            module.embed_texts(["red apple"])
        return
    with pytest.raises(ConfigError, match=message) as error:
        build_module(resolve("vlmo", values=changes, scale="tiny"), 0)
    assert "\n" not in str(error.value)


def test_match_takes_pairs() -> None:
    with pytest.raises(ConfigError, match="1 images and 2 texts"):
        module_of().match([Image.new("RGB", (9, 9))], ["a", "b"])


# -- released files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(golden: Callable[[str], Any]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in golden("vlmo").weights.items()}


def loaded(state: dict[str, Tensor], folder: Path, **changes: Any) -> Any:
    save_file(state, folder / "vlmo.safetensors")
    return load_model(folder / "vlmo.safetensors", model="vlmo", changes=changes)


def test_another_image_size_is_interpolated_and_said(weights: dict[str, Tensor], tmp_path: Path) -> None:
    model, recipe, report = loaded(weights, tmp_path, trunk={"image_size": 40})
    assert recipe.image_size == 40
    assert report.resized == ["trunk.trunk.rel_bias"]
    assert "interpolated to the image size: trunk.trunk.rel_bias" in str(report)
    assert report.new == []
    assert report.new_parts == ()
    trunk: Any = model.trunk
    assert trunk.trunk.rel_bias.shape == (9 * 9 + 5 + 24, 4, 4)
    stored = weights["relative_position_bias_table"].view(-1, 4, 4)
    assert torch.equal(trunk.trunk.rel_bias[81:], stored[25:])
    assert torch.equal(trunk.trunk.rel_bias[40], stored[12])  # the offset (0, 0) keeps its value
    features = model.image_features(torch.zeros(2, 3, 40, 40))  # type: ignore[operator]
    assert torch.isfinite(features).all()


def test_a_checkpoint_of_another_size_is_one_line(weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="only image_size may differ") as error:
        loaded(weights, tmp_path, trunk={"width": 64})
    assert "\n" not in str(error.value)
    big = {
        "transformer.patch_embed.proj.weight": torch.empty(1024, 3, 16, 16, device="meta"),
        "transformer.blocks.23.mlp_vl.fc1.weight": torch.empty(4096, 1024, device="meta"),
        "transformer.blocks.0.mlp_imag.fc1.weight": torch.empty(4096, 1024, device="meta"),
        "text_embeddings.word_embeddings.weight": torch.empty(30522, 1024, device="meta"),
        "relative_position_bias_table": torch.empty(1126, 384, device="meta"),
    }
    with pytest.raises(WeightsError, match="width 1024 and 24 layers, not vlmo: load it with model='vlmo-large'"):
        from_state(resolve("vlmo"), big)
    official = from_state(resolve("vlmo-large"), big)
    assert official is not None
    trunk = official.recipe.parts["trunk"][1]
    assert (trunk.image_size, trunk.heads, trunk.text_rows, trunk.context_length) == (224, 16, 196, 40)  # type: ignore[attr-defined]
    with pytest.raises(WeightsError, match=r"no text_embeddings.word_embeddings.weight: is it whole\?"):
        from_state(resolve("vlmo"), {k: v for k, v in big.items() if "word" not in k})
    assert from_state(resolve("vlmo"), {"trunk.stem.cls": torch.zeros(1)}) is None


@pytest.mark.parametrize(("rows", "text", "expected"), [(1126, 40, (14, 196)), (3878, 40, (30, 196)), (54, 8, (3, 12))])
def test_sizes_of_a_relative_table(rows: int, text: int, expected: tuple[int, int]) -> None:
    assert relative_sizes(rows, text) == expected
    side, texts = expected
    assert (2 * side - 1) ** 2 + 5 + 2 * texts == rows
    with pytest.raises(WeightsError, match="fits no image"):
        relative_sizes(7, 40)


def test_stage_two_file_leaves_the_pair_experts_new(weights: dict[str, Tensor], tmp_path: Path) -> None:
    lacking = ("mlp_vl", "norm2_vl", "itc_", "itm_", "pooler", "logit_")
    model, recipe, report = loaded({n: t for n, t in weights.items() if not any(x in n for x in lacking)}, tmp_path)
    assert recipe.parts["trunk"][1].pair_layers == 2  # type: ignore[attr-defined]
    assert {n for n in report.new if ".ffn.2." in n} == {n for n in model.state_dict() if ".ffn.2." in n}
    assert {"logit_scale", "matching.weight", "contrast.pair_text.weight"} <= set(report.new)
    assert not any(n.startswith(("trunk.text", "words")) or ".ffn.0." in n for n in report.new)


def test_fine_tuned_files_keep_their_own_heads(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """NLVR2 files have a third token type and a classifier; both are left, and the classifier is named."""
    types = weights["token_type_embeddings.weight"]
    state = {**weights, "token_type_embeddings.weight": torch.cat([types, types[1:]])}
    state["nlvr2_classifier.0.weight"] = torch.zeros(64, 64)
    model, _, report = loaded(state, tmp_path)
    assert report.ignored == ["nlvr2_classifier.0.weight"]
    assert torch.equal(model.trunk.kinds.weight, types)  # type: ignore[union-attr]
    with pytest.raises(WeightsError, match="does not name: rubbish"):
        loaded({**weights, "rubbish": torch.zeros(1)}, tmp_path)


def test_saved_and_loaded_again(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "vlmo.safetensors")
    tokenizer = {"tokenizer": "openmoji-bpe"}  # the released one would be fetched
    module = zoo.from_pretrained(tmp_path / "vlmo.safetensors", model="vlmo", trunk=tokenizer).eval()
    zoo.weights.save(module, module.recipe, tmp_path / "own")
    again = zoo.from_pretrained(tmp_path / "own").eval()
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (F.normalize(m.image_features(pixels), dim=-1) for m in (module, again))
    assert torch.equal(a, b)
