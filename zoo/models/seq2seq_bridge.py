"""An image encoder, a connector, and an encoder-decoder language model: BLIP-2's stage 2 with FlanT5 (arXiv 2301.12597,
section 3.2), and InstructBLIP's.

The language model's encoder reads [image tokens; prefix], its decoder writes the rest of the text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor

from zoo.connectors.base import ConnectorConfig
from zoo.decoders.seq2seq_lm import Seq2SeqLM, Seq2SeqLMConfig
from zoo.encoders.base import ImageEncoderConfig
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, TokenBatch, lay_out
from zoo.layout_facts import Reads
from zoo.models.bridge import TYPICAL_TEXT, Bridge, BridgeConfig
from zoo.models.writing import CANDIDATES, IGNORE, _given
from zoo.part import PartConfig
from zoo.sampling.text import Decoding, write

if TYPE_CHECKING:
    from zoo.data.processor import PromptProcessor
    from zoo.models.writing import Prompt


@dataclass(frozen=True, kw_only=True)
class Seq2SeqBridgeConfig(BridgeConfig):
    """Joins an image encoder, a connector and an encoder-decoder language model.

    Attributes:
        template: How a question is written for the encoder (``zoo.data.templates``): prefix, or prefix_instructblip.
        prompt: What the encoder reads where a sample or a call gives no question. Without one, training is prefix
            language modelling.
        split: Cut captions in training, the encoder reading the first piece; False = the decoder writes all of it.
    """

    per_stage: ClassVar[frozenset[str]] = BridgeConfig.per_stage | {"split"}

    template: str = "prefix"
    split: bool = True

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Seq2SeqBridge:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other, a decoder-only language model, or an unknown template.
        """
        from zoo.data.templates import template

        if not template(self.template).eos:
            raise ConfigError(
                f"wiring.template = {self.template!r} ends answers by a text, an encoder-decoder model by EOS: choose"
                " prefix or prefix_instructblip"
            )
        name, decoder = parts["decoder"]
        if not isinstance(decoder, Seq2SeqLMConfig):
            raise ConfigError(
                f"wiring bridge-seq2seq needs an encoder-decoder language model, decoder={name} is none: choose"
                " flan-t5-xl or seq2seq-lm, or a recipe with wiring bridge"
            )
        return Seq2SeqBridge(
            self,
            cast("ImageEncoderConfig", parts["encoder"][1]),
            cast("ConnectorConfig", parts["connector"][1]),
            decoder,
            seed,
        )


class Seq2SeqBridge(Bridge):
    """``encoder``, ``connector``, ``decoder``, whose ``lm`` has an encoder of its own."""

    config: Seq2SeqBridgeConfig
    gives_context = True
    decoder: Seq2SeqLM
    decoder_config: Seq2SeqLMConfig
    score_plain_text = None  # type: ignore[assignment]  # its decoder reads what an encoder has read; without, nothing

    # -- tensors ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read ``input_ids`` [B, T], a placeholder for every image token among them, and write ``labels`` [B, L].

        ``labels`` end in EOS and are -100 on pads; the decoder reads them shifted right, behind the start token, or
        ``decoder_input_ids`` [B, L] where the batch has them. Images, ``attention_mask`` and instructions are as
        ``Bridge.forward`` has them.

        Returns:
            ``hidden`` [B, L, width] and ``targets`` [B, L], the id each row should predict: the labels themselves.
        """
        labels = batch["labels"]
        pixels, encoded = batch.get("pixel_values"), batch.get("image_tokens")
        if (has_image := batch.get("has_image")) is not None:
            pixels = None if pixels is None else pixels[has_image]
            encoded = None if encoded is None else encoded[has_image]
        text = self._instruction(batch)
        context = self._splice(batch["input_ids"], pixels, text=text, image_tokens=encoded)
        ids = batch.get("decoder_input_ids")
        ids = self.shift_right(labels) if ids is None else ids
        return {"hidden": self.decode(ids, context, batch.get("attention_mask")), "targets": labels}

    def shift_right(self, labels: Tensor) -> Tensor:
        """What the decoder reads to write ``labels`` [B, L]: the start token, then all but the last label; -100 becomes
        the start token too (T5's pad), which nothing that counts comes after."""
        start = self.decoder_config.start_id
        ids = labels.roll(1, 1)
        ids[:, :1] = start
        return ids.masked_fill(ids == IGNORE, start)

    def decode(self, ids: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, width] of the decoder for ids [B, L], the start token first, that cross-attend what the
        language model's encoder makes of ``context`` [B, T, width]."""
        mask = None if context_mask is None else context_mask.bool()
        batch = TokenBatch(self.decoder.embed(ids), _text(ids))
        hidden: Tensor = self.decoder(batch, None, context=context, context_mask=mask)
        return hidden

    def text_logits(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        instruction_ids: Tensor | None = None,
        instruction_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, L, V] of every position of the decoder.

        Args:
            pixel_values: [N, 3, H, W], as in ``Bridge.text_logits``.
            input_ids: [B, T], what the encoder reads, with ``image_token_id`` at each of an image's slots.
            attention_mask: [B, T], 1 = real. Pads may stand anywhere: the real tokens are moved together first, which
                the released code does not do, so that its results depend on the side of the pads.
            decoder_input_ids: [B, L], the start token in the first place; it alone by default.
            instruction_ids: [B, Tq], the instructions in the connector's vocabulary, where it reads them.
            instruction_mask: [B, Tq], 1 = real.
        """
        context, mask = self._read(pixel_values, input_ids, attention_mask, instruction_ids, instruction_mask)
        ids = self._start(len(context)) if decoder_input_ids is None else decoder_input_ids
        return self.decoder.logits(self.decode(ids, context, mask))

    def _read(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        instruction_ids: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings [B, t, D] for the language model's encoder, pads behind, and their mask (None = all real)."""
        text = self._instruction(_given(instruction_ids, instruction_mask))
        real = None if attention_mask is None else attention_mask.bool()
        if real is not None:
            input_ids, real = align_left(input_ids, real)
            real = None if bool(real.all()) else real
        return self._splice(input_ids, pixel_values, features, text=text), real

    def _start(self, batch: int) -> Tensor:
        return torch.full((batch, 1), self.decoder_config.start_id, dtype=torch.long, device=self.device)

    # -- writing and scoring ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate_ids(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoding: Decoding | None = None,
        *,
        stop_ids: Sequence[int] | None = None,
        pad_id: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
        instruction_ids: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        tell: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """New token ids [B, n], without the start token, for what the encoder reads: ``input_ids`` [B, T] with image
        placeholders, pads anywhere; see ``zoo.sampling.text.write``.

        By default a row stops at EOS and is filled up with the tokenizer's pad id. A repetition penalty counts what was
        written and the start token, not what the encoder read. The model should be in eval mode.
        """
        context, mask = self._read(pixel_values, input_ids, attention_mask, instruction_ids, instruction_mask)
        start = self._start(len(context))
        return write(
            self.decoder,
            self.decoder.embed(start),
            _text(start),
            decoding or Decoding(),
            stop_ids=sorted(self.processor.stop_ids) if stop_ids is None else stop_ids,
            pad_id=self.tokenizer.pad_id if pad_id is None else pad_id,
            generators=generators,
            context=context,
            context_mask=mask,
            prompt_ids=start,
            tell=tell,
        )

    def _rows(
        self, texts: Sequence[str], prompts: Sequence[Prompt] | None, images: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        rows = self.processor.encode_texts(texts, prompts, images)
        return {key: value.to(self.device) for key, value in rows.items()}

    def _score(self, features: Tensor, rows: dict[str, Tensor]) -> Tensor:
        context, mask = self._read(None, rows["input_ids"], rows["attention_mask"], features=features)
        labels = rows["labels"]
        return self._nats(self.decode(self.shift_right(labels), context, mask), labels)

    def _rank(self, features: Tensor, texts: Sequence[str], prompt: Prompt | None) -> Tensor:
        """Scores [C] of texts about the same images [k, n, D] and prompt, which the encoder reads once for all."""
        if not len(texts):
            return torch.empty(0, device=features.device)
        rows = self._rows(texts, None if prompt is None else [prompt] * len(texts), [len(features)] * len(texts))
        context, mask = self._read(None, rows["input_ids"][:1], rows["attention_mask"][:1], features=features)
        start = self._start(1)
        memory = self.decoder.new_cache()
        first = self.decoder(
            TokenBatch(self.decoder.embed(start), _text(start)), memory, context=context, context_mask=mask
        )  # [1, 1, D]
        labels = rows["labels"]
        scores: list[Tensor] = []
        for at in range(0, len(texts), CANDIDATES):
            own = labels[at : at + CANDIDATES]
            ids = self.shift_right(own)
            index = torch.zeros(len(own), dtype=torch.long, device=labels.device)
            copied = self.decoder.select_cache(copy.deepcopy(memory), index)
            hidden = first.expand(len(own), -1, -1)
            if ids.shape[1] > 1:
                tail = self.decoder(TokenBatch(self.decoder.embed(ids[:, 1:]), _text(ids)), copied)
                hidden = torch.cat([hidden, tail], 1)  # [c, L, D]
            scores.append(self._nats(hidden, own))
        return torch.cat(scores)

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def processor(self) -> PromptProcessor:
        """Turns samples into ``forward``'s batch; made on first use.

        Raises:
            ConfigError: A tokenizer has more ids than the part that reads them has rows.
        """
        if self._processor is None:
            from zoo.data.prefix import PrefixProcessor

            self._processor = PrefixProcessor(**self._processor_fields(), split=self.config.split)
        return self._processor

    def layouts(self) -> dict[str, Layout]:
        """What the language model's two stacks read, for a caption of typical length cut in the middle."""
        image = Segment("image", self.connector.tokens, "image", "full")
        prefix = Segment("prefix", self._typical_prefix, "text", "full")
        both: dict[tuple[str, str], Reads] = {("image", "prefix"): "all", ("prefix", "image"): "all"}
        return {
            "encoder": lay_out([image, prefix], relation=both),
            "decoder": lay_out([Segment("text", self.typical_targets, "text", "causal", predicted=True)]),
        }

    @property
    def typical_targets(self) -> int:
        return max(1, min(TYPICAL_TEXT // 2 + 1, self.decoder_config.context_length))

    @property
    def _typical_prefix(self) -> int:
        return max(1, min(TYPICAL_TEXT // 2, self.decoder_config.context_length - self.connector.tokens))

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """One image and a caption of typical length an item, cut in the middle; every token of the second half and its
        end are targets."""
        batch = super().example_batch(batch_size)
        slots, device = self.connector.tokens, self.device
        ids = torch.ones(batch_size, slots + self._typical_prefix, dtype=torch.long, device=device)
        ids[:, :slots] = self.image_token_id
        labels = torch.ones(batch_size, self.typical_targets, dtype=torch.long, device=device)
        return {
            **batch,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids, dtype=torch.bool),
            "labels": labels,
        }


def align_left(x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's real entries of x [B, T] to its front, in order, and cut columns that hold pads only; ``real``
    [B, T] bool."""
    order = (~real).long().argsort(dim=1, stable=True)[:, : max(1, int(real.sum(dim=1).max()))]
    return x.gather(1, order), real.gather(1, order)


def _text(ids: Tensor) -> Layout:
    """Plain causal text [B, L]; pads behind it read it and are not read."""
    return lay_out([Segment("text", ids.shape[1], predicted=True)], device=ids.device)
