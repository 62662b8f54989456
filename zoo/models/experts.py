"""One trunk for images, texts and pairs: the wiring of VLMo (arXiv 2111.02358) and BEiT-3 (arXiv 2208.10442).

The same weights are a dual encoder (an image alone, a text alone, one dot product) and a fusion encoder (both in one
sequence).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layout import Layout
from zoo.models.base import Model
from zoo.models.lazy import LazyOutputs
from zoo.models.pairs import EmbedsPairs
from zoo.nn import start_std
from zoo.nn.norm import Linear
from zoo.part import Features, PartConfig, seeded
from zoo.recipe import WiringConfig
from zoo.trunks.multiway import Kind, Multiway, MultiwayConfig

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike
    from zoo.data.fused import FusionProcessor

TYPICAL_TEXT = 16
"""Tokens of a caption with its start and end, as layouts and FLOP counts assume."""

WORDS = ("none", "bert", "linear")


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(WiringConfig):
    """Heads on a multiway trunk; defaults: VLMo's.

    Attributes:
        pair_contrast: Compare images and texts a second time, behind the pair experts (VLMo's second term).
        match: A matching head on the pooled pair.
        words: Head over the vocabulary: ``none``, ``bert`` (dense, GELU, norm, matrix, not tied; VLMo) or ``linear``
            (BEiT-3).
        codes: Rows of the head over an image tokenizer's codes; 0 = no head. Needs ``trunk.mask_token``.
        temperature: Initial softmax temperature; the logit scales start at ln(1 / temperature).
        augment: What training images go through (``none``, ``random-resized-crop``, ``shift``, ``flip``,
            ``shift-flip``).
    """

    slots: ClassVar[tuple[str, ...]] = ("trunk",)

    pair_contrast: bool = True
    match: bool = True
    words: str = "bert"
    codes: int = 0
    temperature: float = 0.07
    augment: str = "none"

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.codes < 0:
            raise ValueError("temperature must be above 0 and codes not negative")
        if self.words not in WORDS:
            raise ValueError(f"words = {self.words!r} must be one of {', '.join(WORDS)}")

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Experts:
        """Build the model; trunk and heads are drawn from their own streams of ``seed``.

        Raises:
            ConfigError: A head that the trunk cannot serve.
        """
        return (MatchingExperts if self.match else Experts)(self, cast("MultiwayConfig", parts["trunk"][1]), seed)


class WordHead(nn.Module):
    """dense, GELU, norm and a matrix of its own (BERT's head, not tied), or the matrix alone."""

    def __init__(self, width: int, vocab: int, deep: bool) -> None:
        super().__init__()
        std = start_std(width)
        self.dense = Linear(width, width, std=std) if deep else None
        self.norm = nn.LayerNorm(width, eps=1e-12) if deep else None
        self.decoder = Linear(width, vocab, std=std)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of ``hidden`` [..., D]."""
        if self.dense is not None and self.norm is not None:
            hidden = self.norm(F.gelu(self.dense(hidden)))
        logits: Tensor = self.decoder(hidden)
        return logits


class Experts(EmbedsPairs, Model):
    """A multiway ``trunk`` and heads.

    ``forward`` gives the two sides of the contrast (``image_embeds``, ``text_embeds``, ``logit_scale``), those behind
    the pair experts (``pair_image_embeds``, ``pair_text_embeds``, ``pair_logit_scale``), and ``image_tokens`` [B, N, D]
    and ``text_tokens`` [B, T, D], the embedded inputs that ``fuse`` starts from; ``text_states`` [B, T, D] is the text
    read alone. Each is computed when an objective reads it.
    """

    def __init__(self, config: ExpertsConfig, trunk_config: MultiwayConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.image_config = self.text_config = self.trunk_config = trunk_config
        self.text_slot, self.augment, self.seed = "trunk", config.augment, seed
        if config.pair_contrast and not trunk_config.pair_layers:
            raise ConfigError("wiring.pair_contrast needs pair experts: set trunk.pair_layers, or pair_contrast=false")
        if config.codes and not trunk_config.mask_token:
            raise ConfigError("wiring.codes needs a vector for hidden patches: set trunk.mask_token=true, or codes=0")
        with seeded(seed, "trunk"):
            self.trunk: Multiway = trunk_config.build()
        width = self.shared_width = self.trunk.width
        with seeded(seed, "heads"):
            std = start_std(width)
            names = ["image", "text", *(["pair_image", "pair_text"] if config.pair_contrast else [])]
            self.contrast = nn.ModuleDict({name: Linear(width, width, False, std=std) for name in names})
            self.pooler = Linear(width, width, std=std) if config.match else None
            self.matching = Linear(width, 2, std=std) if config.match else None
            vocab, deep = trunk_config.vocab_size, config.words == "bert"
            self.words = WordHead(width, vocab, deep) if config.words != "none" else None
            self.codes = Linear(width, config.codes, std=std) if config.codes else None
        start = math.log(1 / config.temperature)
        self.logit_scale = nn.Parameter(torch.tensor(start))
        self.pair_logit_scale = nn.Parameter(torch.tensor(start)) if config.pair_contrast else None

    @property
    def provides(self) -> frozenset[str]:  # type: ignore[override]
        """Names of ``forward``'s outputs; which there are depends on the heads."""
        pair = {"pair_image_embeds", "pair_text_embeds", "pair_logit_scale"} if self.config.pair_contrast else set()
        return frozenset(
            {"image_embeds", "text_embeds", "logit_scale", "image_tokens", "text_tokens", "text_states", *pair}
        )

    # -- tensors ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> LazyOutputs:  # type: ignore[override]
        """Promise the outputs of ``pixel_values`` [B, 3, S, S] and ``input_ids`` [B, T] with ``attention_mask``."""
        pixels, ids, mask = batch["pixel_values"], batch["input_ids"], batch.get("attention_mask")
        lower: dict[str, Tensor] = {}

        def below(out: LazyOutputs, kind: Kind) -> Tensor:
            """Rows after the layers without pair experts, which both contrasts share."""
            if kind not in lower:
                lower[kind] = self._below(out[f"{kind}_tokens"], kind, mask)
            return lower[kind]

        def side(kind: Kind, pair: bool) -> Callable[[LazyOutputs], Tensor]:
            return lambda out: F.normalize(self._above(below(out, kind), kind, mask, pair), dim=-1)

        makers: dict[str, Callable[[LazyOutputs], Tensor]] = {
            "image_tokens": lambda out: self.trunk.embed_image(pixels),
            "text_tokens": lambda out: self.trunk.embed_text(ids),
            "image_embeds": side("image", False),
            "text_embeds": side("text", False),
            "logit_scale": lambda out: self.logit_scale,
            "text_states": lambda out: self.read_text(ids, mask).tokens,
        }
        if self.pair_logit_scale is not None:
            scale = self.pair_logit_scale
            makers["pair_image_embeds"], makers["pair_text_embeds"] = side("image", True), side("text", True)
            makers["pair_logit_scale"] = lambda out: scale
        return LazyOutputs(makers, pixels.device.type)

    def _below(self, rows: Tensor, kind: Kind, mask: Tensor | None) -> Tensor:
        """Run one kind's rows through the layers below the pair experts."""
        start = self.trunk_config.pair_start
        return self._alone(rows, kind, mask, layers=slice(0, start), final_norm=False) if start else rows

    def _above(self, rows: Tensor, kind: Kind, mask: Tensor | None, pair: bool = False) -> Tensor:
        """Run one kind's rows through the upper layers, with its own or the pair experts, and project the first."""
        layers = slice(self.trunk_config.pair_start, None)
        hidden = self._alone(rows, kind, mask, layers=layers, pair=pair)
        projected: Tensor = self.contrast[f"pair_{kind}" if pair else kind](hidden[:, 0])
        return projected

    def _alone(self, rows: Tensor, kind: Kind, mask: Tensor | None, **options: Any) -> Tensor:
        out = self.trunk(image=rows, **options) if kind == "image" else self.trunk(text=rows, mask=mask, **options)
        hidden: Tensor = out.image if kind == "image" else out.text
        return hidden

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Projected features [B, D] of ``pixel_values`` [B, 3, S, S] read alone, not normalised."""
        return self._above(self._below(self.trunk.embed_image(pixel_values), "image", None), "image", None)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projected features [B, D] of ``input_ids`` [B, T] read alone, not normalised."""
        rows = self._below(self.trunk.embed_text(input_ids), "text", attention_mask)
        return self._above(rows, "text", attention_mask)

    def read_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Features:
        """Read a text alone: ``tokens`` [B, T, D] after the final norm, ``pooled`` the first."""
        hidden = self._alone(self.trunk.embed_text(input_ids), "text", attention_mask)
        return Features(hidden, None if attention_mask is None else attention_mask.bool(), hidden[:, 0])

    def read_image(self, pixel_values: Tensor, hidden: Tensor | None = None) -> Features:
        """Read an image alone: ``tokens`` [B, 1 + h*w, D] after the final norm, ``pooled`` the first.

        Args:
            hidden: [B, h*w] bool, patches that the mask token replaces.
        """
        rows = self._alone(self.trunk.embed_image(pixel_values, hidden), "image", None)
        return Features(rows, None, rows[:, 0], self.trunk.grid)

    def read_pair(
        self, image: Tensor, text: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Features, Features]:
        """Read an embedded image [B, N, D] and an embedded text [B, T, D] in one sequence.

        Returns:
            The image's and the text's rows after the final norm; ``pooled`` is the first row of the sequence in both.
        """
        out = self.trunk(image, text, attention_mask, **options)
        seen, read = cast(Tensor, out.image), cast(Tensor, out.text)
        first = read[:, 0] if self.trunk_config.text_first else seen[:, 0]
        real = None if attention_mask is None else attention_mask.bool()
        return Features(seen, None, first, self.trunk.grid), Features(read, real, first)

    def fuse(
        self,
        image: Features,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        text_tokens: Tensor | None = None,
        **options: Any,
    ) -> Features:
        """The text's rows [B, T, D] of the joint sequence, ``pooled`` its first row.

        Args:
            image: ``tokens`` = ``image_tokens`` of ``forward``.
            text_tokens: [B, T, D] of ``forward`` for the same ids, which are embedded again without it.
        """
        text = self.trunk.embed_text(input_ids) if text_tokens is None else text_tokens
        return self.read_pair(image.tokens, text, attention_mask, **options)[1]

    def matching_logits(self, fused: Features) -> Tensor:
        """Logits [B, 2] of (no match, match) from what ``fuse`` gave: tanh-pooled, then linear."""
        if self.pooler is None or self.matching is None:
            raise ConfigError("this model has no matching head: set wiring.match=true")
        logits: Tensor = self.matching(torch.tanh(self.pooler(fused.pooled)))
        return logits

    def match_logits(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, 2] of (no match, match) of image b and text b."""
        image = Features(self.trunk.embed_image(pixel_values))
        return self.matching_logits(self.fuse(image, input_ids, attention_mask))

    def word_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] over the vocabulary of rows [..., D]."""
        if self.words is None:
            raise ConfigError("this model has no head over words: set wiring.words")
        logits: Tensor = self.words(hidden)
        return logits

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., codes] over the image tokenizer's codes of rows [..., D]."""
        if self.codes is None:
            raise ConfigError("this model has no head over image codes: set wiring.codes")
        logits: Tensor = self.codes(hidden)
        return logits

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the trunk, as ``nn.Module.compile``: ``forward`` itself computes nothing yet."""
        self.trunk.compile(*args, **options)

    def parts(self) -> dict[str, nn.Module]:
        """The trunk with its embeddings, and the heads."""
        return dict(self.named_children())

    @property
    def processor(self) -> FusionProcessor:
        """Turns samples into ``pixel_values``, ``input_ids`` and ``attention_mask``, as long as the longest text of a
        batch; made on first use.

        Raises:
            ConfigError: The tokenizer has more ids than the trunk has rows.
        """
        from zoo.data.fused import FusionProcessor

        if not isinstance(self._processor, FusionProcessor):
            plain = super().processor
            length = self.trunk_config.context_length
            self._processor = FusionProcessor(plain.transform, plain.tokenizer, length, seed=self.seed)
        return self._processor

    def layouts(self) -> dict[str, Layout]:
        """An image alone, a caption of typical length alone, and the pair."""
        text = min(TYPICAL_TEXT, self.trunk_config.context_length)
        image = self.trunk.tokens
        return {
            "image": self.trunk.layout(image=image),
            "text": self.trunk.layout(text=text),
            "pair": self.trunk.layout(image=image, text=text),
        }

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """``pixel_values``, ``input_ids`` and ``attention_mask`` for ``batch_size`` pairs of typical length."""
        size, length = self.trunk_config.image_size, min(TYPICAL_TEXT, self.trunk_config.context_length)
        ids = torch.full((batch_size, length), 5, dtype=torch.long, device=self.device)  # no special id
        dtype = next(self.parameters()).dtype
        return {
            "pixel_values": torch.zeros(batch_size, 3, size, size, dtype=dtype, device=self.device),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        }


class MatchingExperts(Experts):
    """``Experts`` with a matching head, which is a capability of its class.

    Attributes:
        rerank_similarity: Candidates are ordered again by matching logit plus cosine similarity (unilm
            vlmo/modules/objectives.py, compute_irtr_recall_with_rerank).
    """

    rerank_similarity: ClassVar[bool] = True

    def match(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """The logit of "match" of image n and text n, as the head gives it: [N] float32."""
        if isinstance(texts, str) or len(images) != len(texts):
            raise ConfigError(f"{len(images)} images and {len(texts)} texts: match judges them one to one")

        def judged(chunk: Sequence[tuple[ImageLike, str]]) -> Tensor:
            pixels = self._pixels([image for image, _ in chunk])
            return self.match_logits(pixels, *self._ids([text for _, text in chunk]))[:, 1].float()

        return self._chunked(list(zip(images, texts, strict=True)), judged, torch.empty(0, device=self.device))

    def match_pairs(self, images: Sequence[ImageLike], texts: Sequence[str], pairs: Tensor) -> Tensor:
        """The logit of "match" of many pairs [P, 2] of (image, text) rows: [P] float32, equal to ``match`` of each.

        Every image is prepared and embedded once; reading it with a text is a pass for each pair.
        """
        seen: list[Tensor] = []

        def look(chunk: Sequence[ImageLike]) -> Tensor:
            seen.append(self.trunk.embed_image(self._pixels(chunk)))
            return seen[-1][:, 0, 0]

        def judged(chunk: Sequence[tuple[int, int]]) -> Tensor:
            rows = torch.tensor([image for image, _ in chunk], device=self.device)
            ids, mask = self._ids([texts[text] for _, text in chunk])
            return self.matching_logits(self.fuse(Features(torch.cat(seen)[rows]), ids, mask))[:, 1].float()

        empty = torch.empty(0, device=self.device)
        self._chunked(images, look, empty)
        return self._chunked([(int(image), int(text)) for image, text in pairs.tolist()], judged, empty)
