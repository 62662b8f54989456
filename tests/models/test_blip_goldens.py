"""BLIP against its released code, every file read by the real loader: pre-training step, captions, matching, VQA,
retrieval fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.errors import WeightsError
from zoo.module import ZooModule
from zoo.part import Features
from zoo.sampling.text import Decoding
from zoo.weights.keymaps import blip as maps

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SLOTS = {
    "blip": ("encoder", "text_encoder", "decoder"),
    "blip-retrieval": ("encoder", "text_encoder"),
    "blip-caption": ("encoder", "decoder"),
    "blip-vqa": ("encoder", "text_encoder", "decoder"),
    "blip-nlvr": ("encoder", "text_encoder"),
}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., ZooModule]:
    """Write the golden's weights as the release does and read them back; 4 heads cannot be seen in the tensors."""

    def loaded(g: Any, model: str, **changes: Any) -> ZooModule:
        path = tmp_path / "model.pth"
        torch.save({"model": dict(g.weights), "config": {"image_size": g.config["image"]}}, path)
        heads = {slot: {"heads": g.config["text_heads"]} for slot in SLOTS[model]}
        heads["encoder"] = {"heads": g.config["vision_heads"]}
        return zoo.from_pretrained(path, model=model, **{**heads, **changes}).eval()

    return loaded


class Tokens:
    """The golden's ids, which stand for no text."""

    def __init__(self, c: dict[str, Any]) -> None:
        self.bos_id, self.eos_id, self.pad_id = c["cls_id"], c["sep_id"], c["pad_id"]
        self.vocab_size, self.image_token_id = c["vocab_size"] - 2, None


def with_tokens(module: ZooModule, g: Any) -> Any:
    module.model.tokenizer = Tokens(g.config)
    return module.model


def pairs(g: Any) -> dict[str, Tensor]:
    i = g.inputs
    return {
        "pixel_values": i["image"],
        "input_ids": i["input_ids"],
        "attention_mask": i["attention_mask"].bool(),
        "negative_images": i["itm_image_neg_idx"],
        "negative_texts": i["itm_text_neg_idx"],
    }


def slow_weights(module: ZooModule, g: Any) -> None:
    """Fill the momentum copy and the queues as the golden has them before the step."""
    state, _ = maps.placed(maps.encoder_keymap("_m"), maps.PARTS).load(g.weights)
    missing = module.momentum.teacher.load_state_dict(state, strict=False)  # type: ignore[union-attr]
    assert not missing.unexpected_keys
    assert all(".cross" in name for name in missing.missing_keys)
    contrast = module.objectives["momentum-contrastive"]
    contrast.image_queue, contrast.text_queue = (g.weights[f"{n}_queue"].T.contiguous() for n in ("image", "text"))
    contrast.pointer.fill_(g.config["queue_ptr"])


def test_pretraining_step(golden: Callable[[str], Any], load: Callable[..., ZooModule]) -> None:
    g, step = golden("blip"), golden("blip_step")
    c = g.config
    objective = {
        "momentum-contrastive": {"queue_size": c["queue_size"], "alpha": c["alpha"], "ramp": 0.0},
    }
    module = load(g, "blip", objective=objective)
    with_tokens(module, g)
    slow_weights(module, g)
    batch = pairs(g)
    module.momentum.update(module.model)  # type: ignore[union-attr]  # the golden runs in eval mode
    outputs = module.model(batch)
    total = torch.zeros(())
    wanted = {"momentum-contrastive": "loss_ita", "matching": "loss_itm", "next-token": "loss_lm"}
    for name, key in wanted.items():
        loss, _ = module.objectives[name](module.model, batch, outputs)
        torch.testing.assert_close(loss, g.outputs[key], **CLOSE)
        total = total + loss
    torch.testing.assert_close(total, g.outputs["loss_total"], **CLOSE)
    torch.testing.assert_close(outputs["image_embeds"], g.outputs["image_feat"], **CLOSE)
    torch.testing.assert_close(outputs["text_embeds"], g.outputs["text_feat"], **CLOSE)
    image_weights, text_weights = module.objectives["matching"].weights(batch, outputs)
    torch.testing.assert_close(image_weights, g.outputs["itm_weights_t2i"], **CLOSE)
    torch.testing.assert_close(text_weights, g.outputs["itm_weights_i2t"], **CLOSE)
    total.backward()  # type: ignore[no-untyped-call]
    grads = {n: p.grad for n, p in module.model.named_parameters(remove_duplicate=False)}
    assert all(gradient is not None for gradient in grads.values())
    official, unknown = maps.med_keymap().save(grads)
    gradients = {n.removeprefix("grad_total/"): t for n, t in step.outputs.items() if n.startswith("grad_total/")}
    assert not unknown
    assert "temp" in gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(official[name], gradient, atol=5e-5, rtol=5e-4)
    module.objectives["momentum-contrastive"].after_forward()
    contrast = module.objectives["momentum-contrastive"]
    torch.testing.assert_close(contrast.image_queue.T, g.outputs["queue_after/image_queue"], **CLOSE)
    torch.testing.assert_close(contrast.text_queue.T, g.outputs["queue_after/text_queue"], **CLOSE)
    assert int(contrast.pointer) == int(g.outputs["queue_after/queue_ptr"])
    after, _ = maps.placed(maps.encoder_keymap("_m"), maps.PARTS).save(module.momentum.teacher.state_dict())  # type: ignore[union-attr]
    kept = {n.removeprefix("momentum_after/"): t for n, t in step.outputs.items() if n.startswith("momentum_after/")}
    assert kept
    for name, tensor in kept.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_matching_and_similarity_of_a_file_with_more_in_it(
    golden: Callable[[str], Any], load: Callable[..., ZooModule]
) -> None:
    g = golden("blip")
    module = load(g, "blip-retrieval")
    assert not hasattr(module.model, "generate_text")
    assert (
        any(name.startswith("text_decoder.") for name in module.model.recipe_report.ignored)
        if hasattr(module.model, "recipe_report")
        else True
    )
    ids, mask = g.inputs["input_ids"], g.inputs["attention_mask"].bool()
    image = F.normalize(module.image_features(g.inputs["image"]), dim=-1)
    text = F.normalize(module.text_features(ids, mask), dim=-1)
    torch.testing.assert_close(image @ text.T, g.outputs["blip_itm/itc_similarity"], **CLOSE)
    logits = module.model.match_logits(g.inputs["image"], ids, mask)
    torch.testing.assert_close(logits, g.outputs["itm_logits"][: len(ids)], **CLOSE)
    tokens = module.model.encoder(g.inputs["image"]).tokens
    scores = torch.stack(
        [
            module.model.matching_logits(module.model.fuse(Features(one.expand(len(ids), -1, -1)), ids, mask))[:, 1]
            for one in tokens
        ]
    )
    torch.testing.assert_close(scores, g.outputs["retrieval/itm_logit1"], **CLOSE)
    torch.testing.assert_close(scores + image @ text.T, g.outputs["retrieval/score_i2t"], **CLOSE)


@pytest.mark.parametrize("model", ["blip", "blip-caption"])
@torch.no_grad()
def test_captions(golden: Callable[[str], Any], load: Callable[..., ZooModule], model: str) -> None:
    g = golden("blip")
    c = g.config
    module = load(g, model)
    net = with_tokens(module, g)
    assert net.start_id == c["dec_id"]
    ids, mask = g.inputs["caption_input_ids"], g.inputs["caption_attention_mask"].bool()
    started = torch.cat([torch.full_like(ids[:, :1], c["dec_id"]), ids[:, 1:]], 1)
    logits = net.text_logits(g.inputs["image"], started, mask)
    torch.testing.assert_close(logits[mask], g.outputs["caption/lm_logits"][mask], **CLOSE)
    if model == "blip-caption":
        prompt = len(c["prompt_words"]) + 1
        labels = ids.masked_fill(~mask, -100)
        labels[:, :prompt] = -100
        batch = {"pixel_values": g.inputs["image"], "input_ids": ids, "attention_mask": mask, "labels": labels}
        loss, report = module.objectives["next-token"](net, batch, net(batch))
        torch.testing.assert_close(loss, g.outputs["caption/loss"], **CLOSE)
        assert int(report["tokens"]) == int(mask.sum()) - prompt * len(ids)
    context, _ = net.read(g.inputs["image"])
    begun = torch.tensor([[c["dec_id"], *c["prompt_words"]]]).repeat(len(ids), 1)
    room = {"max_new_tokens": c["gen_max"] - begun.shape[1], "min_new_tokens": c["gen_min"] - begun.shape[1]}
    for name, changes in (
        ("generate/greedy_ids", {}),
        ("generate/beam3_ids", {"beams": 3, "length": "whole"}),
        ("generate/beam3_rep_ids", {"beams": 3, "length": "whole", "repetition_penalty": 1.3}),
        ("generate_transformers_5/beam3_ids", {"beams": 3}),
        ("generate_transformers_5/beam3_rep_ids", {"beams": 3, "repetition_penalty": 1.3}),
    ):
        new = net.write_ids(context, begun, decoding=Decoding(**room, **changes))
        whole = torch.cat([begun, new], 1)
        wanted = g.outputs[name]
        assert torch.equal(F.pad(whole, (0, wanted.shape[1] - whole.shape[1]), value=c["pad_id"]), wanted), name
    assert not torch.equal(g.outputs["generate/beam3_ids"], g.outputs["generate_transformers_5/beam3_ids"])


def test_answers(golden: Callable[[str], Any], load: Callable[..., ZooModule]) -> None:
    g = golden("blip_vqa")
    c, i = g.config, g.inputs
    module = load(g, "blip-vqa")
    net = with_tokens(module, g)
    assert net.decoder.context_width == c["text_width"] != net.encoder.width
    mask = i["answer_attention_mask"].bool()
    batch = {
        "pixel_values": i["image"],
        "question_ids": i["question_input_ids"],
        "question_mask": i["question_attention_mask"].bool(),
        "input_ids": i["answer_input_ids"],
        "attention_mask": mask,
        "labels": i["answer_input_ids"].masked_fill(~mask, -100),
        "answers_per_question": i["answers_per_question"],
        "answer_weights": i["answer_weights"],
    }
    outputs = net(batch)
    logits = net.decoder.logits(outputs["hidden"])
    torch.testing.assert_close(logits[mask], g.outputs["answer_logits"][mask], **CLOSE)
    objective = module.objectives["answers"]
    each = objective.per_answer(net, outputs["hidden"], outputs["targets"])
    torch.testing.assert_close(each, g.outputs["answer_loss_per_answer"], atol=2e-5, rtol=2e-5)
    loss, _ = objective(net, batch, outputs)
    torch.testing.assert_close(loss, g.outputs["loss"], atol=2e-5, rtol=2e-5)
    states = net.asked(i["image"], i["question_input_ids"], batch["question_mask"])
    real = batch["question_mask"]
    torch.testing.assert_close(states[real], g.outputs["question_hidden"][real], **CLOSE)
    with torch.no_grad():
        chosen, scores = net.rank_ids(
            states, real, i["rank_answer_input_ids"], i["rank_answer_attention_mask"], k=c["k_test"]
        )
        assert torch.equal(chosen, g.outputs["rank/topk_ids"])
        torch.testing.assert_close(scores, g.outputs["rank/neg_loss_sum"], atol=2e-5, rtol=2e-5)
        best = chosen.gather(1, scores.argmax(1, keepdim=True))[:, 0]
        assert torch.equal(best, g.outputs["rank/best_answer_index"])
        begun = torch.full((len(states), 1), c["dec_id"])
        states = net.asked(i["image"], i["question_input_ids"], real, pads_read=True)
        decoding = Decoding(max_new_tokens=9, beams=3)  # max_length 10; with one prompt token both lengths agree
        for length in ("new", "whole"):  # with all places of the question in sight
            new = net.write_ids(states, begun, decoding=replace(decoding, length=length))
            ids = F.pad(torch.cat([begun, new], 1), (0, 9 - new.shape[1]), value=c["pad_id"])
            assert torch.equal(ids, g.outputs["generate/answer_ids"])


def test_retrieval_step(golden: Callable[[str], Any], load: Callable[..., ZooModule]) -> None:
    g = golden("blip_retrieval")
    c = g.config
    objective = {"momentum-contrastive": {"queue_size": c["queue_size"], "alpha": 0.4, "ramp": 0.0}}
    alpha = float(g.inputs["alpha"])
    objective["momentum-contrastive"]["alpha"] = alpha
    module = load(g, "blip-retrieval", objective=objective)
    slow_weights(module, g)
    contrast = module.objectives["momentum-contrastive"]
    contrast.id_queue = g.weights["idx_queue"][0].long().clone()
    batch = {**pairs(g), "image_ids": g.inputs["idx"]}
    module.momentum.update(module.model)  # type: ignore[union-attr]
    outputs = module.model(batch)
    loss, _ = contrast(module.model, batch, outputs)
    torch.testing.assert_close(loss, g.outputs["loss_ita"], **CLOSE)
    loss, _ = module.objectives["matching"](module.model, batch, outputs)
    torch.testing.assert_close(loss, g.outputs["loss_itm"], **CLOSE)
    image_weights, text_weights = module.objectives["matching"].weights(batch, outputs)
    torch.testing.assert_close(image_weights, g.outputs["itm_weights_t2i"], **CLOSE)
    torch.testing.assert_close(text_weights, g.outputs["itm_weights_i2t"], **CLOSE)
    same = g.inputs["idx"][:, None] == g.inputs["idx"]
    assert not image_weights[same].any()
    contrast.after_forward()
    torch.testing.assert_close(contrast.image_queue.T, g.outputs["queue_after/image_queue"], **CLOSE)
    assert torch.equal(contrast.id_queue[None], g.outputs["queue_after/idx_queue"].long())


@torch.no_grad()
def test_two_images(golden: Callable[[str], Any], load: Callable[..., ZooModule]) -> None:
    g = golden("blip_nlvr")
    module = load(g, "blip-nlvr")
    net: Any = module.model
    merging = [layer.cross.merge is not None for layer in net.text_encoder.trunk.layers]
    assert merging == [False] * 6 + [True] * 2
    first, second = g.inputs["image"].chunk(2)  # along the batch
    ids, mask = g.inputs["input_ids"], g.inputs["attention_mask"].bool()
    batch = {
        "pixel_values": first, "other_pixel_values": second, "input_ids": ids, "attention_mask": mask,
        "labels": g.inputs["targets"],
    }  # fmt: skip
    outputs = net(batch)
    torch.testing.assert_close(outputs["verdict_logits"], g.outputs["logits"], **CLOSE)
    loss, _ = module.objectives["verdict"](net, batch, outputs)
    torch.testing.assert_close(loss, g.outputs["loss"], **CLOSE)
    assert not torch.allclose(net.verdict_logits(second, first, ids, mask), outputs["verdict_logits"], atol=1e-3)


def test_a_file_of_another_blip_is_refused_in_one_line(
    golden: Callable[[str], Any], load: Callable[..., ZooModule], tmp_path: Path
) -> None:
    g = golden("blip_vqa")
    with pytest.raises(WeightsError, match=r"no vision_proj.*model=blip-caption or blip-vqa"):
        load(g, "blip-retrieval")
    cut = {n: t for n, t in g.weights.items() if n != "visual_encoder.blocks.0.mlp.fc1.weight"}
    torch.save(cut, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match=r"no visual_encoder\.blocks\.0\.mlp\.fc1\.weight"):
        zoo.from_pretrained(tmp_path / "cut.pth", model="blip-vqa")
    with pytest.raises(WeightsError, match=r"do not tell encoder\.heads"):
        load(g, "blip-vqa", encoder={})


def test_another_image_size_interpolates_positions_and_says_so(
    golden: Callable[[str], Any], load: Callable[..., ZooModule], tmp_path: Path
) -> None:
    g = golden("blip")
    small = load(g, "blip")
    from zoo.weights.load import load_model

    path = tmp_path / "model.pth"
    heads = {slot: {"heads": 4} for slot in SLOTS["blip"]}
    heads["encoder"]["image_size"] = 40
    large, _, report = load_model(path, model="blip", changes=heads)
    assert report.resized == ["encoder.embed.positions"]
    assert "interpolated to the image size: encoder.embed.positions" in str(report)
    assert report.new_parts == ()
    was, now = small.model.encoder.embed.positions, large.encoder.embed.positions
    assert (was.shape[1], now.shape[1]) == (1 + 3 * 3, 1 + 5 * 5)
    assert torch.equal(was[:, 0], now[:, 0])
    grid = was[:, 1:].detach().reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, size=(5, 5), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(now[:, 1:].detach(), wanted)
    assert torch.equal(small.model.encoder.trunk.layers[0].ffn.up.weight, large.encoder.trunk.layers[0].ffn.up.weight)


def test_saved_by_the_zoo_and_read_again(
    golden: Callable[[str], Any], load: Callable[..., ZooModule], tmp_path: Path
) -> None:
    """What encoder and decoder share is written once, and is one again after reading."""
    from safetensors.torch import load_file

    from zoo.data.text import named_tokenizer
    from zoo.weights import save

    module = load(golden("blip"), "blip")
    module.model.tokenizer = named_tokenizer("openmoji-bpe")
    folder = save(module, module.recipe, tmp_path / "own")
    stored = load_file(folder / "model.safetensors")
    assert not any(n.startswith("decoder.embed_tokens") or (n.startswith("decoder") and ".ffn" in n) for n in stored)
    again = zoo.from_pretrained(folder)
    state = again.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.model.state_dict().items())
    for mine, other in zip(again.model.decoder.trunk.layers, again.model.text_encoder.trunk.layers, strict=True):
        assert mine.cross is other.cross
        assert mine.ffn.up.weight.data_ptr() == other.ffn.up.weight.data_ptr()
        assert mine.attn.q.weight.data_ptr() != other.attn.q.weight.data_ptr()
