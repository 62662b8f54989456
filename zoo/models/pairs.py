"""What models of image-text pairs share around their tensors: tokenizer, processor, and work in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.models.base import evaluating
from zoo.models.tokenizing import OwnsTokenizer

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike
    from zoo.data.processor import PairProcessor

CHUNK = 64
"""Images, texts or pairs a forward pass of a capability."""

Item = TypeVar("Item")


class ImageInput(Protocol):
    """The fields of a part's configuration that say how it is shown an image."""

    @property
    def image_size(self) -> int: ...
    @property
    def mean(self) -> list[float]: ...
    @property
    def std(self) -> list[float]: ...
    @property
    def resize(self) -> str: ...


class TextInput(Protocol):
    """The fields of a part's configuration that say how it is given a text."""

    @property
    def tokenizer(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...


class EmbedsPairs(OwnsTokenizer):
    """``embed_images``, ``embed_texts``, the tokenizer and the processor of a model with ``image_features`` and
    ``text_features``.

    Attributes:
        image_config, text_config: The configurations of the parts that read images and texts (may be one).
        text_slot: Where the user sets the text's fields, for messages.
        augment: What training images go through.
        shared_width: Width of the shared space.
        seed: Of the augmentation.
    """

    image_config: ImageInput
    text_config: TextInput
    text_slot: str
    augment: str
    shared_width: int
    seed: int
    _processor: PairProcessor | None = None

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Projected image features [B, shared_width], not normalised."""
        raise TypeError(f"{type(self).__name__} defines no image_features")

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projected text features [B, shared_width], not normalised; ``attention_mask`` [B, T], 1 = real."""
        raise TypeError(f"{type(self).__name__} defines no text_features")

    # -- capabilities ----------------------------------------------------------------------------------------------

    def embed_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Embed images: [N, shared_width] float32 of unit length, on the model's device."""
        return self._embed(images, lambda chunk: self.image_features(self._pixels(chunk)))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: [N, shared_width] float32 of unit length, on the model's device."""
        return self._embed(texts, lambda chunk: self.text_features(*self._ids(chunk)))

    def _pixels(self, images: Sequence[ImageLike]) -> Tensor:
        where = next(self.parameters())
        return self.processor.encode_images(images).to(where.device, where.dtype)

    def _ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [N, T], cut to the longest of ``texts``: what is behind it is pads for all of them."""
        rows = self.processor.encode_texts(texts)
        longest = int(rows["attention_mask"].sum(1).max())
        device = next(self.parameters()).device
        return rows["input_ids"][:, :longest].to(device), rows["attention_mask"][:, :longest].to(device)

    def _embed(self, items: Sequence[Item], features: Callable[[Sequence[Item]], Tensor]) -> Tensor:
        return self._chunked(
            items,
            lambda chunk: F.normalize(features(chunk).float(), dim=-1),
            torch.empty(0, self.shared_width, device=next(self.parameters()).device),
        )

    def _chunked(self, items: Sequence[Item], run: Callable[[Sequence[Item]], Tensor], empty: Tensor) -> Tensor:
        """Run over the items in chunks, in eval mode; the training mode of every module is restored."""
        if isinstance(items, str):
            raise ConfigError("expected a list of items, got one string: wrap it in a list")
        items = list(items)
        with evaluating(self):
            rows = [run(items[i : i + CHUNK]) for i in range(0, len(items), CHUNK)]
            return torch.cat(rows) if rows else empty

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Rows of the token table, out of which a masked word may be replaced."""
        return self.text_config.vocab_size

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of ``cls``, ``pad`` and ``mask``; a tokenizer without [MASK] lends its image token, which no text has.

        Raises:
            ConfigError: A tokenizer with neither.
        """
        tokenizer = self.tokenizer
        mask = tokenizer.mask_id if tokenizer.mask_id is not None else tokenizer.image_token_id
        if mask is None:
            raise ConfigError(
                f"tokenizer {self.text_config.tokenizer!r} has no [MASK] and no image token: choose one that has"
            )
        return {"cls": tokenizer.bos_id, "pad": tokenizer.pad_id, "eos": tokenizer.eos_id, "mask": int(mask)}

    @property
    def processor(self) -> PairProcessor:
        """Turns samples into ``pixel_values``, ``input_ids`` and ``attention_mask``; made on first use.

        Raises:
            ConfigError: The tokenizer has more ids than the part that reads text has rows.
        """
        if self._processor is None:
            from zoo.data.images import ImageTransform
            from zoo.data.processor import PairProcessor

            tokenizer, image = self.tokenizer, self.image_config
            if tokenizer.vocab_size > self.text_config.vocab_size:
                raise ConfigError(
                    f"tokenizer {self.text_config.tokenizer!r} has {tokenizer.vocab_size} ids, more than "
                    f"{self.text_slot}.vocab_size = {self.text_config.vocab_size}: set one to fit the other"
                )
            transform = ImageTransform(
                size=image.image_size,
                mean=tuple(image.mean),
                std=tuple(image.std),
                mode=cast("Any", image.resize),
                augment=cast("Any", self.augment),
            )
            self._processor = PairProcessor(transform, tokenizer, self.text_config.context_length, seed=self.seed)
        return self._processor
