"""An image written code by code behind a condition: a caption's features, or a class (LlamaGen, arXiv 2406.06525).

The condition is a prefix of the sequence and no text of the decoder's vocabulary, which is the image tokenizer's codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.decoders.base import Decoder, DecoderConfig
from zoo.draws import rand
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, TokenBatch, lay_out
from zoo.models.base import Model, evaluating
from zoo.models.writing import IGNORE
from zoo.part import seeded
from zoo.recipe import WiringConfig
from zoo.sampling.block import CHUNK, Prefix, distinct
from zoo.sampling.codes import CodeDecoding, CodeDraws, CodeStreams, decode_codes
from zoo.sampling.text import streams
from zoo.tokenizers.base import ImageTokenizer, ImageTokenizerConfig

TYPICAL_TEXT = 16
"""Tokens of a caption, as layouts and FLOP counts assume."""

SHAPES = ("attention_mask", "caption_mask")
"""What a batch says of its conditions that holds for no condition too: LlamaGen keeps the caption's pads."""


@dataclass(frozen=True, kw_only=True)
class ConditionedConfig(WiringConfig):
    """What both kinds of condition share.

    Attributes:
        drop: Share of the training samples that see no condition, for classifier-free guidance.
        guidance: Factor s of u + s (c - u), by which a condition's logits c and those of none, u, are mixed; 1 = c.
        guidance_interval: k: guide the first k + 2 codes only; -1 = all (generate.py, cfg_interval, which counts the
            steps after the one that reads the condition).
        temperature: The logits are divided by it; 0 = take the likeliest code.
        top_k: Draw among the k likeliest codes; 0 = all.
        top_p: Then among the fewest likeliest that hold this mass.
        augment: What training images go through (``none``, ``random-resized-crop``, ``shift``, ``flip``,
            ``shift-flip``).
    """

    per_stage: ClassVar[frozenset[str]] = frozenset(
        {"drop", "guidance", "guidance_interval", "temperature", "top_k", "top_p", "augment"}
    )

    drop: float = 0.1
    guidance: float = 2.0
    guidance_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    augment: str = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop = {self.drop} must lie in [0, 1)")
        self.decoding()

    def decoding(self, **changes: Any) -> CodeDecoding:
        """How codes are drawn, with the changes that are not None.

        Raises:
            ConfigError: A value out of range.
        """
        names = ("temperature", "top_k", "top_p", "guidance", "guidance_interval")
        fields = {n: getattr(self, n) if changes.get(n) is None else changes[n] for n in names}
        return CodeDecoding(interval=fields.pop("guidance_interval"), **fields)


class ImageLM(Model):
    """``decoder`` and ``image_tokenizer``, and what makes the condition."""

    provides: ClassVar[frozenset[str]] = frozenset({"hidden", "targets"})
    reads_image_codes: ClassVar[bool] = True
    config: Any
    prefix_tokens: int

    def __init__(
        self,
        config: ConditionedConfig,
        decoder_config: DecoderConfig,
        image_config: ImageTokenizerConfig,
        seed: int,
        prefix: int,
    ) -> None:
        super().__init__()
        self.config, self.image_config, self.seed = config, image_config, seed
        self.prefix_tokens = prefix
        self._processor: Any = None
        with seeded(seed, "image_tokenizer"):
            image_tokenizer: ImageTokenizer = image_config.build()
        if not getattr(image_tokenizer, "discrete", True):
            raise ConfigError("an image LM writes codes, and the image tokenizer has none: choose image_tokenizer=vq")
        self.grid = image_tokenizer.grid
        self.decoder_config = dataclasses.replace(
            decoder_config, vocab_size=image_tokenizer.codes, context_length=prefix + self.cells
        )
        if image_tokenizer.stored and config.augment != "none":
            raise ConfigError(
                f"stored codes are those of unchanged images, and wiring.augment = {config.augment!r} changes them: set"
                " wiring.augment=none"
            )
        self._make_condition(seed)
        with seeded(seed, "decoder"):
            self.decoder: Decoder = self.decoder_config.build()
        self._join(seed)
        self.image_tokenizer = image_tokenizer

    def _make_condition(self, seed: int) -> None:
        """Build what reads the condition, in the order tokens pass through the parts."""

    def _join(self, seed: int) -> None:
        """Build what needs the decoder's width."""

    @property
    def cells(self) -> int:
        """Codes of an image."""
        return self.grid[0] * self.grid[1]

    # -- tensors ---------------------------------------------------------------------------------------------------

    def condition(self, batch: Mapping[str, Tensor], dropped: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prefix [B, P, D] of a batch, that of no condition in the rows ``dropped`` [B] bool, and which of its
        tokens are real, [B, P] bool, pads in front; None where all are."""
        raise TypeError(f"{type(self).__name__} defines no condition")

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read the condition and ``pixel_values`` [B, 3, H, W], or ``image_codes`` [B, h*w] in their place.

        ``valid`` [B] bool leaves rows out of the loss, and ``drop_draw`` [B] in [0, 1) settles which rows see no
        condition (those below ``wiring.drop``); it is drawn in training and none is dropped otherwise.

        Returns:
            ``hidden`` [B, h*w, D] and ``targets`` [B, h*w], the code each row predicts, the first from the last token
            of the condition.

        Raises:
            ConfigError: Codes of another grid, or neither codes nor pixels.
        """
        codes = self.tokenize_images(batch)  # [B, h*w]
        if codes.shape[1:] != (self.cells,):
            raise ConfigError(
                f"image_codes have shape {tuple(codes.shape)}, the model writes {self.cells} codes an image: set"
                " image_tokenizer.image_size and patch_size to fit"
            )
        draw = batch.get("drop_draw")
        if draw is None and self.training and self.config.drop and not codes.is_meta:
            draw = rand((len(codes),), codes.device)
        none = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
        prefix, real = self.condition(batch, none if draw is None else draw < self.config.drop)
        hidden = self.hidden(prefix, codes[:, :-1], real)
        targets = codes if "valid" not in batch else codes.masked_fill(~batch["valid"].bool()[:, None], IGNORE)
        return {"hidden": hidden, "targets": targets}

    def hidden(self, prefix: Tensor, codes: Tensor, real: Tensor | None = None) -> Tensor:
        """States [B, n + 1, D] behind a prefix [B, P, D] and n codes [B, n]: row i predicts code i."""
        x = torch.cat([prefix, self.decoder.embed(codes).to(prefix.dtype)], 1)  # [B, P + n, D]
        layout = self.layout(prefix.shape[1], real, x.device).truncate(x.shape[1])
        states: Tensor = self.decoder(TokenBatch(x, layout))
        return states[:, prefix.shape[1] - 1 :]

    def layout(self, prefix: int, real: Tensor | None = None, device: torch.device | None = None) -> Layout:
        """The sequence of ``prefix`` condition tokens and a whole image: every row reads its past.

        A code's position is its (row, column), the condition has none.

        Args:
            real: [B, prefix] bool, False for pads.
        """
        position = F.pad(self._places(device), (prefix, 0), value=-1)
        if real is not None:
            real = F.pad(real.bool(), (0, self.cells), value=True)
        return lay_out(
            [Segment("condition", prefix), Segment("image", self.cells, "image", predicted=True)],
            real=real,
            position=position[None],  # [1, 2, T]
            device=device,
        )

    def _places(self, device: torch.device | None) -> Tensor:
        """Row and column of every code, [2, h*w]."""
        place = torch.arange(self.cells, device=device)
        return torch.stack([place // self.grid[1], place % self.grid[1]])

    # -- drawing ---------------------------------------------------------------------------------------------------

    def _rows(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The condition of a batch for texts."""
        raise TypeError(f"{type(self).__name__} defines no _rows")

    @property
    def draws_code_by_code(self) -> bool:
        """An image takes as many forward passes as it has codes; no number of steps can be chosen."""
        return True

    def generate_images(
        self,
        texts: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_interval: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        samples: int = 1,
    ) -> Tensor:
        """Write ``samples`` images a text: [N * samples, 3, H, W] float32 in [0, 1], those of one text together.

        The condition is read once for all samples of a text. Other arguments are the wiring's by default.

        Args:
            steps: Must be left out: an image takes one step a code.

        Raises:
            ConfigError: A text that is no condition of this model, a value out of range, or an image tokenizer that
                cannot draw.
        """
        if isinstance(texts, str):
            raise ConfigError("expected a list of texts, got one string: wrap it in a list")
        if steps is not None and steps != self.cells:
            raise ConfigError(f"steps = {steps}: this model writes an image in {self.cells} steps, one a code")
        if samples < 1:
            raise ConfigError(f"samples = {samples}: expected 1 or more images a text")
        if self.image_tokenizer.stored:
            raise ConfigError(
                "image_tokenizer=stored-codes cannot draw images: load the model with the tokenizer that made the codes"
            )
        decoding = self.config.decoding(
            guidance=guidance, guidance_interval=guidance_interval, temperature=temperature, top_k=top_k, top_p=top_p
        )
        rows = self._rows(texts)
        size = self.image_config.image_size
        images = [torch.empty(0, 3, size, size, device=self.device)]
        with evaluating(self):
            for start in range(0, len(texts), max(1, CHUNK // samples)):
                part = slice(start, start + max(1, CHUNK // samples))
                given = {name: value[part].to(self.device) for name, value in rows.items()}
                first, count = start * samples, len(texts[part]) * samples
                draws = CodeStreams(streams(seed, first, count))
                codes = self.generate_codes(given, decoding, draws, samples=samples)
                images.append(self.image_config.shown(self.image_tokenizer.decode(codes)))
            return torch.cat(images)

    @torch.inference_mode()
    def generate_codes(
        self,
        rows: Mapping[str, Tensor],
        decoding: CodeDecoding,
        draws: CodeDraws | None = None,
        *,
        samples: int = 1,
        tell: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Codes [B * samples, h*w] int64 behind the conditions of ``rows`` (``condition``); eval mode is the caller's.

        Equal conditions, and no condition, are read once; the branches of the guidance are rows of one batch, of which
        those of no condition leave when the guidance ends.

        Args:
            draws: Random numbers; not needed at temperature 0.
            tell: As of ``zoo.sampling.codes.decode_codes``.
        """
        count, branches = len(next(iter(rows.values()))), len(decoding.weights)
        dropped = torch.arange(branches * count, device=self.device) >= count
        both = {name: torch.cat([value] * branches) for name, value in rows.items()}
        return decode_codes(
            self._read(both, dropped, samples),
            self.cells,
            self.decoder.embed,
            self.decoder.logits,
            decoding,
            draws,
            "image",
            position=self._places(self.device)[None],
            tell=tell,
        )

    def _read(self, rows: Mapping[str, Tensor], dropped: Tensor, samples: int) -> Prefix:
        """The conditions' keys and values, ``samples`` rows each; every distinct one is computed once."""
        fill = {name: v if name in SHAPES else v.masked_fill(_over(dropped, v), 0) for name, v in rows.items()}
        index, group = distinct(dropped[:, None], *(_bits(v).reshape(len(v), -1) for v in fill.values()))
        embeds, real = self.condition({name: value[index] for name, value in rows.items()}, dropped[index])
        layout = self.layout(embeds.shape[1], real, embeds.device).truncate(embeds.shape[1])
        return Prefix(self.decoder, embeds, layout, group.repeat_interleave(samples))

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    def reconfigure(self, config: Any) -> None:
        self.config = config
        self._processor = None

    def _transform(self) -> Any:
        from zoo.data.images import ImageTransform

        image = self.image_config
        return ImageTransform(
            size=image.image_size,
            mean=tuple(image.mean),
            std=tuple(image.std),
            mode=image.resize,  # type: ignore[arg-type]
            augment=self.config.augment,
        )

    @property
    def typical_targets(self) -> int:
        """Targets of an image."""
        return self.cells

    def _example_images(self, batch_size: int) -> dict[str, Tensor]:
        size, like = self.image_config.image_size, next(self.decoder.parameters())
        batch = {"pixel_values": torch.zeros(batch_size, 3, size, size, dtype=like.dtype, device=like.device)}
        if self.image_tokenizer.stored:
            batch["image_codes"] = torch.zeros(batch_size, self.cells, dtype=torch.long, device=like.device)
        return batch


def _over(rows: Tensor, value: Tensor) -> Tensor:
    return rows.view(-1, *(1,) * (value.ndim - 1))


def _bits(value: Tensor) -> Tensor:
    """Integers that differ where the values do."""
    return value.float().view(torch.int32) if value.is_floating_point() else value
