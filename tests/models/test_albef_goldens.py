"""ALBEF against its released code, loaded as its own checkpoint and trained through the zoo's objectives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo.errors import WeightsError
from zoo.module import ZooModule
from zoo.objectives.momentum import Momentum, MomentumContrastive
from zoo.part import Features
from zoo.weights.keymaps import albef as maps

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
GRADIENT = {"atol": 5e-5, "rtol": 1e-4}
HEADS = {"encoder": {"heads": 4}, "text_encoder": {"heads": 4}}


def released(golden: Any, folder: Path, model: str, **changes: Any) -> ZooModule:
    """The golden's weights as a released file of ``model``; the momentum copies and queues as they were stored."""
    path = folder / "golden.safetensors"
    save_file({name: tensor.clone() for name, tensor in golden.weights.items()}, path)
    c = golden.config
    queue = {"objective.momentum-contrastive.queue_size": c["queue_size"], "objective.matching.floor": 0.0}
    module = zoo.from_pretrained(path, model=model, **{**HEADS, **changes}, **queue)
    if "queue_size" in c:
        head = module.model.text_encoder.lm_head is not None
        stored = maps.fusion_keymap(head, head, "_m").load(golden.weights)[0]
        assert module.momentum is not None
        module.momentum.teacher.load_state_dict(stored)
        contrast = module.objectives["momentum-contrastive"]
        assert isinstance(contrast, MomentumContrastive)
        contrast.image_queue.copy_(golden.weights["image_queue"].T)
        contrast.text_queue.copy_(golden.weights["text_queue"].T)
        contrast.pointer.fill_(c["queue_ptr"])
        if "idx_queue" in golden.weights:
            contrast.id_queue.copy_(golden.weights["idx_queue"][0])
    return module


def batch_of(g: Any) -> dict[str, Tensor]:
    batch = {
        "pixel_values": g.inputs["image"],
        "input_ids": g.inputs["input_ids"],
        "attention_mask": g.inputs["attention_mask"].bool(),
        "negative_images": g.inputs["itm_image_neg_idx"],
        "negative_texts": g.inputs["itm_text_neg_idx"],
    }
    if "mlm_input_ids" in g.inputs:
        batch |= {"masked_ids": g.inputs["mlm_input_ids"], "masked_labels": g.inputs["mlm_labels"]}
    if "idx" in g.inputs:
        batch["image_ids"] = g.inputs["idx"]
    return batch


def losses(module: ZooModule, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """One training forward pass as the goldens were made: with the moving average's step, without dropout."""
    module.train()
    module.model.eval()
    assert module.momentum is not None
    module.momentum.teacher.eval()
    return module.losses(batch)


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("albef")


@pytest.fixture
def module(g: Any, tmp_path: Path) -> ZooModule:
    return released(g, tmp_path, "albef")


def test_features_fusion_and_matching(g: Any, module: ZooModule) -> None:
    model, batch, real = module.model, batch_of(g), g.inputs["attention_mask"].bool()
    with torch.no_grad():
        out = model(batch)
        torch.testing.assert_close(out["image_tokens"], g.outputs["image_embeds"], **CLOSE)
        torch.testing.assert_close(out["text_tokens"][real], g.outputs["text_embeds"][real], **CLOSE)
        torch.testing.assert_close(out["image_embeds"], g.outputs["image_feat"], **CLOSE)
        torch.testing.assert_close(out["text_embeds"], g.outputs["text_feat"], **CLOSE)
        image = Features(out["image_tokens"])
        for states in (None, out["text_tokens"]):  # from the ids, and on from the states of the text alone
            fused = model.fuse(image, batch["input_ids"], real, text_tokens=states)
            torch.testing.assert_close(fused.tokens[real], g.outputs["fusion_hidden_pos"][real], **CLOSE)
        logits = model.match_logits(batch["pixel_values"], batch["input_ids"], real)
        torch.testing.assert_close(logits, g.outputs["itm_logits"][: len(real)], **CLOSE)
        words = model.word_logits(model.fuse(image, batch["masked_ids"], real).tokens)
        torch.testing.assert_close(words[real], g.outputs["mlm_logits"][real], **CLOSE)


def test_losses_and_gradients_of_a_step(g: Any, module: ZooModule) -> None:
    loss, report = losses(module, batch_of(g))
    torch.testing.assert_close(report["momentum-contrastive"], g.outputs["loss_ita"], **CLOSE)
    torch.testing.assert_close(report["matching"], g.outputs["loss_itm"], **CLOSE)
    torch.testing.assert_close(report["masked-lm"], g.outputs["loss_mlm"], **CLOSE)
    torch.testing.assert_close(report["masked-lm/masked_lm"], g.outputs["mlm_ce"], **CLOSE)
    torch.testing.assert_close(loss, g.outputs["loss_total"], **CLOSE)
    loss.backward()
    official, unknown = maps.fusion_keymap(True, True).save(
        {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}
    )
    assert not unknown
    wanted = {name.removeprefix("grad_total/"): t for name, t in g.outputs.items() if name.startswith("grad_total/")}
    assert len(wanted) >= 8
    for name, gradient in wanted.items():
        torch.testing.assert_close(official[name], gradient, **GRADIENT)
    assert float(module.model.temperature.grad.abs()) > 1e-3


def test_momentum_step_and_queue(g: Any, module: ZooModule) -> None:
    losses(module, batch_of(g))
    momentum, contrast = module.momentum, module.objectives["momentum-contrastive"]
    assert isinstance(momentum, Momentum)
    saved, unknown = maps.fusion_keymap(True, True, "_m").save(momentum.teacher.state_dict())
    assert not unknown
    after = {n.removeprefix("momentum_after/"): t for n, t in g.outputs.items() if n.startswith("momentum_after/")}
    assert len(after) > 80
    for name, tensor in after.items():
        torch.testing.assert_close(saved[name], tensor, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(contrast.image_queue.T, g.outputs["queue_after/image_queue"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(contrast.text_queue.T, g.outputs["queue_after/text_queue"], atol=1e-6, rtol=1e-6)
    assert int(contrast.pointer) == int(g.outputs["queue_after/queue_ptr"])


def test_momentum_features_and_sampling_weights(g: Any, module: ZooModule) -> None:
    batch = batch_of(g)
    with torch.no_grad():
        module.momentum.update(module.model)
        out = module.model(batch)
        slow = module.momentum.features(batch, out)
        torch.testing.assert_close(slow["image_tokens"], g.outputs["image_embeds_m"], **CLOSE)
        torch.testing.assert_close(slow["image_embeds"], g.outputs["image_feat_m"], **CLOSE)
        torch.testing.assert_close(slow["text_embeds"], g.outputs["text_feat_m"], **CLOSE)
        images, texts = module.objectives["matching"].weights(batch, out)
    torch.testing.assert_close(images, g.outputs["itm_weights_t2i"], **CLOSE)
    torch.testing.assert_close(texts, g.outputs["itm_weights_i2t"], **CLOSE)


def test_losses_without_distillation(g: Any, tmp_path: Path) -> None:
    changes = {f"objective.{name}.alpha": 0.0 for name in ("momentum-contrastive", "masked-lm")}
    _, report = losses(released(g, tmp_path, "albef", **changes), batch_of(g))
    torch.testing.assert_close(report["momentum-contrastive"], g.outputs["alpha0/loss_ita"], **CLOSE)
    torch.testing.assert_close(report["masked-lm"], g.outputs["alpha0/loss_mlm"], **CLOSE)


def test_retrieval_step_with_image_ids(golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("albef_retrieval")
    module = released(g, tmp_path, "albef-retrieval")
    batch = batch_of(g)
    with torch.no_grad():
        module.momentum.update(module.model)
        out = module.model(batch)
        torch.testing.assert_close(out["image_embeds"], g.outputs["image_feat"], **CLOSE)
        torch.testing.assert_close(out["text_embeds"], g.outputs["text_feat"], **CLOSE)
        images, texts = module.objectives["matching"].weights(batch, out)
        torch.testing.assert_close(images, g.outputs["itm_weights_t2i"], **CLOSE)
        torch.testing.assert_close(texts, g.outputs["itm_weights_i2t"], **CLOSE)
        contrast = module.objectives["momentum-contrastive"]
        contrast(module.model, batch, out)
        size = len(batch["input_ids"]) + g.config["queue_size"]
        hard = contrast._targets(len(batch["input_ids"]), size, 0, batch["image_ids"])
        torch.testing.assert_close(hard, g.outputs["sim_targets"], **CLOSE)
    module = released(g, tmp_path, "albef-retrieval")
    _, report = losses(module, batch)
    torch.testing.assert_close(report["momentum-contrastive"], g.outputs["loss_ita"], **CLOSE)
    torch.testing.assert_close(report["matching"], g.outputs["loss_itm"], **CLOSE)
    contrast = module.objectives["momentum-contrastive"]
    for ours, theirs in (("image_queue", "image_queue"), ("text_queue", "text_queue")):
        stored = g.outputs[f"queue_after/{theirs}"]
        torch.testing.assert_close(getattr(contrast, ours).T, stored, atol=1e-6, rtol=1e-6)
    assert torch.equal(contrast.id_queue, g.outputs["queue_after/idx_queue"][0])
    assert int(contrast.pointer) == int(g.outputs["queue_after/queue_ptr"])


# -- answers -----------------------------------------------------------------------------------------------------------


def answering(g: Any, folder: Path) -> ZooModule:
    path = folder / "vqa.safetensors"
    save_file({name: tensor.clone() for name, tensor in g.weights.items()}, path)
    module = zoo.from_pretrained(path, model="albef-vqa", decoder={"heads": 4}, **HEADS)
    assert module.momentum is not None
    module.momentum.teacher.load_state_dict(maps.answerer_keymap("_m").load(g.weights)[0])
    return module


def test_answers_and_their_distilled_loss(golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("albef_vqa")
    module = answering(g, tmp_path)
    words = g.inputs["answer_attention_mask"].bool()
    labels = g.inputs["answer_input_ids"].masked_fill(~words, -100)
    labels[:, 0] = -100
    batch = {
        "pixel_values": g.inputs["image"],
        "question_ids": g.inputs["question_input_ids"],
        "question_mask": g.inputs["question_attention_mask"].bool(),
        "input_ids": g.inputs["answer_input_ids"],
        "attention_mask": words,
        "labels": labels,
        "answer_weights": g.inputs["answer_weights"],
        "answers_per_question": g.inputs["answers_per_question"],
    }
    loss, report = losses(module, batch)
    torch.testing.assert_close(loss, g.outputs["loss"], atol=2e-5, rtol=1e-5)
    assert float(report["distilled-answers/alpha"]) == pytest.approx(float(g.inputs["alpha"]))
    model, objective = module.model, module.objectives["distilled-answers"]
    with torch.no_grad():
        out = model(batch)
        each, _ = objective.per_answer(model, batch, out)
        torch.testing.assert_close(each, g.outputs["answer_loss_per_answer"], atol=2e-5, rtol=1e-5)
        logits = model.decoder.logits(out["hidden"])
        torch.testing.assert_close(logits[words], g.outputs["answer_logits"][words], **CLOSE)
        slow = module.momentum.teacher
        soft = slow.decoder.logits(slow(batch)["hidden"])[:, :-1]
        said = words[:, :-1]
        torch.testing.assert_close(soft[said], g.outputs["answer_logits_momentum"][said], **CLOSE)


def test_answers_of_a_list_are_ranked(golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("albef_vqa")
    model, real = answering(g, tmp_path).model, g.inputs["question_attention_mask"].bool()
    ids, mask = g.inputs["rank_answer_input_ids"], g.inputs["rank_answer_attention_mask"]
    with torch.no_grad():
        states = model.asked(g.inputs["image"], g.inputs["question_input_ids"], real)
        torch.testing.assert_close(states[real], g.outputs["question_hidden"][real], **CLOSE)
        ranked = {"k": g.config["k_test"], "label_smoothing": 0.0}
        chosen, scores = model.rank_ids(states, real, ids, mask, **ranked, first_twice=True)
        once = model.rank_ids(states, real, ids, mask, **ranked)[1]
    torch.testing.assert_close(scores, g.outputs["rank/log_prob_sum"], atol=2e-5, rtol=1e-5)
    probability, order = scores.softmax(-1).sort(descending=True)
    torch.testing.assert_close(probability, g.outputs["rank/topk_probs"], **CLOSE)
    assert torch.equal(chosen.gather(1, order), g.outputs["rank/topk_ids"])
    assert bool((once > scores).all())  # the release counts the first token twice


# -- what the loader says ----------------------------------------------------------------------------------------------


def test_checkpoint_of_another_size_is_one_line(g: Any, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    save_file({name: tensor.clone() for name, tensor in g.weights.items()}, path)
    with pytest.raises(WeightsError, match=r"no published size .*encoder\.heads") as error:
        zoo.from_pretrained(path, model="albef")
    assert "\n" not in str(error.value)


def test_file_of_another_albef_is_one_line(g: Any, tmp_path: Path) -> None:
    path = tmp_path / "pretrained.safetensors"
    save_file({name: tensor.clone() for name, tensor in g.weights.items()}, path)
    with pytest.raises(WeightsError, match="no answer decoder"):
        zoo.from_pretrained(path, model="albef-vqa", **HEADS)


def test_positions_of_another_image_size_are_interpolated_and_said_so(g: Any, tmp_path: Path) -> None:
    path = tmp_path / "stored.safetensors"
    save_file({name: tensor.clone() for name, tensor in g.weights.items()}, path)
    module = zoo.from_pretrained(path, model="albef", **{**HEADS, "encoder": {"heads": 4, "image_size": 40}})
    assert "interpolated" in str(module.load_report)
    assert module.load_report.resized == ["encoder.embed.positions"]
    stored, own = g.weights["visual_encoder.pos_embed"], module.model.encoder.embed.positions
    assert torch.equal(own[:, 0], stored[:, 0])  # the class token's row stays
    grid = stored[:, 1:].reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, (5, 5), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(own[:, 1:], wanted)


def test_pretrained_file_starts_the_retrieval_model(g: Any, tmp_path: Path) -> None:
    path = tmp_path / "pretrained.safetensors"
    save_file({name: tensor.clone() for name, tensor in g.weights.items()}, path)
    module = zoo.from_pretrained(path, model="albef-retrieval", **HEADS)
    assert module.model.text_encoder.lm_head is None
    assert any(name.startswith("text_encoder.cls") for name in module.load_report.ignored)
    own, slow = dict(module.model.named_parameters()), dict(module.momentum.teacher.named_parameters())
    assert set(own) - set(slow) == {"temperature", "matching_head.weight", "matching_head.bias"}
    assert all(torch.equal(tensor, own[name]) for name, tensor in slow.items())  # copies equal what was loaded
