"""Facts of CLIP (clip.md sections 2, 5 and 10) that a parity test on small sizes does not show."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from zoo.data.text import named_tokenizer
from zoo.errors import ConfigError
from zoo.models.towers import Towers
from zoo.recipe import resolve

POSITIONS = "attnpool.positional_embedding"
SIZES: dict[str, tuple[int, dict[str, tuple[int, ...]], tuple[int, int], int]] = {
    # recipe: parameters of the released archive, shapes in the image tower, text width and heads, shared width
    "clip": (
        151_277_313, {"conv1.weight": (768, 3, 32, 32), "positional_embedding": (50, 768)}, (512, 8), 512
    ),
    "clip-vit-b-16": (
        149_620_737, {"conv1.weight": (768, 3, 16, 16), "positional_embedding": (197, 768)}, (512, 8), 512
    ),
    "clip-vit-l-14": (
        427_616_513, {"conv1.weight": (1024, 3, 14, 14), "positional_embedding": (257, 1024)}, (768, 12), 768
    ),
    "clip-vit-l-14-336": (427_944_193, {"positional_embedding": (577, 1024)}, (768, 12), 768),
    "clip-rn50": (
        102_007_137, {POSITIONS: (50, 2048), "layer3.5.conv1.weight": (256, 1024, 1, 1)}, (512, 8), 1024
    ),
    "clip-rn101": (
        119_688_033, {"layer3.22.conv1.weight": (256, 1024, 1, 1), "attnpool.c_proj.weight": (512, 2048)}, (512, 8), 512
    ),
    "clip-rn50x4": (178_300_601, {POSITIONS: (82, 2560), "conv3.weight": (80, 40, 3, 3)}, (640, 10), 640),
    "clip-rn50x16": (290_979_217, {POSITIONS: (145, 3072), "conv3.weight": (96, 48, 3, 3)}, (768, 12), 768),
    "clip-rn50x64": (623_258_305, {POSITIONS: (197, 4096), "conv3.weight": (128, 64, 3, 3)}, (1024, 16), 1024),
}  # fmt: skip
LR = {"clip-vit-l-14": 4e-4, "clip-vit-l-14-336": 2e-5, "clip-rn50x16": 4e-4, "clip-rn50x64": 3.6e-4}


def published(name: str) -> Towers:
    recipe = resolve(name)
    with torch.device("meta"):
        model: Towers = recipe.wiring[1].build(recipe.parts, 0)
    return model


@pytest.mark.parametrize("name", SIZES)
def test_published_size_has_the_released_shapes_and_training_constants(name: str) -> None:
    parameters, shapes, (width, heads), embed = SIZES[name]
    model = published(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    image = model.encoder.tower.state_dict()
    assert {n: tuple(image[n].shape) for n in shapes} == shapes
    text = model.text_encoder.tower
    assert tuple(text.token_embedding.weight.shape) == (49408, width)
    assert tuple(text.positional_embedding.shape) == (77, width)
    assert len(text.transformer.resblocks) == 12
    assert {b.attn.num_heads for b in text.transformer.resblocks} == {heads}
    out = model(model.example_batch(2))
    assert out["image_embeds"].shape == out["text_embeds"].shape == (2, embed)
    recipe = resolve(name)
    vit = "rn" not in name
    assert recipe.optimizer.lr == LR.get(name, 5e-4)
    assert recipe.optimizer.betas == ([0.9, 0.98] if vit else [0.9, 0.999])
    assert recipe.optimizer.eps == (1e-6 if vit else 1e-8)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.warmup, recipe.optimizer.clip) == (0.2, 2000, 0.0)


@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_a_tiny_and_a_small_form(name: str) -> None:
    for scale in ("tiny", "small"):
        recipe = resolve(name, scale=scale)
        with torch.device("meta"):
            model = recipe.wiring[1].build(recipe.parts, 0)
        out = model(model.example_batch(2))
        assert out["image_embeds"].shape == out["text_embeds"].shape
        assert sum(p.numel() for p in model.parameters()) < (4e6 if scale == "tiny" else 25e6)


def test_the_patch_matrix_has_no_bias_and_a_norm_stands_before_the_blocks() -> None:
    tower = published("clip").encoder.tower
    assert tower.conv1.bias is None
    assert tower.ln_pre.weight.shape == (768,)
    assert {tower.ln_pre.eps, tower.ln_post.eps, tower.transformer.resblocks[0].ln_1.eps} == {1e-5}
    assert all(m.weight.shape[0] == 768 for m in (tower.ln_post, tower.transformer.resblocks[11].ln_2))


def test_quick_gelu_is_a_switch() -> None:
    values = []
    for quick in (True, False):
        small = {"width": 32, "depth": 1, "heads": 2, "ffn": 64, "quick_gelu": quick}
        recipe = resolve("clip", values={"encoder": small, "text_encoder": small}, scale="tiny")
        model = recipe.wiring[1].build(recipe.parts, 0)
        values.append(
            [
                t.transformer.resblocks[0].mlp.gelu(torch.tensor(1.0)).item()
                for t in (model.encoder.tower, model.text_encoder.tower)
            ]
        )
    assert_close(torch.tensor(values), torch.tensor([[0.8458] * 2, [0.8413] * 2]), atol=5e-5, rtol=0)


def test_tokenizer_gives_the_released_ids() -> None:
    model = published("clip")
    model.tokenizer = named_tokenizer("clip-bpe")
    rows = model.processor.encode_texts(["a photo of a cat", "x " * 100])
    assert rows["input_ids"].shape == (2, 77)
    assert rows["input_ids"][0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert rows["input_ids"][0, 7:].eq(0).all()
    assert rows["input_ids"][1, 76] == 49407  # what is too long still ends


def test_initial_spreads_are_those_of_the_released_code() -> None:
    recipe = resolve("clip", scale="tiny")
    model = recipe.wiring[1].build(recipe.parts, 0)
    text, width, depth = model.text_encoder.tower, 128, 4
    block = text.transformer.resblocks[1]
    expected = {
        "token_embedding": (text.token_embedding.weight, 0.02),
        "positional_embedding": (text.positional_embedding, 0.01),
        "in_proj": (block.attn.in_proj_weight, width**-0.5),
        "out_proj": (block.attn.out_proj.weight, width**-0.5 * (2 * depth) ** -0.5),
        "c_fc": (block.mlp.c_fc.weight, (2 * width) ** -0.5),
        "c_proj": (block.mlp.c_proj.weight, width**-0.5 * (2 * depth) ** -0.5),
        "text_projection": (model.text_projection.weight, width**-0.5),
        "image_projection": (model.image_projection.weight, width**-0.5),
        "vision positions": (model.encoder.tower.positional_embedding, width**-0.5),
    }
    for name, (weight, std) in expected.items():
        assert abs(weight.std().item() / std - 1) < 0.05, name


def test_weight_decay_spares_norms_biases_positions_and_the_temperature() -> None:
    from zoo import torchvision_ops

    torchvision_ops.ensure()
    from zoo.module import ZooModule

    recipe = resolve("clip", scale="tiny")
    module = ZooModule(recipe.wiring[1].build(recipe.parts, 0), recipe)
    module.steps = 10
    names = {id(p): n for n, p in module.named_parameters()}
    decayed, plain = (
        {names[id(p)] for p in group["params"]} for group in module.configure_optimizers()["optimizer"].param_groups
    )
    spared = ("ln_", "bias", "positional_embedding", "class_embedding", "logit_scale")
    assert not [n for n in decayed if any(s in n for s in spared)]
    assert not [n for n in plain if not any(s in n for s in spared)]
    assert any(n.endswith("mlp.c_fc.weight") for n in decayed)


def test_prompt_ensembles_average_unit_vectors_and_renormalise() -> None:
    recipe = resolve("clip", scale="tiny")
    model = recipe.wiring[1].build(recipe.parts, 0)
    names, templates = ["red heart", "cat face"], ["a photo of a {}.", "{}", "an icon: {}"]
    every = model.embed_texts([t.format(n) for n in names for t in templates]).view(2, 3, -1)
    weights = model.zero_shot_weights(names, templates)
    assert_close(weights.norm(dim=-1), torch.ones(2))
    assert_close(weights, F.normalize(every.mean(1), dim=-1))
    raw = torch.stack([model.text_features(**_rows(model, [t.format(n) for t in templates])).mean(0) for n in names])
    assert not torch.allclose(
        weights, F.normalize(raw, dim=-1), atol=1e-5
    )  # averaging before normalising is another thing
    with pytest.raises(ConfigError, match="unlike 'an icon'"):
        model.zero_shot_weights(names, ["an icon"])


def _rows(model: Towers, texts: list[str]) -> dict[str, torch.Tensor]:
    rows: dict[str, torch.Tensor] = model.processor.encode_texts(texts)
    return rows
