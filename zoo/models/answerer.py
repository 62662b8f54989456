"""A question reads the image, and a decoder reads the question's states: visual question answering of ALBEF and
BLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.decoders.bert_decoder import BertDecoder
from zoo.encoders.base import ImageEncoderConfig
from zoo.encoders.bert import Bert, BertConfig
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, lay_out
from zoo.models.fusion import TYPICAL_TEXT
from zoo.models.grounded import shifted
from zoo.models.writer import Writer, WriterConfig
from zoo.part import PartConfig, seeded

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike


@dataclass(frozen=True, kw_only=True)
class AnswererConfig(WriterConfig):
    """Joins an image encoder, a text encoder that lets a question read the image, and a decoder that reads the
    question's states.

    Attributes:
        question_length: Longest question in tokens.
        end: Close questions with [SEP]; ALBEF does not.
        rank_smoothing: Label smoothing within the scores of ``choose_answers``; BLIP 0.1, ALBEF 0.
        first_twice: ``choose_answers`` adds log p of an answer's first token once more, as ALBEF's release does.
        prompt: The question where a sample or a call gives none.
        share: As ``MEDConfig.share``; BLIP's release does not tie the two, and its widths may then differ.
    """

    slots: ClassVar[tuple[str, ...]] = ("encoder", "text_encoder", "decoder")

    question_length: int = 35
    text_length: int = 16
    end: bool = True
    rank_smoothing: float = 0.1
    first_twice: bool = False
    prompt: str = "what is this?"
    share: bool = False

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Answerer:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other.
        """
        image, text, decoder = (parts[slot][1] for slot in self.slots)
        return Answerer(self, cast("ImageEncoderConfig", image), text, decoder, seed)


class Answerer(Writer):
    """``encoder``, ``text_encoder``, ``decoder``: visual question answering of ALBEF and BLIP. The decoder reads the
    states of the question, never the image's tokens."""

    provides: ClassVar[frozenset[str]] = Writer.provides | {"answer_weights"}

    def __init__(
        self,
        config: AnswererConfig,
        image_config: ImageEncoderConfig,
        text_config: PartConfig,
        decoder_config: PartConfig,
        seed: int,
    ) -> None:
        if not isinstance(text_config, BertConfig):
            raise ConfigError(
                "this wiring needs a text encoder that cross-attends images: choose text_encoder=blip-bert or another"
                " on zoo.encoders.bert"
            )
        self.text_config: BertConfig = text_config
        super().__init__(config, image_config, decoder_config, seed)
        self.answerer = config
        with seeded(seed, "text_encoder"):
            self.text_encoder: Bert = text_config.build(self.encoder.width)
        if config.share and isinstance(self.decoder, BertDecoder):
            self.decoder.share_with(self.text_encoder.embed, self.text_encoder.trunk)

    def _context_width(self) -> int:
        return self.text_config.width

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Answer ``question_ids`` [B, Q] (with ``question_mask``) about ``pixel_values`` [B, 3, S, S] by ``input_ids``
        [A, T] with their ``attention_mask`` and ``labels``, as ``Writer.forward`` has them.

        The answers are one a question, unless ``answers_per_question`` [B] says how many each has, in order;
        ``answer_weights`` [A] is 1 by default.

        Returns:
            ``hidden`` [A, T, D], ``targets`` [A, T], and ``answer_weights`` [A], divided by the number of questions.
        """
        mask = batch.get("question_mask")
        states = self.asked(batch["pixel_values"], batch["question_ids"], mask)
        questions, counts = len(states), batch.get("answers_per_question")
        if counts is not None:
            states = states.repeat_interleave(counts, 0)
            mask = None if mask is None else mask.repeat_interleave(counts, 0)
        ids = batch["input_ids"]
        hidden = self.decode(self.started(ids), batch.get("attention_mask"), states, mask)
        weights = batch.get("answer_weights")
        weights = states.new_ones(len(ids)) if weights is None else weights
        return {"hidden": hidden, "targets": shifted(batch["labels"], None), "answer_weights": weights / questions}

    def momentum_parts(self) -> tuple[str, ...]:
        """The parts of which distillation keeps a moving average."""
        return ("encoder", "text_encoder", "decoder")

    def asked(
        self,
        pixel_values: Tensor,
        question_ids: Tensor,
        question_mask: Tensor | None = None,
        *,
        pads_read: bool = False,
    ) -> Tensor:
        """States [B, Q, D] of questions that read their images.

        Args:
            pads_read: Let pads read the question too. BLIP's release does, and its generation then cross-attends them,
                so that an answer depends on how far its question is padded; ``generate_text`` does not.
        """
        image = self.encoder(pixel_values)
        ids = self.text_encoder.reading(question_ids)
        if pads_read and question_mask is not None:
            keys = question_mask.bool()[:, None, None]  # [B, 1, 1, Q]
            mask = keys.expand(-1, -1, keys.shape[-1], -1)
            return cast(Tensor, self.text_encoder.trunk(self.text_encoder.embed(ids), context=image.tokens, mask=mask))
        states: Tensor = self.text_encoder(ids, question_mask, context=image.tokens, context_mask=image.mask).tokens
        return states

    def read(self, pixel_values: Tensor, prompts: Sequence[str] | None = None) -> tuple[Tensor, Tensor | None]:
        """The states of the questions ``prompts``, the wiring's own by default, and their mask."""
        said = [self.answerer.prompt] * len(pixel_values) if prompts is None else list(prompts)
        rows = self.processor.encode_questions(said)
        ids, mask = (rows[name].to(self.device) for name in ("question_ids", "question_mask"))
        return self.asked(pixel_values, ids, mask), mask

    def begin(self, prompts: Sequence[str] | None, count: int) -> list[list[int]]:
        """An answer begins with the start token; the prompt is the question, which it cross-attends."""
        return [[self.start_id] for _ in range(count)]

    # -- choosing among answers ------------------------------------------------------------------------------------

    def rank_ids(
        self,
        states: Tensor,
        mask: Tensor | None,
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        k: int = 128,
        label_smoothing: float = 0.1,
        first_twice: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The ``k`` answers of a list whose first token is likeliest for each question, and how good they are.

        As the releases' ``rank_answer``: an answer's score is minus its cross-entropy summed over its tokens, label
        smoothing included. BLIP smooths by 0.1, ALBEF not.

        Args:
            first_twice: Add log p of the first token to the answer's once more, as ALBEF's release does.
            states: [B, Q, D], as ``asked`` gives them.
            mask: [B, Q] bool.
            answer_ids: [A, T] with the start token in the first place.
            answer_mask: [A, T].

        Returns:
            Rows of the list [B, k], by the probability of the first token, and their scores [B, k].
        """
        k = min(k, len(answer_ids))
        start = answer_ids[:1, :1].expand(len(states), -1)
        first = self.decoder.logits(self.decode(start, None, states, mask)[:, 0]).float().softmax(-1)  # [B, V]
        likely, chosen = first[:, answer_ids[:, 1]].topk(k)  # [B, k]
        rows = chosen.flatten()
        ids, real = answer_ids[rows], answer_mask[rows].bool()  # [B * k, T]
        seen = states.repeat_interleave(k, 0)
        seen_mask = None if mask is None else mask.repeat_interleave(k, 0)
        logits = self.decoder.logits(self.decode(ids, real, seen, seen_mask)).float()  # [B * k, T, V]
        loss = F.cross_entropy(
            logits.transpose(1, 2), shifted(ids, real), reduction="none", label_smoothing=label_smoothing
        )
        scores = -loss.sum(1).view_as(likely)
        return chosen, scores + likely.log() if first_twice else scores

    def choose_answers(
        self, images: Sequence[ImageLike], questions: Sequence[str], answers: Sequence[str], k: int = 128
    ) -> list[str]:
        """The best of a list of answers to each question, as the published models are evaluated on VQA."""
        out: list[str] = []
        with self._evaluating():
            ids, real, _ = self._answered(self.begin(None, len(answers)), answers)
            for start in range(0, len(images), 8):
                part = slice(start, start + 8)
                states, mask = self.read(self._pixels(images[part]), questions[part])
                chosen, scores = self.rank_ids(
                    states,
                    mask,
                    ids,
                    real,
                    k=k,
                    label_smoothing=self.answerer.rank_smoothing,
                    first_twice=self.answerer.first_twice,
                )
                best = chosen.gather(1, scores.argmax(1, keepdim=True))[:, 0]
                out += [answers[i] for i in best.tolist()]
        return out

    def _make_processor(self, length: int) -> Any:
        from zoo.data.questions import QuestionProcessor

        return QuestionProcessor(
            self._transform(),
            self.tokenizer,
            length,
            question_length=min(self.answerer.question_length, self.text_config.context_length),
            question=self.answerer.prompt,
            end=self.answerer.end,
            seed=self.seed,
        )

    def layouts(self) -> dict[str, Layout]:
        """As ``Writer.layouts``, and the question, whose tokens read each other and the image."""
        question = Segment("question", min(TYPICAL_TEXT, self.answerer.question_length), "text", "full")
        return {**super().layouts(), "question": lay_out([question])}

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """As ``Writer.example_batch``, with a question of typical length an item."""
        length = min(TYPICAL_TEXT, self.answerer.question_length)
        ids = torch.full((batch_size, length), 5, dtype=torch.long, device=self.device)
        return {
            **super().example_batch(batch_size),
            "question_ids": ids,
            "question_mask": torch.ones_like(ids, dtype=torch.bool),
        }
