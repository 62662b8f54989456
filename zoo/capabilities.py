"""What a model can do, as Protocols. Evaluation, the CLI and the notebook dispatch on these and on nothing else.

All of them take sequences of PIL images (or paths) and strings, run in eval mode under ``torch.inference_mode`` in
batches, and restore the training mode. A row of the result depends on its own inputs only, never on what shares its
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor

    ImageLike: TypeAlias = Image | Path | str


@runtime_checkable
class EmbedImages(Protocol):
    """Embeds images in the space shared with texts."""

    def embed_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Return [N, D] float, rows of unit length; or [N, Q, D], several for each image, of which the nearest to a
        text counts (BLIP-2; ``zoo.evaluation.metrics.similarity``)."""
        ...


@runtime_checkable
class EmbedTexts(Protocol):
    """Embeds texts in the space shared with images."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return [N, D] float, rows of unit length."""
        ...


@runtime_checkable
class EmbedModalities(Protocol):
    """Embeds items of several modalities in one space."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of what it embeds, ``image`` and ``text`` among them where it does."""
        ...

    def embed(self, modality: str, items: Sequence[Any]) -> Tensor:
        """Return [N, D] float, rows of unit length.

        Args:
            items: What samples carry under this name.

        Raises:
            ConfigError: A modality that it does not embed.
            DataError: An item that is no such thing, in one line.
        """
        ...


@runtime_checkable
class ScoreText(Protocol):
    """Gives the likelihood of a text for an image."""

    def score_text(
        self,
        images: Sequence[ImageLike],
        texts: Sequence[str],
        prompts: Sequence[str] | None = None,
    ) -> Tensor:
        """Return [N], log p(text | image, prompt) in nats, summed over the text's tokens and its end."""
        ...


@runtime_checkable
class ScoreTexts(Protocol):
    """Scores many candidate texts for each image, encoding the image once: a faster door for ranking."""

    def score_candidates(
        self,
        images: Sequence[ImageLike],
        candidates: Sequence[Sequence[str]],
        prompts: Sequence[str] | None = None,
    ) -> Tensor:
        """Return [N, C] log p(candidate | image, prompt) in nats, equal to ``score_text`` of every pair."""
        ...


@runtime_checkable
class ScorePlainText(Protocol):
    """Gives the likelihood of a text by itself, without an image."""

    def score_plain_text(self, texts: Sequence[str]) -> Tensor:
        """Return [N], log p(text) in nats, summed over the text's tokens and its end; nothing stands before it.

        Raises:
            DataError: a text is longer than the model reads; nothing was computed by then.
        """
        ...


@runtime_checkable
class GenerateText(Protocol):
    """Writes text about an image."""

    def generate_text(
        self,
        images: Sequence[ImageLike],
        prompts: Sequence[str] | None = None,
        max_new_tokens: int = 32,
    ) -> list[str]:
        """Return one text an image, greedy by default."""
        ...


@runtime_checkable
class Match(Protocol):
    """Judges whether an image and a text belong together (BLIP-2's and ALBEF's matching head)."""

    def match(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """Return [N], the logit of "they match"."""
        ...


@runtime_checkable
class Classify(Protocol):
    """Judges which of a fixed list of labels (answers, classes) an image has, or an image and a question."""

    def classify(self, images: Sequence[Any], texts: Sequence[str] | None = None) -> Tensor:
        """Return [N, C], a logit for every label."""
        ...


@runtime_checkable
class ClassifySamples(Protocol):
    """Judges which of a fixed list of labels an item of any modality has."""

    labels: tuple[str, ...]

    def classify_samples(self, samples: Sequence[Any]) -> Tensor:
        """Return [N, C], a logit for every one of ``labels``.

        Args:
            samples: ``zoo.data.sample.Sample``s that hold the model's modality.

        Raises:
            DataError: A sample lacks it, or holds what cannot be read; nothing was computed by then.
        """
        ...

    def example_samples(self, count: int) -> Sequence[Any]:
        """Return ``count`` samples that the model can be asked about."""
        ...


@runtime_checkable
class PredictSamples(Protocol):
    """Predicts numbers of items of any modality, or labels of the elements that an item has."""

    def predict_samples(self, samples: Sequence[Any]) -> Tensor:
        """Return [N, C], the values of every item, or [N, T, C], a logit for every label of every element that the
        model looks at.

        Raises:
            DataError: A sample lacks the modality, or holds what cannot be read; nothing was computed by then.
        """
        ...

    def example_samples(self, count: int) -> Sequence[Any]:
        """Return ``count`` samples that the model can be asked about."""
        ...


@runtime_checkable
class EncodeImages(Protocol):
    """Turns images into discrete codes."""

    codebook_size: int

    def image_codes(self, images: Sequence[ImageLike]) -> Tensor:
        """Return [N, h*w] int64, the code of every patch in row order, each below ``codebook_size``."""
        ...


@runtime_checkable
class ReconstructImages(Protocol):
    """Draws images from their own codes."""

    def reconstruct_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Return [N, 3, H, W] float32 in [0, 1]."""
        ...

    def prepared_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Return [N, 3, H, W] float32 in [0, 1]: the images as the model is shown them, to compare with."""
        ...


@runtime_checkable
class GenerateImages(Protocol):
    """Draws images from texts."""

    def generate_images(
        self, texts: Sequence[str], *, seed: int = 0, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        """Return [N, 3, H, W] float32 in [0, 1], one image a text; H and W are the model's own.

        Row n draws from ``zoo.sampling.text.streams(seed, n, 1)`` alone: the same call gives the same images, row n
        does not depend on the other rows, and no global random state is read or moved.

        Args:
            steps: forward passes over an image (of masked decoding, denoising, an ODE); None takes the model's own. A
                model that decodes token by token has no such number, refuses one, and says so in an attribute
                ``draws_code_by_code = True``.
            guidance: classifier-free guidance weight, on the scale of the model's own paper; None takes the model's.

        Raises:
            ConfigError: a text that does not fit, or a value out of range; nothing was computed by then.
        """
        ...


@runtime_checkable
class InpaintImages(Protocol):
    """Draws a part of images anew."""

    def prepared_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Return [N, 3, H, W] float32 in [0, 1]: the images as the model is shown them, of the size it draws."""
        ...

    def inpaint_images(
        self,
        images: Sequence[ImageLike],
        masks: Tensor,
        texts: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Return [N, 3, H, W] float32 in [0, 1]; seeds, steps and guidance as in ``generate_images``.

        Args:
            images: prepared as the model is shown them (resized, cropped) to H x W.
            masks: [N, H, W] bool, True = draw anew; of the size of the images that the model draws. What a patch shows
                in one such pixel is drawn anew as a whole.

        Raises:
            ConfigError: masks of another size, number or dtype.
        """
        ...


@runtime_checkable
class EditImages(Protocol):
    """Changes images as an instruction says."""

    def edit_images(
        self,
        images: Sequence[ImageLike],
        instructions: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Return [N, 3, H, W] float32 in [0, 1]; seeds, steps and guidance as in ``generate_images``."""
        ...


@runtime_checkable
class GenerateInterleaved(Protocol):
    """Continues a sequence of texts and images with texts and images."""

    def generate_interleaved(
        self,
        prompts: Sequence[Sequence[ImageLike]],
        *,
        max_images: int = 4,
        max_new_tokens: int = 64,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> list[list[str | Tensor]]:
        """Return, for each prompt, what follows it: texts, and images [3, H, W] float32 in [0, 1], in their order.

        Args:
            prompts: each a sequence of texts (``str``) and images (PIL, or ``Path``: a ``str`` is always a text).
            max_images: images drawn for a prompt, at most.
            max_new_tokens: of text for a prompt, at most, over all its texts.
        """
        ...


@runtime_checkable
class SegmentImages(Protocol):
    """Finds the pixels that show what a text names."""

    def segment_images(self, images: Sequence[ImageLike], texts: Sequence[str]) -> list[Tensor]:
        """Return one mask an image, [H, W] bool of the image's own size: True where it shows what its text names, all
        of it, and nowhere if it shows none."""
        ...


@dataclass(frozen=True)
class MaskedText:
    """An answer that names targets, with the mask of each.

    Attributes:
        text: The answer; ``[1]``, ``[2]``, ... stand where it names a target.
        masks: [K, H, W] bool of the image's own size, in that order; K may be 0.
        phrases: The words before each of them.
        scores: How sure the model is of each, from 0 to 1: the mean probability inside the mask.
    """

    text: str
    masks: Tensor
    phrases: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()


@runtime_checkable
class SegmentInText(Protocol):
    """Answers questions about images in texts whose targets have masks, any number of them."""

    def segment(
        self, images: Sequence[ImageLike], prompts: Sequence[str], max_new_tokens: int = 64
    ) -> list[MaskedText]:
        """Return one answer an image; one image and one prompt (a str) give that answer itself."""
        ...


CAPABILITIES: dict[str, type] = {
    "embed_images": EmbedImages,
    "embed_texts": EmbedTexts,
    "embed": EmbedModalities,
    "score_text": ScoreText,
    "score_candidates": ScoreTexts,
    "score_plain_text": ScorePlainText,
    "generate_text": GenerateText,
    "match": Match,
    "classify": Classify,
    "classify_samples": ClassifySamples,
    "predict_samples": PredictSamples,
    "image_codes": EncodeImages,
    "reconstruct_images": ReconstructImages,
    "generate_images": GenerateImages,
    "inpaint_images": InpaintImages,
    "edit_images": EditImages,
    "generate_interleaved": GenerateInterleaved,
    "segment_images": SegmentImages,
    "segment": SegmentInText,
}
"""Capability name (its method's name) -> Protocol."""


def capabilities_of(model: Any) -> tuple[str, ...]:
    """Return the names of the capabilities ``model`` offers, in the order of `CAPABILITIES`."""
    return tuple(name for name, protocol in CAPABILITIES.items() if isinstance(model, protocol))


def capability_name(protocol: type) -> str:
    """Return the name (the method) of a capability's Protocol."""
    return next(name for name, known in CAPABILITIES.items() if known is protocol)
