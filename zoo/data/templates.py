"""How a dialogue about images is written for a language model, as data, and which of its tokens are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from zoo.data.text import TextTokenizer
from zoo.errors import ConfigError, DataError, near

IGNORE = -100
"""Label of a token that is not trained."""

IMAGE = "<image>"
"""In a question: an image stands here."""

DRAWN = "<draw>"
"""In an answer: an image is drawn here."""

Turn = tuple[str, str | None]
"""A question (may be empty) and its answer; None where the model is to write it."""

SHORT, CHOICE = "short", "choice"
"""Response formats a sample may ask for in ``meta["format"]``: a word or phrase, the letter of a choice."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """The pieces of a prompt.

    Attributes:
        name: what recipes call it.
        system: text before the first question, or in the place of ``{system}`` in it.
        image: text written for each image at the start of the first question where the questions place none; its
            ``<image>`` becomes the image slots.
        inline: text written for an ``<image>`` inside a question.
        image_first: the only ``<image>`` of a question moves to its start, where ``image`` is written.
        image_before_bos: the slots stand before BOS, wherever the questions place images.
        image_ahead: the images stand before the text around the first question, wherever the questions place them.
        bos: what starts a row: the tokenizer's BOS, or its EOS.
        turn_bos: later turns start with it too.
        question: text around each question, up to and with what calls for the answer.
        trained_marker: what ``question`` starts with and is trained all the same, because it ends the answer before.
        tag: text after the question that names the one who answers, trained where ``trains_tag``.
        answer: text around each answer; all of it is trained.
        eos: the end-of-sequence token follows each answer and is trained.
        end: text after the last answer, trained.
        stop: text that ends a written answer, beside EOS.
        joined: a prompt and its answer are tokenised as one text; else each on its own, as are later turns.
        question_tokens: most tokens of a question's text, cut from the left; 0 = no limit. Only where not ``joined``.
        answer_tokens: most tokens of an answer with its end, cut from the right; 0 = no limit. As above.
        reads_questions: False drops the questions of training samples (a caption stage keeps only the answers).
        trains_bos: BOS is trained where the answer follows it at once.
        between: text between an answer and the next question; never trained.
        last_only: only the last answer is trained, ended and tokenised on its own; the turns before it are one text.
        mask: special token before the last answer; BOS, which is trained, stands behind it and not at the start of the
            row (GLM's ``[gMASK]`` and sop). It is written as text where the vocabulary lacks it.
        instructions: questions to draw from where a sample has none; the first is the default of a call.
        formats: response format -> text around the first question of a sample that asks for it.
    """

    name: str
    system: str = ""
    image: str = IMAGE
    inline: str = IMAGE
    image_first: bool = False
    image_before_bos: bool = False
    image_ahead: bool = False
    bos: Literal["bos", "eos"] = "bos"
    turn_bos: bool = False
    question: str = "{question}"
    trained_marker: str = ""
    tag: str = ""
    trains_tag: bool = False
    answer: str = "{answer}\n"
    eos: bool = False
    end: str = ""
    stop: str = ""
    joined: bool = True
    question_tokens: int = 0
    answer_tokens: int = 0
    reads_questions: bool = True
    trains_bos: bool = False
    between: str = ""
    last_only: bool = False
    mask: str = ""
    instructions: tuple[str, ...] = ()
    formats: Mapping[str, str] = field(default_factory=dict)

    def asked(self, question: str, form: str | None = None) -> str:
        """The question with what asks for a response format; unchanged where the template knows no such format.

        Raises:
            ConfigError: a format that no template has.
        """
        if form and form not in (SHORT, CHOICE):
            raise ConfigError(f"unknown response format {form!r}{near(form, (SHORT, CHOICE))}")
        return self.formats[form].replace("{question}", question) if form and form in self.formats else question


_SYSTEM = (
    "A chat between a curious {human} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {human}'s questions."
)
_LLAMA_2 = (
    "<<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language.\n<</SYS>>\n\n"
)
_LLAVA_FORMATS = {  # LLaVA-1.5, section 3.1 and table 7
    SHORT: "{question}\nAnswer the question using a single word or phrase.",
    CHOICE: "{question}\nAnswer with the option's letter from the given choices directly.",
}
_ALIGNMENT = (  # prompts/alignment.txt of MiniGPT-4
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
_CAPTIONS = (  # InstructBLIP, appendix C: the templates of image captioning
    "A short image caption:",
    "A short image description:",
    "A photo of",
    "An image that shows",
    "Write a short description for the image.",
    "Write a description for the photo.",
    "Provide a description of what is presented in the photo.",
    "Briefly describe the content of the image.",
    "Can you briefly explain what you see in the image?",
    "Could you use a few words to describe what you perceive in the photo?",
    "Please provide a short depiction of the picture.",
    "Using language, provide a short account of the image.",
    "Use a few words to illustrate what is happening in the picture.",
)
_WRAPPED = "<Img><image></Img>"


def _vicuna(name: str, human: str) -> Template:
    return Template(
        name=name,
        system=_SYSTEM.format(human=human) + " ",
        image="<image>\n",
        image_first=True,
        question="USER: {question} ASSISTANT:",
        answer=" {answer}",
        eos=True,
        formats=_LLAVA_FORMATS,
    )


def _minigpt4(name: str, **pieces: object) -> Template:
    fields = {
        "image": f"{_WRAPPED} ",
        "inline": _WRAPPED,
        "turn_bos": True,
        "joined": False,
        "answer_tokens": 160,
        "instructions": _ALIGNMENT,
    }
    return Template(name=name, **{**fields, **pieces})  # type: ignore[arg-type]


def _cogvlm(form: str, **pieces: str) -> Template:
    fields = {"name": f"cogvlm_{form}", "answer": "{answer}", **pieces}
    return Template(image_ahead=True, eos=True, joined=False, last_only=True, **fields)  # type: ignore[arg-type]


def _visualglm(name: str, question: str) -> Template:
    pieces = {"image": "<img><image></img>", "answer": "{answer}", "between": "\n", "mask": "[gMASK]"}
    return Template(name=name, question=question, image_ahead=True, eos=True, last_only=True, **pieces)  # type: ignore[arg-type]


TEMPLATES: dict[str, Template] = {
    t.name: t
    for t in (
        # LLaVA stage 1 (preprocess_plain): image, caption, newline; the human turn is only the image
        Template(name="plain", reads_questions=False, stop="\n"),
        # BLIP-2 stage 2 with OPT: slots, then BOS, an optional prompt, caption, newline
        Template(
            name="blip2",
            image_before_bos=True,
            trains_bos=True,
            stop="\n",
            formats={SHORT: "Question: {question} Short answer:"},
        ),
        # LLaVA-1.5 training and LLaVA-1.5 evaluation (conversation.py), different in one word
        _vicuna("vicuna_v1", "user"),
        _vicuna("llava_v1", "human"),
        # LLaVA's first releases (preprocess with the sign ###): of a human turn the first two ids, which are ##, #
        Template(
            name="llava_v0",
            system=_SYSTEM.format(human="human") + "\n\n",
            image="<image>\n",
            image_first=True,
            question="### Human: {question}\n",
            trained_marker="###",
            tag="### Assistant:",
            trains_tag=True,
            answer=" {answer}\n",
            end="### ",
            stop="###",
            formats=_LLAVA_FORMATS,
        ),
        # LLaVA on LLaMA-2-chat (preprocess_llama_2): BOS before every turn, a blank before </s>
        Template(
            name="llava_llama_2",
            system=_LLAMA_2,
            image="<image>\n",
            image_first=True,
            turn_bos=True,
            question="[INST] {system}{question} [/INST]",
            answer=" {answer} ",
            eos=True,
            formats=_LLAVA_FORMATS,
        ),
        # MiniGPT-4 stage 1: no instruction, at most 32 tokens
        Template(name="minigpt4_caption", reads_questions=False, joined=False, answer_tokens=32, stop="\n"),
        # stage 2 with Vicuna and with LLaMA-2-chat, and what the demonstration writes
        _minigpt4("minigpt4", question="###Human: {question} ###Assistant: ", answer="{answer}###", stop="###"),
        _minigpt4("minigpt4_llama_2", question="[INST] {question} [/INST] ", answer="{answer}", eos=True),
        _minigpt4(
            "minigpt4_chat",
            system="Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I "
            "provide it to you. Please answer my questions.",
            turn_bos=False,
            question="###Human: {question}###Assistant: ",
            answer="{answer}###",
            stop="###",
        ),
        # MiniGPT-5: a caption alone, and the next scene of a story
        Template(name="minigpt5_caption", answer="{answer} ###", joined=False, stop="###"),
        Template(
            name="minigpt5",
            system="Give the following images in <Img>ImageContent</Img> format. You will be able to see the images"
            " once I provide it to you. Please understanding images and generate story.",
            image=f"{_WRAPPED} ",
            inline=_WRAPPED,
            question="###Human: {question} ###Assistant: ",
            answer="{answer} ###",
            joined=False,
            stop="###",
        ),
        # a question, a line's end, an answer: what a small model learns soonest
        Template(name="lines", question="{question}\n", answer="{answer}", eos=True, joined=False),
        # InstructBLIP: rows start with </s>, which LAVIS made the BOS; 128 tokens of instruction, 256 of answer, both
        # counted with their BOS
        Template(
            name="instructblip",
            image_before_bos=True,
            bos="eos",
            answer="{answer}",
            eos=True,
            joined=False,
            question_tokens=127,
            answer_tokens=255,
            instructions=_CAPTIONS,
            formats={SHORT: "Question: {question} Short answer:", CHOICE: "Question: {question} Short answer:"},
        ),
        # BLIP-2 with FlanT5: T5's encoder reads slots, the caption's start or a question, and EOS (zoo.data.prefix)
        Template(
            name="prefix",
            image_before_bos=True,
            answer="{answer}",
            eos=True,
            formats={SHORT: "Question: {question} Short answer:"},
        ),
        # InstructBLIP with FlanT5 (blip2_t5_instruct.py): 128 tokens of instruction, 256 of answer, with their EOS
        Template(
            name="prefix_instructblip",
            image_before_bos=True,
            answer="{answer}",
            eos=True,
            question_tokens=127,
            answer_tokens=256,
            instructions=_CAPTIONS,
            formats={SHORT: "Question: {question} Short answer:", CHOICE: "Question: {question} Short answer:"},
        ),
        # CogVLM by checkpoint (template_version of the hub's config.json); a question asks for one answer
        _cogvlm("base"),
        _cogvlm("chat", question=" [INST] {question} [/INST] "),
        _cogvlm("vqa", question="Question: {question} Short answer:"),
        _cogvlm("chat_old", question="Question: {question} Answer:", between="\n"),
        # VisualGLM in its two languages: the dialogue is the prefix, then [gMASK], sop, the answer
        _visualglm("visualglm", "Q:{question}\nA:"),
        _visualglm("visualglm_zh", "问：{question}\n答："),
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


class _Row:
    """The ids and labels of a row while it is written."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.pending: list[tuple[str, bool]] = []  # text not yet tokenised, and whether it is trained

    def text(self, text: str, trained: bool = False) -> None:
        self.pending.append((text, trained))

    def flush(self, ends: Sequence[int] = (), most: int = 0) -> None:
        """Tokenise what is pending, then append the trained ids ``ends``; of all that keep the first ``most``, or,
        where it is negative, the last."""
        text = "".join(t for t, _ in self.pending)
        ids: list[int] = []
        labels: list[int] = []
        if text:
            flags = [flag for t, flag in self.pending for _ in t]
            ids, spans = self.tokenizer.encode_with_offsets(text)
            # an empty span (a lone word-start mark) goes with the character it stands before
            labels = [
                token if any(flags[start : max(stop, start + 1)]) else IGNORE
                for token, (start, stop) in zip(ids, spans, strict=True)
            ]
        self.pending.clear()
        ids, labels = [*ids, *ends], [*labels, *ends]
        kept = slice(most or None) if most >= 0 else slice(most, None)
        self.ids += ids[kept]
        self.labels += labels[kept]

    def special(self, values: Sequence[int], trained: bool = False) -> None:
        self.flush()
        self.ids += values
        self.labels += values if trained else [IGNORE] * len(values)


def lay_out(
    template: Template,
    tokenizer: TextTokenizer,
    turns: Sequence[Turn],
    images: int,
    image_tokens: int,
    image_token_id: int,
    *,
    preamble: bool = True,
    drawn: Sequence[int] = (),
) -> tuple[list[int], list[int]]:
    """Write a dialogue as ids and labels.

    Where a template is ``joined``, text between special tokens is tokenised in one piece, as a model meets it, and a
    token is trained when any of its characters belongs to an answer: that is the masking of LLaVA's ``preprocess_v1``
    without counting tokens. A length of L ids with k images as single placeholders becomes L - k + k * n with n slots
    an image.

    Args:
        turns: at least one; only the last may lack its answer. An ``<image>`` in a question places an image there.
        images: how many images the row shows; where no question places one, all stand at the first question.
        image_tokens: n, slots of one image.
        preamble: False leaves out the template's system text.
        drawn: ids that stand for a ``<draw>`` of an answer and are trained with it; empty = it is text.

    Returns:
        ids and labels of equal length, unpadded; labels are ids where trained, else -100.

    Raises:
        DataError: an answer is missing before the last turn, or the questions place more or fewer images than there
            are.
    """
    placed = sum(question.count(IMAGE) for question, _ in turns)
    if placed and placed != images:
        raise DataError(
            f"the questions place {placed} images with {IMAGE} and the row shows {images}: expected one {IMAGE} an"
            " image, or none to put all of them first"
        )
    slots = [image_token_id] * image_tokens
    row = _Row(tokenizer)

    def image(pattern: str) -> None:
        lead, _, rest = pattern.partition(IMAGE)
        row.text(lead)
        row.special(slots)
        row.text(rest)

    first = template.image_before_bos
    if first:
        row.special(slots * images)
    system = template.system if preamble else ""
    bare = not system and not turns[0][0] and not template.question.replace("{question}", "")
    bos = [tokenizer.eos_id if template.bos == "eos" else tokenizer.bos_id]
    if not template.mask:
        row.special(bos, trained=template.trains_bos and bare and turns[0][1] is not None)
    if "{system}" not in template.question:
        row.text(system)
    for number, (question, answer) in enumerate(turns):
        last = number == len(turns) - 1
        if number:
            row.text(template.between)
        if number and template.turn_bos:
            row.special(bos)
        pattern = template.question.replace("{system}", "" if number else system)
        before, _, after = pattern.partition("{question}")
        if template.image_ahead and not number:
            for _ in range(images):
                image(template.image)
        row.text(template.trained_marker, True)
        row.text(before.removeprefix(template.trained_marker))
        if first or template.image_ahead:
            question = " ".join(question.replace(IMAGE, " ").split()) if IMAGE in question else question
        elif template.image_first and question.count(IMAGE) == 1:
            image(template.image)
            question = question.replace(IMAGE, "").strip()
        elif not placed and not number:
            for _ in range(images):
                image(template.image)
        for part, text in enumerate(question.split(IMAGE)):
            if part:
                image(template.inline)
            row.text(text)
        row.text(after)
        row.text(template.tag, template.trains_tag)
        apart = not template.joined and (last or not template.last_only)
        if apart:
            row.flush(most=-template.question_tokens)
        if last and template.mask:
            known = tokenizer.special_id(template.mask)
            row.text(template.mask if known is None else "")
            row.special([] if known is None else [known])
            row.special(bos, trained=answer is not None)
        if answer is None:
            if not last:
                raise DataError(f"turn {number + 1} of {len(turns)} has no answer; only the last may lack one")
            break
        learned = last or not template.last_only
        said = template.answer.replace("{answer}", answer)
        for part, text in enumerate(said.split(DRAWN) if drawn else [said]):
            if part:
                row.special(drawn, learned)
            row.text(text, learned)
        if (template.eos and learned) or apart:
            row.flush([tokenizer.eos_id] if template.eos and learned else [], template.answer_tokens)
    else:
        row.text(template.end, True)
    row.flush()
    return row.ids, row.labels
