"""The wiring of LISA and PixelLM: a bridge whose language model names targets and whose mask decoder draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.data.templates import IMAGE, template
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, TokenBatch, lay_out
from zoo.mask_decoders.base import MaskDecoder, MaskDecoderConfig
from zoo.models.bridge import Bridge, BridgeConfig
from zoo.models.writing import IGNORE
from zoo.part import Features, PartConfig, seeded
from zoo_grounding.answering import AnswersWithMasks
from zoo_grounding.marks import IMAGE_MARKS, MarkedTokenizer, mark_names
from zoo_grounding.masks import Square, at_original_size, shown_patches
from zoo_grounding.processor import GroundingProcessor

OBJECT = "{object}"


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig(BridgeConfig):
    """Joins an image encoder, a connector, a text decoder and a mask decoder.

    The vocabulary of the text decoder grows by the tokens of one target, ``[SEG]`` or ``[SEG0]``, ``[SEG1]``, ..., and
    by those around an image; their ids follow ``decoder.vocab_size``.

    Attributes:
        image_marks: Write ``<im_start>`` and ``<im_end>`` around an image.
        question: What ``segment_images`` asks, with ``{object}`` for what is looked for.
        answer_tokens: Most tokens of its answers.
    """

    slots: ClassVar[tuple[str, ...]] = ("encoder", "connector", "decoder", "mask_decoder")

    template: str = "llava_v1"
    image_marks: bool = True
    question: str = "Can you segment {object} in this image?"
    answer_tokens: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if OBJECT not in self.question:
            raise ValueError(f"question = {self.question!r}: expected {OBJECT} in it")
        if self.answer_tokens < 1:
            raise ValueError(f"answer_tokens = {self.answer_tokens} must be 1 or more")
        if self.augment != "none":
            raise ValueError(f"augment = {self.augment!r}: masks do not follow an augmented image, set it to none")

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Segmenter:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other.
        """
        configs: dict[str, Any] = {slot: parts[slot][1] for slot in self.slots}
        return Segmenter(
            self, configs["encoder"], configs["connector"], configs["decoder"], configs["mask_decoder"], seed
        )


class Segmenter(AnswersWithMasks, Bridge):
    """``encoder``, ``connector``, ``decoder``, ``text_hidden`` (Linear, ReLU, Linear, from the state that predicts a
    target's token to a prompt) and ``mask_decoder``."""

    provides: ClassVar[frozenset[str]] = frozenset(
        {"hidden", "targets", "mask_logits", "mask_targets", "mask_shown", "mask_question"}
    )
    reads_image_tokens: ClassVar[bool] = False
    config: SegmenterConfig

    def __init__(
        self,
        config: SegmenterConfig,
        image_config: Any,
        connector_config: Any,
        decoder_config: Any,
        mask_config: MaskDecoderConfig,
        seed: int,
    ) -> None:
        names = mark_names(mask_config.prompts)
        first = decoder_config.vocab_size
        self_marks = {name: first + place for place, name in enumerate((*names, *IMAGE_MARKS))}
        grown = replace(decoder_config, vocab_size=first + len(self_marks))
        super().__init__(config, image_config, connector_config, grown, seed)
        self.mask_names, self.marks, self.mask_config = names, self_marks, mask_config
        with seeded(seed, "mask_decoder"):
            self.mask_decoder: MaskDecoder = mask_config.build(
                text_width=self.decoder.width, image_width=self.encoder.width
            )
        with seeded(seed, "text_hidden"):
            width = self.decoder.width
            self.text_hidden = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.mask_decoder.width)
            )
        if self.mask_decoder.prompts != len(names):
            raise ConfigError(
                f"the mask decoder reads {self.mask_decoder.prompts} prompts a target, its configuration says"
                f" {len(names)}"
            )
        if self.mask_decoder.layers and not callable(getattr(self.encoder, "levels", None)):
            raise ConfigError(
                "this mask decoder reads several blocks of the image encoder, which gives only one: choose an encoder"
                " with levels, as clip-vit-l-14-448, or a mask decoder with an image encoder of its own, as sam-vit-h"
            )

    # -- tensors ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read what ``Bridge.forward`` reads, a row an image, and what ``GroundingProcessor`` adds: the targets.

        Returns:
            ``hidden`` [B, T, width] and ``targets`` [B, T] as a bridge; ``mask_logits`` [M, H, W], float32, of the
            batch's M targets at the sizes of their images, ``mask_targets`` [M, H, W] (1 inside; what is to be ignored
            counts as outside, as in LISA's training), ``mask_shown`` [M, H, W] bool (False beyond a smaller image) and
            ``mask_question`` [M].
        """
        ids, pixels = batch["input_ids"], batch["pixel_values"]
        eye, levels = self._look(pixels)
        embeds, layout = self._sequence(ids, batch.get("attention_mask"), eye)
        hidden = self.decoder(TokenBatch(embeds, layout))  # [B, T, D]
        row, masks = batch["mask_row"], batch["masks"]
        drawn = self._draw(hidden, batch["prompt_places"], row, batch.get("mask_pixels"), levels)
        logits, shown = at_original_size(
            drawn, batch["resized"][row], batch["image_sizes"][row], self.square.size, (masks.shape[1], masks.shape[2])
        )
        return {
            "hidden": hidden,
            "targets": F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE),
            "mask_logits": logits,
            "mask_targets": (masks == 1).to(logits.dtype),
            "mask_shown": shown,
            "mask_question": batch["mask_question"],
        }

    def _look(self, pixel_values: Tensor) -> tuple[Features, list[Features]]:
        """What the language model sees of images, and what the mask decoder reads of the encoder."""
        layers = self.mask_decoder.layers
        if not layers:
            return self.connector(self.encode_images(pixel_values)), []
        encoder: Any = self.encoder
        shown = shown_patches(pixel_values, pixel_values.shape[-1] // int(cast("Any", self.image_config).patch_size))
        frozen = not any(p.requires_grad for p in encoder.parameters())
        with torch.no_grad() if frozen else nullcontext():
            levels: list[Features] = encoder.levels(pixel_values, layers, shown)
        return self.connector(levels[0]), levels

    def image_features(
        self, pixel_values: Tensor | None, text: Features | None = None, image_tokens: Tensor | None = None
    ) -> Tensor:
        if pixel_values is None:
            raise ConfigError("a segmenter reads pixels: give pixel_values")
        return self._look(pixel_values)[0].tokens

    def _sequence(self, ids: Tensor, attention_mask: Tensor | None, eye: Features) -> tuple[Tensor, Layout]:
        """Embeddings [B, T, D] and layout of rows with one image each; image tokens that show padding are hidden."""
        embeds = self._splice(ids, None, eye.tokens)
        if eye.mask is None:
            return embeds, self._layout(ids, attention_mask)
        real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        position = (real.long().cumsum(1) - 1).clamp(min=0)  # hidden tokens count, pads do not
        slots = ids == self.image_token_id  # [B, T]
        if ids.is_meta:  # no values to place: the costs are those of a row without padding
            return embeds, self._layout(ids, attention_mask)
        real = real.masked_scatter(slots, eye.mask)
        layout = lay_out(
            [Segment("sequence", ids.shape[1], predicted=True)], len(ids), real=real, position=position, padding="any"
        )
        return embeds, self.decoder.arrange(replace(layout, modality=slots.long(), spans=None), ids, slots)

    def _draw(
        self, hidden: Tensor, places: Tensor, row: Tensor, mask_pixels: Tensor | None, levels: Sequence[Features]
    ) -> Tensor:
        """Logits [M, h, w] over squares of M targets, whose tokens stand at ``places`` [M, Q] in the rows ``row`` [M]
        of ``hidden`` [B, T, D]: each is prompted by the states before them, which predict them."""
        prompts = self.text_hidden(hidden[row[:, None], places - 1])  # [M, Q, C]
        if len(row):
            return self.mask_decoder.decode(self.mask_decoder.encode(mask_pixels, levels), prompts, row)
        # one image is enough where nothing is drawn, so that what learns stays in the graph, as DDP asks
        seen = self.mask_decoder.encode(None if mask_pixels is None else mask_pixels[:1], levels)
        idle: Tensor = self.text_hidden(hidden[:1, :1]).sum()
        return self.mask_decoder.decode(seen, prompts, row) + 0.0 * idle

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def square(self) -> Square:
        """What the mask decoder's picture becomes: its own square, or that of the encoder whose blocks it reads."""
        about: Any = self.image_config if self.mask_decoder.layers else self.mask_config
        return Square(about.image_size, tuple(about.mean), tuple(about.std))

    @property
    def processor(self) -> GroundingProcessor:
        """Turns samples into ``forward``'s batch; made on first use.

        Raises:
            ConfigError: The tokenizer has more ids than the decoder had rows, or other ids for the targets' tokens.
        """
        if self._processor is None:
            fields = self._processor_fields()
            written = template(self.config.template)
            if self.config.image_marks:
                around = f"{IMAGE_MARKS[0]}{IMAGE}{IMAGE_MARKS[1]}"
                image, inline = (text.replace(IMAGE, around) for text in (written.image, written.inline))
                written = replace(written, image=image, inline=inline)
            self._processor = GroundingProcessor(
                names=self.mask_names,
                square=self.square,
                shares=bool(self.mask_decoder.layers),
                **{**fields, "tokenizer": self._marked(), "layout": written},
            )
        return cast("GroundingProcessor", self._processor)

    def _marked(self) -> MarkedTokenizer:
        base, first = self.tokenizer, min(self.marks.values())
        for name, id in self.marks.items():
            known = base.special_id(name)
            if known not in (None, id) or (known is None and base.vocab_size > first):
                raise ConfigError(
                    f"the decoder's tokenizer has {base.vocab_size} ids and {name} at {known}: expected {first} ids"
                    f" without it, or {name} at {id}; set decoder.vocab_size to its ids without these tokens"
                )
        return MarkedTokenizer(base, self.marks)

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """A bridge's rows, each with one target, at the end of the text, whose image fills the square."""
        batch = super().example_batch(batch_size)
        device, size, prompts = self.device, self.square.size, len(self.mask_names)
        dtype = batch["pixel_values"].dtype
        length = batch["input_ids"].shape[1]
        places = torch.arange(length - prompts, length, device=device).expand(batch_size, -1)
        if self.mask_decoder.layers:
            batch["pixel_values"] = torch.ones_like(batch["pixel_values"])  # zeros would be padding
        else:
            batch["mask_pixels"] = torch.zeros(batch_size, 3, size, size, dtype=dtype, device=device)
        whole = torch.full((batch_size, 2), size, device=device)
        return {
            **batch,
            "resized": whole,
            "image_sizes": whole,
            "masks": torch.ones(batch_size, size, size, dtype=torch.uint8, device=device),
            "mask_row": torch.arange(batch_size, device=device),
            "mask_question": torch.arange(batch_size, device=device),
            "prompt_places": places,
        }
