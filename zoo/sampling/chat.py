"""Talking with a model about images: turns that are kept, answers that appear as they are written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from zoo.errors import ConfigError
from zoo.sampling.text import Decoding, streams

Tell = Callable[[str], None]


class Chat:
    """A dialogue with a model that offers ``generate_text`` and reads prompts through a ``PromptProcessor``.

    Attributes:
        images: What the dialogue is about.
        turns: (question, answer) so far.
    """

    def __init__(self, model: Any, decoding: Decoding | None = None, images: Sequence[Any] = ()) -> None:
        """Start a dialogue.

        Raises:
            ConfigError: The model reads no prompts, or the decoding cannot be shown token by token.
        """
        if not hasattr(model, "generate_ids") or not getattr(model.processor, "dialogues", False):
            raise ConfigError(
                f"{type(model).__name__} holds no dialogues: take a model that bridges to a language model, e.g. llava"
            )
        self.model = model
        self.decoding = decoding or Decoding(max_new_tokens=128)
        if self.decoding.beams > 1:
            raise ConfigError(f"beams = {self.decoding.beams} cannot be shown as they are written: leave beams at 1")
        self.images = list(images)
        self.turns: list[tuple[str, str]] = []

    def show(self, *images: Any) -> None:
        """Start again, about other images."""
        self.images = list(images)
        self.reset()

    def reset(self) -> None:
        """Forget the turns, not the images."""
        self.turns = []

    def ask(self, question: str, tell: Tell | None = None) -> str:
        """The answer to a question, which becomes a turn.

        Greedy answers to a first question are those of ``generate_text``; ``tell`` receives the answer piece by piece,
        and the pieces joined are what is returned.

        Raises:
            DataError: The dialogue no longer fits the model's context; it is left as it was.
        """
        model, processor = self.model, self.model.processor
        rows = processor.encode_prompts([[*self.turns, (question, None)]], 1, images=[len(self.images)])
        device, dtype = model.device, next(model.parameters()).dtype
        pixels = processor.encode_images(self.images).to(device, dtype) if self.images else None
        pieces = _Pieces(processor, tell)
        streaming = {"tell": pieces} if "tell" in inspect.signature(model.generate_ids).parameters else {}
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            ids = model.generate_ids(
                pixels,
                rows.pop("input_ids").to(device),
                rows.pop("attention_mask").to(device),
                self.decoding,
                generators=streams(self.decoding.seed, len(self.turns), 1) if self.decoding.temperature else None,
                **{name: value.to(device) for name, value in rows.items() if name.startswith("instruction_")},
                **streaming,
            )
        finally:
            for module, mode in modes:
                module.training = mode
        answer = pieces.end(ids[0].tolist())
        self.turns.append((question, answer))
        return answer


class _Pieces:
    """Tells of an answer what can no longer change: whole characters, no part of a stop text, no outer blanks."""

    def __init__(self, processor: Any, tell: Tell | None) -> None:
        self.processor, self.tell = processor, tell
        self.stop = str(processor.layout.stop)
        self.ids: list[int] = []
        self.told = ""

    def __call__(self, token: Tensor) -> None:
        """Take the next token of the one row, [1] int64."""
        if self.tell is None:
            return
        self.ids.append(int(token[0]))
        text: str = self.processor.decode(self.ids)
        if text.endswith("\ufffd"):  # the first bytes of a character
            return
        for length in range(len(self.stop) - 1, 0, -1):
            if text.endswith(self.stop[:length]):
                text = text[:-length].rstrip()
                break
        self._more(text)

    def end(self, ids: Sequence[int]) -> str:
        """The whole answer, with what was held back told."""
        text: str = self.processor.decode(ids)
        self._more(text)
        return text

    def _more(self, text: str) -> None:
        if self.tell is not None and len(text) > len(self.told) and text.startswith(self.told):
            self.tell(text[len(self.told) :])
            self.told = text
