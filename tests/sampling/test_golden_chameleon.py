"""Chameleon's image state: greedy codes behind a mixed prompt, and the order of its logits processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.data.sequences import style
from zoo.data.vocabulary import Vocabulary
from zoo.decoders.trunk_lm import TrunkLMConfig
from zoo.models.drawing import DrawingFields, DrawsImages
from zoo.sampling.codes import CodeDecoding
from zoo.sampling.guidance import image_text_weights, mixed, probabilities, weights
from zoo.weights.keymaps import chameleon, load_into

CODES = slice(4, 20)


class Painter(DrawsImages):
    """What the drawing code asks of a model, and no more; codes are numbered in the order of their ids."""

    def __init__(self, c: dict[str, Any], swin: bool) -> None:
        super().__init__()
        self.style, self.config = style("chameleon"), DrawingFields()
        self.vocabulary = Vocabulary(
            text=c["vocab_size"],
            specials=self.style.specials,
            codes=c["vq"]["num_embeddings"],
            places={"boi": c["boi"], "eoi": c["eoi"]},
            code_place=CODES.start,
        )
        self.decoder = TrunkLMConfig(
            width=c["hidden_size"], depth=c["layers"], heads=c["heads"], kv_heads=c["kv_heads"],
            ffn=c["intermediate_size"], placement="branch" if swin else "pre", qk_norm="layer", qk_norm_per_head=True,
            tie=False, vocab_size=c["vocab_size"], context_length=64,
        ).build()  # fmt: skip

    def code_embeds(self, codes: Tensor) -> Tensor:
        return self.decoder.embed(codes + self.vocabulary.first_code)

    def code_logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits_of(hidden, self.vocabulary.code_ids)


@pytest.mark.parametrize(("name", "swin"), [("prenorm", False), ("swin", True)])
def test_greedy_codes_behind_a_prompt_with_an_image(golden: Callable[[str], Any], name: str, swin: bool) -> None:
    g = golden("chameleon")
    painter = Painter(g.config, swin).eval()
    ignored = ("model.vqmodel.{**}", "official_vqgan.{**}")
    keys = chameleon.keymap(embed="embedding.tokens.", head="lm_head.")
    load_into(painter.decoder, g.weights, keys, allow_ignored=ignored)
    ids, real = g.outputs["ids_with_image"], g.inputs["attention_mask"].bool()
    begun = torch.cat([ids, torch.full((len(ids), 1), g.config["boi"])], 1)
    segment = torch.where(torch.nn.functional.pad(real, (0, 1), value=True), 0, -1)
    assert not real.all()  # left pads
    greedy = CodeDecoding(temperature=0.0)
    codes = painter.next_codes(begun, segment, g.config["tokens_per_image"], greedy, None)
    assert torch.equal(codes + painter.vocabulary.first_code, g.outputs[f"{name}_image_generated"])


def test_guidance_then_codes_alone_then_temperature_then_top_p(golden: Callable[[str], Any]) -> None:
    g = golden("chameleon")
    logits = g.inputs["cfg_logits"]
    three = mixed(logits, image_text_weights(3.0, 1.2))
    torch.testing.assert_close(three.repeat(3, 1), g.outputs["cfg_mixed"])
    two = mixed(logits, weights(2.5, "scale"))
    torch.testing.assert_close(two.repeat(2, 1), g.outputs["cfg_mixed_two"])
    p = probabilities(three[:, CODES], CodeDecoding(temperature=0.7, top_p=0.9))
    stored = g.outputs["cfg_image_probs"][:2]
    torch.testing.assert_close(p, stored[:, CODES], atol=1e-6, rtol=1e-5)
    assert bool((p == 0).any())
    torch.testing.assert_close(stored[:, CODES].sum(1), torch.ones(2))
