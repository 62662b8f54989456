"""Text and images as one sequence: what stands where, who reads whom, and what is predicted, as data.

A *style* says how a family writes its rows. ``write_row`` makes one row, ``collate`` a batch, ``segments_of`` numbers
the pieces of rows from their ids alone, and ``layout_of`` turns the numbers into the layout that every mask follows
from. Nothing here depends on a model; images are places (``image_slots``) whose codes or patches a wiring puts in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.vocabulary import Vocabulary
from zoo.errors import ConfigError, DataError, near
from zoo.layout import ALL, PAST, Layout, Segment, lay_out

TASKS = ("t2i", "mmu", "lm", "interleaved")
"""Kinds of rows, by their number in a batch's ``task``: image from text, text from an image, text alone, any order."""

IMAGE_ATTENTION = ("causal", "full")
"""Who reads whom inside an image, where it is not the style's own."""

IGNORE = -100
"""Label of a place without a target."""

CODE = -1
"""Label of an image slot whose code is to be predicted: the wiring replaces it once the image tokenizer has run."""

MOST_IMAGES = 32
"""Images a row may hold."""


@dataclass(frozen=True, kw_only=True)
class SequenceStyle:
    """How a family writes text and images as one sequence.

    Attributes:
        name: What wirings call it.
        specials: Special tokens the vocabulary needs beside the text tokenizer's.
        start, end: Names of those around an image.
        full: Who is in an image's full segment: ``none`` (plain causal), ``places`` (the image alone) or ``span`` (its
            start and end too).
        causal: A full segment reads its own past alone, as text does; what belongs to it stays the same (an ablation,
            ``with_image_attention``).
        prompt_full: In ``mmu`` rows everything up to the image's end is that one segment.
        features: In ``mmu`` rows the places hold an encoder's features: they alone are full, and the text before reads
            them (Show-o with CLIP).
        task_tokens: Task -> special token that such rows begin with.
        padded_prompt: The text of ``t2i`` rows fills a prefix of fixed length, padded on the left.
        images: How images are predicted: ``masked`` (hidden codes in their own place), ``next`` (codes as the next
            token) or ``none`` (not by tokens).
        start_predicted, end_predicted: The special around an image is a target of the token before it.
        prompt_predicted: The text of ``t2i`` rows is trained.
        question: How a question is written before its answer.
        prompt_dropout: Share of ``t2i`` rows whose text is left out in training, for guidance.
        tasks: Task -> share of the samples with image and text, by default; ``t2i`` is caption first.
    """

    name: str
    specials: tuple[str, ...]
    start: str
    end: str
    full: Literal["none", "places", "span"]
    causal: bool = False
    prompt_full: bool = False
    features: bool = False
    task_tokens: tuple[tuple[str, str], ...] = ()
    padded_prompt: bool = False
    images: Literal["masked", "next", "none"] = "none"
    start_predicted: bool = True
    end_predicted: bool = True
    prompt_predicted: bool = True
    question: str = "{question}\n"
    prompt_dropout: float = 0.1
    tasks: tuple[tuple[str, float], ...] = (("t2i", 0.5), ("mmu", 0.5))

    @property
    def caption_first(self) -> float:
        """Share of the pairs whose caption stands before the image."""
        shares = dict(self.tasks)
        return shares.get("t2i", 0.0) / (shares.get("t2i", 0.0) + shares.get("mmu", 0.0))

    def with_image_attention(self, attention: str) -> SequenceStyle:
        """The style whose images are read so: ``causal``, ``full``, or empty for the style's own. Rows, segments and
        targets stay the same; ``layout_of`` alone reads it.

        Raises:
            ConfigError: Another word, or ``full`` for codes that are predicted one after the other.
        """
        if attention not in ("", *IMAGE_ATTENTION):
            raise ConfigError(
                f"image_attention = {attention!r}{near(attention, IMAGE_ATTENTION)}: expected"
                f" {' or '.join(IMAGE_ATTENTION)}, or nothing for the style's own"
            )
        if attention == "full" and self.full == "none":
            raise ConfigError(
                f"image_attention = 'full' does not fit style = {self.name!r}, whose codes are predicted one after the"
                " other: each would read its own answer; leave it out, or set it to causal"
            )
        return replace(self, causal=attention == "causal") if attention else self

    def vocabulary(self, text: int, codes: int = 0) -> Vocabulary:
        """The joined vocabulary over ``text`` rows of text and ``codes`` image codes."""
        return Vocabulary(text=text, specials=self.specials, codes=codes, mask=self.images == "masked")


_SHOW_O = ("pad", "soi", "eoi", "sov", "eov", "t2i", "mmu", "t2v", "v2v", "lvg")

STYLES = (
    SequenceStyle(  # card sections 2 to 4; shares of the first stage
        name="show-o",
        specials=_SHOW_O,
        start="soi",
        end="eoi",
        full="span",
        prompt_full=True,
        task_tokens=(("t2i", "t2i"), ("mmu", "mmu"), ("interleaved", "lvg")),
        padded_prompt=True,
        images="masked",
        prompt_predicted=False,
        question="USER: \n{question} ASSISTANT:",
        tasks=(("t2i", 15), ("lm", 4), ("mmu", 10)),
    ),
    SequenceStyle(
        name="show-o-features",
        specials=_SHOW_O,
        start="soi",
        end="eoi",
        full="span",
        features=True,
        task_tokens=(("t2i", "t2i"), ("mmu", "mmu"), ("interleaved", "lvg")),
        padded_prompt=True,
        images="masked",
        prompt_predicted=False,
        question="USER: \n{question} ASSISTANT:",
        tasks=(("t2i", 3), ("lm", 1), ("mmu", 4)),
    ),
    SequenceStyle(  # section 2.2: half of the pairs image first
        name="chameleon", specials=("boi", "eoi"), start="boi", end="eoi", full="none", images="next"
    ),
    SequenceStyle(  # sections 3 and 4.1
        name="transfusion",
        specials=("boi", "eoi"),
        start="boi",
        end="eoi",
        full="places",
        end_predicted=False,
        tasks=(("t2i", 0.8), ("mmu", 0.2)),
    ),
)


def style(name: str) -> SequenceStyle:
    """A style by name; raises ConfigError with near names."""
    known = {s.name: s for s in STYLES}
    if name not in known:
        raise ConfigError(f"unknown sequence style {name!r}{near(name, known)}")
    return known[name]


@dataclass(frozen=True)
class Words:
    """Ids of the text tokenizer that frame rows."""

    bos: int
    eos: int
    pad: int


@dataclass(frozen=True)
class Text:
    """A text of a row: its ids, without specials, and whether they are targets."""

    ids: tuple[int, ...]
    trained: bool = True


@dataclass(frozen=True)
class Image:
    """An image of a row: how many places it takes, and whether it is only read."""

    places: int
    given: bool = False


@dataclass(frozen=True)
class Row:
    """One row before padding.

    Attributes:
        ids: Token ids, ``vocabulary.slot_id`` where an image's codes or patches go.
        labels: Targets, each in its own place: an id, ``CODE``, or ``IGNORE``.
        task: One of ``TASKS``.
        pads: Pads in front.
        given: Of each image, whether it is only read.
        first: Of each image, whether text that is to be learned stands behind it and none before.
        drawn: Of each image, whether its codes are to be predicted.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    task: str
    pads: int = 0
    given: tuple[bool, ...] = ()
    first: tuple[bool, ...] = ()
    drawn: tuple[bool, ...] = ()


def write_row(
    style: SequenceStyle,
    vocabulary: Vocabulary,
    words: Words,
    task: str,
    parts: Sequence[Text | Image],
    *,
    length: int,
    text_length: int = 0,
    closed: bool = True,
    system: Sequence[int] = (),
) -> Row:
    """Write one row.

    ``t2i`` rows of a padded prompt: pads, task, BOS, text, EOS, image. Their ``mmu``: task, ``system``, image, BOS,
    text, EOS (no BOS behind features). Everything else: [task] BOS, texts and images in order, EOS.

    Args:
        parts: Texts and images in order.
        length: Longest row.
        text_length: Longest text with BOS and EOS in rows that have a prefix of fixed length; 0 = no limit.
        closed: Write what follows the last part; a prompt to be continued is not closed.
        system: Text before the image of ``mmu`` rows, never trained.

    Raises:
        DataError: The row does not fit ``length`` with its images, or a prompt to be continued not at all.
    """
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}{near(task, TASKS)}")
    tokens = dict(style.task_tokens)
    out = _Writer(style, vocabulary, drawn=style.images != "masked" or task in ("t2i", "interleaved"))
    pads = 0
    out.special([vocabulary.id(tokens[task])] if task in tokens else [], trained=False)
    texts = [part for part in parts if isinstance(part, Text)]
    images = [part for part in parts if isinstance(part, Image)]
    if style.padded_prompt and task == "t2i":
        trained = style.prompt_predicted
        out.special([words.bos], trained=trained)
        for text in texts:
            out.text(text.ids, trained=trained and text.trained)
        out.special([words.eos], trained=trained)
        if len(out.ids) > text_length + 1:
            if not closed:
                raise _too_long(len(out.ids) - 1, text_length, "the prompt")
            out.cut(text_length + 1, words.eos)
        pads = text_length + 1 - len(out.ids)
        for image in images:
            out.image(image)
    elif style.padded_prompt and task == "mmu":
        out.special(system, trained=False)
        for image in images:
            out.image(image)
        before = len(out.ids)
        if not style.features:
            out.special([words.bos], trained=closed)
        for text in texts:
            out.text(text.ids, trained=text.trained)
        if closed:
            out.special([words.eos])
        if text_length and len(out.ids) - before > text_length:
            if not closed:
                raise _too_long(len(out.ids) - before, text_length, "the prompt")
            out.cut(before + text_length, words.eos)
    else:
        out.special([words.bos])
        for part in parts:
            if isinstance(part, Image):
                out.image(part)
            else:
                out.text(part.ids, trained=part.trained)
        if closed:
            out.special([words.eos])
    if pads + len(out.ids) > length:
        if not closed or vocabulary.slot_id in out.ids[length - pads :]:
            raise _too_long(pads + len(out.ids), length, "the row")
        out.cut(length - pads)
    first = tuple(any(out.words[at:]) and not any(out.words[:at]) for at in out.starts)
    drawn = tuple(out.labels[at] == CODE for at in out.starts)
    return Row(tuple(out.ids), tuple(out.labels), task, pads, tuple(image.given for image in images), first, drawn)


class _Writer:
    """Ids and labels of one row as they are put down."""

    def __init__(self, style: SequenceStyle, vocabulary: Vocabulary, drawn: bool) -> None:
        self.style, self.vocabulary = style, vocabulary
        self.drawn = drawn  # images are learned where they are not given
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.words: list[bool] = []  # text that is trained
        self.starts: list[int] = []  # first place of every image

    def special(self, ids: Sequence[int], trained: bool = True) -> None:
        self._put(ids, ids if trained else [IGNORE] * len(ids), False)

    def text(self, ids: Sequence[int], trained: bool) -> None:
        self._put(ids, ids if trained else [IGNORE] * len(ids), trained)

    def image(self, image: Image) -> None:
        style, learned = self.style, self.drawn and not image.given
        self.special([self.vocabulary.id(style.start)], trained=learned and style.start_predicted)
        self.starts.append(len(self.ids))
        label = CODE if learned and style.images != "none" else IGNORE
        self._put([self.vocabulary.slot_id] * image.places, [label] * image.places, False)
        self.special([self.vocabulary.id(style.end)], trained=learned and style.end_predicted)

    def _put(self, ids: Sequence[int], labels: Sequence[int], word: bool) -> None:
        self.ids.extend(ids)
        self.labels.extend(labels)
        self.words.extend([word] * len(ids))

    def cut(self, length: int, last: int | None = None) -> None:
        """Keep ``length`` tokens, of which the last becomes ``last`` where one is given."""
        del self.ids[length:], self.labels[length:], self.words[length:]
        if last is not None:
            self.ids[-1] = last
            self.labels[-1] = last if self.labels[-1] != IGNORE else IGNORE


def _too_long(found: int, most: int, what: str) -> DataError:
    return DataError(
        f"{what} has {found} tokens, image places included, and {most} fit: shorten the text, or raise"
        " wiring.text_length or the decoder's context_length"
    )


def collate(
    rows: Sequence[Row], style: SequenceStyle, vocabulary: Vocabulary, pad_id: int, *, trim: bool = False
) -> dict[str, Tensor]:
    """Rows as a batch, padded to the longest.

    Args:
        trim: Leave out the pads in front that all rows with such have: no number of a real token changes.

    Returns:
        ``input_ids`` [B, T] int64 (``slot_id`` at image places), ``attention_mask`` [B, T] bool (False at pads),
        ``segment`` [B, T] int64 (``segments_of``), ``labels`` [B, T] int64, ``image_slots`` [B, T] bool, ``task`` [B]
        int64 (place in ``TASKS``), and of the N images in the order of their slots ``image_given`` [N] bool,
        ``image_first`` [N] bool (they stand before their caption) and ``image_drawn`` [N] bool (their codes are to be
        predicted); images that an encoder reads are not among these.

    Raises:
        DataError: A row has more than ``MOST_IMAGES`` images.
    """
    spare = min((row.pads for row in rows if row.pads or (style.padded_prompt and row.task == "t2i")), default=0)
    rows = [replace(row, pads=max(0, row.pads - spare)) for row in rows] if trim else rows
    width = max((row.pads + len(row.ids) for row in rows), default=0)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORE)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        if len(row.given) > MOST_IMAGES:
            raise DataError(f"a row shows {len(row.given)} images; at most {MOST_IMAGES} fit one")
        here = slice(row.pads, row.pads + len(row.ids))
        ids[i, here] = torch.tensor(row.ids)
        labels[i, here] = torch.tensor(row.labels)
        real[i, here] = True
    coded = [row for row in rows if not (style.features and row.task == "mmu")]
    return {
        "input_ids": ids,
        "attention_mask": real,
        "segment": segments_of(ids, real, style, vocabulary),
        "labels": labels,
        "image_slots": ids == vocabulary.slot_id,
        "task": torch.tensor([TASKS.index(row.task) for row in rows], dtype=torch.long),
        "image_given": torch.tensor([g for row in coded for g in row.given], dtype=torch.bool),
        "image_first": torch.tensor([f for row in coded for f in row.first], dtype=torch.bool),
        "image_drawn": torch.tensor([d for row in coded for d in row.drawn], dtype=torch.bool),
    }


def segments_of(ids: Tensor, real: Tensor | None, style: SequenceStyle, vocabulary: Vocabulary) -> Tensor:
    """Number the pieces of rows by their ids: 0 text, k the k-th image, -1 pads.

    An image is what stands between its start and its end, with or without them as the style says; one whose end is not
    there yet reaches to the end of the row. Where the style reads images ahead (``features``), the text before the
    image of an ``mmu`` row is number ``MOST_IMAGES + 1``. Needs no value on the host.

    Args:
        ids: [B, T] int64; places may hold ``slot_id``, codes or the mask.
        real: [B, T] bool, False at pads; None where there are none.
    """
    starts, ends = ids == vocabulary.id(style.start), ids == vocabulary.id(style.end)
    opened = starts.long().cumsum(1)  # [B, T]
    closed = ends.long().cumsum(1)
    inside = opened > closed  # from a start to the place before its end
    segment = torch.where(inside & ~starts, opened, 0)
    tokens = dict(style.task_tokens)
    understanding = torch.zeros_like(ids[:, :1], dtype=torch.bool)
    if "mmu" in tokens:
        understanding = (ids == vocabulary.id(tokens["mmu"])).any(1, keepdim=True)  # [B, 1]
    if style.full == "span":
        span = torch.where(inside | ends, opened, 0)
        segment = torch.where(understanding, segment, span) if style.features else span
    if style.prompt_full:
        segment = torch.where(understanding & (closed - ends.long() == 0), 1, segment)
    if style.features:
        segment = torch.where(understanding & (opened - starts.long() == 0), MOST_IMAGES + 1, segment)
    return segment if real is None else torch.where(real, segment, -1)


def layout_of(
    segment: Tensor,
    style: SequenceStyle,
    *,
    slots: Tensor | None = None,
    padding: Literal["none", "right"] | None = None,
    document: Tensor | None = None,
) -> Layout:
    """The layout of numbered pieces: ``past`` everywhere, ``all`` where a full image meets itself, unless the style's
    images are ``causal``.

    Positions count real tokens, so that pads on the left change nothing. A causal style comes out as plain causal, in
    one segment, and needs no mask. Pads read themselves alone; the released Show-o lets left pads read earlier pads,
    and the text before the first image of its interleaved rows read them, whose numbers no real row should depend on.

    Args:
        segment: [B, T] int64 from ``segments_of``.
        slots: [B, T] bool, image places: their modality is ``image``.
        padding: A promise about pads, for tensors that are not on the CPU.
        document: [B, T] int64, -1 at pads, where rows are packed (``zoo.data.packing``): a document reads itself alone,
            and its positions count from 0.
    """
    if document is not None:
        return replace(layout_of(segment, style, slots=slots, padding=padding), position=restarted(document)).separate(
            document
        )
    real = segment >= 0
    position = (real.long().cumsum(1) - 1).clamp(min=0)
    if style.full == "none":
        return lay_out(
            [Segment("text", segment.shape[1], predicted=True)],
            len(segment),
            real=real,
            position=position,
            padding=padding,
        )
    ahead = 1 if style.features else 0
    if segment.device.type == "cpu" and not ahead:
        images = max(int(segment.max()), 0) if segment.numel() else 0
    else:
        images = MOST_IMAGES
    relation = torch.full((1 + images + ahead, 1 + images + ahead), PAST)
    full = 0 if style.causal else images
    for k in range(1, full + 1):
        relation[k, k] = ALL
        if ahead:
            relation[-1, k] = ALL
    return Layout.from_ids(
        segment,
        relation,
        modality=None if slots is None else slots.long(),
        position=position,
        names=["text", *(f"image {k}" for k in range(1, images + 1)), *(["prompt"] * ahead)],
        padding=padding,
        predicted=("text",) if style.images != "masked" else ("text", *(f"image {k}" for k in range(1, images + 1))),
    )


def restarted(document: Tensor) -> Tensor:
    """Positions [B, T] that count from 0 in each document of ``document`` [B, T], whose tokens stand together; 0 at
    pads (-1), of which there may be more than a table of positions has rows."""
    place = torch.arange(document.shape[1], device=document.device)
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    return (place - torch.where(begins, place, 0).cummax(1).values).masked_fill(document < 0, 0)


def row_tasks(batch: Mapping[str, Tensor]) -> Tensor:
    """The task (place in ``TASKS``) of every row as [B, 1], or of every token [B, T] where rows are packed."""
    task, document = batch["task"], batch.get("document")
    return task[:, None] if document is None else task[document.clamp(min=0)]


def next_targets(labels: Tensor, own_place: Tensor | None = None) -> Tensor:
    """The id that each row predicts of the next token, [B, T]: labels [B, T] shifted by one, without those predicted
    in their ``own_place`` [B, T]."""
    if own_place is not None:
        labels = labels.masked_fill(own_place, IGNORE)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)
