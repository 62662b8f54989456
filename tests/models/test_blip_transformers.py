"""BLIP folders of transformers through the loader: captions, answers, matching equal the library's, random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.errors import WeightsError
from zoo.models.grounded import shifted
from zoo.module import ZooModule
from zoo.sampling.text import Decoding
from zoo.torchvision_ops import ensure

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
PAD, CLS, SEP, DEC, ENC, VOCAB = 0, 2, 3, 58, 59, 60


def library(name: str, width: int = 32) -> Any:
    """The class with every tensor drawn again: transformers starts the image encoder at a deviation of 1e-10."""
    ensure()
    import transformers

    vision = {
        "hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 24, "patch_size": 8, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    text = {
        "vocab_size": VOCAB, "hidden_size": 32, "encoder_hidden_size": width, "intermediate_size": 40,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 24, "label_smoothing": 0.1,
        "bos_token_id": DEC, "eos_token_id": 1, "pad_token_id": PAD, "sep_token_id": SEP,
    }  # fmt: skip
    config = transformers.BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=16)
    model = getattr(transformers, name)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                norm = "norm" in key.lower() and key.endswith("weight")
                parameter.copy_((1.0 if norm else 0.0) + 0.3 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embedding" in key else 1.2 / parameter.shape[-1] ** 0.5))
    return model


@pytest.fixture
def both(tmp_path: Path) -> Callable[[str], tuple[Any, ZooModule]]:
    def made(name: str, width: int = 32) -> tuple[Any, ZooModule]:
        theirs = library(name, width)
        theirs.save_pretrained(tmp_path / name)
        return theirs, zoo.from_pretrained(tmp_path / name).eval()

    return made


def text(lengths: tuple[int, ...], first: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, DEC, real.shape, generator=generator)
    ids[:, 0] = first
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = SEP
    return ids.masked_fill(~real, PAD), real


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(1))


class Tokens:
    bos_id, eos_id, pad_id, vocab_size, image_token_id = CLS, SEP, PAD, VOCAB - 2, None


def behind_stop(ids: Tensor, start: int) -> Tensor:
    """transformers' ids without the prompt, pads behind the stop, where its beams fill with the stop."""
    ids = ids[:, start:]
    ends = (ids == SEP).cumsum(1) - (ids == SEP).long() > 0
    return ids.masked_fill(ends, PAD)


@pytest.mark.parametrize("width", [32, 24])
def test_captions(both: Callable[..., tuple[Any, ZooModule]], width: int) -> None:
    theirs, ours = both("BlipForConditionalGeneration", width)
    net: Any = ours.model
    net.tokenizer = Tokens()
    pixels = images(3)
    ids, real = text((9, 6, 7), DEC)
    labels = ids.masked_fill(~real, -100)
    wanted = theirs(pixel_values=pixels, input_ids=ids, attention_mask=real.long(), labels=labels)
    logits = net.text_logits(pixels, ids, real)
    assert float(wanted.logits[real].std()) > 0.5
    torch.testing.assert_close(logits[real], wanted.logits[real], **CLOSE)
    batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": real, "labels": labels}
    loss, _ = ours.objectives["next-token"](net, batch, net(batch))
    torch.testing.assert_close(loss, wanted.loss, **CLOSE)
    loss.backward()
    wanted.loss.backward()
    key = "text_decoder.bert.encoder.layer.1.crossattention.self.value.weight"
    torch.testing.assert_close(
        net.decoder.trunk.layers[1].cross.v.weight.grad, theirs.get_parameter(key).grad, atol=1e-5, rtol=1e-3
    )
    torch.testing.assert_close(
        net.encoder.embed.positions.grad, theirs.vision_model.embeddings.position_embedding.grad, atol=1e-5, rtol=1e-3
    )
    prompt = torch.tensor([[CLS, 7, 9, SEP]]).repeat(3, 1)  # the library replaces the first id and drops the last
    begun = torch.tensor([[DEC, 7, 9]]).repeat(3, 1)
    with torch.no_grad():
        context, _ = net.read(pixels)
        for beams in (1, 3):
            found = net.write_ids(context, begun, decoding=Decoding(max_new_tokens=8, min_new_tokens=2, beams=beams))
            out = theirs.generate(
                pixels, input_ids=prompt.clone(), num_beams=beams, max_new_tokens=8, min_new_tokens=2, do_sample=False
            )
            assert torch.equal(found, behind_stop(out, 3)[:, : found.shape[1]])


def test_answers(both: Callable[..., tuple[Any, ZooModule]]) -> None:
    theirs, ours = both("BlipForQuestionAnswering")
    net: Any = ours.model
    net.tokenizer = Tokens()
    pixels = images(3)
    questions, asked = text((8, 5, 6), ENC)
    answers, real = text((4, 3, 5), DEC, seed=2)
    labels = answers.masked_fill(~real, -100)
    with torch.no_grad():
        wanted = theirs(
            pixel_values=pixels, input_ids=questions, attention_mask=asked.long(), decoder_input_ids=answers,
            decoder_attention_mask=real.long(), labels=labels,
        )  # fmt: skip
        # transformers 5.23 loses the question's mask on its way to the decoder's cross-attention (the released code
        # does not, see the goldens): every place of the padded questions is read
        states = net.asked(pixels, questions, asked, pads_read=True)
        hidden = net.decode(answers, real, states, None)
        objective = ours.objectives["answers"]
        assert objective.label_smoothing == 0.1
        each = objective.per_answer(net, hidden, shifted(labels, None))
        torch.testing.assert_close(each.sum() / (labels[:, 1:] != -100).sum(), wanted.loss, **CLOSE)
        seen = {"encoder_hidden_states": theirs.vision_model(pixels).last_hidden_state}
        asked_theirs = theirs.text_encoder(input_ids=questions, attention_mask=asked.long(), **seen).last_hidden_state
        torch.testing.assert_close(states, asked_theirs, **CLOSE)
        decoded = theirs.text_decoder(
            input_ids=answers, attention_mask=real.long(), encoder_hidden_states=asked_theirs
        ).logits
        torch.testing.assert_close(net.decoder.logits(hidden)[real], decoded[real], **CLOSE)
        batch = {
            "pixel_values": pixels[:1], "question_ids": questions[:1], "question_mask": asked[:1],
            "input_ids": answers[:1], "attention_mask": real[:1], "labels": labels[:1],
        }  # fmt: skip
        assert bool(asked[0].all())  # without pads the wiring as a whole agrees
        logits = net.decoder.logits(net(batch)["hidden"])
        torch.testing.assert_close(logits[real[:1]], decoded[:1][real[:1]], **CLOSE)
        for beams in (1, 3):
            decoding = Decoding(max_new_tokens=6, beams=beams)
            found = net.write_ids(states, torch.full((3, 1), DEC), decoding=decoding)
            out = theirs.generate(
                input_ids=questions, pixel_values=pixels, attention_mask=asked.long(), num_beams=beams,
                max_new_tokens=6, do_sample=False,
            )  # fmt: skip
            assert torch.equal(found, behind_stop(out, 1)[:, : found.shape[1]])


@torch.no_grad()
def test_matching_and_similarity(both: Callable[..., tuple[Any, ZooModule]]) -> None:
    theirs, ours = both("BlipForImageTextRetrieval", 24)
    pixels = images(3)
    plain, real = text((8, 5, 6), CLS)
    grounded = torch.cat([torch.full((3, 1), ENC), plain[:, 1:]], 1)
    itm = theirs(input_ids=grounded, pixel_values=pixels, attention_mask=real.long()).itm_score
    torch.testing.assert_close(ours.model.match_logits(pixels, plain, real), itm, **CLOSE)
    itc = theirs(input_ids=plain, pixel_values=pixels, attention_mask=real.long(), use_itm_head=False).itm_score
    own = F.normalize(ours.image_features(pixels), dim=-1) @ F.normalize(ours.text_features(plain, real), dim=-1).T
    torch.testing.assert_close(own, itc, **CLOSE)
    assert float(itc.std()) > 0.05
    assert float(itm.std()) > 0.05


def test_what_the_zoo_does_not_read_is_said_in_one_line(tmp_path: Path) -> None:
    import json

    for config, message in (
        ({"architectures": ["BlipModel"]}, "BlipForConditionalGeneration"),
        (
            {"architectures": ["BlipForConditionalGeneration"], "vision_config": {"hidden_size": 1024}},
            "encoder_hidden_size = 768",
        ),
        (
            {"architectures": ["BlipForConditionalGeneration"], "text_config": {"hidden_act": "relu"}},
            "hidden_act = 'relu'",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip", **config}))
        with pytest.raises(WeightsError, match=message) as error:
            zoo.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)
