"""The shared encoder of Meta-Transformer against its released code: plain blocks without a final norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from zoo.nn import PatchEmbedding, Trunk
from zoo.weights.keymaps import load_into, meta_transformer

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
KEYMAP = (
    meta_transformer.ENCODER.under("encoder.", "trunk.")
    + meta_transformer.IMAGE.under("image.", "image.")
    + meta_transformer.HYPER.under("hyper.", "hyper.")
)
TOKENIZERS = ("series.{**}", "series_timef.{**}", "series_patch.{**}", "graph.{**}")


class HyperStem(nn.Module):
    def __init__(self, values: int, width: int, bands: int) -> None:
        super().__init__()
        self.patch = nn.Linear(values, width)
        self.cls, self.positions = (
            nn.Parameter(torch.zeros(1, 1, width)),
            nn.Parameter(torch.zeros(1, bands + 1, width)),
        )


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("meta_transformer")


@pytest.fixture
def model(g: Any) -> nn.ModuleDict:
    c, width = g.config, g.config["hyper_width"]
    depth = 1 + max(int(name.split(".")[2]) for name in g.weights if name.startswith("hyper.transformer."))
    values = c["hyper_image"] ** 2 * c["hyper_near"]
    config = meta_transformer.trunk_config(width=c["width"], depth=c["layers"], heads=c["heads"])
    hyper = meta_transformer.trunk_config(width=width, depth=depth, heads=c["hyper_heads"])
    built = nn.ModuleDict(
        {
            "trunk": Trunk(config),
            "image": PatchEmbedding(c["width"], c["image"], c["patch"], cls=False, positions=False),
            "hyper": nn.ModuleDict(
                {
                    "stem": HyperStem(values, width, c["hyper_bands"]),
                    "trunk": Trunk(hyper),
                    "norm": nn.LayerNorm(width, eps=1e-5),
                    "head": nn.Linear(width, c["hyper_classes"]),
                }
            ),
        }
    ).eval()
    load_into(built, g.weights, KEYMAP, allow_ignored=TOKENIZERS)
    return built


@torch.no_grad()
def test_every_block(g: Any, model: nn.ModuleDict) -> None:
    trunk = model["trunk"]
    assert trunk.config.eps == 1e-5
    assert trunk.final_norm is None
    out, taps = trunk(g.inputs["tokens"], taps=True)
    for i, seen in enumerate(taps):
        torch.testing.assert_close(seen, g.outputs[f"encoder/after_block_{i}"], **TOLERANCE)
    assert torch.equal(out, taps[-1])


@torch.no_grad()
def test_modalities_alone_and_together(g: Any, model: nn.ModuleDict) -> None:
    image = model["image"](g.inputs["image"])
    torch.testing.assert_close(image, g.outputs["image/tokens"], atol=1e-6, rtol=1e-5)
    series, text = g.outputs["series/tokens"], g.outputs["text/zero_padded"][:, None]
    for x, name in ((image, "image"), (series, "series"), (torch.cat([image, series, text], 1), "mixed")):
        torch.testing.assert_close(model["trunk"](x), g.outputs[f"{name}/encoded"], **TOLERANCE)


@torch.no_grad()
def test_hyper_spectral_classifier(g: Any, model: nn.ModuleDict) -> None:
    hyper, x = model["hyper"], g.inputs["hyper"]
    x = torch.cat([hyper["stem"].cls.expand(len(x), -1, -1), hyper["stem"].patch(x)], 1) + hyper["stem"].positions
    logits = hyper["head"](hyper["norm"](hyper["trunk"](x)[:, 0]))
    torch.testing.assert_close(logits, g.outputs["hyper/logits"], **TOLERANCE)


@torch.no_grad()
def test_layers_run_one_at_a_time(g: Any, model: nn.ModuleDict) -> None:
    """Point clouds add their positions before every block: a range of layers is enough for that."""
    trunk, x = model["trunk"], g.inputs["tokens"]
    for i in range(trunk.config.depth):
        x = trunk(x, layers=slice(i, i + 1))
        torch.testing.assert_close(x, g.outputs[f"encoder/after_block_{i}"], **TOLERANCE)


def test_saving_gives_the_official_names_back(g: Any, model: nn.ModuleDict) -> None:
    saved, unknown = KEYMAP.save(model.state_dict())
    assert unknown == []
    assert set(saved) == {name for name in g.weights if name.startswith(("encoder.", "image.", "hyper."))}
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
