"""Encoders: what a chosen layer is, what is built, and parity of the own ViT and of timm's with the library."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from zoo.encoders.open_clip import OpenCLIPResNetConfig, OpenCLIPTextConfig, OpenCLIPViTConfig
from zoo.encoders.timm_vit import TimmConfig
from zoo.encoders.vit import ViTConfig
from zoo.errors import ConfigError
from zoo.plugin import catalogue

SMALL = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 3, "heads": 2}


@torch.no_grad()
def draw(model: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(noise * max(0.1, tensor[0].numel() ** -0.5) if tensor.ndim > 1 else 1 + 0.3 * noise)
    return model.eval()


def pixels(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


VITS = {
    "open_clip": lambda **k: OpenCLIPViTConfig(**SMALL, ffn=64, **k),
    "own": lambda **k: ViTConfig(**SMALL, ffn=64, **k),
    "timm": lambda **k: TimmConfig(**SMALL, **k),
}


@pytest.mark.parametrize("family", VITS)
def test_a_layer_is_its_blocks_output_and_later_blocks_are_not_built(family: str) -> None:
    make = VITS[family]
    whole = draw(make().build())
    seen: list[Tensor] = []
    blocks = next(m for m in whole.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) == 3)
    hook = blocks[1].register_forward_hook(lambda m, i, o: seen.append(o))
    pooled = whole(pixels()).pooled
    hook.remove()
    tapped = make(layer=-2).build().eval()
    tapped.load_state_dict(whole.state_dict())
    features = tapped(pixels())
    assert_close(features.tokens, seen[0])
    assert_close(features.pooled, pooled)
    short = make(layer=-2, pool=False, cls=False).build().eval()
    state = short.state_dict()
    assert set(state) < set(whole.state_dict())
    assert not [n for n in state if ".2." in n]
    short.load_state_dict({n: whole.state_dict()[n] for n in state})
    features = short(pixels())
    assert features.pooled is None
    assert short.pooled_width == 0
    assert features.grid == (4, 4)
    assert features.tokens.shape == (2, short.tokens, short.width) == (2, 16, 32)
    assert_close(features.tokens, seen[0][:, 1:])


def test_own_vit_is_timms_vit() -> None:
    from zoo import torchvision_ops

    torchvision_ops.ensure()
    from timm.models.vision_transformer import VisionTransformer

    reference = draw(VisionTransformer(32, 8, num_classes=0, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2.0))
    ours = ViTConfig(**SMALL, ffn=64).build().eval()
    theirs = reference.state_dict()
    state = {}
    for name in ours.state_dict():
        source = name.replace("embed.patch.", "patch_embed.proj.").replace("trunk.layers.", "blocks.")
        source = source.replace("embed.cls", "cls_token").replace("embed.positions", "pos_embed")
        source = source.replace("attn_norm", "norm1").replace("ffn_norm", "norm2").replace("trunk.final_norm", "norm")
        source = source.replace("ffn.up", "mlp.fc1").replace("ffn.down", "mlp.fc2").replace("attn.out", "attn.proj")
        part = next((p for p in "qkv" if f"attn.{p}." in source), None)
        if part:
            fused = theirs[source.replace(f"attn.{part}.", "attn.qkv.")]
            state[name] = fused.chunk(3)["qkv".index(part)]
        else:
            state[name] = theirs[source]
    ours.load_state_dict(state)
    features = ours(pixels())
    expected = reference.forward_features(pixels())
    assert expected.std() > 0.1
    assert_close(features.tokens, expected, atol=1e-5, rtol=1e-5)
    assert_close(features.pooled, expected[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_any_timm_model_gives_tokens_on_a_grid_and_what_its_classifier_reads(arch: str) -> None:
    encoder = draw(TimmConfig(arch=arch, image_size=64).build())
    features = encoder(pixels(64))
    assert features.tokens.shape == (2, encoder.tokens, encoder.width)
    assert features.pooled.shape == (2, encoder.pooled_width)
    height, width = features.grid
    hidden = encoder.model.forward_features(pixels(64))
    assert_close(features.pooled, encoder.model.forward_head(hidden, pre_logits=True))
    if hidden.ndim == 4:
        assert_close(features.tokens[:, 1], hidden[:, :, 0, 1])
        assert encoder.tokens == height * width
    published = TimmConfig(arch=arch).mean
    assert published == ([0.5] * 3 if arch.startswith("vit") else [0.485, 0.456, 0.406])


def test_eva_vit_g_is_blip2s() -> None:
    config = catalogue()["encoder"].parse("eva-vit-g")
    with torch.device("meta"):
        encoder = config.build()
    state = encoder.state_dict()
    assert len(encoder.trunk.layers) == 39
    assert encoder.trunk.final_norm is None
    attention = {n.removeprefix("trunk.layers.0.attn.") for n in state if n.startswith("trunk.layers.0.attn.")}
    assert attention == {"q.weight", "k.weight", "v.weight", "out.weight", "q.bias", "v.bias", "out.bias"}
    assert state["trunk.layers.0.ffn.up.weight"].shape == (6144, 1408)
    assert encoder.config.eps == 1e-6
    assert encoder.tokens == 257
    assert 980e6 < sum(p.numel() for p in encoder.parameters()) < 990e6


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_resnet_stages_are_tokens_in_row_order(layer: int) -> None:
    options: dict[str, Any] = {"blocks": [1, 2, 1, 1], "stem_width": 16, "embed_width": 24, "image_size": 64}
    whole = draw(OpenCLIPResNetConfig(**options, layer=layer).build())
    features = whole(pixels(64))
    x = whole.tower.stem(pixels(64))
    for index in range(layer % 4 + 1):
        x = getattr(whole.tower, f"layer{index + 1}")(x)
    assert features.grid == tuple(x.shape[2:])
    assert_close(features.tokens[:, features.grid[1] + 1], x[:, :, 1, 1])
    assert features.pooled.shape == (2, 24)
    assert whole.projects
    short = OpenCLIPResNetConfig(**options, layer=layer, pool=False).build().eval()
    short.load_state_dict({n: whole.state_dict()[n] for n in short.state_dict()})
    assert not [n for n in short.state_dict() if n.startswith((f"tower.layer{layer % 4 + 2}", "tower.attnpool"))]
    assert_close(short(pixels(64)).tokens, features.tokens)
    assert not short.projects


def test_text_pooling_by_end_by_mask_and_by_largest_id() -> None:
    options: dict[str, Any] = {"vocab_size": 50, "context_length": 12, "width": 32, "depth": 2, "heads": 2, "ffn": 64}
    ids = torch.tensor([[1, 9, 7, 30, 4, 4], [1, 7, 8, 3, 7, 30]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])

    def places(given: Tensor | None, **more: Any) -> list[int]:
        encoder = draw(OpenCLIPTextConfig(**options, **more).build())
        features = encoder(ids, given)
        match = (features.tokens - features.pooled[:, None]).abs().amax(-1) < 1e-6
        return [int(row.nonzero()[0]) for row in match]

    assert places(None, eos_id=7) == [2, 1]
    assert places(mask, eos_id=7) == [2, 1]
    assert places(mask, eos_id=3) == [3, 3]
    assert places(mask, eos_id=49) == [3, 4]
    assert places(None, eos_id=49) == [3, 5]
    assert places(mask, pooling="argmax") == [3, 5]


def test_pads_are_cut_off_without_changing_what_is_read() -> None:
    options: dict[str, Any] = {"vocab_size": 50, "context_length": 12, "width": 32, "depth": 2, "heads": 2, "ffn": 64}
    encoder = draw(OpenCLIPTextConfig(**options).build())
    ids, mask = torch.randint(1, 50, (2, 12)), torch.zeros(2, 12, dtype=torch.bool)
    mask[0, :3], mask[1, :5] = True, True
    features = encoder(ids, mask)
    assert features.tokens.shape == (2, 5, 32)
    assert features.mask.tolist() == mask[:, :5].tolist()
    full = encoder(ids)
    assert_close(features.tokens, full.tokens[:, :5], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OpenCLIPViTConfig(image_size=100), "multiple of patch_size"),
        (lambda: ViTConfig(heads=7), "multiple of heads"),
        (lambda: OpenCLIPViTConfig(layer=-13), "not among the 12 blocks"),
        (lambda: OpenCLIPResNetConfig(image_size=100), "multiple of 32"),
        (lambda: OpenCLIPResNetConfig(blocks=[1, 2]), "four numbers"),
        (lambda: OpenCLIPTextConfig(pooling="mean"), "one of end, argmax"),
        (lambda: TimmConfig(arch="resnet1888"), "no model 'resnet1888'"),
        (lambda: TimmConfig(arch="resnet18", width=64), "no plain vision transformer"),
        (lambda: TimmConfig(pretrained=True, width=64, heads=2), "fit no other width"),
        (lambda: ViTConfig(resize="stretch"), "crop, squash or pad"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_built(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_images_of_another_size_are_refused() -> None:
    for make in VITS.values():
        with pytest.raises(ConfigError, match="pixel values have shape"):
            make().build()(pixels(64))
    with pytest.raises(ConfigError, match="gives only its last features"):
        TimmConfig(arch="resnet18", layer=-2).build()


@pytest.mark.parametrize("name", [c.name for c in catalogue()["encoder"]])
def test_every_encoder_survives_the_tiny_sizes(name: str) -> None:
    config = catalogue()["encoder"].parse(name)
    sizes = {"image_size": 64, "patch_size": 8, "width": 128, "depth": 4, "heads": 4, "ffn": 512, "stem_width": 16}
    tiny = config.scaled({**sizes, "embed_width": 128, "kv_heads": 4, "head_dim": 32, "dropout": 0.0})
    json.dumps(tiny.mean)
    encoder = tiny.build().eval()
    features = encoder(pixels(64))
    assert features.tokens.shape == (2, encoder.tokens, encoder.width)
    assert (features.pooled is None) == (encoder.pooled_width == 0)
    assert torch.isfinite(features.tokens).all()
    assert (features.tokens[0] - features.tokens[1]).abs().max() > 1e-4
