"""A multiway trunk with one head over a list of labels: BEiT-3 fine-tuned to answer from fixed answers, to judge two
images, or to classify (arXiv 2208.10442, section 3.1 and 3.2; unilm, beit3/modeling_finetune.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.data.labels import LabelProcessor
from zoo.errors import ConfigError
from zoo.layout import Layout
from zoo.models.base import Model
from zoo.models.experts import TYPICAL_TEXT
from zoo.models.pairs import EmbedsPairs
from zoo.nn.norm import Linear
from zoo.part import PartConfig, seeded
from zoo.recipe import WiringConfig
from zoo.trunks.multiway import Multiway, MultiwayConfig

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike

READS = ("pair", "images", "image")


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(WiringConfig):
    """One head over labels.

    Attributes:
        reads: ``pair``, an image and a question (VQA); ``images``, a statement about two images (NLVR2); ``image``.
        labels: The labels' names; empty where only their number is known.
        classes: How many labels there are, where ``labels`` is empty.
        label_key: Key of the sample's label in its ``meta``; without one a sample's label is the answer of its turn, or
            its text. What is no label counts as none.
        question: What is asked where a sample or a call brings no question.
        augment: What training images go through (``none``, ``random-resized-crop``, ``shift``, ``flip``,
            ``shift-flip``).
    """

    slots: ClassVar[tuple[str, ...]] = ("trunk",)

    reads: str = "pair"
    labels: list[str] = field(default_factory=list)
    classes: int = 1000
    label_key: str = ""
    question: str = "what is this?"
    augment: str = "none"

    def __post_init__(self) -> None:
        if self.reads not in READS:
            raise ValueError(f"reads = {self.reads!r} must be one of {', '.join(READS)}")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must differ from each other")
        if self.classes < 2 or len(self.labels) == 1:
            raise ValueError("there must be at least two labels")

    @property
    def outputs(self) -> int:
        """Number of labels."""
        return len(self.labels) or self.classes

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Labelled:
        """Build the model; trunk and head are drawn from their own streams of ``seed``."""
        return Labelled(self, cast("MultiwayConfig", parts["trunk"][1]), seed)


class PairHead(nn.Module):
    """The first row of a pair, normed, through a matrix and tanh; then two matrices, norm and GELU between."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.dense = nn.LayerNorm(width), Linear(width, width)
        self.out = nn.Sequential(
            Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), Linear(2 * width, outputs)
        )

    def forward(self, first: Tensor) -> Tensor:
        """Logits [B, C] of rows [B, D]."""
        logits: Tensor = self.out(torch.tanh(self.dense(self.norm(first))))
        return logits


class ImagesHead(nn.Module):
    """The image's and the text's first rows of two pairs, side by side, through norm, matrix, norm, GELU, matrix."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.dense1 = nn.LayerNorm(4 * width), Linear(4 * width, 2 * width)
        self.norm2, self.dense2 = nn.LayerNorm(2 * width), _small(2 * width, outputs)

    def forward(self, firsts: Tensor) -> Tensor:
        """Logits [B, C] of rows [B, 4 * D]."""
        logits: Tensor = self.dense2(F.gelu(self.norm2(self.dense1(self.norm1(firsts)))))
        return logits


class ImageHead(nn.Module):
    """The mean of the patches' rows, normed, through one matrix."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), _small(width, outputs)

    def forward(self, patches: Tensor) -> Tensor:
        """Logits [B, C] of rows [B, N, D]."""
        logits: Tensor = self.out(self.norm(patches.mean(1)))
        return logits


HEADS: dict[str, type[nn.Module]] = {"pair": PairHead, "images": ImagesHead, "image": ImageHead}


def _small(width: int, outputs: int) -> Linear:
    """The released heads of NLVR2 and ImageNet start at a thousandth."""
    return Linear(width, outputs, std=0.02 * 1e-3)


class Labelled(EmbedsPairs, Model):
    """``trunk`` and ``head``."""

    provides: ClassVar[frozenset[str]] = frozenset({"label_logits", "label_targets"})
    embed_images = embed_texts = None  # type: ignore[assignment]  # its rows lie in no shared space

    def __init__(self, config: LabelledConfig, trunk_config: MultiwayConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.image_config = self.text_config = self.trunk_config = trunk_config
        self.text_slot, self.augment, self.seed = "trunk", config.augment, seed
        with seeded(seed, "trunk"):
            self.trunk: Multiway = trunk_config.build()
        self.shared_width = self.trunk.width
        with seeded(seed, "head"):
            self.head = HEADS[config.reads](self.trunk.width, config.outputs)

    # -- tensors ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read what the processor made.

        Returns:
            ``label_logits`` [B, C] and ``label_targets`` [B, C] float, the share of each label (all 0 = none).
        """
        logits = self.label_logits(batch["pixel_values"], batch.get("input_ids"), batch.get("attention_mask"))
        return {"label_logits": logits, "label_targets": batch["label_targets"]}

    def label_logits(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits [B, C].

        Args:
            pixel_values: [B, 3, S, S]; for two images [B, 2, 3, S, S].
            input_ids: [B, T] the question or statement; not for images alone.
            attention_mask: [B, T], 1 = real.
        """
        if self.config.reads == "image":
            rows = self.trunk(image=self.trunk.embed_image(pixel_values), final_norm=False)
            patches: Tensor = self.head(cast(Tensor, rows.image)[:, 1:])
            return patches
        if input_ids is None:
            raise ConfigError(f"wiring.reads = {self.config.reads!r} needs a text: give input_ids")
        if self.config.reads == "pair":
            image, _ = self._read(pixel_values, input_ids, attention_mask, final_norm=False)
            logits: Tensor = self.head(image[:, 0])
            return logits
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ConfigError(f"pixel values have shape {tuple(pixel_values.shape)}, expected [batch, 2, 3, S, S]")
        twice = [t.repeat_interleave(2, 0) if t is not None else None for t in (input_ids, attention_mask)]
        image, text = self._read(pixel_values.flatten(0, 1), cast(Tensor, twice[0]), twice[1])
        firsts = torch.cat([image[:, 0], text[:, 0]], -1).view(len(pixel_values), -1)  # [B, 4 * D]
        both: Tensor = self.head(firsts)
        return both

    def _read(self, pixels: Tensor, ids: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        rows = self.trunk(self.trunk.embed_image(pixels), self.trunk.embed_text(ids), mask, **options)
        return cast(Tensor, rows.image), cast(Tensor, rows.text)

    # -- capabilities ----------------------------------------------------------------------------------------------

    def classify(self, images: Sequence[Any], texts: Sequence[str] | None = None) -> Tensor:
        """Logits [N, C] float32 of every label.

        Args:
            images: One an item; where the head reads two, a pair of them an item (one image is then shown twice).
            texts: The question or statement of each item; the wiring's own question by default.
        """
        if texts is not None and len(texts) != len(images):
            raise ConfigError(f"{len(images)} images and {len(texts)} texts: expected one each")
        texts = [self.config.question] * len(images) if texts is None else texts

        def judged(chunk: Sequence[tuple[Any, str]]) -> Tensor:
            pixels = self._shown([image for image, _ in chunk])
            if self.config.reads == "image":
                return self.label_logits(pixels).float()
            return self.label_logits(pixels, *self._ids([text for _, text in chunk])).float()

        empty = torch.empty(0, self.config.outputs, device=self.device)
        return self._chunked(list(zip(images, texts, strict=True)), judged, empty)

    def _shown(self, images: Sequence[ImageLike | Sequence[ImageLike]]) -> Tensor:
        if self.config.reads != "images":
            return self._pixels(cast("Sequence[ImageLike]", images))
        pairs = [list(item) if isinstance(item, list | tuple) else [item, item] for item in images]
        flat = self._pixels([cast("ImageLike", image) for pair in pairs for image in pair])
        return flat.view(len(images), 2, *flat.shape[1:])

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def processor(self) -> LabelProcessor:
        """Turns samples into ``pixel_values``, ``input_ids``, ``attention_mask`` and ``label_targets``.

        Raises:
            ConfigError: No labels' names, or two images, which samples do not have.
        """
        if not isinstance(self._processor, LabelProcessor):
            plain, c = super().processor, self.config
            self._processor = LabelProcessor(
                plain.transform,
                plain.tokenizer,
                self.trunk_config.context_length,
                labels=c.labels,
                label_key=c.label_key,
                question=c.question,
                reads=c.reads,
                seed=self.seed,
            )
        return self._processor

    def layouts(self) -> dict[str, Layout]:
        """The sequence the head reads, with a text of typical length."""
        text = 0 if self.config.reads == "image" else min(TYPICAL_TEXT, self.trunk_config.context_length)
        name = "image" if self.config.reads == "image" else "pair"
        return {name: self.trunk.layout(image=self.trunk.tokens, text=text)}

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """Blank images, texts of typical length, and label 0."""
        size, length = self.trunk_config.image_size, min(TYPICAL_TEXT, self.trunk_config.context_length)
        like = next(self.parameters())
        shape = (batch_size, 2, 3, size, size) if self.config.reads == "images" else (batch_size, 3, size, size)
        ids = torch.full((batch_size, length), 5, dtype=torch.long, device=like.device)
        targets = torch.zeros(batch_size, self.config.outputs, device=like.device)
        targets[:, 0] = 1.0
        batch = {"pixel_values": torch.zeros(shape, dtype=like.dtype, device=like.device), "label_targets": targets}
        if self.config.reads != "image":
            batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}
        return batch
