"""The mapper of MiniGPT-5 against its released code: an encoder-decoder with ReLU, norms first, learned queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nn import Trunk
from zoo.output_connectors.mapper import Mapper, MapperConfig
from zoo.weights.keymaps import load_into, minigpt5, torch_transformer

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def mapper(c: dict[str, Any]) -> Mapper:
    sizes = {"width": c["sd_hidden"], "heads": c["nhead"], "ffn": c["ffn"], "queries": c["queries"]}
    config = MapperConfig(depth=c["layers"][0], act=c["activation"], **sizes)
    return config.build(in_width=c["llm_hidden"], in_tokens=c["vokens"], out_width=c["sd_hidden"])


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("minigpt5")


@pytest.fixture
def model(g: Any) -> Mapper:
    built = mapper(g.config).eval()
    load_into(built, g.weights, minigpt5.keymap())
    return built


def states(g: Any) -> Tensor:
    """The states of the image tokens, from the one before the first; zeros where the condition is dropped."""
    place = g.inputs["voken_start"][:, None] + torch.arange(g.config["vokens"])
    rows = g.inputs["hidden"][torch.arange(len(place))[:, None], place]
    return rows.masked_fill(g.inputs["dropped"][:, None, None], 0.0)


@torch.no_grad()
def test_mapping(g: Any, model: Mapper) -> None:
    assert model.encoder.config.eps == model.decoder.config.eps == 1e-5
    assert model.encoder.config.act == model.decoder.config.act == "relu"
    torch.testing.assert_close(model.fc(states(g)), g.outputs["fc_out"], **TOLERANCE)
    feature = model(states(g)).tokens
    torch.testing.assert_close(feature, g.outputs["mapping_feature"], **TOLERANCE)
    torch.testing.assert_close(F.mse_loss(feature, g.inputs["caption_states"]), g.outputs["caption_loss"], **TOLERANCE)
    torch.testing.assert_close(model(torch.zeros_like(states(g)[:1])).tokens, g.outputs["negative"], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_maps_hold_for_torch_itself(norm_first: bool, shake: Callable[..., nn.Module]) -> None:
    """The same maps against nn.Transformer, in the order the golden does not have."""
    sizes = {"dim_feedforward": 48, "dropout": 0.0, "activation": "gelu", "batch_first": True}
    theirs = shake(nn.Transformer(24, 4, 2, 3, norm_first=norm_first, **sizes)).eval()
    encoder, decoder = torch_transformer.trunk_configs(
        width=24, heads=4, ffn=48, encoder_depth=2, decoder_depth=3, act="gelu", norm_first=norm_first
    )
    ours = nn.ModuleDict({"encoder": Trunk(encoder), "decoder": Trunk(decoder)}).eval()
    load_into(ours, theirs.state_dict(), torch_transformer.keymap())
    draw = torch.Generator().manual_seed(1)
    source, target = (torch.randn(2, length, 24, generator=draw) for length in (5, 7))
    got = ours["decoder"](target, context=ours["encoder"](source))
    torch.testing.assert_close(got, theirs(source, target), **TOLERANCE)
    assert got.std() > 0.1


def test_saving_gives_the_official_names_back(g: Any, model: Mapper) -> None:
    saved, unknown = minigpt5.keymap().save(model.state_dict())
    assert unknown == []
    assert set(saved) == set(g.weights)
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
