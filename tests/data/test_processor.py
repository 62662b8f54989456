from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from zoo.data.images import ImageTransform
from zoo.data.processor import PairProcessor, PromptProcessor, describe
from zoo.data.sample import Sample
from zoo.data.templates import TEMPLATES, lay_out, template
from zoo.data.text import ClipBpeConfig, HfTokenizerConfig, OpenMojiBpeConfig, TextTokenizer
from zoo.errors import ConfigError, DataError

BPE = OpenMojiBpeConfig().build()
TRANSFORM = ImageTransform(size=16)
RED = Image.new("RGB", (20, 16), (255, 0, 0))


def pair(**fields: Any) -> PairProcessor:
    return PairProcessor(TRANSFORM, BPE, **{"context_length": 12, **fields})


def prompt(layout: str = "plain", **fields: Any) -> PromptProcessor:
    return PromptProcessor(TRANSFORM, BPE, layout, **{"image_tokens": 4, **fields})


def trained(batch: dict[str, torch.Tensor], row: int = 0) -> str:
    return BPE.decode([i for i in batch["labels"][row].tolist() if i != -100])


# -- two towers --------------------------------------------------------------------------------------------------------


def test_clip_context_is_the_published_one() -> None:
    clip = PairProcessor(TRANSFORM, ClipBpeConfig().build(), 77, truncate=False)
    batch = clip.encode_texts(["a photo of a cat", "cat " * 75])
    assert batch["input_ids"][0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407] + [0] * 70
    assert batch["attention_mask"].sum(1).tolist() == [7, 77]
    with pytest.raises(DataError, match="78 tokens, more than context_length=77"):
        clip.encode_texts(["cat " * 76])
    cut = PairProcessor(TRANSFORM, ClipBpeConfig().build(), 77).encode_texts(["cat " * 90])["input_ids"][0]
    assert cut[-2:].tolist() == [2368, 49407]


def test_pairs_have_pixels_ids_and_masks() -> None:
    batch = pair()([Sample("a", RED, ("red", "rot")), Sample("b", RED, ("a cup",))])
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
        "pixel_values": ((2, 3, 16, 16), torch.float32),
        "input_ids": ((2, 12), torch.int64),
        "attention_mask": ((2, 12), torch.bool),
    }
    row = batch["input_ids"][0][batch["attention_mask"][0]].tolist()
    assert row == [BPE.bos_id, *BPE.encode(["red"])[0], BPE.eos_id]
    assert not batch["attention_mask"][:, -1].any()


def test_the_caption_is_drawn_by_seed_id_and_draw_in_training_only() -> None:
    sample = Sample("a", RED, tuple(f"text {i}" for i in range(8)))
    texts = [pair()([sample], train=True, draws=[d])["input_ids"][0] for d in range(30)]
    assert len({tuple(t.tolist()) for t in texts}) > 4
    torch.testing.assert_close(pair()([sample] * 2, train=True, draws=[7, 8])["input_ids"][1], texts[8])
    other = [pair(seed=1)([sample], train=True, draws=[d])["input_ids"][0] for d in range(30)]
    assert not torch.equal(torch.stack(texts), torch.stack(other))
    first = pair().encode_texts(["text 0"])["input_ids"]
    torch.testing.assert_close(pair()([sample], train=False, draws=[5])["input_ids"], first)


def test_ready_pixels_equal_the_images_even_where_they_must_be_resized() -> None:
    for size in (16, 24):
        pixels = np.random.default_rng(1).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
        with_images = [Sample(str(i), Image.fromarray(p), ("x",)) for i, p in enumerate(pixels)]
        without = [Sample(str(i), None, ("x",)) for i in range(3)]
        for processor in (pair(), prompt()):
            torch.testing.assert_close(processor(without, pixels=pixels), processor(with_images), atol=0, rtol=0)


def test_a_pair_needs_both_halves() -> None:
    with pytest.raises(DataError, match="'a' has no image"):
        pair()([Sample("a", None, ("x",))])
    with pytest.raises(DataError, match="'a' has no text"):
        pair()([Sample("a", RED)])
    with pytest.raises(ConfigError, match="context_length=2"):
        pair(context_length=2)


# -- language models ---------------------------------------------------------------------------------------------------


def test_plain_trains_the_caption_and_its_newline_only() -> None:
    batch = prompt()([Sample("a", RED, ("red cup",)), Sample("b", RED, ("é",))])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    text = BPE.encode(["red cup\n"])[0]
    assert ids == [1, 3, 3, 3, 3, *text]
    assert labels == [-100] * 5 + text
    assert batch["text_bytes"].tolist() == [7, 2]
    assert trained(batch, 1) == "é\n"
    assert (batch["labels"][1] == -100)[~batch["attention_mask"][1]].all()
    assert (batch["input_ids"][1] == BPE.pad_id)[~batch["attention_mask"][1]].all()
    assert batch["attention_mask"].dtype == torch.bool


def test_blip2_puts_the_slots_before_bos_and_trains_bos_only_without_a_prompt() -> None:
    bare = prompt("blip2").encode_texts(["red cup"])
    text = BPE.encode(["red cup\n"])[0]
    assert bare["input_ids"][0].tolist() == [3, 3, 3, 3, 1, *text]
    assert bare["labels"][0].tolist() == [-100] * 4 + [1, *text]
    asked = prompt("blip2").encode_texts([" red cup"], ["a photo of"])
    assert asked["labels"][0, :5].tolist() == [-100] * 5
    assert trained(asked) == " red cup\n"
    assert BPE.decode(asked["input_ids"][0].tolist()) == "a photo of red cup\n"


def test_prompts_to_continue_are_the_rows_up_to_the_answer_and_padded_on_the_left() -> None:
    for name in TEMPLATES:
        processor = prompt(name)
        questions = ["What is it?", "Name every colour in it."]
        prompts = processor.encode_prompts(questions, 2)
        rows = processor.encode_texts(["a cup", "red"], questions)
        for i in range(2):
            begin = prompts["input_ids"][i][prompts["attention_mask"][i]]
            row = rows["input_ids"][i][rows["attention_mask"][i]]
            label = rows["labels"][i][rows["attention_mask"][i]]
            assert row[: len(begin)].tolist() == begin.tolist()
            asked = len(begin) - bool(TEMPLATES[name].mask)  # BOS behind a mask is a target
            assert (label[:asked] == -100).all()
            assert (label[asked:] == row[asked:]).all()
        assert prompts["attention_mask"][:, -1].all()
        assert not prompts["attention_mask"][0, 0]


def test_padding_side_moves_rows_without_changing_them() -> None:
    texts = ["red cup", "x"]
    right, left = prompt().encode_texts(texts), prompt(padding="left").encode_texts(texts)
    for key in ("input_ids", "labels"):
        for i in range(2):
            assert (
                right[key][i][right["attention_mask"][i]].tolist() == left[key][i][left["attention_mask"][i]].tolist()
            )
    assert left["attention_mask"][:, -1].all()
    assert not left["attention_mask"][1, 0]


def test_text_cannot_forge_special_tokens() -> None:
    batch = prompt()([Sample("a", RED, ("<image> <eos></s><bos>",))])
    assert (batch["input_ids"] == 3).sum() == 4
    assert (batch["input_ids"] == BPE.eos_id).sum() == 0
    assert trained(batch) == "<image> <eos></s><bos>\n"


def test_truncation_follows_the_expansion_of_the_image() -> None:
    long, short = (
        prompt().encode_texts(["red cup and blue box"]),
        prompt(max_length=8).encode_texts(["red cup and blue box"]),
    )
    assert short["input_ids"].shape[1] == 8
    for key in ("input_ids", "labels"):
        assert short[key][0].tolist() == long[key][0, :8].tolist()
    with pytest.raises(ConfigError, match="max_length=5"):
        prompt(max_length=5)
    with pytest.raises(DataError, match="cuts into the 4 slots"):
        prompt("vicuna_v1", max_length=30).encode_texts(["x"])


def test_a_batch_with_a_text_only_row() -> None:
    samples = [Sample("a", RED, ("red",)), Sample("t", None, ("only text",))]
    batch = prompt()(samples)
    assert batch["has_image"].tolist() == [True, False]
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert not batch["pixel_values"][1].any()
    assert (batch["input_ids"] == 3).sum(1).tolist() == [4, 0]
    torch.testing.assert_close(batch["pixel_values"][:1], prompt()(samples[:1])["pixel_values"])
    assert "has_image" not in prompt()(samples[:1])
    assert prompt()(samples[1:])["pixel_values"].shape == (1, 3, 16, 16)


def test_dialogues_train_every_answer_and_no_question() -> None:
    turns = (("Is it red?\n<image>", "Yes."), ("Is it round?", "No."))
    batch = prompt("vicuna_v1")([Sample("a", RED, (), {"turns": turns})])
    assert trained(batch) == " Yes. No."
    assert (batch["labels"] == BPE.eos_id).sum() == 2
    assert batch["text_bytes"].tolist() == [7]
    text = BPE.decode(batch["input_ids"][0].tolist())
    assert "user's questions. USER: \nIs it red? ASSISTANT: Yes.USER: Is it round? ASSISTANT: No." in text
    plain = prompt()([Sample("a", RED, (), {"turns": turns})])
    assert BPE.decode(plain["input_ids"][0].tolist()) == "Yes.\n"
    with pytest.raises(DataError, match="turn 1 of 2 has no answer"):
        lay_out(template("plain"), BPE, [("a", None), ("b", "c")], 1, 4, 3)


def test_answers_are_decoded_up_to_their_end() -> None:
    newline = BPE.encode(["\n"])[0]
    processor = prompt()
    assert processor.stop_ids == {BPE.eos_id, *newline}
    assert processor.decode([*BPE.encode([" red cup"])[0], *newline, *BPE.encode(["junk"])[0]]) == "red cup"
    assert processor.decode([*BPE.encode(["red"])[0], BPE.eos_id, 5]) == "red"
    assert prompt("vicuna_v1").stop_ids == {BPE.eos_id}


def test_wrong_layouts_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean vicuna_v1"):
        prompt("vicuna")
    with pytest.raises(ConfigError, match="no image token"):
        PromptProcessor(TRANSFORM, ClipBpeConfig().build(), "plain", 4)
    with pytest.raises(ConfigError, match="padding"):
        prompt(padding="middle")


def test_processors_reach_workers_and_manifests() -> None:
    for processor in (pair(), prompt("blip2", seed=3)):
        again = pickle.loads(pickle.dumps(processor))
        samples = [Sample("a", RED, ("red", "rot"))]
        torch.testing.assert_close(again(samples, True, [4]), processor(samples, True, [4]))
        assert json.loads(json.dumps(describe(processor))) == describe(again)
    assert describe(pair()) != describe(pair(context_length=13))


# -- the released code of LLaVA ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    path = Path(__file__).parents[1] / "goldens" / "llava_labels.json"
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def llama(golden: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("llama")
    fast = Tokenizer.from_str(json.dumps(golden["tokenizer"]))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(folder)
    return HfTokenizerConfig(path=str(folder)).build()


def dialogues(golden: dict[str, Any]) -> list[list[tuple[str, str]]]:
    return [
        [(c[i]["value"].replace("<image>", "").strip(), c[i + 1]["value"]) for i in range(0, len(c), 2)]
        for c in golden["conversations"]
    ]


def test_vicuna_ids_and_labels_equal_preprocess_v1(golden: dict[str, Any], llama: TextTokenizer) -> None:
    # one placeholder an image, as the released code has it before splicing; the join drops the repeated BOS
    for row, turns in enumerate(dialogues(golden)):
        ids, labels = lay_out(template("vicuna_v1"), llama, turns, golden["images_per_row"][row], 1, 999)
        count = sum(golden["attention_mask"][row])
        assert [-200 if i == 999 else i for i in ids] == golden["input_ids"][row][:count]
        assert labels == golden["labels"][row][:count]
        assert ids.count(llama.bos_id) == 1
        spliced, _ = lay_out(template("vicuna_v1"), llama, turns, golden["images_per_row"][row], 16, 999)
        assert len(spliced) == len(ids) + golden["images_per_row"][row] * 15


def test_plain_ids_and_labels_equal_preprocess_plain(golden: dict[str, Any], llama: TextTokenizer) -> None:
    answer = golden["plain_sample"][1]["value"]
    ids, labels = lay_out(template("plain"), llama, [("", answer)], 1, 1, 999)
    assert [-200 if i == 999 else i for i in ids] == golden["plain_ids"]
    assert labels == golden["plain_labels"]


def test_spliced_truncated_and_left_padded_labels_equal_the_released_code(
    golden: dict[str, Any], llama: TextTokenizer
) -> None:
    turns = dialogues(golden)[:2]
    fields = {"image_tokens": golden["image_tokens"], "image_token_id": 999}
    for padding, name in (("right", "spliced_labels"), ("left", "left_labels")):
        batch = PromptProcessor(TRANSFORM, llama, "vicuna_v1", padding=padding, **fields).encode_rows(
            turns, [True, False]
        )  # type: ignore[arg-type]
        for row in range(2):
            kept = torch.tensor(golden[name][row])
            ours = batch["labels"][row]
            # the released batch is as wide as its third row, which shows two images
            extra = len(kept) - len(ours)
            kept = kept[: len(ours)] if padding == "right" else kept[extra:]
            assert ours.tolist() == kept.tolist()
    cut = PromptProcessor(TRANSFORM, llama, "vicuna_v1", max_length=golden["max_length"], **fields)
    batch = cut.encode_rows(turns, [True, False])
    assert batch["labels"].tolist() == golden["trunc_labels"][:2]
    assert batch["attention_mask"].long().tolist() == golden["trunc_mask"][:2]
