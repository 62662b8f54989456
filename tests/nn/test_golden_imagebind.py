"""ImageBind against its released code: six stems, six trunks (four with a learned key and value), six heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layout import Segment, lay_out
from zoo.nn import TokenEmbedding, Trunk, resize_positions
from zoo.weights.keymaps import imagebind, load_into

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
EMBEDDING = {"atol": 2e-5, "rtol": 1e-5}


class Stem(nn.Module):
    """Patches through one matrix, a norm on them, CLS, positions, and vision's norm before the trunk."""

    def __init__(
        self, patch: nn.Module, width: int, tokens: int, *, patch_norm: bool = True, norm: bool = False
    ) -> None:
        super().__init__()
        self.patch = patch
        self.patch_norm = nn.LayerNorm(width, eps=1e-5) if patch_norm else None
        self.cls, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, tokens, width))
        self.norm = nn.LayerNorm(width, eps=1e-6) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        if not isinstance(self.patch, nn.Linear):
            x = x.flatten(2).transpose(1, 2)  # [B, N, D]
        if self.patch_norm is not None:
            x = self.patch_norm(x)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        old, new = (int((t.shape[1] - 1) ** 0.5) for t in (self.positions, x))
        square = x.shape[1] != self.positions.shape[1]
        return x + (resize_positions(self.positions, (old, old), (new, new)) if square else self.positions)


class Head(nn.Module):
    def __init__(self, width: int, out: int, scaled: bool) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, out, bias=False)
        if scaled:
            self.log_scale = nn.Parameter(torch.zeros(()))


class ImageBind(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        k = c["kwargs"]
        width, frames, *patch = k["vision_embed_dim"], *k["kernel_size"]
        grid = c["image"] // patch[0]
        stems: dict[str, nn.Module] = {
            "vision": Stem(
                nn.Conv3d(3, width, (frames, *patch), (frames, *patch), bias=False),
                width,
                grid**2 + 1,
                patch_norm=False,
                norm=True,
            ),
            "text": TokenEmbedding(c["vocab_size"], k["text_embed_dim"], positions=c["context_length"]),
        }
        size, stride = k["audio_kernel_size"], k["audio_stride"]
        height, length = ((n - size) // stride + 1 for n in (k["audio_num_mel_bins"], k["audio_target_len"]))
        width = k["audio_embed_dim"]
        stems["audio"] = Stem(nn.Conv2d(1, width, size, stride, bias=False), width, height * length + 1)
        for name in ("depth", "thermal"):
            width, size = k[f"{name}_embed_dim"], k[f"{name}_kernel_size"]
            stems[name] = Stem(nn.Conv2d(1, width, size, size, bias=False), width, (c["image"] // size) ** 2 + 1)
        width, size = k["imu_embed_dim"], k["imu_kernel_size"]
        stems["imu"] = Stem(nn.Linear(6 * size, width, bias=False), width, c["imu_steps"] // size + 1)
        self.window = size
        self.stems = nn.ModuleDict(stems)
        self.trunks = nn.ModuleDict(
            {
                name: Trunk(
                    imagebind.trunk_config(
                        name, width=k[f"{name}_embed_dim"], depth=k[f"{name}_num_blocks"], heads=k[f"{name}_num_heads"]
                    )
                )
                for name in imagebind.MODALITIES
            }
        )
        self.heads = nn.ModuleDict(
            {name: Head(k[f"{name}_embed_dim"], k["out_embed_dim"], name != "vision") for name in imagebind.MODALITIES}
        )

    def tokens(self, name: str, x: Tensor) -> Tensor:
        if name == "vision" and x.ndim == 4:
            x = x[:, :, None].expand(-1, -1, self.stems["vision"].patch.kernel_size[0], -1, -1)  # the image as frames
        if name == "imu":
            x = x.unfold(-1, self.window, self.window).transpose(1, 2).flatten(2)  # [B, windows, 6 * window]
        return self.stems[name](x)

    def trunk(self, name: str, tokens: Tensor) -> Tensor:
        if name == "vision":
            tokens = self.stems["vision"].norm(tokens)
        layout = lay_out([Segment("tokens", tokens.shape[1], attends="causal" if name == "text" else "full")])
        assert layout.kind == ("causal" if name == "text" else "full")
        return self.trunks[name](tokens, layout)

    def head(self, name: str, hidden: Tensor, x: Tensor) -> Tensor:
        end = x.argmax(-1) if name == "text" else torch.zeros(len(hidden), dtype=torch.long)
        return self.heads[name].proj(self.heads[name].norm(hidden[torch.arange(len(hidden)), end]))

    def scaled(self, name: str, head: Tensor) -> Tensor:
        unit = F.normalize(head, dim=-1)
        return unit if name == "vision" else unit * self.heads[name].log_scale.exp().clamp(max=100)


def keymap(c: dict[str, Any]) -> Any:
    return imagebind.keymap({name: c["kwargs"][f"{name}_num_heads"] for name in imagebind.MODALITIES})


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("imagebind")


@pytest.fixture
def model(g: Any) -> ImageBind:
    built = ImageBind(g.config).eval()
    load_into(built, g.weights, keymap(g.config))
    return built


@torch.no_grad()
@pytest.mark.parametrize("name", imagebind.MODALITIES)
def test_modality(g: Any, model: ImageBind, name: str) -> None:
    trunk, x = model.trunks[name], g.inputs[name]
    assert trunk.config.eps == 1e-6
    assert ("layers.0.attn.bias_k" in trunk.state_dict()) == (name in imagebind.WITH_BIAS_KV)
    tokens = model.tokens(name, x)
    torch.testing.assert_close(tokens, g.outputs[f"{name}/tokens"], **TOLERANCE)
    hidden = model.trunk(name, tokens)
    torch.testing.assert_close(hidden, g.outputs[f"{name}/trunk"], **TOLERANCE)
    head = model.head(name, hidden, x)
    torch.testing.assert_close(head, g.outputs[f"{name}/head"], **TOLERANCE)
    torch.testing.assert_close(model.scaled(name, head), g.outputs[f"{name}/embedding"], **EMBEDDING)


@torch.no_grad()
def test_another_resolution(g: Any, model: ImageBind) -> None:
    x = g.inputs["vision_large"]
    head = model.head("vision", model.trunk("vision", model.tokens("vision", x)), x)
    torch.testing.assert_close(head, g.outputs["vision_large/head"], **TOLERANCE)


@torch.no_grad()
def test_clips_are_averaged_after_the_scale(g: Any, model: ImageBind) -> None:
    x = g.inputs["audio_clips"].flatten(0, 1)
    head = model.head("audio", model.trunk("audio", model.tokens("audio", x)), x)
    torch.testing.assert_close(head, g.outputs["audio_clips/head"], **TOLERANCE)
    clips = model.scaled("audio", head).unflatten(0, g.inputs["audio_clips"].shape[:2])
    torch.testing.assert_close(clips.mean(1), g.outputs["audio_clips/embedding"], **EMBEDDING)


@torch.no_grad()
def test_the_learned_key_matters(g: Any, model: ImageBind) -> None:
    before = model.trunk("depth", g.outputs["depth/tokens"])
    for layer in model.trunks["depth"].layers:
        layer.attn.bias_v.zero_()
    assert (model.trunk("depth", g.outputs["depth/tokens"]) - before).abs().max() > 1e-2


def test_saving_gives_the_official_names_back(g: Any, model: ImageBind) -> None:
    saved, unknown = keymap(g.config).save(model.state_dict())
    assert unknown == []
    assert set(g.weights) - set(saved) == {"modality_preprocessors.text.mask"}
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
