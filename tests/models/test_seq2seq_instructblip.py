"""InstructBLIP with T5 against transformers, through folders that save_pretrained wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from zoo.models.seq2seq_bridge import Seq2SeqBridge
from zoo.objectives.next_token import NextTokenConfig
from zoo.sampling.text import Decoding
from zoo.torchvision_ops import ensure
from zoo.weights import load_model

SLOTS, IMAGE = 6, 110


def theirs() -> Any:
    ensure()
    from transformers import (
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipQFormerConfig,
        InstructBlipVisionConfig,
        T5Config,
    )

    vision = InstructBlipVisionConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    qformer = InstructBlipQFormerConfig(
        vocab_size=99, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40,
        encoder_hidden_size=32, max_position_embeddings=30,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=120, d_model=40, d_kv=6, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu", dense_act_fn="gelu", tie_word_embeddings=False,
    )  # fmt: skip
    config = InstructBlipConfig(
        vision_config=vision, qformer_config=qformer, text_config=t5, num_query_tokens=SLOTS, image_token_index=IMAGE
    )
    model = InstructBlipForConditionalGeneration(config)
    head = model.language_model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    return model.eval()


def rows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (3, SLOTS + 7), generator=generator)
    ids[:, :SLOTS] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    asked = torch.randint(3, 99, (3, 8), generator=generator)
    asked_mask = torch.ones_like(asked)
    asked_mask[2, -5:] = 0
    labels = torch.randint(3, 100, (3, 6), generator=generator)
    labels[0, -2:] = -100
    return {
        "pixel_values": torch.randn(3, 3, 28, 28, generator=generator),
        "qformer_input_ids": asked,
        "qformer_attention_mask": asked_mask,
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
    }


def test_equals_transformers(shake: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    other = theirs()
    shake(other)
    other.save_pretrained(tmp_path)
    ours, recipe, report = load_model(tmp_path)
    assert isinstance(ours, Seq2SeqBridge)
    assert recipe.model == "instructblip-flan-t5-xl"
    assert (report.new, report.ignored) == ([], [])
    ours.eval()
    given = rows()
    batch = {
        **given,
        "instruction_ids": given["qformer_input_ids"],
        "instruction_mask": given["qformer_attention_mask"].bool(),
    }
    said: dict[str, Any] = {k: batch[k] for k in ("instruction_ids", "instruction_mask")}
    read = [given[k] for k in ("pixel_values", "input_ids", "attention_mask")]
    with torch.no_grad():
        expected = other(**given)
        logits = ours.text_logits(*read, ours.shift_right(given["labels"]), **said)
        loss, _ = NextTokenConfig().build()(ours, batch, ours(batch))
        swapped = {"instruction_ids": said["instruction_ids"].flip(0), "instruction_mask": said["instruction_mask"]}
        other_words = ours.text_logits(*read, ours.shift_right(given["labels"]), **swapped)
    real = given["labels"] != -100
    assert expected.logits[real].std() > 0.3
    torch.testing.assert_close(logits[real], expected.logits[real], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    assert (other_words - logits).abs().max() > 1e-2  # what the Q-Former is asked matters
    prompt = {k: v for k, v in given.items() if k != "labels"}
    for how, words in (
        (Decoding(max_new_tokens=6), {}),
        (Decoding(max_new_tokens=6, beams=5, repetition_penalty=1.5), {"num_beams": 5, "repetition_penalty": 1.5}),
    ):
        new = other.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2, **words)
        got = ours.generate_ids(*read, how, stop_ids=[2], pad_id=0, **said)
        assert torch.equal(new[:, 1 : 1 + got.shape[1]], got)


def test_the_question_goes_to_both_readers() -> None:
    module = zoo.build("instructblip-flan-t5-xl", scale="tiny", **{"encoder.depth": 1, "decoder.depth": 1})
    processor = module.processor
    rows = processor.encode_prompts(["what colour?", [("is it red?", "yes"), ("and small?", None)]], 2)
    read = [[i for i in row.tolist() if i != processor.image_token_id] for row in rows["input_ids"]]
    texts = ["what colour?", "is it red? yes and small?"]
    assert [processor.tokenizer.decode(row) for row in read] == texts
    assert [processor.instructed.decode(row) for row in rows["instruction_ids"].tolist()] == texts
