"""A CogVLM that starts from a bridge with a Llama: the language is taken over, the visual experts are its copies."""

from __future__ import annotations

import torch

import zoo
from zoo.models.base import Model

PARTS = {"encoder": "clip-vit-l-14", "connector": "glu-adapter", "scale": "tiny", "stages": "joint"}


def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    from zoo.layout import Segment, TokenBatch, lay_out

    decoder = model.decoder
    layout = lay_out([Segment("text", ids.shape[1], "text", "causal")], len(ids))
    hidden = decoder(TokenBatch(decoder.embed(ids), layout, ids=ids))
    return decoder.logits(hidden)


def test_language_is_taken_over_and_experts_are_its_copies() -> None:
    llama, cogvlm = zoo.build("llava", **PARTS).model, zoo.build("cogvlm-base-224", seed=1, **PARTS).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in llama.decoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    stored = llama.decoder.state_dict()
    taken = cogvlm.decoder.adopt(stored)
    assert set(taken) == set(cogvlm.decoder.state_dict())
    cogvlm.decoder.load_state_dict(taken)
    ids = torch.randint(5, 1000, (2, 9), generator=generator)
    torch.testing.assert_close(logits(cogvlm, ids), logits(llama, ids), rtol=1e-4, atol=1e-4)
    layer = cogvlm.decoder.trunk.layers[1]
    assert torch.equal(layer.attn.q[1].weight, layer.attn.q[0].weight)
    assert torch.equal(layer.ffn[1].up.weight, layer.ffn[0].up.weight)
    assert not torch.equal(layer.attn.q[0].weight, layer.attn.k[0].weight)


def test_its_own_tensors_stay_what_they_are() -> None:
    own = zoo.build("cogvlm-base-224", **PARTS).model.decoder
    stored = own.state_dict()
    assert own.adopt(stored) == stored
