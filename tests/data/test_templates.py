"""Templates as data: what is written, where images stand, what is trained, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from zoo.data.images import ImageTransform
from zoo.data.processor import PromptProcessor
from zoo.data.sample import Sample
from zoo.data.templates import CHOICE, SHORT, TEMPLATES, Turn, lay_out, template
from zoo.data.text import HfTokenizerConfig, OpenMojiBpeConfig, TextTokenizer
from zoo.errors import ConfigError, DataError

BPE = OpenMojiBpeConfig().build()
IMAGE = 2000
TRANSFORM = ImageTransform(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
TALK: list[Turn] = [("What is it?", "A cup."), ("Is it full?", "No.")]


def written(ids: list[int], tokenizer: TextTokenizer = BPE) -> str:
    """A row as text: B and E for BOS and EOS, I for an image of two slots."""
    out, run = "", []
    for token in [*ids, None]:
        if token is not None and token not in (tokenizer.bos_id, tokenizer.eos_id, IMAGE):
            run.append(token)
            continue
        out += tokenizer.decode(run)
        run = []
        out += {tokenizer.bos_id: "[B]", tokenizer.eos_id: "[E]", IMAGE: "I"}.get(token or -1, "")
    return out.replace("II", "[I]")


def row(name: str, turns: list[Turn], images: int = 1, **how: Any) -> tuple[str, str]:
    """What is written, and what of it is trained."""
    ids, labels = lay_out(template(name), BPE, turns, images, 2, IMAGE, **how)
    assert len(ids) == len(labels)
    assert all(a == b for a, b in zip(ids, labels, strict=True) if b != -100)
    return written(ids), written([t for t in labels if t != -100])


V1 = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
V1 += "and polite answers to the user's questions. "
V0 = V1.replace("user", "human").strip() + "\n\n"
ROWS = {
    "vicuna_v1": (
        f"[B]{V1}USER: [I]\nWhat is it? ASSISTANT: A cup.[E]USER: Is it full? ASSISTANT: No.[E]",
        " A cup.[E] No.[E]",
    ),
    "llava_v0": (
        f"[B]{V0}### Human: [I]\nWhat is it?\n### Assistant: A cup.\n### Human: Is it full?\n### Assistant: No.\n### ",
        "###### Assistant: A cup.\n###### Assistant: No.\n### ",
    ),
    "llava_llama_2": (
        "[B][INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using natural language.\n"
        "<</SYS>>\n\n[I]\nWhat is it? [/INST] A cup. [E][B][INST] Is it full? [/INST] No. [E]",
        " A cup. [E] No. [E]",
    ),
    "minigpt4": (
        "[B]###Human: <Img>[I]</Img> What is it? ###Assistant: A cup.###[B]###Human: Is it full? ###Assistant: No.###",
        "A cup.###No.###",
    ),
    "minigpt4_llama_2": (
        "[B][INST] <Img>[I]</Img> What is it? [/INST] A cup.[E][B][INST] Is it full? [/INST] No.[E]",
        "A cup.[E]No.[E]",
    ),
    "instructblip": ("[I][E]What is it?A cup.[E]Is it full?No.[E]", "A cup.[E]No.[E]"),
    "blip2": ("[I][B]What is it?A cup.\nIs it full?No.\n", "A cup.\nNo.\n"),
}


@pytest.mark.parametrize("name", list(ROWS))
def test_two_turns(name: str) -> None:
    assert row(name, TALK) == ROWS[name]


@pytest.mark.parametrize("name", list(ROWS))
def test_prompt_is_the_row_up_to_the_answer(name: str) -> None:
    whole, _ = row(name, TALK)
    prompt, trained = row(name, [TALK[0], (TALK[1][0], None)])
    assert whole.startswith(prompt)
    assert trained in ROWS[name][1]
    assert whole.removeprefix(prompt).strip().startswith("No.")


def test_preamble_may_be_left_out() -> None:
    text, _ = row("vicuna_v1", TALK[:1], preamble=False)
    assert text == "[B]USER: [I]\nWhat is it? ASSISTANT: A cup.[E]"
    text, _ = row("llava_llama_2", TALK[:1], preamble=False)
    assert text == "[B][INST] [I]\nWhat is it? [/INST] A cup. [E]"


def test_images_stand_where_questions_place_them() -> None:
    between: list[Turn] = [("Is <image> like <image> here?", "Yes.")]
    assert row("minigpt4", between, 2)[0] == (
        "[B]###Human: Is <Img>[I]</Img> like <Img>[I]</Img> here? ###Assistant: Yes.###"
    )
    assert row("vicuna_v1", between, 2, preamble=False)[0] == "[B]USER: Is [I] like [I] here? ASSISTANT: Yes.[E]"
    # LLaVA's code moves the one image of a question to its start (preprocess_multimodal)
    assert row("vicuna_v1", [("What is this?\n<image>", "A cup.")], preamble=False)[0] == (
        "[B]USER: [I]\nWhat is this? ASSISTANT: A cup.[E]"
    )
    later: list[Turn] = [("Hello.", "Hi."), ("What is <image>?", "A cup.")]
    assert "Human: Hello. ###Assistant: Hi.###[B]###Human: What is <Img>[I]</Img>? ###" in row("minigpt4", later)[0]
    assert row("instructblip", [("What is <image>?", "A cup.")])[0] == "[I][E]What is ?A cup.[E]"
    # none placed: all in front; none shown: none written
    assert row("minigpt4", [("Which?", "One.")], 2)[0].count("<Img>[I]</Img> ") == 2
    assert row("minigpt4", [("Which?", "One.")], 0)[0] == "[B]###Human: Which? ###Assistant: One.###"


@pytest.mark.parametrize(
    ("question", "images", "message"),
    [
        ("What is <image>?", 0, "place 1 images with <image> and the row shows 0"),
        ("What is <image> and <image>?", 1, "place 2 images with <image> and the row shows 1"),
        ("What is <image>?", 2, "place 1 images with <image> and the row shows 2"),
    ],
)
@pytest.mark.parametrize("name", ["vicuna_v1", "minigpt4", "instructblip"])
def test_placeholders_and_images_must_agree(name: str, question: str, images: int, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        row(name, [(question, "x")], images)
    assert "\n" not in str(error.value)


def test_only_the_last_answer_may_be_missing() -> None:
    with pytest.raises(DataError, match="turn 1 of 2 has no answer"):
        row("vicuna_v1", [("a", None), ("b", "c")])
    with pytest.raises(ConfigError, match="unknown prompt template 'minigpt'; did you mean minigpt"):
        template("minigpt")


def test_cuts_of_question_and_answer() -> None:
    long = " ".join(["word"] * 400)
    ids, labels = lay_out(template("instructblip"), BPE, [(long + " last", long)], 1, 2, IMAGE)
    words = BPE.encode([long + " last"])[0]
    assert ids[3 : 3 + 127] == words[-127:]  # from the left
    kept = [t for t in labels if t != -100]
    assert kept == BPE.encode([long])[0][:255]  # from the right, EOS with it, as the released code cuts
    _, labels = lay_out(template("minigpt4_caption"), BPE, [("", long)], 1, 2, IMAGE)
    assert len([t for t in labels if t != -100]) == 32


def processor(name: str, **fields: Any) -> PromptProcessor:
    return PromptProcessor(TRANSFORM, BPE, name, image_tokens=2, image_token_id=IMAGE, **fields)


def test_response_formats_are_part_of_the_pipeline() -> None:
    from PIL import Image

    red = Image.new("RGB", (8, 8), (255, 0, 0))
    turns = [["What colour is it?", "Red"], ["And its shape?", "Square"]]
    for form, words in (
        (SHORT, "\nAnswer the question using a single word or phrase."),
        (CHOICE, "\nAnswer with the option's letter from the given choices directly."),
    ):
        batch = processor("vicuna_v1")([Sample("a", red, (), {"turns": turns, "format": form})])
        text = written(batch["input_ids"][0].tolist())
        assert f"What colour is it?{words} ASSISTANT: Red" in text
        assert text.count(words) == 1  # merged questions of one image are told once
    plain = processor("vicuna_v1")([Sample("a", red, (), {"turns": turns})])
    assert "single word" not in written(plain["input_ids"][0].tolist())
    assert processor("plain").asked("What?", SHORT) == "What?"


def test_prompt_longer_than_the_context_is_one_line() -> None:
    short = processor("vicuna_v1", max_length=40)
    with pytest.raises(
        DataError, match=r"the prompt has \d+ tokens, image tokens included, and the model reads 40"
    ) as e:
        short.encode_prompts(["What is it?"], 1)
    assert "\n" not in str(e.value)
    assert short.encode_rows([[("", "a")]], [0])["input_ids"].shape[1] == 40  # training rows are cut
    with pytest.raises(DataError, match="must end with a question"):
        short.encode_prompts([[("a", "b")]], 1)


def test_dialogues_are_scored_by_their_last_answer_alone() -> None:
    talk = [("What is it?", "A cup."), ("Is it full?", None)]
    for side in ("right", "left"):
        one = processor("vicuna_v1", padding=side).encode_texts(["No.", "Yes, it is."], [talk, "Is it?"])
        for i, text in enumerate(("No.", "Yes, it is.")):
            kept = one["labels"][i][one["labels"][i] != -100].tolist()
            assert written(kept) == f" {text}[E]"


def test_every_template_states_each_of_its_pieces_once() -> None:
    for name, t in TEMPLATES.items():
        assert t.name == name
        assert t.question.count("{question}") == 1
        assert t.answer.count("{answer}") == 1
        assert t.image.count("<image>") == t.inline.count("<image>") == 1
        assert t.eos or t.stop, f"nothing ends an answer of {name}"
        assert t.question.startswith(t.trained_marker)


def test_stop_text_is_known_in_both_of_llamas_spellings(tmp_path: Path) -> None:
    """With a word-start mark ``###`` is one token, behind a word it is two."""
    path = Path(__file__).parents[1] / "goldens" / "llava_labels.json"
    definition = json.loads(path.read_text(encoding="utf-8"))["tokenizer"]
    vocab, merges = definition["model"]["vocab"], definition["model"]["merges"]
    for token in ("#", "##", "▁##", "▁###"):
        vocab.setdefault(token, len(vocab))
    pair = isinstance(merges[0], list)
    for a, b in (("#", "#"), ("▁", "##"), ("▁##", "#")):
        merges.append([a, b] if pair else f"{a} {b}")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    fast.save_pretrained(tmp_path)
    llama = HfTokenizerConfig(path=str(tmp_path)).build()
    made = PromptProcessor(TRANSFORM, llama, "minigpt4", image_tokens=2, image_token_id=IMAGE)
    assert made.stop_ids == {llama.eos_id, vocab["▁###"]}
    assert made.stop_sequences == ((vocab["##"], vocab["#"]),)
    # one segment each side of the image, so that each starts a word
    ids, _ = lay_out(made.layout, llama, [("Name it.", "A cup")], 1, 2, IMAGE)
    assert ids[1] == vocab["▁###"]
    assert ids[-2:] == [vocab["##"], vocab["#"]]
