"""BEiT-3's own promises: what each branch reads, captions and their scores, stored codes, labels, and sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import zoo
from zoo.capabilities import capabilities_of
from zoo.data.sample import Sample
from zoo.errors import ConfigError
from zoo.models.mask_writing import _interleaved
from zoo.tokenizers.stored import write_codes

TEXTS = ("red apple", "a cat with wry smile", "flag: Japan")


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((0.2 if p.ndim < 2 else 0.08) * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def module() -> Any:
    made = zoo.build("beit3", scale="tiny", image_tokenizer={"vocab_size": 30}, seed=1)
    shaken(made.model)
    return made.eval()


def pictures(count: int = 3, side: int = 64) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(p.numpy()) for p in pixels]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(7) < torch.tensor([7, 4])[:, None]
    return torch.randn(2, 3, 64, 64, generator=generator), torch.randint(5, 900, (2, 7), generator=generator), mask


@torch.no_grad()
@pytest.mark.parametrize(("expert", "moves"), [("0", {"text", "pair"}), ("1", {"image", "pair"})])
def test_each_kind_reads_its_own_branch_only(expert: str, moves: set[str]) -> None:
    model = shaken(zoo.build("beit3", scale="tiny", seed=1).model)
    pixels, ids, mask = inputs()

    def read() -> dict[str, Tensor]:
        image, text = model.trunk.embed_image(pixels), model.trunk.embed_text(ids)
        pair = torch.cat([f.tokens for f in model.read_pair(image, text, mask)], 1)
        return {"image": model.read_image(pixels).tokens, "text": model.read_text(ids, mask).tokens, "pair": pair}

    before = read()
    every = dict(model.trunk.trunk.named_parameters())
    own = [n for n in every if expert in n.split(".")[2:] or n.startswith(f"final_norm.{expert}.")]
    assert len(own) == len(every) / 2  # nothing is shared
    for name in own:
        every[name].add_(0.1 * torch.randn(every[name].shape, generator=torch.Generator().manual_seed(1)))
    after = read()
    assert {name for name in before if not torch.equal(before[name], after[name])} == moves


def test_norms_stand_inside_both_branches(module: Any) -> None:
    trunk = module.model.trunk.trunk
    for layer in trunk.layers:
        for expert in (0, 1):
            assert layer.attn.sub_norm[expert].normalized_shape == (128,)
            assert layer.ffn[expert].sub_norm.normalized_shape == (512,)
    seen: list[Tensor] = []
    hook = trunk.layers[0].ffn[1].down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        module.model.read_image(inputs()[0])
    hook.remove()
    norm = trunk.layers[0].ffn[1].sub_norm
    plain = (seen[0] - norm.bias) / norm.weight
    torch.testing.assert_close(plain.mean(-1), torch.zeros(2, 17), atol=1e-4, rtol=0)
    torch.testing.assert_close(plain.var(-1, unbiased=False), torch.ones(2, 17), atol=1e-3, rtol=0)


def test_sizes_are_those_of_the_paper_and_the_files() -> None:
    def count(part: nn.Module) -> float:
        return sum(p.numel() for p in part.parameters()) / 1e6

    with torch.device("meta"):
        base, large, giant = (zoo.build(name).model for name in ("beit3", "beit3-large", "beit3-giant"))
    assert count(base.trunk) == pytest.approx(221.0, abs=0.5)
    assert count(large.trunk) == pytest.approx(672.7, abs=1.0)
    assert count(base.words) == pytest.approx(49, abs=0.5)
    assert count(base.codes) == pytest.approx(6.3, abs=0.1)
    assert count(giant.trunk) + count(giant.words) == pytest.approx(1900, rel=0.03)
    shared = [layer.attn for layer in giant.trunk.trunk.layers]
    assert count(nn.ModuleList(shared)) == pytest.approx(317, rel=0.01)
    for expert, owners in ((0, 40), (1, 40), (2, 3)):
        own = [layer.ffn[expert] for layer in giant.trunk.trunk.layers if len(layer.ffn) > expert]
        assert len(own) == owners
        assert count(nn.ModuleList(own)) == pytest.approx(692 * owners / 40, rel=0.01)


# -- captions ----------------------------------------------------------------------------------------------------------


def test_caption_mask_lets_no_image_row_read_text_and_no_word_its_future(module: Any) -> None:
    layout = module.model.trunk.layout(image=17, text=6, causal=True)
    mask = layout.mask()[0, 0]
    assert not bool(mask[:17, 17:].any())
    assert bool(mask[:17, :17].all())
    assert bool(mask[17:, :17].all())
    assert torch.equal(mask[17:, 17:], torch.ones(6, 6).tril().bool())


def test_masks_between_words_read_the_past_and_no_other_mask() -> None:
    real = torch.tensor([[True, True, True], [True, True, False]])
    mask = _interleaved(2, real).mask()[:, 0]
    rows = {"w0": 2, "m1": 3, "w1": 4, "m2": 5, "w2": 6, "m3": 7}

    def reads(name: str) -> set[str]:
        return {other for other, place in rows.items() if bool(mask[0, rows[name], place])}

    assert reads("w0") == {"w0"}
    assert reads("m1") == {"w0", "m1"}
    assert reads("w1") == {"w0", "w1"}
    assert reads("m2") == {"w0", "w1", "m2"}
    assert reads("m3") == {"w0", "w1", "w2", "m3"}
    assert bool(mask[0, 2:, :2].all())
    assert not bool(mask[:, :2, 2:].any())
    assert not bool(mask[1, :6, 6:].any())  # pads


@torch.no_grad()
def test_score_is_the_product_of_what_each_mask_predicted(module: Any) -> None:
    model, images = module.model, pictures()
    scores = module.score_text(images, TEXTS)
    pixels = model.processor.encode_images(images)
    special = model.special_ids
    for n, text in enumerate(TEXTS):
        words = [*model.tokenizer.encode([text])[0], special["eos"]]
        total, row = 0.0, [model.tokenizer.bos_id]
        for word in words:
            ids = torch.tensor([[*row, special["mask"]]])
            image = model.trunk.embed_image(pixels[n : n + 1])
            _, read = model.read_pair(image, model.trunk.embed_text(ids), causal=True)
            total += float(model.word_logits(read.tokens[0, -1]).log_softmax(-1)[word])
            row.append(word)
        assert float(scores[n]) == pytest.approx(total, abs=1e-3)


def test_scores_of_candidates_and_prompts_agree(module: Any) -> None:
    images = pictures()
    table = module.score_candidates(images, [TEXTS] * 3)
    torch.testing.assert_close(table.diagonal(), module.score_text(images, TEXTS), atol=1e-4, rtol=1e-5)
    one = module.score_text(images[:1], ["apple"], prompts=["red "])
    assert torch.isfinite(one).all()
    assert one < 0
    assert module.score_candidates([], []).shape[0] == 0
    with pytest.raises(ConfigError, match="same number"):
        module.score_candidates(images[:2], [["a"], ["a", "b"]])
    with pytest.raises(ConfigError, match="3 images and 1 texts"):
        module.score_text(images, ["a"])
    with pytest.raises(ConfigError, match="shorten it"):
        module.score_text(images[:1], ["x " * 300])


@pytest.mark.parametrize("options", [{}, {"beams": 3}, {"temperature": 1.0, "seed": 4}])
def test_captions_do_not_depend_on_the_batch(module: Any, options: dict[str, Any]) -> None:
    images, prompts = pictures(), ["", "red", "a cat"]
    together = module.generate_text(images, prompts, max_new_tokens=6, **options)
    assert len(together) == 3
    if not options.get("temperature"):
        alone = [
            module.generate_text([i], [p], max_new_tokens=6, **options)[0] for i, p in zip(images, prompts, strict=True)
        ]
        assert together == alone
    assert together == module.generate_text(images, prompts, max_new_tokens=6, **options)


def test_captions_need_a_trunk_that_can_write_them() -> None:
    made = zoo.build("beit3", scale="tiny", trunk={"text_norm": True}, seed=1)
    with pytest.raises(ConfigError, match="choose a BEiT-3 trunk"):
        made.generate_text(pictures(1))
    silent = zoo.build("beit3-captioning", scale="tiny", wiring={"words": "none"}, stages="joint", seed=1)
    with pytest.raises(ConfigError, match=r"wiring.words=linear"):
        silent.score_text(pictures(1), ["a"])


# -- tokenizer ---------------------------------------------------------------------------------------------------------


def test_trunk_and_tokenizer_must_see_the_same_patches() -> None:
    with pytest.raises(ConfigError, match=r"8 x 8 codes, the trunk sees 4 x 4"):
        zoo.build("beit3", scale="tiny", image_tokenizer={"patch_size": 8})
    with pytest.raises(ConfigError, match=r"image_tokenizer.mean"):
        zoo.build("beit3", scale="tiny", image_tokenizer={"mean": [0.4, 0.4, 0.4]})
    with pytest.raises(ConfigError, match="leave it 0"):
        zoo.build("beit3", scale="tiny", wiring={"codes": 7})


def test_stored_codes_are_the_targets(tmp_path: Path) -> None:
    path = tmp_path / "codes.safetensors"
    codes = torch.arange(32).view(2, 16)
    write_codes(path, ["a", "b"], codes, 1024)
    options: dict[str, Any] = {"image_tokenizer": "stored-codes", "objective": ["masked-data", "contrastive"]}
    made = zoo.build("beit3", scale="tiny", stages="joint", options={
        "image_tokenizer.path": str(path), "wiring.augment": "none"}, **options)  # fmt: skip
    samples = [Sample(i, image, (text,)) for i, image, text in zip("ba", pictures(2), TEXTS[:2], strict=True)]
    batch = made.processor(samples, train=True)
    assert torch.equal(batch["image_codes"], codes[[1, 0]])
    made.train()
    loss, report = made.losses(batch)
    assert torch.isfinite(loss)
    assert report["masked-data/image"] > 0
    assert "reconstruction" not in made.model.provides
    with pytest.raises(ConfigError, match="processor"):
        made.model({k: v for k, v in batch.items() if k != "image_codes"})["image_codes"]
    with pytest.raises(ConfigError, match=r"wiring.augment=none"):
        zoo.build("beit3", scale="tiny", stages="joint", **options)


def test_stages_train_what_they_name(module: Any) -> None:
    trained = {}
    for index, stage in enumerate(module.recipe.stages):
        module.set_stage(index)
        trained[stage.name] = {n.split(".")[0] for n, p in module.model.named_parameters() if p.requires_grad}
    assert trained["tokenizer"] == {"image_tokenizer"}
    assert trained["pretrain"] == {"trunk", "words", "codes"}
    assert trained["contrast"] == {"trunk", "contrast", "logit_scale"}
    module.set_stage(0)
    module.eval()


def test_codebook_stands_still_while_the_trunk_learns() -> None:
    made = zoo.build("beit3", scale="tiny", image_tokenizer={"vocab_size": 20}, seed=1)
    made.set_stage(1)
    made.train()
    before = {k: v.clone() for k, v in made.model.image_tokenizer.state_dict().items()}
    batch = made.model.example_batch(6)
    batch["pixel_values"] = torch.randn(6, 3, 64, 64)
    made.losses(batch)[0].backward()
    assert all(torch.equal(v, before[k]) for k, v in made.model.image_tokenizer.state_dict().items())
    assert made.model.trunk.stem.mask_token.grad.abs().sum() > 0


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_come_from_turns_texts_or_meta() -> None:
    made = zoo.build("beit3-vqa", scale="tiny", wiring={"labels": ["two", "apple"], "question": "what?"}, seed=1)
    samples = [
        Sample("a", pictures(1)[0], ("apple",), {"turns": (("<image> how many?", "two"),)}),
        Sample("b", pictures(1)[0], ("apple",)),
        Sample("c", pictures(1)[0], ("pear",)),
    ]
    batch = made.processor(samples)
    assert batch["label_targets"].tolist() == [[1, 0], [0, 1], [0, 0]]
    asked = [made.model.tokenizer.decode(row.tolist()) for row in batch["input_ids"]]
    assert asked == ["how many?", "what?", "what?"]
    keyed = zoo.build("beit3-in1k", scale="tiny", wiring={"labels": ["x", "y"], "label_key": "kind"}, seed=1)
    rows = keyed.processor([Sample("a", pictures(1)[0], ("t",), {"kind": "y"})])
    assert rows["label_targets"].tolist() == [[0, 1]]
    assert "input_ids" not in rows
    with pytest.raises(ConfigError, match=r"wiring.labels"):
        zoo.build("beit3-vqa", scale="tiny", seed=1).processor(samples)
    with pytest.raises(ConfigError, match="this model reads two"):
        zoo.build("beit3-nlvr2", scale="tiny", wiring={"labels": ["no", "yes"]}, seed=1).processor(samples)


def test_losses_over_labels() -> None:
    from zoo.objectives.labels import LabelsConfig

    torch.manual_seed(0)
    logits = torch.randn(3, 5)
    targets = torch.tensor([[0, 1.0, 0, 0, 0], [0.3, 0, 0.6, 0, 0], [0, 0, 0, 0, 0]])
    outputs = {"label_logits": logits, "label_targets": targets}
    loss, report = LabelsConfig(right="any").build()(None, {}, outputs)
    p = logits.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    best = targets.gather(1, logits.argmax(1, keepdim=True))[:2].mean()
    torch.testing.assert_close(report["accuracy"], best)
    loss, _ = LabelsConfig().build()(None, {}, outputs)
    torch.testing.assert_close(loss, -(targets * logits.log_softmax(-1)).sum(1)[:2].mean())


def test_a_head_over_two_images_reads_both_and_their_order(shake: Callable[[nn.Module], nn.Module]) -> None:
    made = zoo.build("beit3-nlvr2", scale="tiny", seed=1).eval()
    shake(made.model.head)
    one, two, _ = pictures()
    logits = made.classify([(one, two), (two, one), (one, one)], ["same"] * 3)
    assert logits.shape == (3, 2)
    assert not torch.allclose(logits[0], logits[1])
    torch.testing.assert_close(made.classify([one], ["same"])[0], logits[2], atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"\[batch, 2, 3, S, S\]"):
        made.model.label_logits(torch.zeros(1, 3, 64, 64), torch.ones(1, 3, dtype=torch.long))


def test_capabilities_say_what_each_recipe_does(module: Any) -> None:
    offered = set(capabilities_of(module.model))
    assert offered == {"embed_images", "embed_texts", "score_text", "score_candidates", "generate_text"}
    vqa = zoo.build("beit3-vqa", scale="tiny", seed=1)
    assert capabilities_of(vqa.model) == ("classify",)
