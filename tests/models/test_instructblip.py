"""InstructBLIP against the released code and transformers, and what its card asks of any implementation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo
from zoo.data.sample import Sample
from zoo.errors import ConfigError
from zoo.layout import TokenBatch
from zoo.models.bridge import Bridge
from zoo.module import ZooModule
from zoo.objectives.next_token import NextTokenConfig
from zoo.sampling.text import Decoding, align_right
from zoo.sampling.text import write as write_text
from zoo.weights import load_model
from zoo.weights.keymaps import instructblip as maps
from zoo.weights.keymaps import load_into

Golden = Callable[[str], Any]
Shake = Callable[[nn.Module], nn.Module]
LOGITS = {"atol": 1e-4, "rtol": 0.0}
FEATURES = {"atol": 2e-5, "rtol": 1e-5}
KNOWN = ("vision_config", "qformer_config", "text_config", "num_query_tokens", "image_token_index")


def hf_folder(folder: Path, golden: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "instructblip", **{k: golden.config[k] for k in KNOWN}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.clone() for k, v in golden.weights.items()}, folder / "model.safetensors")
    return folder


def loss_of(model: Bridge, batch: dict[str, Tensor]) -> Tensor:
    return NextTokenConfig().build()(model, batch, model(batch))[0]


def test_transformers_golden(golden: Golden, tmp_path: Path) -> None:
    g = golden("hf_instructblip")
    model, recipe, report = load_model(hf_folder(tmp_path, g))
    model.eval()
    assert isinstance(model, Bridge)
    assert (recipe.model, report.new, report.ignored) == ("instructblip-vicuna-7b", [], [])
    asked = {"instruction_ids": g.inputs["qformer_input_ids"], "instruction_mask": g.inputs["qformer_attention_mask"]}
    names = ("pixel_values", "input_ids", "attention_mask", "labels")
    batch = {**{k: g.inputs[k] for k in names}, **{k: v.bool() if "mask" in k else v for k, v in asked.items()}}
    with torch.no_grad():
        text = model._instruction(batch)
        rows = model.connector.hidden(model.encoder(batch["pixel_values"]), text)  # type: ignore[operator]
        logits = model.text_logits(*(g.inputs[k] for k in names[:3]), **asked)
        loss = loss_of(model, batch)
    real = torch.cat([torch.ones(3, 5), g.inputs["qformer_attention_mask"]], 1).bool()
    torch.testing.assert_close(rows[real], g.outputs["qformer_last_hidden_state"][real], **FEATURES)
    seen = g.inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[seen], g.outputs["logits"][seen], **LOGITS)
    torch.testing.assert_close(loss, g.outputs["loss"], atol=2e-5, rtol=0)
    new = model.generate_ids(
        g.inputs["pixel_values"],
        g.inputs["gen_input_ids"],
        g.inputs["gen_attention_mask"],
        Decoding(max_new_tokens=g.config["gen_max_new_tokens"]),
        stop_ids=[2],
        pad_id=2,
        instruction_ids=g.inputs["gen_qformer_input_ids"],
        instruction_mask=g.inputs["gen_qformer_attention_mask"],
    )
    assert torch.equal(new, g.outputs["generate_ids"][:, : new.shape[1]])


def lavis(golden: Golden, tmp_path: Path) -> Bridge:
    """LAVIS' own state dict, with the block of the image tower that must be dropped, in the golden's sizes."""
    g = golden("instructblip")
    model, _, _ = load_model(hf_folder(tmp_path, golden("hf_instructblip")), changes={"connector.input_eps": 1e-5})
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    dropped = {k.removeprefix("dropped_block/"): v for k, v in g.inputs.items() if k.startswith("dropped_block/")}
    load_into(model, {**g.weights, **dropped}, maps.lavis(2, 3, "llm", text=True))
    assert isinstance(model, Bridge)
    assert dropped
    return model.eval()


def rows(model: Bridge, g: Any) -> tuple[Tensor, Tensor, Tensor]:
    """[slots; instruction; answer without its first token; pads] from the golden's padded pieces."""
    slots = torch.full((3, 5), model.image_token_id)
    ids, labels, mask = (torch.zeros(3, 17, dtype=torch.long) for _ in range(3))
    labels.fill_(-100)
    for i in range(3):
        text = g.inputs["text_input_ids"][i][g.inputs["text_input_attention_mask"][i].bool()]
        answer = g.inputs["text_output_ids"][i][g.inputs["text_output_attention_mask"][i].bool()][1:]
        row = torch.cat([slots[i], text, answer])
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        labels[i, 5 + len(text) : len(row)] = answer
    return ids, labels, mask


def test_lavis_golden(golden: Golden, tmp_path: Path) -> None:
    g = golden("instructblip")
    model = lavis(golden, tmp_path)
    for parameter in (*model.encoder.parameters(), *model.decoder.parameters()):
        parameter.requires_grad_(False)
    ids, labels, mask = rows(model, g)
    assert torch.equal(labels, g.outputs["labels"])
    assert torch.equal(mask, g.outputs["attention_mask"])
    asked = {"instruction_ids": g.inputs["qformer_input_ids"], "instruction_mask": g.inputs["qformer_attention_mask"]}
    batch = {"pixel_values": g.inputs["image"], "input_ids": ids, "attention_mask": mask, "labels": labels}
    batch |= {k: v.bool() if "mask" in k else v for k, v in asked.items()}
    connector: Any = model.connector
    image, text = model.encoder(g.inputs["image"]), model._instruction(batch)
    torch.testing.assert_close(image.tokens, g.outputs["vit_tokens"], **FEATURES)
    torch.testing.assert_close(connector.hidden(image, text)[:, :5], g.outputs["query_output"], **FEATURES)
    embeds = model._splice(ids, g.inputs["image"], text=text)
    torch.testing.assert_close(embeds[mask.bool()], g.outputs["inputs_embeds"][mask.bool()], **FEATURES)
    logits = model.text_logits(g.inputs["image"], ids, mask, **asked)
    torch.testing.assert_close(logits[mask.bool()], g.outputs["logits"][mask.bool()], **LOGITS)
    loss = loss_of(model, batch)
    torch.testing.assert_close(loss.detach(), g.outputs["loss"], atol=2e-5, rtol=0)
    loss.backward()
    assert all(p.grad is None for p in (*model.encoder.parameters(), *model.decoder.parameters()))
    layer = connector.trunk.layers[0]
    for ours, theirs in (
        (connector.query_tokens, "query_tokens"),
        (connector.ln_vision.weight, "ln_vision.weight"),
        (connector.proj.weight, "llm_proj.weight"),
        (connector.text.tokens.weight, "Qformer.bert.embeddings.word_embeddings.weight"),
        (layer.ffn[0].up.weight, "Qformer.bert.encoder.layer.0.intermediate.dense.weight"),
        (layer.cross.v.weight, "Qformer.bert.encoder.layer.0.crossattention.self.value.weight"),
    ):
        torch.testing.assert_close(ours.grad, g.outputs[f"grad/{theirs}"], **LOGITS)
    # the switch qformer_text_input, which is BLIP-2's Q-Former
    connector.reads_text = False
    with torch.no_grad():
        plain = connector.hidden(image)
        torch.testing.assert_close(plain, g.outputs["no_text_query_output"], **FEATURES)
        logits = model.text_logits(g.inputs["image"], ids, mask, **asked)
        torch.testing.assert_close(logits[mask.bool()], g.outputs["no_text_logits"][mask.bool()], **LOGITS)
        torch.testing.assert_close(loss_of(model, batch), g.outputs["no_text_loss"], atol=2e-5, rtol=0)


def test_lavis_greedy_frames_and_ranking(golden: Golden, tmp_path: Path) -> None:
    g = golden("instructblip")
    model = lavis(golden, tmp_path)
    asked = {"instruction_ids": g.inputs["qformer_input_ids"], "instruction_mask": g.inputs["qformer_attention_mask"]}
    prompt, real = g.inputs["prompt_left_ids"], g.inputs["prompt_left_attention_mask"]

    def write(pixels: Tensor, images: int, **how: Any) -> Tensor:
        slots = torch.full((3, 5 * images), model.image_token_id)
        ids, mask = torch.cat([slots, prompt], 1), torch.cat([torch.ones_like(slots), real], 1)
        decoding = Decoding(max_new_tokens=g.config["gen_max_length"], **how)
        return model.generate_ids(pixels, ids, mask, decoding, stop_ids=[2], pad_id=2, **asked)

    def same(new: Tensor, expected: Tensor) -> None:
        assert torch.equal(
            new.masked_fill(new == 0, 2), expected[:, : new.shape[1]].masked_fill(expected[:, : new.shape[1]] == 49, 2)
        )

    same(write(g.inputs["image"], 1), g.outputs["generate_ids_greedy"])
    frames = g.inputs["video"].transpose(1, 2).flatten(0, 1)  # [B * F, 3, S, S]
    same(write(frames, 2), g.outputs["video_generate_ids_greedy"])
    # two frames: two images of one row, each read with the row's instruction, 2 x 5 tokens
    slots = torch.full((3, 10), model.image_token_id)
    text, mask = g.inputs["prompt_left_ids"], g.inputs["prompt_left_attention_mask"].bool()
    with torch.no_grad():
        embeds = model._splice(
            torch.cat([slots, text], 1),
            frames,
            text=model._instruction(
                {"instruction_ids": asked["instruction_ids"], "instruction_mask": asked["instruction_mask"].bool()}
            ),
        )
    real10 = torch.cat([torch.ones_like(slots).bool(), mask], 1)
    torch.testing.assert_close(embeds[real10], g.outputs["video_inputs_embeds"][real10], **FEATURES)
    # the released penalty counts what was written and an unused BOS, not the prompt, which is embeddings there
    slots5 = slots[:, :5]
    ids, seen = torch.cat([slots5, text], 1), torch.cat([torch.ones_like(slots5).bool(), mask], 1)
    asked_bool = {"instruction_ids": asked["instruction_ids"], "instruction_mask": asked["instruction_mask"].bool()}
    embeds, aligned = align_right(model._splice(ids, g.inputs["image"], text=model._instruction(asked_bool)), seen)
    new = write_text(
        model.decoder, embeds, model._layout(align_right(ids, seen)[0], aligned),
        Decoding(max_new_tokens=g.config["gen_max_length"], repetition_penalty=1.5), stop_ids=[2], pad_id=2,
    )  # fmt: skip
    same(new, g.outputs["generate_ids_greedy_rep1.5"])
    # ranking: the sum of nats orders candidates as the released mean over the padded row does
    losses = torch.zeros(3, 3)
    instruction = {"instruction_ids": asked["instruction_ids"], "instruction_mask": asked["instruction_mask"].bool()}
    with torch.no_grad():
        features = model.image_features(g.inputs["image"], model._instruction(instruction))
        for i in range(3):
            question = g.inputs["text_input_ids"][i][g.inputs["text_input_attention_mask"][i].bool()]
            answers = [
                ids[m.bool()][1:]
                for ids, m in zip(g.inputs["candidate_ids"], g.inputs["candidate_attention_mask"], strict=True)
            ]
            for c, answer in enumerate(answers):
                row = torch.cat([slots[0, :5], question, answer])[None]
                embeds = model._splice(row, None, features[i : i + 1])
                hidden = model.decoder(TokenBatch(embeds, model._layout(row, None)))
                labels = row.clone()
                labels[:, : -len(answer)] = -100
                losses[i, c] = -model._nats(hidden[:, :-1], labels[:, 1:])
    assert torch.equal(losses.argsort(1), g.outputs["rank_candidates"])
    width = losses / g.outputs["rank_losses"]  # positions of the padded row, one number a row of the batch
    torch.testing.assert_close(width, width.round(), atol=1e-3, rtol=0)


def test_equals_transformers(shake: Shake, tmp_path: Path) -> None:
    from zoo.torchvision_ops import ensure

    ensure()
    from transformers import (
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipQFormerConfig,
        InstructBlipVisionConfig,
        LlamaConfig,
    )

    vision = InstructBlipVisionConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    qformer = InstructBlipQFormerConfig(
        vocab_size=99, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40,
        encoder_hidden_size=32, max_position_embeddings=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=120, hidden_size=40, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=3, eos_token_id=2,
    )  # fmt: skip
    config = InstructBlipConfig(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=6, image_token_index=110
    )
    theirs: Any = InstructBlipForConditionalGeneration(config).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    ours, _, report = load_model(tmp_path)
    ours.eval()
    assert isinstance(ours, Bridge)
    assert report.new == []
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 100, (3, 16), generator=generator)
    ids[:, :6] = 110
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[1, -4:] = 0
    asked = torch.randint(4, 99, (3, 7), generator=generator)
    asked_mask = torch.ones(3, 7, dtype=torch.long)
    asked_mask[2, -3:] = 0
    pixels = torch.randn(3, 3, 28, 28, generator=generator)
    labels = ids.masked_fill((ids == 110) | (mask == 0), -100)
    labels[:, :10] = -100
    given = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        expected = theirs(**given, labels=labels, qformer_input_ids=asked, qformer_attention_mask=asked_mask)
        logits = ours.text_logits(*given.values(), instruction_ids=asked, instruction_mask=asked_mask)
        loss = loss_of(
            ours, {**given, "labels": labels, "instruction_ids": asked, "instruction_mask": asked_mask.bool()}
        )
    real = mask.bool()
    assert expected.logits[real].std() > 0.3
    torch.testing.assert_close(logits[real], expected.logits[real], **LOGITS)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    prompt = ids[:, :12]
    theirs_new = theirs.generate(
        pixel_values=pixels, input_ids=prompt, attention_mask=mask[:, :12], qformer_input_ids=asked,
        qformer_attention_mask=asked_mask, max_new_tokens=7, do_sample=False, num_beams=1,
    )  # fmt: skip
    new = ours.generate_ids(
        pixels, prompt, mask[:, :12], Decoding(max_new_tokens=7), stop_ids=[2], pad_id=1,
        instruction_ids=asked, instruction_mask=asked_mask,
    )  # fmt: skip
    assert torch.equal(theirs_new[:, -new.shape[1] :], new)


# -- what the card asks ------------------------------------------------------------------------------------------------

SMALL = {
    "encoder": {"width": 32, "depth": 2, "heads": 2, "ffn": 48, "image_size": 32, "patch_size": 8},
    "connector": {"width": 24, "depth": 3, "heads": 2, "ffn": 40, "queries": 5},
    "decoder": {"width": 48, "depth": 2, "heads": 4, "ffn": 64},
}


def small(shake: Shake, **changes: Any) -> ZooModule:
    values: dict[str, Any] = {k: {**v, **changes.pop(k, {})} for k, v in SMALL.items()}
    module = zoo.build("instructblip-vicuna-7b", scale="tiny", **values, **changes)
    shake(module.model)
    return module


def picture(seed: int) -> Image.Image:
    import numpy as np

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 32, 3), dtype=np.uint8))


def asked(questions: list[str], answers: list[str]) -> list[Sample]:
    return [
        Sample(str(i), picture(i), (a,), {"turns": [[q, a]]})
        for i, (q, a) in enumerate(zip(questions, answers, strict=True))
    ]


def tokens_of(model: Any, question: str) -> Tensor:
    rows = model.processor.encode_prompts([question], 1)
    with torch.no_grad():
        text = model._instruction({k: v for k, v in rows.items() if k.startswith("instruction")})
        features: Tensor = model.image_features(model.processor.encode_images([picture(0)]), text)
    return features


def test_visual_tokens_depend_on_the_instruction(shake: Shake) -> None:
    model: Any = small(shake).model.eval()
    one, two = tokens_of(model, "What colour is it?"), tokens_of(model, "Count the birds in the picture, please.")
    assert one.shape == two.shape == (1, 5, 48)  # whatever the instruction's length
    assert (one - two).abs().max() > 1e-2
    off: Any = small(shake, connector={"reads_text": False}).model.eval()
    assert torch.equal(tokens_of(off, "What colour is it?"), tokens_of(off, "Count the birds."))
    assert not any("text" in name for name in off.connector.state_dict())  # BLIP-2's Q-Former
    assert "instruction_ids" not in off.processor(asked(["a?"], ["b"]))


def test_pads_of_the_instruction_change_nothing(shake: Shake) -> None:
    model: Any = small(shake).model.eval()
    pixels = model.processor.encode_images([picture(0)])
    ids = torch.tensor([[1, 7, 9, 4, 2]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    wide = torch.cat([ids, torch.tensor([[11, 12, 13]])], 1)
    hidden = torch.cat([mask, torch.zeros(1, 3, dtype=torch.bool)], 1)
    with torch.no_grad():
        alone = model.image_features(pixels, model.connector.embed_text(ids, mask))
        padded = model.image_features(pixels, model.connector.embed_text(wide, hidden))
        seen = model.image_features(pixels, model.connector.embed_text(wide, torch.ones_like(hidden)))
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-5)
    assert (alone - seen).abs().max() > 1e-3


def test_text_and_queries_have_their_own_feed_forward_networks_in_one_pass(shake: Shake) -> None:
    model: Any = small(shake).model.eval()
    connector = model.connector
    pixels = model.processor.encode_images([picture(0)])
    text = connector.embed_text(torch.tensor([[1, 7, 9, 2]]))
    with torch.no_grad():
        before = connector.hidden(model.encoder(pixels), text)
        last = connector.trunk.layers[-1].ffn
        noise = torch.randn(24)  # a constant would not pass the norm behind
        last[0].down.bias.add_(noise)  # the text's
        after = connector.hidden(model.encoder(pixels), text)
        assert torch.equal(before[:, :5], after[:, :5])
        assert (before[:, 5:] - after[:, 5:]).abs().max() > 1e-3
        last[0].down.bias.sub_(noise)
        last[1].down.bias.add_(noise)  # the queries'
        after = connector.hidden(model.encoder(pixels), text)
    assert (before[:, :5] - after[:, :5]).abs().max() > 1e-3
    torch.testing.assert_close(before[:, 5:], after[:, 5:], atol=1e-5, rtol=1e-5)


def test_only_the_answer_is_learned_and_follows_at_once(shake: Shake) -> None:
    model: Any = small(shake).model.eval()
    tokenizer = model.tokenizer
    questions = ["What is it?", "Describe what the animal in the middle of this picture is doing."]
    batch = model.processor(asked(questions, ["a red apple", "it runs"]))
    for row, answer in enumerate(["a red apple", "it runs"]):
        real = batch["attention_mask"][row]
        ids, labels = batch["input_ids"][row][real].tolist(), batch["labels"][row][real].tolist()
        words = [*tokenizer.encode([answer])[0], tokenizer.eos_id]
        question = tokenizer.encode([questions[row]])[0]
        # slots, </s>, instruction, answer, </s>: nothing between them in a batch with pads
        assert ids == [model.image_token_id] * 5 + [tokenizer.eos_id, *question, *words]
        assert labels == [-100] * (len(ids) - len(words)) + words
    with torch.no_grad():
        loss = loss_of(model, batch)
        other = batch["labels"].clone()
        place = (batch["labels"][0] != -100).nonzero()[0]
        other[0, place] = 9
        assert loss_of(model, {**batch, "labels": other}) != loss
    assert (
        int((batch["labels"] != -100).sum())
        == len(tokenizer.encode(["a red apple", "it runs"])[0]) + len(tokenizer.encode(["it runs"])[0]) + 2
    )  # no label of an instruction that could change it


def test_the_instruction_goes_in_twice_cut_from_the_left(shake: Shake) -> None:
    model: Any = small(shake, connector={"instruction_length": 6}).model
    batch = model.processor(asked(["one two three four five six seven eight", "what"], ["x", "y"]))
    words = model.tokenizer.encode(["one two three four five six seven eight"])[0]
    tokenizer = model.instruction_tokenizer
    assert batch["instruction_ids"][0].tolist() == [tokenizer.bos_id, *words[-4:], tokenizer.eos_id]
    assert batch["instruction_mask"].sum(1).tolist() == [6, 2 + len(tokenizer.encode(["what"])[0])]
    assert set(words) <= set(batch["input_ids"][0].tolist())


def test_tower_and_language_model_get_no_gradient_the_text_branch_does(shake: Shake) -> None:
    module = small(shake).train()
    model: Any = module.model
    module.losses(model.processor(asked(["what is it?", "name"], ["a", "b"]), train=True))[0].backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"connector"}
    assert model.connector.trunk.layers[0].ffn[0].up.weight.grad.abs().max() > 0
    assert model.connector.ln_vision.weight.grad.abs().max() > 0
    assert not model.encoder.training
    assert not model.decoder.training


def test_candidates_are_ranked_by_likelihood_in_lists_of_their_own(shake: Shake) -> None:
    model: Any = small(shake).model
    images, prompts = [picture(i) for i in range(3)], ["what?", "which colour has it?", "what?"]
    lists = [["red apple", "a", "dog"], ["flag"], ["x", "dog"]]
    scores = model.score_candidates(images, lists, prompts)
    assert scores.shape == (3, 3)
    for i, own in enumerate(lists):
        pairs = model.score_text([images[i]] * len(own), own, [prompts[i]] * len(own))
        torch.testing.assert_close(scores[i, : len(own)], pairs, atol=1e-4, rtol=1e-5)
        assert bool(torch.isinf(scores[i, len(own) :]).all())
    again = model.score_candidates(images, lists, ["other words", *prompts[1:]])
    assert (again[0] - scores[0]).abs().max() > 1e-3


def test_frames_are_images_of_one_prompt(shake: Shake) -> None:
    model: Any = small(shake).model.eval()
    frames = [picture(0), picture(1), picture(2)]
    sample = Sample("v", frames[0], ("it moves",), {"images": frames, "turns": [["What happens?", "it moves"]]})
    batch = model.processor([sample, *asked(["what?"], ["dog"])])
    assert batch["pixel_values"].shape[0] == 4
    assert (batch["input_ids"] == model.image_token_id).sum(1).tolist() == [15, 5]
    with torch.no_grad():
        loss = loss_of(model, batch)
    assert torch.isfinite(loss)
    together = model.generate_text([frames, picture(3)], ["What happens?", "what?"], max_new_tokens=5)
    alone = model.generate_text([frames], ["What happens?"], max_new_tokens=5)
    assert together[0] == alone[0]


def test_captions_get_an_instruction_drawn_by_sample_and_draw(shake: Shake) -> None:
    processor = small(shake).model.processor
    samples = [Sample(str(i), picture(0), ("dog",)) for i in range(40)]
    drawn = {processor._turns(s, True, 0)[0][0] for s in samples}
    assert len(drawn) > 6
    assert drawn <= set(processor.layout.instructions)
    assert processor._turns(samples[0], True, 3) == processor._turns(samples[0], True, 3)
    assert len({processor._turns(samples[0], True, d)[0][0] for d in range(30)}) > 6
    assert processor._turns(samples[0], False, 5)[0][0] == "A short image caption:"
    short = Sample("q", picture(0), (), {"turns": [["What colour?", "red"]], "format": "short"})
    assert processor._turns(short, True, 0)[0][0] == "Question: What colour? Short answer:"
    with pytest.raises(ConfigError, match="unknown response format 'shrt'; did you mean short"):
        processor.asked("a", "shrt")


def test_saved_with_both_tokenizers_and_loaded_again(shake: Shake, tmp_path: Path) -> None:
    from zoo.weights import save

    module = small(shake)
    save(module, module.recipe, tmp_path / "w")
    assert (tmp_path / "w" / "tokenizer" / "instruction" / "tokenizer.json").is_file()
    again, _, report = load_model(tmp_path / "w")
    assert report.new == []
    ours: Any = module.model
    assert again._instruction_tokenizer is not None  # from the checkpoint, not by name
    images, texts = [picture(0), picture(1)], ["red apple", "dog"]
    assert torch.equal(ours.score_text(images, texts), again.score_text(images, texts))  # type: ignore[operator]


def test_trimmed_file_leaves_the_language_model_new(golden: Golden, tmp_path: Path) -> None:
    from zoo.recipe import resolve
    from zoo.weights.formats import file_format

    g = golden("instructblip")
    trimmed = {k: v for k, v in g.weights.items() if not k.startswith("llm_model.")}
    official = file_format(resolve("instructblip-vicuna-7b"), trimmed)
    assert official is not None
    assert official.form == "LAVIS instructblip"
    assert official.new == ("decoder.{**}",)
    _, unknown = official.keymap.load(trimmed)
    assert unknown == []
