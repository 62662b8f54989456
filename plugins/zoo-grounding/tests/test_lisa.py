"""What a toy LISA gets wrong (section 10 of its card), on the recipes themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from zoo_grounding.losses import EPS, SCALE, bce_of, dice_of
from zoo_grounding.marks import MarkedTokenizer, groups_of, mark_names
from zoo_grounding.masks import Square, at_original_size
from zoo_grounding.sam import SAM_MEAN, SAM_STD

import zoo
from zoo.adapters import is_adapter
from zoo.data.sample import Sample
from zoo.errors import ConfigError, DataError

QUESTION = "Can you segment the cat in this image?"


def picture(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def sample(answer: str, masks: int, size: tuple[int, int] = (64, 48), seed: int = 0) -> Sample:
    """A picture with one question and rectangles as masks."""
    width, height = size
    found = np.zeros((masks, height, width), np.uint8)
    for number in range(masks):
        found[number, 4 : 20 + number, 6 + 9 * number : 22 + 9 * number] = 1
    meta = {"turns": [(QUESTION, answer)], "masks": list(found)}
    return Sample(f"s{seed}", picture(width, height, seed), ("x",), meta)


@pytest.fixture(scope="module")
def lora() -> Any:
    """LISA-7B's recipe at tiny sizes: LoRA, frozen eyes."""
    return zoo.build("lisa-7b", scale="tiny", seed=0)


@pytest.fixture(scope="module")
def joint() -> Any:
    return zoo.build("lisa", scale="tiny", seed=0)


def shaken(module: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def test_what_learns(lora: Any) -> None:
    """SAM's encoders are frozen, its decoder learns; LoRA is on the language model's q and v and nowhere else."""
    model = lora.model
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("encoder.", "connector.", "mask_decoder.image_encoder.")) for name in learns)
    assert not {"mask_decoder.no_mask.weight", "mask_decoder.positions.positional_embedding"} & learns
    assert all(p.requires_grad for p in model.mask_decoder.decoder.parameters())
    assert all(p.requires_grad for p in model.text_hidden.parameters())
    adapted = {name for name, _ in model.named_parameters() if is_adapter(name)}
    layers = len(model.decoder.lm.model.layers)
    places = {name.split(".lora_")[0] for name in adapted}
    assert places == {
        f"decoder.lm.model.layers.{n}.self_attn.{letter}_proj" for n in range(layers) for letter in ("q", "v")
    }
    whole = {name for name in learns if name.startswith("decoder.") and name not in adapted}
    assert whole == {"decoder.lm.model.embed_tokens.weight", "decoder.lm.lm_head.weight"}
    assert len({p for name, p in model.named_parameters() if is_adapter(name) and p.shape[0] == 8}) > 0


def test_gradients_of_masks_reach_the_language_model(lora: Any) -> None:
    """Through text_hidden to LoRA; text losses left aside."""
    model = shaken(lora.model).train()
    batch = model.processor([sample("It is {seg}.", 1), sample("Sure, {seg}.", 1, seed=1)])
    outputs = model(batch)
    loss, _ = lora.objectives["mask-bce"](model, batch, outputs)
    other, _ = lora.objectives["mask-dice"](model, batch, outputs)
    for one in (loss, other):
        lora.zero_grad(set_to_none=True)
        one.backward(retain_graph=True)
        grads = {name: p.grad for name, p in model.named_parameters() if is_adapter(name)}
        assert all(grad is not None for grad in grads.values())
        first = [grad for name, grad in grads.items() if ".layers.0." in name]
        assert min(float(grad.abs().max()) for grad in first) > 0
        assert float(model.text_hidden[0].weight.grad.abs().max()) > 0
        assert model.decoder.lm.lm_head.weight.grad is None  # no mask loss reads the logits


def test_prompts_are_the_states_that_predict_the_token(joint: Any) -> None:
    """What stands at the token itself and behind it reaches no mask; the token before it does."""
    model = shaken(joint.model).eval()
    batch = model.processor([sample("It is {seg}.", 1)])
    place = int(batch["prompt_places"][0, 0])
    assert int(batch["input_ids"][0, place]) == model.marks["[SEG]"]
    with torch.no_grad():
        masks = model(batch)["mask_logits"]
        later = {**batch, "input_ids": batch["input_ids"].clone()}
        later["input_ids"][0, place:] = 7
        assert torch.equal(model(later)["mask_logits"], masks)
        before = {**batch, "input_ids": batch["input_ids"].clone()}
        before["input_ids"][0, place - 1] = 7
        assert float((model(before)["mask_logits"] - masks).abs().max()) > 1e-3
        shifted = model({**batch, "prompt_places": batch["prompt_places"] + 1})["mask_logits"]
        assert float((shifted - masks).abs().max()) > 1e-3


def test_two_targets_in_order_and_none(joint: Any) -> None:
    model = shaken(joint.model).eval()
    batch = model.processor([sample("The cat {seg} and the dog {seg}.", 2), sample("There is no cat.", 0, seed=1)])
    assert batch["mask_row"].tolist() == [0, 0]
    assert batch["prompt_places"][0, 0] < batch["prompt_places"][1, 0]
    with torch.no_grad():
        outputs = model(batch)
        assert outputs["mask_logits"].shape == (2, 48, 64)
        torch.testing.assert_close(outputs["mask_targets"][1], batch["masks"][1].float())
        alone = model(model.processor([sample("The cat {seg} and the dog {seg}.", 2)]))["mask_logits"]
    torch.testing.assert_close(outputs["mask_logits"], alone, atol=1e-3, rtol=1e-3)
    assert float((alone[0] - alone[1]).abs().max()) > 1e-3


def test_a_batch_without_masks_costs_text_alone(joint: Any) -> None:
    model = joint.model.train()
    batch = model.processor([sample("There is no cat.", 0), sample("No.", 0, seed=1)])
    assert batch["masks"].shape[0] == 0
    total, report = joint.losses(batch)
    assert float(report["mask-bce"]) == float(report["mask-dice"]) == 0.0
    assert float(total.detach()) == float(report["next-token"]) > 0
    joint.zero_grad(set_to_none=True)
    total.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []  # what learns stays in the graph, as distributed training asks
    assert float(model.text_hidden[0].weight.grad.abs().max()) == 0.0


def test_answers_with_as_many_masks_as_tokens(joint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks come in the order of the tokens, of the image's own size; none without a token."""
    model = shaken(joint.model).eval()
    seg, stop = model.marks["[SEG]"], model.tokenizer.eos_id
    word = model.tokenizer.encode(["cat and dog"])[0]
    answers = [[*word, seg, *word, seg, stop], [*word, stop], [seg, stop]]

    def written(eye: Any, ids: Tensor, real: Tensor, decoding: Any) -> Tensor:
        width = max(map(len, answers))
        return torch.tensor([row + [model.tokenizer.pad_id] * (width - len(row)) for row in answers])

    monkeypatch.setattr(model, "_continue", written)
    images = [picture(40, 30), picture(64, 64, 1), picture(20, 50, 2)]
    two, none, one = model.segment(images, ["a?", "what is to be seen here?", "b?"])
    assert two.masks.shape == (2, 30, 40)
    assert none.masks.shape == (0, 64, 64)
    assert one.masks.shape == (1, 50, 20)
    assert two.text == "cat and dog [1] cat and dog [2]"
    assert two.phrases == ("dog", "dog")
    assert none.text == "cat and dog"
    assert none.phrases == none.scores == ()
    assert len(two.scores) == 2
    assert [m.shape for m in model.segment_images(images, ["x", "y", "z"])] == [(30, 40), (64, 64), (50, 20)]
    assert not model.segment_images(images, ["x", "y", "z"])[1].any()
    row = {**model.processor([sample("x {seg}", 1)])}
    assert row["masks"].shape == (1, 48, 64)


def test_one_image_and_one_prompt_give_one_answer(joint: Any) -> None:
    answer = joint.segment(picture(), QUESTION, 3)
    assert answer.masks.shape[1:] == (48, 64)
    assert joint.segment([picture()], [QUESTION], 3)[0].text == answer.text
    with pytest.raises(ConfigError, match="1 images and 2 prompts"):
        joint.segment([picture()], ["a", "b"])


@pytest.mark.parametrize(("width", "height"), [(100, 60), (60, 100), (64, 64), (640, 33)])
def test_square_pads_after_normalising(width: int, height: int) -> None:
    image = picture(width, height)
    square = Square(64, tuple(SAM_MEAN), tuple(SAM_STD))
    pixels, inside, own = square([image])
    h, w = inside[0].tolist()
    assert max(h, w) == 64
    assert own.tolist() == [[height, width]]
    assert abs(h / w - height / width) * min(w, width) / max(h / w, 1) < 1.5
    assert not pixels[0, :, h:].any()
    assert not pixels[0, :, :, w:].any()
    small = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR)).astype(np.float64)
    expected = (small - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    torch.testing.assert_close(
        pixels[0, :, :h, :w].permute(1, 2, 0).double(), torch.tensor(expected), atol=1e-5, rtol=1e-5
    )


def test_the_eye_has_a_picture_of_its_own(joint: Any) -> None:
    """CLIP's branch resizes the short side and crops, in CLIP's mean; SAM's keeps everything and pads."""
    processor = joint.model.processor
    image = picture(128, 64)
    batch = processor([Sample("s", image, ("x",), {"turns": [(QUESTION, "No.")], "masks": []})])
    assert batch["pixel_values"].shape == batch["mask_pixels"].shape == (1, 3, 64, 64)
    assert not batch["mask_pixels"][0, :, 32:].any()
    assert batch["pixel_values"][0, :, 32:].abs().min() > 0
    assert batch["resized"].tolist() == [[32, 64]]
    assert batch["image_sizes"].tolist() == [[64, 128]]


def test_masks_are_scored_at_the_images_size() -> None:
    """Logits over the square, cut to the picture in it and resized: known answers for a half that is padding."""
    logits = torch.full((2, 8, 8), -5.0)
    logits[0, :4, :4] = 5.0  # of the square's upper half, the picture of 32 x 16 in it, the left half
    resized, original = torch.tensor([[16, 32], [32, 32]]), torch.tensor([[48, 96], [20, 20]])
    out, shown = at_original_size(logits, resized, original, 32, (48, 96))
    assert out.shape == shown.shape == (2, 48, 96)
    assert shown.sum((1, 2)).tolist() == [48 * 96, 400]
    assert (out[0, :, :40] > 0).all()
    assert (out[0, :, 56:] < 0).all()
    assert not out[1, 20:].any()
    assert (out[1, :20, :20] < 0).all()
    same, whole = at_original_size(logits[:1], resized[:1], original[:1], 32, (48, 96))
    torch.testing.assert_close(same[0], out[0])
    assert whole.all()


def test_losses_have_lisas_scale_and_weights(joint: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    targets = (torch.rand(3, 5, 7, generator=generator) > 0.6).float()
    everywhere = torch.ones(3, 5, 7, dtype=torch.bool)
    p = 1 / (1 + (-logits).exp())
    bce = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean((1, 2))
    torch.testing.assert_close(bce_of(logits, targets, everywhere), bce)
    above = 2 * (p / 1000 * targets).sum((1, 2)) + 1e-6
    dice = 1 - above / ((p / 1000).sum((1, 2)) + (targets / 1000).sum((1, 2)) + 1e-6)
    torch.testing.assert_close(dice_of(logits, targets, everywhere), dice)
    assert (SCALE, EPS) == (1000.0, 1e-6)
    # a small mask: the scale does not cancel against eps
    tiny, far = torch.zeros(1, 5, 7), torch.full((1, 5, 7), -9.0)
    tiny[0, 0, 0] = 1
    plain = 1 - (2 * (far.sigmoid() * tiny).sum() + EPS) / (far.sigmoid().sum() + 1 + EPS)
    assert abs(float(dice_of(far, tiny, everywhere[:1])) - float(plain)) > 1e-4
    empty = dice_of(torch.full((1, 5, 7), -40.0), torch.zeros(1, 5, 7), everywhere[:1])
    assert float(empty) == pytest.approx(0, abs=1e-5)
    half = everywhere.clone()
    half[:, :, 4:] = False
    torch.testing.assert_close(bce_of(logits, targets, half), bce_of(logits[..., :4], targets[..., :4], half[..., :4]))
    torch.testing.assert_close(
        dice_of(logits, targets, half), dice_of(logits[..., :4], targets[..., :4], half[..., :4])
    )
    weights = {name: config.weight for name, config in joint.recipe.objectives.items()}
    assert weights == {"next-token": 1.0, "mask-bce": 2.0, "mask-dice": 0.5}


def test_losses_divide_by_the_masks_of_the_batch(joint: Any) -> None:
    """Three masks of one image and one of another: a mean over four, not over two images."""
    logits = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(1))
    outputs = {"mask_logits": logits, "mask_targets": torch.zeros(4, 6, 6), "mask_shown": torch.ones(4, 6, 6).bool()}
    loss, report = joint.objectives["mask-bce"](joint.model, {}, outputs)
    torch.testing.assert_close(loss, bce_of(logits, torch.zeros(4, 6, 6), torch.ones(4, 6, 6).bool()).mean())
    assert float(report["masks"]) == 4


def test_published_sizes() -> None:
    with torch.device("meta"):
        model = zoo.build("lisa-7b").model
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.mask_decoder.named_children()}
    assert round(counts["image_encoder"] / 1e6) == 637
    assert round(counts["decoder"] / 1e6, 2) == 4.06
    assert model.decoder.lm.model.embed_tokens.weight.shape[0] == 32003
    assert model.marks == {"[SEG]": 32000, "<im_start>": 32001, "<im_end>": 32002}
    assert model.connector.tokens == 256
    assert [tuple(layer.weight.shape) for layer in (model.text_hidden[0], model.text_hidden[2])] == [
        (4096, 4096),
        (256, 4096),
    ]


# -- tokens and rows -------------------------------------------------------------------------------------------------


def test_marks_are_ids_of_their_own(joint: Any) -> None:
    tokenizer = MarkedTokenizer(joint.model.tokenizer, {"[SEG]": 2000, "<im_end>": 2001})
    text = "the cat [SEG] and<im_end> a dog [SEG]"
    ids, spans = tokenizer.encode_with_offsets(text)
    assert [text[a:b] for id, (a, b) in zip(ids, spans, strict=True) if id >= 2000] == ["[SEG]", "<im_end>", "[SEG]"]
    assert tokenizer.encode([text]) == [ids]
    assert tokenizer.decode(ids) == "the cat [SEG] and <im_end> a dog [SEG]"
    assert tokenizer.vocab_size == 2002
    assert tokenizer.special_id("[SEG]") == 2000
    assert mark_names(1) == ("[SEG]",)
    assert mark_names(3) == ("[SEG0]", "[SEG1]", "[SEG2]")
    assert groups_of([3, 5, 8, 9], 2) == [(3, 5), (8, 9)]
    assert groups_of([3, 5, 8], 2) == []


def test_rows_write_marks_and_train_the_answer(joint: Any) -> None:
    processor = joint.model.processor
    batch = processor([sample("It is {seg}.", 1)])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    start, end = joint.model.marks["<im_start>"], joint.model.marks["<im_end>"]
    slots = [n for n, id in enumerate(ids) if id == joint.model.image_token_id]
    assert len(slots) == processor.image_tokens
    assert ids[slots[0] - 1] == start
    assert ids[slots[-1] + 1] == end
    place = int(batch["prompt_places"][0, 0])
    assert labels[place] == joint.model.marks["[SEG]"]
    assert labels[slots[-1] + 1] == -100
    assert processor.decode([i for i in labels if i != -100]) == "It is [SEG]."


def test_cut_rows_keep_whole_targets(joint: Any) -> None:
    processor = joint.model.processor
    long = sample("The cat {seg}, " + "the very long-winded dog " * 30 + "{seg}.", 2)
    batch = processor([long])
    assert batch["input_ids"].shape[1] == processor.max_length
    assert len(batch["masks"]) == len(batch["prompt_places"]) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (sample("It is {seg}.", 0), "its answers name 1 targets .* and it has 0 masks"),
        (sample("It is nothing.", 2), "its answers name 0 targets .* and it has 2 masks"),
        (Sample("s", None, ("x",), {"turns": [("a", "b")]}), "must show one image"),
        (
            Sample("s", picture(), ("x",), {"turns": [("a", "{seg}")], "masks": [np.ones((10, 10), np.uint8)]}),
            r"a mask of shape \[10, 10\], its image is 48 high and 64 wide",
        ),
    ],
)
def test_bad_samples_are_named(joint: Any, given: Sample, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        joint.model.processor([given])
    assert "\n" not in str(caught.value)


def test_bad_configurations_are_named(joint: Any) -> None:
    with pytest.raises(ConfigError, match="masks do not follow an augmented image"):
        zoo.build("lisa", scale="tiny", wiring={"augment": "flip"})
    with pytest.raises(ConfigError, match=r"expected \{object\} in it"):
        zoo.build("lisa", scale="tiny", wiring={"question": "Where?"})
    with pytest.raises(ConfigError, match=r"SAM was given \[1, 3, 32, 32\], it reads squares \[images, 3, 64, 64\]"):
        joint.model.mask_decoder.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="global_blocks"):
        zoo.build("lisa", mask_decoder={"global_blocks": [40]})
    with pytest.raises(ConfigError, match="reads several blocks of the image encoder"):
        zoo.build("lisa", scale="tiny", mask_decoder="pixel-decoder")


def test_a_step_learns(joint: Any) -> None:
    """Twenty steps on two samples: every loss falls by half."""
    module = zoo.build("lisa", scale="tiny", seed=1).train()
    batch = module.model.processor([sample("It is {seg}.", 1), sample("{seg} and {seg}.", 2, seed=1)])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    reports = []
    for _ in range(20):
        loss, report = module.losses(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reports.append({name: float(value) for name, value in report.items()})
    for name in ("next-token", "mask-bce", "mask-dice"):
        assert reports[-1][name] < 0.5 * reports[0][name]
