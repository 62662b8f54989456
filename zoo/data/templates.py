"""How a dialogue about an image is written for a language model, as data, and which of its tokens are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zoo.data.text import TextTokenizer
from zoo.errors import ConfigError, DataError, near

IGNORE = -100
"""Label of a token that is not trained."""

Turn = tuple[str, str | None]
"""A question (may be empty) and its answer; None where the model is to write it."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """The pieces of a prompt.

    Attributes:
        name: what recipes call it.
        system: text before the first question.
        image: text written for each image at the start of the first question; its ``<image>`` becomes the image slots.
        image_before_bos: the slots stand before BOS and ``image`` is not used (BLIP-2 with OPT).
        question: text around each question, up to and with what calls for the answer.
        answer: text around each answer; all of it is trained.
        eos: the end-of-sequence token follows each answer and is trained.
        reads_questions: False drops the questions of training samples (a caption stage keeps only the answers).
        trains_bos: BOS is trained where the answer follows it at once.
    """

    name: str
    system: str = ""
    image: str = "<image>"
    image_before_bos: bool = False
    question: str = "{question}"
    answer: str = "{answer}\n"
    eos: bool = False
    reads_questions: bool = True
    trains_bos: bool = False


_VICUNA = (
    "A chat between a curious {human} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {human}'s questions. "
)
_VICUNA_TURN = {"image": "<image>\n", "question": "USER: {question} ASSISTANT:", "answer": " {answer}", "eos": True}

TEMPLATES: dict[str, Template] = {
    t.name: t
    for t in (
        # LLaVA stage 1 (preprocess_plain): image, caption, newline; the human turn is only the image
        Template(name="plain", reads_questions=False),
        # BLIP-2 stage 2 with OPT: slots, then BOS, an optional prompt, caption, newline
        Template(name="blip2", image_before_bos=True, trains_bos=True),
        # LLaVA-1.5 training and LLaVA-1.5 evaluation (conversation.py), different in one word
        Template(name="vicuna_v1", system=_VICUNA.format(human="user"), **_VICUNA_TURN),  # type: ignore[arg-type]
        Template(name="llava_v1", system=_VICUNA.format(human="human"), **_VICUNA_TURN),  # type: ignore[arg-type]
    )
}


def template(name: str) -> Template:
    """Return a template by name.

    Raises:
        ConfigError: unknown name, with near ones.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"unknown prompt template {name!r}{near(name, TEMPLATES)}")
    return TEMPLATES[name]


def lay_out(
    template: Template,
    tokenizer: TextTokenizer,
    turns: Sequence[Turn],
    images: int,
    image_tokens: int,
    image_token_id: int,
) -> tuple[list[int], list[int]]:
    """Write a dialogue as ids and labels.

    Text between special tokens is tokenised in one piece, as a model meets it, and a token is trained when any of its
    characters belongs to an answer: that is the masking of LLaVA's ``preprocess_v1`` without counting tokens. A length
    of L ids with k images as single placeholders becomes L - k + k * n with n slots an image.

    Args:
        turns: at least one; only the last may lack its answer.
        images: how many images the first question shows.
        image_tokens: n, slots of one image.

    Returns:
        ids and labels of equal length, unpadded; labels are ids where trained, else -100.

    Raises:
        DataError: an answer is missing before the last turn.
    """
    slots = [image_token_id] * image_tokens
    ids: list[int] = []
    labels: list[int] = []
    pending: list[tuple[str, bool]] = []  # text not yet tokenised, and whether it is trained

    def special(values: list[int], trained: bool = False) -> None:
        text = "".join(t for t, _ in pending)
        if text:
            flags = [flag for t, flag in pending for _ in t]
            tokens, spans = tokenizer.encode_with_offsets(text)
            ids.extend(tokens)
            # an empty span (a lone word-start mark) goes with the character it stands before
            labels.extend(
                token if any(flags[start : max(stop, start + 1)]) else IGNORE
                for token, (start, stop) in zip(tokens, spans, strict=True)
            )
        pending.clear()
        ids.extend(values)
        labels.extend(values if trained else [IGNORE] * len(values))

    if template.image_before_bos:
        special(slots * images)
    bare = not template.system and not turns[0][0] and not template.question.replace("{question}", "")
    special([tokenizer.bos_id], trained=template.trains_bos and bare and turns[0][1] is not None)
    pending.append((template.system, False))
    for number, (question, answer) in enumerate(turns):
        before, _, after = template.question.partition("{question}")
        pending.append((before, False))
        if number == 0 and not template.image_before_bos:
            for _ in range(images):
                lead, _, rest = template.image.partition("<image>")
                pending.append((lead, False))
                special(slots)
                pending.append((rest, False))
        pending.append((question + after, False))
        if answer is None:
            if number != len(turns) - 1:
                raise DataError(f"turn {number + 1} of {len(turns)} has no answer; only the last may lack one")
            break
        pending.append((template.answer.replace("{answer}", answer), True))
        if template.eos:
            special([tokenizer.eos_id], trained=True)
    special([])
    return ids, labels
