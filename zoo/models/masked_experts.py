"""BEiT-3's pre-training and what follows from it (arXiv 2208.10442): one trunk for images, texts and pairs, beside an
image tokenizer whose codes are the images' words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.models.autoencoder import reconstruct
from zoo.models.experts import Experts, ExpertsConfig, MatchingExperts
from zoo.models.lazy import LazyOutputs
from zoo.models.mask_writing import WritesByMask
from zoo.part import PartConfig, seeded
from zoo.tokenizers.base import ImageTokenizer, ImageTokenizerConfig
from zoo.trunks.multiway import MultiwayConfig

if TYPE_CHECKING:
    from zoo.data.fused import FusionProcessor


@dataclass(frozen=True, kw_only=True)
class MaskedExpertsConfig(ExpertsConfig):
    """As ``ExpertsConfig``, with BEiT-3's heads by default; ``codes`` is the tokenizer's number.

    Attributes:
        writes: Offer captions by [MASK], which need learned positions (BEiT-3); without, there may be a matching head.
    """

    slots: ClassVar[tuple[str, ...]] = ("trunk", "image_tokenizer")

    writes: bool = True

    pair_contrast: bool = False
    match: bool = False
    words: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codes:
            raise ValueError(f"codes = {self.codes}: the head over codes has the image tokenizer's number, leave it 0")
        if self.writes and self.match:
            raise ValueError("match = true needs writes = false: what writes captions by [MASK] has no matching head")

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> CodedExperts:
        """Build the model; trunk, heads and tokenizer are drawn from their own streams of ``seed``.

        Raises:
            ConfigError: A trunk and a tokenizer that do not see the same patches, or augmentation of stored codes.
        """
        trunk = cast("MultiwayConfig", parts["trunk"][1])
        kind = MaskedExperts if self.writes else MatchingCodedExperts if self.match else CodedExperts
        return kind(self, trunk, cast("ImageTokenizerConfig", parts["image_tokenizer"][1]), seed)


class CodedExperts(Experts):
    """``trunk``, heads and ``image_tokenizer``.

    Beside the outputs of ``Experts`` there are ``image_codes`` [B, h*w], the tokenizer's (no gradient reaches it), and,
    where the tokenizer can be trained, what ``vq-reconstruction`` reads. Each is computed when an objective reads it.
    """

    def __init__(
        self,
        config: MaskedExpertsConfig,
        trunk_config: MultiwayConfig,
        tokenizer_config: ImageTokenizerConfig,
        seed: int,
    ) -> None:
        _check_same_patches(trunk_config, tokenizer_config)
        names = {f.name for f in dataclasses.fields(ExpertsConfig)}
        own = {name: getattr(config, name) for name in names} | {"codes": tokenizer_config.vocab_size}
        super().__init__(ExpertsConfig(**own), trunk_config, seed)
        with seeded(seed, "image_tokenizer"):
            self.image_tokenizer: ImageTokenizer = tokenizer_config.build()
        if self.image_tokenizer.stored and config.augment != "none":
            raise ConfigError(
                f"stored codes are those of unchanged images, and wiring.augment = {config.augment!r} changes them: set"
                " wiring.augment=none"
            )

    @property
    def provides(self) -> frozenset[str]:  # type: ignore[override]
        """Names of ``forward``'s outputs."""
        drawn = () if self.image_tokenizer.stored else ("reconstruction", "commitment", "codes")
        return super().provides | {"image_codes", *drawn}

    def forward(self, batch: Mapping[str, Tensor]) -> LazyOutputs:  # type: ignore[override]
        """As ``Experts.forward``; stored codes come with the batch as ``image_codes`` [B, h*w]."""
        outputs, pixels = super().forward(batch), batch["pixel_values"]
        drawn: dict[str, Tensor] = {}

        def part(name: str) -> Callable[[LazyOutputs], Tensor]:
            def made(_: LazyOutputs) -> Tensor:
                if not drawn:
                    drawn.update(reconstruct(self.image_tokenizer, pixels))
                return drawn[name]

            return made

        def codes(_: LazyOutputs) -> Tensor:
            if self.image_tokenizer.stored:
                return self._stored(batch)
            return self.image_tokenizer.encode(pixels)

        makers: dict[str, Callable[[LazyOutputs], Tensor]] = {"image_codes": codes}
        if not self.image_tokenizer.stored:
            makers |= {name: part(name) for name in ("reconstruction", "commitment", "codes")}
        return outputs.and_also(makers)

    def _stored(self, batch: Mapping[str, Tensor]) -> Tensor:
        if "image_codes" not in batch:
            raise ConfigError("stored codes come with the batch: make it with the model's processor")
        return batch["image_codes"]

    @property
    def processor(self) -> FusionProcessor:
        """As that of ``Experts``, with ``image_codes`` [B, h*w] where the tokenizer stores them."""
        if not self.image_tokenizer.stored:
            return super().processor
        from zoo.tokenizers.processor import StoredCodesProcessor

        if not isinstance(self._processor, StoredCodesProcessor):
            plain = super().processor
            self._processor = StoredCodesProcessor(
                plain.transform,
                plain.tokenizer,
                self.trunk_config.context_length,
                cast(Any, self.image_tokenizer),
                seed=self.seed,
            )
        return self._processor

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """As that of ``Experts``, with stored codes where there are such."""
        batch = super().example_batch(batch_size)
        if self.image_tokenizer.stored:
            cells = self.trunk.grid[0] * self.trunk.grid[1]
            batch["image_codes"] = torch.zeros(batch_size, cells, dtype=torch.long, device=self.device)
        return batch


class MaskedExperts(WritesByMask, CodedExperts):
    """``CodedExperts`` that writes captions by [MASK] (BEiT-3)."""


class MatchingCodedExperts(CodedExperts, MatchingExperts):
    """``CodedExperts`` with a matching head (VLMo from its first stage on)."""


def _check_same_patches(trunk: MultiwayConfig, tokenizer: ImageTokenizerConfig) -> None:
    side = trunk.image_size // trunk.patch_size
    if tokenizer.grid != (side, side):
        raise ConfigError(
            f"the image tokenizer makes {tokenizer.grid[0]} x {tokenizer.grid[1]} codes, the trunk sees {side} x {side}"
            f" patches: set image_tokenizer.image_size={trunk.image_size} and patch_size={trunk.patch_size}"
        )
    for name in ("image_size", "mean", "std"):
        one, other = getattr(tokenizer, name), getattr(trunk, name)
        if one != other:
            raise ConfigError(
                f"image_tokenizer.{name} = {one} and trunk.{name} = {other}: both read one and the same pixel values,"
                " set one to fit the other"
            )
