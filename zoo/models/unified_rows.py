"""What surrounds the tensors of the wirings that write text and images as one sequence: tokenizer, processor, rows to
count FLOPs with, layouts to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor

from zoo.data.sequences import IGNORE, TASKS, Row, SequenceStyle, layout_of
from zoo.data.vocabulary import Vocabulary
from zoo.decoders.base import DecoderConfig
from zoo.errors import ConfigError, DataError, WeightsError
from zoo.layout import Layout
from zoo.models.tokenizing import OwnsTokenizer
from zoo.sampling.block import CHUNK

if TYPE_CHECKING:
    from zoo.data.unified_processor import UnifiedProcessor

TYPICAL_TEXT = 16
"""Text tokens of a caption, as layouts and FLOP counts assume."""

LEAST_TEXT = 4
"""Text tokens, BOS and EOS included, that must fit beside an image."""


class UnifiedRows(OwnsTokenizer):
    """Base of the unified wirings; the image tokenizer never learns in them.

    Attributes:
        style: How rows are written.
        vocabulary: Ids of text, special tokens and codes; the decoder has as many rows.
        places: Codes or patches of an image.
        text_length: Longest text, BOS and EOS included, that fits beside an image.
    """

    tokenizer_of: ClassVar[str] = "decoder_config"
    reads_packed_rows: ClassVar[bool] = True

    config: Any
    decoder_config: DecoderConfig
    image_config: Any
    style: SequenceStyle
    vocabulary: Vocabulary
    places: int
    text_length: int
    seed: int
    image_tokenizer: Any
    _processor: UnifiedProcessor | None = None

    if TYPE_CHECKING:

        @property
        def device(self) -> torch.device: ...

    def train(self, mode: bool = True) -> Self:
        """Set training mode, but for the image tokenizer: its codes are what they are."""
        super().train(mode)
        self.image_tokenizer.eval()
        return self

    def adopt(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors to start from, those of a text model alone put into the joined tables.

        ``decoder.text.embed.weight`` [V, D] and ``decoder.text.head.{weight, bias}`` become the first V rows of the
        decoder's; other rows keep their start. Show-o's Phi has 51,200 rows for 50,295 ids, so that its new tokens and
        first codes start from rows that no text used (released ``train.py``, resize_token_embeddings).

        Raises:
            WeightsError: Fewer rows than this model has text ids.
        """
        names = {"embed": "decoder.embedding.tokens.", "head": "decoder.lm_head."}
        own, out = self.state_dict(), {}
        for name, tensor in stored.items():
            table, _, kind = name.removeprefix("decoder.text.").partition(".")
            if not name.startswith("decoder.text.") or table not in names:
                out[name] = tensor
                continue
            target = names[table] + kind
            if target not in own or own[target].shape[1:] != tensor.shape[1:]:
                continue  # a tied head; another width is refused where the trunk is taken over
            if len(tensor) < self.decoder_config.vocab_size:
                raise WeightsError(
                    f"the text model has {len(tensor)} ids, decoder.vocab_size is {self.decoder_config.vocab_size}: set"
                    " it, and decoder.tokenizer, to the text model's"
                )
            rows = min(len(tensor), len(own[target]))
            out[target] = torch.cat([tensor[:rows], own[target][rows:].to(tensor)])
        return out

    def reconfigure(self, config: Any) -> None:
        self.config = config
        self._processor = None

    @property
    def processor(self) -> Any:
        """The ``UnifiedProcessor`` that turns samples into ``forward``'s batch; made on first use.

        Raises:
            ConfigError: The tokenizer has more ids than the text vocabulary.
        """
        if self._processor is None:
            from zoo.data.unified_processor import UnifiedProcessor

            self._processor = UnifiedProcessor(**self._processor_fields())
        return self._processor

    def _processor_fields(self) -> dict[str, Any]:
        tokenizer, rows = self.tokenizer, self.decoder_config.vocab_size
        if tokenizer.vocab_size > rows:
            raise ConfigError(
                f"tokenizer {self.decoder_config.tokenizer!r} has {tokenizer.vocab_size} ids, decoder.vocab_size is"
                f" {rows}: set one to fit the other"
            )
        dropout = self.config.prompt_dropout
        return {
            "transform": self._transform(self.image_config),
            "tokenizer": tokenizer,
            "style": self.style,
            "vocabulary": self.vocabulary,
            "places": self.places,
            "length": self.row_length,
            "text_length": self.text_length,
            "tasks": self.config.tasks or None,
            "prompt_dropout": None if dropout < 0 else dropout,
            "prompt": self.config.prompt,
            "seed": self.seed,
            "codes": self.image_tokenizer if getattr(self.image_tokenizer, "stored", False) else None,
        }

    @property
    def row_length(self) -> int:
        """Longest row: with a prefix of fixed length that of a ``t2i`` row, else the decoder's context."""
        if self.style.padded_prompt:
            return self.text_length + self.places + 3
        return self.decoder_config.context_length

    def _transform(self, image: Any) -> Any:
        from zoo.data.images import ImageTransform

        return ImageTransform(
            size=image.image_size,
            mean=tuple(image.mean),
            std=tuple(image.std),
            mode=image.resize,
            augment=cast("Any", self.config.augment),
        )

    def prompt_rows(self, texts: Any) -> tuple[Tensor, Tensor]:
        """``UnifiedProcessor.prompt_rows`` on the model's device: (ids, segment), [2 B, P] int64, with the texts and
        without."""
        ids, segment = self.processor.prompt_rows(texts)
        return ids.to(self.device), segment.to(self.device)

    def prompt_chunks(self, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """``prompt_rows`` of ``CHUNK`` texts each; all are looked at before the first image is drawn.

        Raises:
            ConfigError: A text that leaves no room for the image.
        """
        if isinstance(texts, str):
            raise ConfigError("expected a list of texts, got one string: wrap it in a list")
        try:
            return [self.prompt_rows(texts[at : at + CHUNK]) for at in range(0, len(texts), CHUNK)]
        except DataError as error:
            raise ConfigError(str(error)) from None

    @property
    def typical_text(self) -> int:
        return max(1, min(TYPICAL_TEXT, self.text_length - 2))

    def layouts(self) -> dict[str, Layout]:
        """A row of each task with a caption of typical length."""
        tasks = self._example_tasks
        rows = self._example_rows(len(tasks))
        return {
            task: layout_of(rows["segment"][i : i + 1], self.style, slots=rows["image_slots"][i : i + 1])
            for i, task in enumerate(tasks)
        }

    def _example_order(self, batch_size: int) -> list[str]:
        """The tasks of an example batch: those that are trained, in turn."""
        tasks = self._example_tasks
        return [tasks[i % len(tasks)] for i in range(batch_size)]

    @property
    def _example_tasks(self) -> list[str]:
        return [task for task in TASKS if (self.config.tasks or dict(self.style.tasks)).get(task)]

    @property
    def typical_targets(self) -> int:
        """Targets of the next token in a row, on average over the tasks, as FLOP counts assume."""
        counts = []
        for row in self._example_list(len(self._example_tasks)):
            own: set[int] = set()  # what is predicted in its own place
            if self.style.images == "masked":
                own = {self.vocabulary.slot_id}
                if row.task == "t2i":
                    own |= {self.vocabulary.id(self.style.start), self.vocabulary.id(self.style.end)}
            pairs = zip(row.ids[1:], row.labels[1:], strict=True)
            counts.append(sum(label != IGNORE and id not in own for id, label in pairs))
        return max(1, round(sum(counts) / len(counts)))

    def _example_rows(self, batch_size: int) -> dict[str, Tensor]:
        """Rows of the tasks in turn, padded to one length: a caption and an image each."""
        from zoo.data.sequences import collate

        return collate(self._example_list(batch_size), self.style, self.vocabulary, self._example_pad, trim=True)

    @property
    def _example_pad(self) -> int:
        return self.vocabulary.id("pad") if "pad" in self.style.specials else 0

    def _example_list(self, batch_size: int) -> list[Row]:
        from zoo.data.sequences import Image, Text, Words, write_row

        words, text = Words(1, 2, self._example_pad), Text((3,) * self.typical_text)
        rows = []
        for task in self._example_order(batch_size):
            image = Image(self._places_of(task))
            order: dict[str, list[Text | Image]] = {"t2i": [text, image], "mmu": [image, text], "lm": [text]}
            parts = order[task]
            rows.append(
                write_row(
                    self.style, self.vocabulary, words, task, parts,
                    length=self.row_length, text_length=self.text_length,
                )
            )  # fmt: skip
        return rows

    def _places_of(self, task: str) -> int:
        return self.places
