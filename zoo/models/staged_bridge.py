"""BLIP-2 in both stages: a bridge to a language model whose Q-Former first learns to see (arXiv 2301.12597).

What a stage's objectives do not read does not run: the language model in the first stage, the Q-Former's text branch
and the heads in the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.connectors.base import ConnectorConfig
from zoo.connectors.qformer import QFormer, QFormerConfig
from zoo.data.sample import Sample
from zoo.decoders.base import DecoderConfig
from zoo.encoders.base import ImageEncoderConfig
from zoo.layout import Layout
from zoo.models.bridge import Bridge, BridgeConfig
from zoo.models.lazy import LazyOutputs
from zoo.models.query_heads import QueryFields, ReadsQueries, query_heads
from zoo.models.querying import check_vocabulary
from zoo.part import PartConfig

if TYPE_CHECKING:
    from zoo.data.fused import FusionProcessor
    from zoo.data.processor import PromptProcessor
    from zoo.data.text import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class StagedBridgeConfig(BridgeConfig, QueryFields):
    """Joins an image encoder, a Q-Former with its text branch, and a text decoder."""

    def __post_init__(self) -> None:
        QueryFields.__post_init__(self)
        BridgeConfig.__post_init__(self)

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """As the bridge's, and the heads'."""
        return PartConfig.scaled(super().scaled(sizes), sizes)

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> StagedBridge:
        """Build the model; every part and the heads are drawn from their own streams of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other.
        """
        encoder, connector, decoder = (parts[slot][1] for slot in self.slots)
        return StagedBridge(
            self,
            cast("ImageEncoderConfig", encoder),
            cast("ConnectorConfig", connector),
            cast("DecoderConfig", decoder),
            seed,
        )


class StagedBridge(ReadsQueries, Bridge):
    """``Bridge`` and the ``heads`` of stage 1.

    A batch holds the caption twice: as the decoder reads it, and as ``text_ids`` and ``text_mask`` [B, T] in the
    Q-Former's vocabulary.
    """

    provides: ClassVar[frozenset[str]] = Bridge.provides | ReadsQueries.query_outputs
    connector: QFormer

    def __init__(
        self,
        config: StagedBridgeConfig,
        image_config: ImageEncoderConfig,
        connector_config: ConnectorConfig,
        decoder_config: DecoderConfig,
        seed: int,
    ) -> None:
        heads = query_heads(config, connector_config, seed)
        super().__init__(config, image_config, connector_config, decoder_config, seed)
        self.connector_config: QFormerConfig = cast("QFormerConfig", connector_config)
        self.heads = heads
        self._staged: StagedProcessor | None = None

    def forward(self, batch: Mapping[str, Tensor]) -> LazyOutputs:  # type: ignore[override]
        """Promise ``hidden`` and ``targets`` as ``Bridge.forward``, and what ``query_makers`` describes."""
        joint: list[dict[str, Tensor]] = []

        def of_bridge(name: str) -> Tensor:
            if not joint:
                joint.append(Bridge.forward(self, batch))
            return joint[0][name]

        makers = self.query_makers(
            batch.get("pixel_values"), batch["text_ids"], batch.get("text_mask"), batch.get("image_tokens")
        )
        makers["hidden"] = lambda out: of_bridge("hidden")
        makers["targets"] = lambda out: of_bridge("targets")
        return LazyOutputs(makers, batch["text_ids"].device.type)

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    def caption_ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [N, T] of texts in the Q-Former's vocabulary, on the model's device."""
        rows = self.processor.pairs.encode_texts(texts)
        return rows["input_ids"].to(self.device), rows["attention_mask"].to(self.device)

    @property
    def processor(self) -> StagedProcessor:  # type: ignore[override]
        """Turns samples into ``forward``'s batch; made on first use.

        Raises:
            ConfigError: A tokenizer has more ids than its part has rows.
        """
        prompts = super().processor
        if self._staged is None or self._staged.prompts is not prompts:
            from zoo.data.fused import FusionProcessor
            from zoo.data.text import named_tokenizer

            config, fields = self.connector_config, cast("StagedBridgeConfig", self.config)
            own: TextTokenizer = named_tokenizer(config.tokenizer)
            check_vocabulary(config, own.vocab_size)
            length = min(fields.text_length, config.context_length)
            self._staged = StagedProcessor(prompts, FusionProcessor(prompts.transform, own, length, seed=self.seed))
        return self._staged

    def layouts(self) -> dict[str, Layout]:
        """The three tasks of stage 1 on [queries; text], and the decoder's sequence."""
        return {**self.query_layouts(), **super().layouts()}

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile encoder and decoder, as ``nn.Module.compile``: ``forward`` itself computes nothing yet."""
        self.encoder.compile(*args, **options)
        self.decoder.compile(*args, **options)

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """As ``Bridge``'s, with a caption of typical length for the Q-Former."""
        ids = torch.full((batch_size, self._typical_text), 5, dtype=torch.long, device=self.device)
        more = {"text_ids": ids, "text_mask": torch.ones_like(ids, dtype=torch.bool)}
        return {**super().example_batch(batch_size), **more}


class StagedProcessor:
    """A prompt processor whose batches also hold the caption in a second vocabulary.

    Args:
        prompts: What the language model reads; all but calling is its own.
        pairs: How the Q-Former reads the same captions.
    """

    def __init__(self, prompts: PromptProcessor, pairs: FusionProcessor) -> None:
        self.prompts, self.pairs = prompts, pairs

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Return what the prompt processor does, and ``text_ids`` and ``text_mask`` [B, T] of the same captions.

        Both draw a sample's caption by (seed, id, draw), so that it is the same one.
        """
        batch = self.prompts(samples, train, draws, pixels, **options)
        numbers = draws if draws is not None else [0] * len(samples)
        rows = self.pairs.encode_texts([self.pairs._text(s, train, d) for s, d in zip(samples, numbers, strict=True)])
        return {**batch, "text_ids": rows["input_ids"], "text_mask": rows["attention_mask"]}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "prompts" not in self.__dict__:  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.prompts, name)
