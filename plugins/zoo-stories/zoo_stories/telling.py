"""Telling a story: a character and a script become pictures, a comic page and an animated clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from zoo.data.sheet import to_picture
from zoo.errors import ConfigError
from zoo_stories.consistency import Consistency
from zoo_stories.drawing import draw_frames, model_of
from zoo_stories.memory import check_memory
from zoo_stories.page import comic_page, save_clip, save_page
from zoo_stories.script import Frame, read_characters, read_script, write_script
from zoo_stories.transitions import TRANSITIONS, between

HOLD, BRIEF = 900, 90
"""Milliseconds that a clip shows a frame of the story, and one between two."""


@dataclass(frozen=True)
class Story:
    """A story that was told.

    Attributes:
        script: What each frame was drawn from, its caption, and who is in it.
        images: [N, 3, H, W] float32 in [0, 1].
        moves: For each two neighbours the pictures between them.
        title: Of the page.
        how: How the pictures between were made, in a word.
    """

    script: tuple[Frame, ...]
    images: Tensor
    moves: tuple[tuple[Image.Image, ...], ...] = ()
    title: str = ""
    how: str = "none"

    @property
    def frames(self) -> list[Image.Image]:
        return [to_picture(image) for image in self.images]

    @property
    def page(self) -> Image.Image:
        return comic_page(self.frames, [frame.caption for frame in self.script], self.title)

    @property
    def clip(self) -> list[tuple[Image.Image, int]]:
        """The pictures of the clip, each with the milliseconds it is shown."""
        found: list[tuple[Image.Image, int]] = []
        for number, frame in enumerate(self.frames):
            found.append((frame, HOLD))
            if number < len(self.moves):
                found += [(picture, BRIEF) for picture in self.moves[number]]
        return found

    def save(self, page: str | Path | None = None, clip: str | Path | None = None) -> None:
        """Write the page as PNG, the clip as GIF, or both.

        Raises:
            RunError: A file cannot be written.
        """
        if page is not None:
            save_page(self.page, Path(page))
        if clip is not None:
            pictures, durations = zip(*self.clip, strict=True)
            save_clip(pictures, durations, Path(clip))

    def _repr_png_(self) -> bytes:
        """A notebook shows the page."""
        import io

        buffer = io.BytesIO()
        self.page.save(buffer, "PNG")
        return buffer.getvalue()


def tell(
    model: Any,
    character: str | Mapping[str, str] | Sequence[str],
    script: str | Sequence[str] = "",
    *,
    theme: str = "",
    writer: Any = None,
    frames: int = 4,
    title: str = "",
    consistency: Consistency | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    transitions: str = "latents",
    motion: Any = None,
    pictures_between: int = 6,
    memory: int | None = None,
) -> Story:
    """Tell a story.

    Args:
        model: A latent diffusion model: what ``zoo.build`` or ``zoo.from_pretrained`` returns, or a path.
        character: A description, ``"Name: description"`` (several in a list), or a mapping.
        script: Lines, see ``zoo_stories.script``; without one, ``writer`` writes one about ``theme``.
        writer: A model that offers ``generate_text``, or its path.
        frames: How many it writes.
        consistency: How frames read each other; by default as the model says, else ``Consistency()``.
        seed: Frame n starts from the noise of (seed, n).
        steps, guidance, sampler: Of the model; its own by default.
        transitions: What is between two frames of the clip: ``none``, ``latents`` (interpolation of latents) or
            ``motion`` (drawn from what a motion predictor says; the model must draw from embeddings of images).
        motion: A motion predictor or its path, for ``transitions="motion"``.
        pictures_between: Pictures between two frames.
        memory: Bytes that drawing may take; by default most of what is free.

    Raises:
        ConfigError: No character, no script, a model without a denoiser, or more frames than memory allows; nothing was
            drawn by then.
    """
    characters = read_characters(character)
    if transitions not in TRANSITIONS:
        raise ConfigError(f"transitions = {transitions!r}: expected one of {', '.join(TRANSITIONS)}")
    if script and (writer is not None or theme):
        raise ConfigError("a script is given, so that nothing is left for a theme or a writer: give one of the two")
    if not script and writer is None:
        raise ConfigError("the story has no script: give its lines, or a theme and a writer, a model that writes text")
    if transitions == "motion" and motion is None:
        raise ConfigError("transitions='motion' needs a motion predictor: motion=PATH of a run of motion-predictor")
    lines: str | Sequence[str] = script
    told = None if not script else read_script(script, characters)
    plain = model_of(loaded(model))
    if told is None:
        lines = write_script(loaded(writer), theme, characters, frames, seed=seed)
        told = read_script(lines, characters)
    rules = consistency or getattr(plain, "consistency", None) or Consistency()
    check_memory(plain, len(told), rules, guidance=guidance, steps=steps, limit=memory)
    images = draw_frames(
        plain,
        [frame.prompt for frame in told],
        [frame.characters for frame in told],
        rules,
        seed=seed,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
    )
    moves: tuple[tuple[Image.Image, ...], ...] = ()
    if transitions != "none" and len(told) > 1 and pictures_between > 0:
        predictor = None if motion is None else loaded(motion)
        found = between(
            plain, images, [frame.prompt for frame in told], transitions, pictures_between, predictor=predictor,
            seed=seed, steps=steps, guidance=guidance, sampler=sampler,
        )  # fmt: skip
        moves = tuple(tuple(to_picture(picture) for picture in pictures) for pictures in found)
    how = transitions if moves else "none"
    return Story(told, images.cpu(), moves, title or theme, how)


def loaded(model: Any) -> Any:
    """What is behind a path: a run directory, a checkpoint folder or a hub id; a model as it is."""
    if not isinstance(model, str | Path):
        return model
    from zoo.api import from_pretrained

    folder = Path(model)
    path = folder / "weights" if (folder / "weights").is_dir() else folder
    module = from_pretrained(path if path.exists() else str(model))
    return module.to("cuda" if torch.cuda.is_available() else "cpu").eval()
