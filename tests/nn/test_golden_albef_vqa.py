"""ALBEF's question answering against its released code: question encoder, answer decoder, ranking of a list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layout import Segment, lay_out
from zoo.nn import MLMHead, PatchEmbedding, TokenEmbedding, Trunk
from zoo.weights.keymaps import albef, load_into, vit

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
LOSS = {"atol": 2e-5, "rtol": 1e-5}
MOMENTUM = 0.995  # a literal of the release


class VQA(nn.Module):
    def __init__(self, c: dict[str, Any], bert_config: dict[str, Any]) -> None:
        super().__init__()
        vision, vocab = c["vision_width"], c["vocab_size"]
        sizes = {"positions": c["max_positions"], "types": bert_config["type_vocab_size"], "norm": "layer"}
        self.stem = PatchEmbedding(vision, c["image"], c["patch"])
        self.vit = Trunk(vit.trunk_config(width=vision, depth=c["vision_layers"], heads=c["vision_heads"]))
        self.embed = TokenEmbedding(vocab, c["text_width"], **sizes)
        self.text = Trunk(albef.text_config(bert_config))
        self.decoder_embed = TokenEmbedding(vocab, c["text_width"], **sizes)
        self.decoder = Trunk(albef.decoder_config(bert_config, c["decoder_layers"]))
        self.lm = MLMHead(c["text_width"], vocab)

    def question(self, pixels: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        layout = lay_out([Segment("question", ids.shape[1], attends="full")], real=real)
        return self.text(self.embed(ids), layout, context=self.vit(self.stem(pixels)))

    def answer(self, ids: Tensor, real: Tensor, question: Tensor, asked: Tensor) -> Tensor:
        layout = lay_out([Segment("answer", ids.shape[1])], real=real)
        hidden = self.decoder(self.decoder_embed(ids), layout, context=question, context_mask=asked)
        return self.lm(hidden, self.decoder_embed.tokens.weight)


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("albef_vqa")


def loaded(g: Any, copy: str = "") -> VQA:
    built = VQA(g.config, g.info["bert_config"]).eval()
    state = {name: t for name, t in g.weights.items() if ("_m." in name) == bool(copy)}
    load_into(built, state, albef.vqa_keymap(copy))
    return built


@pytest.fixture
def model(g: Any) -> VQA:
    return loaded(g)


def asked(g: Any, model: VQA) -> tuple[Tensor, Tensor]:
    real = g.inputs["question_attention_mask"].bool()
    return model.question(g.inputs["image"], g.inputs["question_input_ids"], real), real


def answered(g: Any, model: VQA) -> tuple[Tensor, Tensor]:
    """The logits of all answers, each over the states of its question."""
    question, real = asked(g, model)
    of = torch.repeat_interleave(torch.arange(len(question)), g.inputs["answers_per_question"])
    words = g.inputs["answer_attention_mask"].bool()
    return model.answer(g.inputs["answer_input_ids"], words, question[of], real[of]), words


@torch.no_grad()
def test_question_states(g: Any, model: VQA) -> None:
    assert {m.eps for m in model.decoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}
    torch.testing.assert_close(model.vit(model.stem(g.inputs["image"])), g.outputs["image_embeds"], **TOLERANCE)
    question, real = asked(g, model)
    torch.testing.assert_close(question[real], g.outputs["question_hidden"][real], **TOLERANCE)


@torch.no_grad()
def test_answer_logits_and_loss(g: Any, model: VQA) -> None:
    logits, words = answered(g, model)
    torch.testing.assert_close(logits[words], g.outputs["answer_logits"][words], **TOLERANCE)
    slow = loaded(g, "_m")
    online = dict(model.named_parameters())
    for name, parameter in slow.named_parameters():
        parameter.lerp_(online[name], 1 - MOMENTUM)
    soft, _ = answered(g, slow)
    soft, said = soft[:, :-1], words[:, :-1]
    torch.testing.assert_close(soft[said], g.outputs["answer_logits_momentum"][said], **TOLERANCE)
    target = g.inputs["answer_input_ids"][:, 1:]
    scored = target != g.config["pad_id"]
    log = logits[:, :-1].log_softmax(-1)
    hard = -log.gather(-1, target[..., None])[..., 0] * scored
    distilled = -(soft.softmax(-1) * log).sum(-1) * scored
    alpha = g.inputs["alpha"]
    each = ((1 - alpha) * hard + alpha * distilled).sum(1)
    torch.testing.assert_close(each, g.outputs["answer_loss_per_answer"], **LOSS)
    loss = (g.inputs["answer_weights"] * each).sum() / len(g.inputs["image"])
    torch.testing.assert_close(loss, g.outputs["loss"], **LOSS)


@torch.no_grad()
def test_answers_of_a_list_are_ranked(g: Any, model: VQA) -> None:
    c, (question, real) = g.config, asked(g, model)
    ids, words = g.inputs["rank_answer_input_ids"], g.inputs["rank_answer_attention_mask"].bool()
    start = ids[:1, :1].expand(len(question), 1)
    first = model.answer(start, torch.ones_like(start, dtype=torch.bool), question, real)[:, 0]
    torch.testing.assert_close(first, g.outputs["rank/first_token_logits"], **TOLERANCE)
    likely, chosen = first.softmax(-1)[:, ids[:, 1]].topk(c["k_test"], 1)  # [questions, k]
    flat = chosen.flatten()
    of = torch.arange(len(question)).repeat_interleave(c["k_test"])
    logits = model.answer(ids[flat], words[flat], question[of], real[of])[:, :-1]
    target = ids[flat, 1:].masked_fill(~words[flat, 1:], -100)
    loss = F.cross_entropy(logits.transpose(1, 2), target, reduction="none").sum(1).view_as(likely)
    total = likely.log() - loss  # the first word counts twice, as in the release
    probability, order = total.softmax(-1).sort(descending=True)
    torch.testing.assert_close(total, g.outputs["rank/log_prob_sum"], **LOSS)
    torch.testing.assert_close(probability, g.outputs["rank/topk_probs"], **TOLERANCE)
    assert torch.equal(chosen.gather(1, order), g.outputs["rank/topk_ids"])


def test_saving_gives_the_official_names_back(g: Any, model: VQA) -> None:
    both = {}
    for copy, built in (("", model), ("_m", loaded(g, "_m"))):
        saved, unknown = albef.vqa_keymap(copy).save(built.state_dict())
        assert unknown == []
        both |= saved
    assert set(both) == set(g.weights)
    assert all(torch.equal(both[name], g.weights[name]) for name in both)
