"""Samples as rows of text and images, whatever the style of the family that reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.images import ImageTransform, uniforms
from zoo.data.processor import _Base, images_of
from zoo.data.sample import Sample, parts_of
from zoo.data.sequences import TASKS, Image, Row, SequenceStyle, Text, Words, collate, segments_of, write_row
from zoo.data.templates import IMAGE, Turn
from zoo.data.text import TextTokenizer
from zoo.data.vocabulary import Vocabulary
from zoo.errors import ConfigError, DataError, near

if TYPE_CHECKING:
    from zoo.data.processor import ImageLike
    from zoo.tokenizers.stored import StoredCodes


class UnifiedProcessor(_Base):
    """Each sample becomes a row of one task: drawn from ``tasks`` where it has an image and a text, ``lm`` without an
    image, ``mmu`` where it is a dialogue, ``interleaved`` where it is several parts (``zoo.data.sample.parts_of``).

    Args:
        style: How rows are written.
        vocabulary: Ids of text, special tokens and codes.
        places: Codes or patches of an image.
        length: Longest row.
        text_length: Longest text, BOS and EOS included, in rows with a prefix of fixed length.
        tasks: Task -> share of the samples with image and text; the style's by default. Drawn by (seed, id, draw).
        prompt_dropout: Share of ``t2i`` rows (and of given texts before a drawn image) left without their text in
            training; the style's by default.
        prompt: The question where a sample or a call gives none.
        system: Text before the image of ``mmu`` rows, never trained.
        codes: Stored codes, which then come with the batch as ``image_codes`` [N, n].
        eye: Transform of the images of ``mmu`` rows, where an encoder reads them and not the image tokenizer.
        eye_places: Features of such an image.
        answer_length: As ``text_length``, of ``mmu`` rows; 0 = the same.
    """

    dialogues: ClassVar[bool] = True

    def __init__(
        self,
        transform: ImageTransform,
        tokenizer: TextTokenizer,
        style: SequenceStyle,
        vocabulary: Vocabulary,
        *,
        places: int,
        length: int,
        text_length: int = 0,
        tasks: Mapping[str, float] | None = None,
        prompt_dropout: float | None = None,
        prompt: str = "",
        system: str = "",
        seed: int = 0,
        codes: StoredCodes | None = None,
        eye: ImageTransform | None = None,
        eye_places: int = 0,
        answer_length: int = 0,
    ) -> None:
        super().__init__(transform, tokenizer, seed)
        self.style, self.vocabulary, self.places = style, vocabulary, places
        self.length, self.text_length, self.answer_length = length, text_length, answer_length or text_length
        self.tasks = check_tasks(tasks or dict(style.tasks))
        self.prompt_dropout = style.prompt_dropout if prompt_dropout is None else prompt_dropout
        self.prompt, self.system, self.codes = prompt, system, codes
        self.eye, self.eye_places = eye, eye_places
        pad = vocabulary.id("pad") if "pad" in style.specials else tokenizer.pad_id
        self.words = Words(tokenizer.bos_id, tokenizer.eos_id, pad)

    # -- training rows ---------------------------------------------------------------------------------------------

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``collate``'s batch, cut to the columns in use, and the images of its rows in order.

        These are ``pixel_values`` [N, 3, S, S], or ``image_codes`` [N, n] int64 where codes are stored; what an encoder
        reads is ``eye_values`` [M, 3, S', S']. ``text_bytes`` [B] are the UTF-8 bytes of the texts that are trained as
        next tokens, where no codes are.

        Args:
            draws: How often each sample was drawn before; with the seed and the id it decides task, text, dropout and
                augmentation.
            pixels: The images as [B, H, W, 3] bytes, in place of ``sample.image``.
        """
        draws = draws if draws is not None else [0] * len(samples)
        rows: list[Row] = []
        counted: list[int] = []
        shown: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # read by the eye? -> (sample, image)
        for number, (sample, draw) in enumerate(zip(samples, draws, strict=True)):
            task, parts, said = self._parts(sample, train, draw, pixels is not None)
            rows.append(self._row(task, parts))
            counted.append(len(said.encode()))
            images = sum(isinstance(part, Image) for part in parts)
            shown[self._seen(task)] += [(number, k) for k in range(images)]
        batch = collate(rows, self.style, self.vocabulary, self.words.pad, trim=True)
        if self.style.images == "masked":
            batch["text_bytes"] = torch.tensor(counted)
        if self.codes is not None:
            batch["image_codes"] = self.codes.lookup([samples[n].id for n, _ in shown[False]])
        else:
            batch["pixel_values"] = self._images(self.transform, samples, train, draws, pixels, shown[False])
        if self.eye is not None:
            batch["eye_values"] = self._images(self.eye, samples, train, draws, pixels, shown[True])
        return batch

    def _seen(self, task: str) -> bool:
        """Whether an encoder reads the images of such rows."""
        return self.eye is not None and task == "mmu"

    def _images(
        self,
        transform: ImageTransform,
        samples: Sequence[Sample],
        train: bool,
        draws: Sequence[int],
        pixels: NDArray[np.uint8] | None,
        shown: Sequence[tuple[int, int]],
    ) -> Tensor:
        """[N, 3, S, S] of the images ``shown``: (sample, which of its images)."""
        return shown_images(transform, samples, draws if train else None, pixels, shown, self.seed)

    def _task(self, sample: Sample, draw: int, images: int) -> str:
        if not images:
            return "lm"
        if sample.meta.get("turns"):
            return "mmu"
        if images > 1 or sample.meta.get("parts") is not None:
            return "interleaved"
        place = uniforms(1, "task", self.seed, sample.id, draw)[0] * sum(self.tasks.values())
        for task, share in self.tasks.items():
            place -= share
            if place < 0:
                return task
        return next(reversed(self.tasks))

    def _parts(self, sample: Sample, train: bool, draw: int, has_pixels: bool) -> tuple[str, list[Text | Image], str]:
        """A sample's task, its parts in that task's order, and the text that is trained in it."""
        images = 1 if has_pixels and not sample.meta.get("images") else len(images_of(sample))
        task = self._task(sample, draw, images)
        drops = train and uniforms(1, "prompt dropout", self.seed, sample.id, draw)[0] < self.prompt_dropout
        if task == "interleaved":
            return task, *self._interleaved(sample, train, draw, drops)
        if task == "mmu" and sample.meta.get("turns"):
            turns = tuple((str(q), str(a)) for q, a in sample.meta["turns"])
            return task, [Image(self._places(task))] * images + self._dialogue(turns), "".join(a for _, a in turns)
        text = self._text(sample, train, draw)
        if task == "lm":
            return task, [Text(self.text_ids(text))], text
        image = Image(self._places(task))
        if task == "t2i":
            room = self.length - self.places - 4  # a caption that is too long is cut, as Show-o's prompts are
            return task, [image] if drops else [Text(self.text_ids(text)[:room]), image], "" if drops else text
        return task, [image, *self._dialogue(((self.prompt, text),))], text

    def _interleaved(self, sample: Sample, train: bool, draw: int, drops: bool) -> tuple[list[Text | Image], str]:
        parts: list[Text | Image] = []
        said: list[str] = []
        for place, part in enumerate(parts_of(sample)):
            given = place < sample.meta.get("given", 0)
            if isinstance(part, int):
                parts.append(Image(self.places, given=given))
            elif not (given and drops):
                again = given and part == sample.texts[:1][0]  # an instruction may have several wordings
                text = self._text(sample, train, draw) if again else part
                parts.append(Text(self.text_ids(text), trained=not given))
                said += [] if given else [text]
        return parts, "".join(said)

    def _dialogue(self, turns: Sequence[Turn]) -> list[Text | Image]:
        """Questions, which are not trained, and answers, which are; every answer but the last with its end."""
        parts: list[Text | Image] = []
        for place, (question, answer) in enumerate(turns):
            asked = question.replace(IMAGE, " ").strip()
            if asked:
                parts.append(Text(self.text_ids(self.style.question.format(question=asked)), trained=False))
            if answer is not None:
                end = () if place == len(turns) - 1 else (self.words.eos,)
                parts.append(Text((*self.text_ids(f" {answer}" if asked else answer), *end)))
        return parts

    def _places(self, task: str) -> int:
        return self.eye_places if self._seen(task) else self.places

    def _row(self, task: str, parts: Sequence[Text | Image], closed: bool = True) -> Row:
        system = self.text_ids(self.system) if task == "mmu" and self.system else ()
        most = self.answer_length if task == "mmu" else self.text_length
        return write_row(
            self.style, self.vocabulary, self.words, task, parts,
            length=self.length, text_length=most, closed=closed, system=system,
        )  # fmt: skip

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text, without special tokens."""
        ids: tuple[int, ...] = self._cached(text)
        return ids

    def _encode_one(self, *key: Any) -> Any:
        return tuple(self.tokenizer.encode([key[0]])[0])

    # -- rows to be continued and scored ---------------------------------------------------------------------------

    def encode_prompts(
        self,
        prompts: Sequence[str | Sequence[Turn]] | None,
        count: int,
        images: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Rows that end where an answer begins, padded on the left.

        Args:
            prompts: Questions, or dialogues whose last turn lacks its answer.
            count: How many rows.
            images: How many images each shows, one by default; without one a row is ``lm``.

        Returns:
            ``input_ids`` [B, T] int64 and ``attention_mask`` [B, T] bool.

        Raises:
            DataError: A prompt that does not fit.
        """
        shown = images if images is not None else [1] * count
        asked = [self._asked(p) for p in prompts] if prompts is not None else [self._asked(None)] * count
        return self._padded([self._answer_row(turns, n) for turns, n in zip(asked, shown, strict=True)], left=True)

    def encode_texts(
        self,
        texts: Sequence[str],
        prompts: Sequence[str | Sequence[Turn]] | None = None,
        images: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Whole rows, padded on the right: beside the tensors of ``encode_prompts`` there are ``labels`` [B, T], which
        are not -100 on the text and its end alone (and on a BOS before it)."""
        shown = images if images is not None else [1] * len(texts)
        asked = [self._asked(p) for p in prompts] if prompts is not None else [self._asked(None)] * len(texts)
        rows = []
        for turns, text, n in zip(asked, texts, shown, strict=True):
            told = [(q, a) for q, a in turns[:-1]]
            before = self._dialogue(told)
            if told:
                before = [Text((*p.ids,), trained=False) for p in before if isinstance(p, Text)]
                before.append(Text((self.words.eos,), trained=False))
            last = self._dialogue(((turns[-1][0], text),))
            parts: list[Text | Image] = [Image(self._places("mmu"), given=True)] * n
            rows.append(self._row("mmu" if n else "lm", [*parts, *before, *last]))
        return self._padded(rows, left=False)

    def _asked(self, prompt: str | Sequence[Turn] | None) -> list[Turn]:
        if prompt is None or isinstance(prompt, str):
            return [(self.prompt if prompt is None else prompt, None)]
        turns = [(str(q), None if a is None else str(a)) for q, a in prompt]
        if not turns or turns[-1][1] is not None:
            raise DataError("a dialogue to be continued must end with a question whose answer is None")
        return turns

    def _answer_row(self, turns: Sequence[Turn], images: int) -> Row:
        parts: list[Text | Image] = [Image(self._places("mmu"), given=True)] * images
        return self._row("mmu" if images else "lm", [*parts, *self._dialogue(turns)], closed=False)

    def prompt_rows(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What stands before an image to be drawn, padded on the left, with the texts and without.

        Show-o's end before the image's start, which belongs to the image; all others end with it.

        Returns:
            (ids, segment), [2 B, P] int64 both: B rows with the texts, then B empty ones.

        Raises:
            DataError: A text that does not fit.
        """
        if isinstance(texts, str):
            raise ConfigError("expected a list of texts, got one string: wrap it in a list")
        start = () if self.style.full == "span" else (self.vocabulary.id(self.style.start),)
        image = self.places + 2
        rows = []
        for text in (*texts, *[""] * len(texts)):
            row = self._row("t2i", [Text(self.text_ids(text))], closed=False)
            if row.pads + len(row.ids) + image > self.length:
                raise DataError(
                    f"the prompt has {len(row.ids)} tokens and an image {image}, and {self.length} fit: shorten the"
                    " prompt, or raise the decoder's context_length"
                )
            rows.append(Row((*row.ids, *start), (*row.labels, *start), row.task))
        padded = self._padded(rows, left=True)
        ids = padded["input_ids"]
        segment = segments_of(ids, padded["attention_mask"], self.style, self.vocabulary)
        return ids, segment

    def _padded(self, rows: Sequence[Row], left: bool) -> dict[str, Tensor]:
        width = max((len(row.ids) for row in rows), default=0)
        ids = torch.full((len(rows), width), self.words.pad)
        labels = torch.full((len(rows), width), -100)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            here = slice(width - len(row.ids), width) if left else slice(0, len(row.ids))
            ids[i, here], labels[i, here] = torch.tensor(row.ids), torch.tensor(row.labels)
            mask[i, here] = True
        return {"input_ids": ids, "attention_mask": mask} | ({} if left else {"labels": labels})

    def encode_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Return ``[B, 3, S, S]`` float32 as the image tokenizer reads them, as in evaluation."""
        return self.transform(images)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The id that ends a text."""
        return frozenset({self.words.eos})

    @property
    def stop_sequences(self) -> tuple[tuple[int, ...], ...]:
        return ()

    def asked(self, question: str, form: str | None = None) -> str:
        """The question as it is; these families have no wording of their own for answer formats."""
        return question

    def decode(self, ids: Sequence[int]) -> str:
        """A written text: up to its end, text ids alone, without outer blanks."""
        kept: list[int] = []
        for id in ids:
            if id in self.stop_ids:
                break
            if id < self.tokenizer.vocab_size:
                kept.append(int(id))
        return self.tokenizer.decode(kept).strip()


def shown_images(
    transform: ImageTransform,
    samples: Sequence[Sample],
    draws: Sequence[int] | None,
    pixels: NDArray[np.uint8] | None,
    shown: Sequence[tuple[int, int]],
    seed: int,
) -> Tensor:
    """[N, 3, S, S] of the images ``shown``: (sample, which of its images).

    Args:
        draws: How often each sample was drawn before, for augmentation; None = as in evaluation.
        pixels: The images as [B, H, W, 3] bytes, in place of ``sample.image``.
    """
    keys = None
    if draws is not None:
        keys = [(seed, f"{samples[n].id}#{k}" if k else samples[n].id, draws[n]) for n, k in shown]
    if pixels is not None:
        chosen = pixels[[n for n, _ in shown]]
        if transform.takes_arrays(pixels.shape[1], pixels.shape[2], keys is not None):
            return transform.from_array(chosen, keys)
        from PIL import Image as Picture

        return transform([Picture.fromarray(p) for p in chosen], keys)
    return transform([images_of(samples[n])[k] for n, k in shown], keys)


def check_tasks(tasks: Mapping[str, float]) -> dict[str, float]:
    """Shares of the tasks, checked.

    Raises:
        ConfigError: An unknown task, a negative share, or nothing but zeros.
    """
    for task in tasks:
        if task not in TASKS[:3]:
            raise ConfigError(f"tasks: unknown task {task!r}{near(task, TASKS[:3])}")
    if any(share < 0 for share in tasks.values()) or not sum(tasks.values()):
        raise ConfigError(f"tasks = {dict(tasks)}: expected shares of 0 or more, of which one is above 0")
    return {task: float(share) for task, share in tasks.items() if share}
