"""Processors turn samples into the tensors that a wiring's ``forward`` takes; data workers run them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.images import ImageTransform, uniforms
from zoo.data.sample import Sample
from zoo.data.templates import IGNORE, IMAGE, Template, Turn, lay_out, template
from zoo.data.text import TextTokenizer
from zoo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image

    ImageLike = Image.Image | Path | str

Side = Literal["right", "left"]


def images_of(sample: Sample) -> list[Any]:
    """All images of a sample in the order its questions place them: ``meta["images"]``, else its one image or none."""
    several = sample.meta.get("images")
    return list(several) if several else [] if sample.image is None else [sample.image]


class Processor(Protocol):
    """What the loader and the models share. ``draws`` are the draw numbers that seed augmentation."""

    transform: ImageTransform
    tokenizer: TextTokenizer

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]: ...

    def encode_images(self, images: Sequence[ImageLike]) -> Tensor: ...


class _Base:
    """Images and the choice of a text, as both processors do them."""

    def __init__(self, transform: ImageTransform, tokenizer: TextTokenizer, seed: int = 0) -> None:
        self.transform = transform
        self.tokenizer = tokenizer
        self.seed = seed
        self._cached = lru_cache(maxsize=65536)(self._encode_one)

    def _encode_one(self, *key: Any) -> Any:
        raise TypeError(f"{type(self).__name__} defines no _encode_one")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_cached"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cached = lru_cache(maxsize=65536)(self._encode_one)

    def encode_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Return ``[B, 3, S, S]`` float32, as in evaluation.

        Raises:
            DataError: a path that is no readable image.
        """
        return self.transform(images)

    def _pixel_values(
        self, samples: Sequence[Sample], train: bool, draws: Sequence[int], pixels: NDArray[np.uint8] | None
    ) -> Tensor:
        keys = [(self.seed, s.id, d) for s, d in zip(samples, draws, strict=True)] if train else None
        if pixels is not None:
            if self.transform.takes_arrays(pixels.shape[1], pixels.shape[2], train):
                return self.transform.from_array(pixels, keys)
            from PIL import Image

            return self.transform([Image.fromarray(p) for p in pixels], keys)
        shown = [s.image for s in samples if s.image is not None]
        if len(shown) == len(samples):
            return self.transform(shown, keys)
        if keys is not None:
            keys = [k for k, s in zip(keys, samples, strict=True) if s.image is not None]
        values = torch.zeros(len(samples), 3, self.transform.size, self.transform.size)
        if shown:
            values[[i for i, s in enumerate(samples) if s.image is not None]] = self.transform(shown, keys)
        return values

    def _all_pixel_values(self, samples: Sequence[Sample], train: bool, draws: Sequence[int]) -> Tensor:
        """Every image of every sample, in order: [N, 3, S, S]. An image after the first has augmentation of its own."""
        shown = [
            (s.id, d, n, image) for s, d in zip(samples, draws, strict=True) for n, image in enumerate(images_of(s))
        ]
        if not shown:
            return torch.zeros(0, 3, self.transform.size, self.transform.size)
        keys = [(self.seed, f"{id}#{n}" if n else id, d) for id, d, n, _ in shown] if train else None
        return self.transform([image for *_, image in shown], keys)

    def _text(self, sample: Sample, train: bool, draw: int) -> str:
        """Return one text: drawn by (seed, id, draw) in training, the first in evaluation."""
        if not sample.texts:
            raise DataError(f"sample {sample.id!r} has no text; this model needs one with each image")
        if not train or len(sample.texts) == 1:
            return sample.texts[0]
        place = uniforms(1, "text", self.seed, sample.id, draw)[0]
        return sample.texts[int(place * len(sample.texts))]


class PairProcessor(_Base):
    """For two towers: one image, one text.

    Args:
        context_length: every text becomes this many ids.
        truncate: cut what is too long and put EOS in the last slot; otherwise it is an error.
    """

    def __init__(
        self,
        transform: ImageTransform,
        tokenizer: TextTokenizer,
        context_length: int,
        truncate: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(transform, tokenizer, seed)
        if context_length < 3:
            raise ConfigError(f"context_length={context_length} leaves no room for text between BOS and EOS")
        self.context_length = context_length
        self.truncate = truncate

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``pixel_values [B, 3, S, S]`` and ``encode_texts`` of one caption each.

        Args:
            draws: how often each sample was drawn before; with the seed and the id it decides caption and augmentation.
            pixels: the images as ``[B, H, W, 3]`` bytes, in place of ``sample.image``.
        """
        draws = draws if draws is not None else [0] * len(samples)
        if pixels is None and any(s.image is None for s in samples):
            missing = next(s.id for s in samples if s.image is None)
            raise DataError(f"sample {missing!r} has no image; this model needs one with each text")
        texts = [self._text(s, train, d) for s, d in zip(samples, draws, strict=True)]
        return {"pixel_values": self._pixel_values(samples, train, draws, pixels), **self.encode_texts(texts)}

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return ``input_ids [B, L]`` int64: BOS, text, EOS, pads; ``attention_mask [B, L]`` bool, False on pads.

        Raises:
            DataError: a text is too long and ``truncate`` is False.
        """
        rows = [self._cached(text) for text in texts]
        ids = torch.full((len(rows), self.context_length), self.tokenizer.pad_id)
        mask = torch.zeros(len(rows), self.context_length, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return {"input_ids": ids, "attention_mask": mask}

    def _encode_one(self, *key: Any) -> Any:
        (text,) = key
        row = [self.tokenizer.bos_id, *self.tokenizer.encode([text])[0], self.tokenizer.eos_id]
        if len(row) > self.context_length:
            if not self.truncate:
                raise DataError(
                    f"the text {text[:40]!r}... has {len(row)} tokens, more than context_length={self.context_length}; "
                    "shorten it or set truncate"
                )
            row = [*row[: self.context_length - 1], self.tokenizer.eos_id]
        return row


class PromptProcessor(_Base):
    """For a language model that reads images: the template's ids with ``image_tokens`` placeholders for an image.

    Args:
        layout: a template or its name.
        image_tokens: slots of one image.
        image_token_id: the placeholder; by default the tokenizer's. It may lie outside the vocabulary, as the model
            replaces the embedding of every slot.
        max_length: training rows are cut to this after the images are expanded, longer prompts are refused; None
            never cuts.
        padding: side of the pads in training and scoring rows; prompts to be continued are padded on the left.
        prompt: the question where a sample or a call gives none; empty = one of the template's instructions.
        preamble: write the template's system text.
        instructed: tokenizer of a connector that reads the instruction (InstructBLIP); rows then have
            ``instruction_ids`` [B, Tq] int64 and ``instruction_mask`` [B, Tq] bool.
        instruction_length: most ids of an instruction, start and end included; cut from the left.
    """

    dialogues: ClassVar[bool] = True  # prompts may be several turns, about several images

    def __init__(
        self,
        transform: ImageTransform,
        tokenizer: TextTokenizer,
        layout: Template | str,
        image_tokens: int,
        image_token_id: int | None = None,
        max_length: int | None = None,
        padding: Side = "right",
        prompt: str = "",
        seed: int = 0,
        preamble: bool = True,
        instructed: TextTokenizer | None = None,
        instruction_length: int = 128,
    ) -> None:
        super().__init__(transform, tokenizer, seed)
        placeholder = image_token_id if image_token_id is not None else tokenizer.image_token_id
        if placeholder is None or placeholder < 0:
            raise ConfigError("the tokenizer has no image token; give image_token_id, or set add_image_token")
        if padding not in ("right", "left"):
            raise ConfigError(f"padding must be right or left, not {padding!r}")
        if max_length is not None and max_length <= image_tokens + 1:
            raise ConfigError(f"max_length={max_length} leaves no room for text after {image_tokens} image tokens")
        self.layout = template(layout) if isinstance(layout, str) else layout
        self.image_tokens = image_tokens
        self.image_token_id = placeholder
        self.max_length = max_length
        self.padding: Side = padding
        self.prompt = prompt
        self.preamble = preamble
        self.instructed = instructed
        self.instruction_length = instruction_length
        self.drawn: tuple[int, ...] = ()  # ids of an image that is drawn; zoo.data.drawn has some

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``pixel_values [B, 3, S, S]`` and ``encode_rows`` of each sample's dialogue or one caption.

        Where some sample has no image its pixels are zeros, its row has no slots, and ``has_image [B]`` bool is added.
        Where some sample has several (``images_of``), ``pixel_values [N, 3, S, S]`` are all images in order, and
        ``has_image`` is not added.
        """
        draws = draws if draws is not None else [0] * len(samples)
        dialogues = [self._turns(s, train, d) for s, d in zip(samples, draws, strict=True)]
        counts = [1 if pixels is not None else len(images_of(s)) for s in samples]
        if max(counts, default=0) > 1 or any(s.meta.get("images") for s in samples):
            return {
                "pixel_values": self._all_pixel_values(samples, train, draws),
                **self.encode_rows(dialogues, counts),
            }
        batch = {"pixel_values": self._pixel_values(samples, train, draws, pixels)}
        batch |= self.encode_rows(dialogues, counts)
        if not all(counts):
            batch["has_image"] = torch.tensor([bool(c) for c in counts])
        return batch

    def _turns(self, sample: Sample, train: bool, draw: int) -> tuple[Turn, ...]:
        stored = sample.meta.get("turns")
        if not stored:
            return ((self._question(sample, train, draw), self._text(sample, train, draw)),)
        turns = tuple((str(q), str(a)) for q, a in stored)
        if not self.layout.reads_questions:  # a caption stage keeps one answer an image
            return ((self.prompt, turns[0][1]),)
        return ((self.asked(turns[0][0], sample.meta.get("format")), turns[0][1]), *turns[1:])

    def asked(self, question: str, form: str | None = None) -> str:
        """The question as the template asks for an answer in a format (``short``, ``choice``, None)."""
        return self.layout.asked(question, form)

    def _question(self, sample: Sample, train: bool, draw: int) -> str:
        """The question of a sample that has none: the prompt, else an instruction drawn by (seed, id, draw)."""
        lines = self.layout.instructions
        if self.prompt or not lines or not train:
            return self.default_question
        return lines[int(uniforms(1, "instruction", self.seed, sample.id, draw)[0] * len(lines))]

    @property
    def default_question(self) -> str:
        """The question where a call gives none."""
        return self.prompt or (self.layout.instructions[0] if self.layout.instructions else "")

    def encode_rows(
        self, dialogues: Sequence[Sequence[Turn]], images: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Return padded rows.

        Args:
            dialogues: turns of (question, answer) a row.
            images: how many images a row shows; by default one each.

        Returns:
            ``input_ids [B, T]`` int64, ``attention_mask [B, T]`` bool, ``labels [B, T]`` int64 with -100 on
            image slots, pads and prompts, and ``text_bytes [B]`` int64, the UTF-8 bytes of the answers; instructions
            where a connector reads them.

        Raises:
            DataError: ``max_length`` cuts into the slots of an image, or questions place another number of images.
        """
        shown = images if images is not None else [1] * len(dialogues)
        rows = [self._cached(tuple(d), int(i)) for d, i in zip(dialogues, shown, strict=True)]
        return {
            **self._pad([r[0] for r in rows], [r[1] for r in rows], self.padding),
            "text_bytes": torch.tensor([sum(len((answer or "").encode()) for _, answer in d) for d in dialogues]),
            **self._instructions(dialogues),
        }

    def encode_texts(
        self,
        texts: Sequence[str],
        prompts: Sequence[str | Sequence[Turn]] | None = None,
        images: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``encode_rows`` of one answer each; ``score_text`` sums over the places where labels are not -100.

        Args:
            prompts: questions, or dialogues whose last turn lacks its answer, of which only the last is then trained.
        """
        asked = [self._dialogue(p) for p in prompts] if prompts is not None else [self._dialogue(None)] * len(texts)
        rows = self.encode_rows([(*d[:-1], (d[-1][0], t)) for d, t in zip(asked, texts, strict=True)], images)
        for i, dialogue in enumerate(asked):
            if len(dialogue) > 1 or self.layout.trains_tag:  # what stands before the answer is given
                before = len(self._cached(dialogue, 1 if images is None else int(images[i]))[0])
                start = 0 if self.padding == "right" else int((~rows["attention_mask"][i]).sum())
                rows["labels"][i, : start + before] = IGNORE
        return rows

    def encode_prompts(
        self,
        prompts: Sequence[str | Sequence[Turn]] | None,
        count: int,
        side: Side = "left",
        images: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``input_ids [B, T]`` and ``attention_mask [B, T]`` of ``count`` rows that end where answers begin.

        Args:
            prompts: questions, or dialogues whose last turn lacks its answer.
            images: how many images a row shows; by default one each.

        Raises:
            DataError: a prompt is longer than ``max_length``, or places another number of images.
        """
        asked = [self._dialogue(p) for p in prompts] if prompts is not None else [self._dialogue(None)] * count
        shown = images if images is not None else [1] * count
        rows = [self._cached(d, int(i)) for d, i in zip(asked, shown, strict=True)]
        padded = self._pad([r[0] for r in rows], [r[1] for r in rows], side)
        del padded["labels"]
        return {**padded, **self._instructions(asked)}

    def _dialogue(self, prompt: str | Sequence[Turn] | None) -> tuple[Turn, ...]:
        if prompt is None or isinstance(prompt, str):
            return ((self.default_question if prompt is None else prompt, None),)
        turns = tuple((str(q), None if a is None else str(a)) for q, a in prompt)
        if not turns or turns[-1][1] is not None:
            raise DataError("a dialogue to be continued must end with a question whose answer is None")
        return turns

    def _encode_one(self, *key: Any) -> Any:
        turns, images = key
        ids, labels = lay_out(
            self.layout,
            self.tokenizer,
            turns,
            images,
            self.image_tokens,
            self.image_token_id,
            preamble=self.preamble,
            drawn=self.drawn,
        )
        if self.max_length is not None and len(ids) > self.max_length:
            if turns[-1][1] is None:
                raise DataError(
                    f"the prompt has {len(ids)} tokens, image tokens included, and the model reads {self.max_length}:"
                    " shorten the prompt, or raise the decoder's context_length"
                )
            if self.image_token_id in ids[self.max_length :]:
                raise DataError(
                    f"max_length={self.max_length} cuts into the {self.image_tokens} slots of the image; raise it "
                    f"to more than {len(ids) - ids[::-1].index(self.image_token_id)}"
                )
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        return ids, labels

    def _instructions(self, dialogues: Sequence[Sequence[Turn]]) -> dict[str, Tensor]:
        """The first question of each row in the connector's vocabulary: later ones would tell of answers to come."""
        if self.instructed is None:
            return {}
        rows = [self._instruction(dialogue[0][0].replace(IMAGE, " ").strip()) for dialogue in dialogues]
        ids = torch.full((len(rows), max(map(len, rows), default=0)), self.instructed.pad_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return {"instruction_ids": ids, "instruction_mask": mask}

    def _instruction(self, text: str) -> list[int]:
        assert self.instructed is not None
        words = self.instructed.encode([text])[0][-(self.instruction_length - 2) :]
        return [self.instructed.bos_id, *words, self.instructed.eos_id]

    def _pad(self, ids: list[list[int]], labels: list[list[int]], side: Side) -> dict[str, Tensor]:
        width = max(map(len, ids), default=0)
        input_ids = torch.full((len(ids), width), self.tokenizer.pad_id)
        targets = torch.full((len(ids), width), IGNORE)
        mask = torch.zeros(len(ids), width, dtype=torch.bool)
        for i, (row, label) in enumerate(zip(ids, labels, strict=True)):
            here = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            input_ids[i, here] = torch.tensor(row)
            targets[i, here] = torch.tensor(label)
            mask[i, here] = True
        return {"input_ids": input_ids, "attention_mask": mask, "labels": targets}

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: EOS, and the template's stop text where it is one token."""
        return frozenset({self.tokenizer.eos_id, *(s[0] for s in self._stops if len(s) == 1)})

    @property
    def stop_sequences(self) -> tuple[tuple[int, ...], ...]:
        """Sequences of several ids that end an answer: the spellings of the template's stop text."""
        return tuple(s for s in self._stops if len(s) > 1)

    @cached_property
    def _stops(self) -> tuple[tuple[int, ...], ...]:
        """The stop text as a text of its own and as the end of a word, which tokenizers spell in two ways."""
        stop = self.layout.stop
        if not stop:
            return ()
        alone = self.tokenizer.encode([stop])[0]
        if len(stop) == 1:
            return ((alone[-1],),)
        ids, spans = self.tokenizer.encode_with_offsets("a" + stop)
        behind = [token for token, (start, _) in zip(ids, spans, strict=True) if start >= 1]
        return tuple(sorted({tuple(alone), tuple(behind)}))

    def decode(self, ids: Sequence[int]) -> str:
        """Return a generated answer as text: up to the first stop, without special tokens and outer blanks."""
        stops = self.stop_ids
        kept: list[int] = []
        for id in ids:
            if id in stops:
                break
            kept.append(int(id))
        text = self.tokenizer.decode(kept)
        return (text.split(self.layout.stop, 1)[0] if self.layout.stop else text).strip()


def describe(processor: PairProcessor | PromptProcessor) -> dict[str, Any]:
    """Return what decides a processor's tensors, for hashes and manifests: JSON-like."""
    from dataclasses import asdict

    about: dict[str, Any] = {
        "transform": asdict(processor.transform),
        "tokenizer": processor.tokenizer.fingerprint(),
        "seed": processor.seed,
    }
    if isinstance(processor, PairProcessor):
        about |= {"context_length": processor.context_length, "truncate": processor.truncate}
    else:
        about |= {
            "template": asdict(processor.layout),
            "image_tokens": processor.image_tokens,
            "max_length": processor.max_length,
            "padding": processor.padding,
            "prompt": processor.prompt,
        }
        if not processor.preamble:
            about["preamble"] = False
        if processor.instructed is not None:
            about["instructed"] = [processor.instructed.fingerprint(), processor.instruction_length]
    plain: dict[str, Any] = json.loads(json.dumps(about))
    return plain
