"""Stories in pictures: one character through several frames, each with a sentence that says what happens to it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.data.openmoji import DEFAULT_SIZE
from zoo.data.sample import Sample, SourceConfig
from zoo.data.scenes import ATTEMPTS, ScenesConfig, described, parse_range
from zoo.data.scenes_derived import Derived
from zoo.data.scenes_edits import Edit, apply, draw, filled, form
from zoo.data.scenes_icons import IconPool
from zoo.data.scenes_layout import BACKGROUNDS, UNITS, Placed, Scene, Stream
from zoo.data.scenes_render import Renderer
from zoo.data.scenes_texts import an, prompt
from zoo.errors import DataError

RULES = 1
"""Raised whenever the same fields make other frames or other sentences."""
FRAMES = (2, 8)
COMPANIONS = 2
"""Others that may be with the character at one time."""
SIDES = (16, 20, 24)
"""Sides of the character in the opening, in units: those of icons in scenes of four."""

_OPENINGS = ("once there was {a}", "this is a story about {a}", "here comes {a}", "look, there is {a}")
_EVENTS: dict[str, tuple[str, ...]] = {
    "add beside": ("{a} comes and stands {of} the {anchor}", "the {anchor} meets {a}, who stays {of} it",
                   "{of} the {anchor} appears {a}"),
    "remove": ("the {name} leaves the {who}", "the {who} says goodbye to the {name}",
               "the {name} goes away, and the {who} stays"),
    "replace": ("the {who} sees the {name} turn into {new}", "near the {who}, the {name} becomes {new}",
                "the {name} beside the {who} turns into {new}"),
    "move beside": ("the {name} goes to the {anchor} and stops {of} it", "now the {name} is {of} the {anchor}",
                    "the {name} walks until it is {of} the {anchor}"),
    "move edge": ("the {name} goes to the {edge} edge", "the {name} runs straight to the {edge} edge",
                  "now the {name} is at the {edge} edge"),
    "resize larger": ("the {name} grows", "the {name} gets larger", "suddenly the {name} is bigger"),
    "resize smaller": ("the {name} shrinks", "the {name} gets smaller", "suddenly the {name} is smaller"),
    "background": ("everything around the {who} turns {where}", "the {who} sees the world turn {where}",
                   "behind the {who} all becomes {where}"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StoriesConfig(SourceConfig):
    """Stories over scenes of OpenMoji icons, as texts and pictures in turn.

    All follows from ``seed`` and the id alone. A story opens with its character alone; then in each frame one thing
    happens: someone comes beside it, leaves, or turns into something else; it moves, grows or shrinks; the background
    changes. The rest of the picture stays, so that a frame follows from the one before and its sentence, and every
    sentence names the character. ``frames`` is how many, as ``4`` or ``3..5`` (2 to 8).

    ``icons="heldout"``: characters and companions of val and test are icons that no training story shows;
    ``"train"``: new stories of known icons, where the opening picture decides the split. ``kinds`` is as for scenes.
    ``background="white"`` keeps every frame white. ``size`` None takes the model's image size.
    """

    kind: ClassVar[str] = "openmoji-stories"
    size: int | None = None
    frames: str | int = "3..5"
    icons: Literal["heldout", "train"] = "heldout"
    kinds: int = 0
    background: Literal["white", "coloured"] = "coloured"
    train_stories: int = 10_000
    val_stories: int = 300
    test_stories: int = 500
    seed: int = 0

    def open(self, image_size: int | None) -> Stories:
        return Stories(self, self.size or image_size or DEFAULT_SIZE)


@dataclass(frozen=True, slots=True)
class Story:
    """``scenes[n]`` is ``scenes[n - 1]`` with ``events[n - 1]`` applied; ``texts[n]`` says what ``scenes[n]`` shows.

    The character is the first object of every scene.
    """

    scenes: tuple[Scene, ...]
    events: tuple[Edit, ...]
    texts: tuple[str, ...]


class Stories(Derived):
    """See :class:`StoriesConfig`. Ids are ``train-000000`` and so on.

    Raises:
        ConfigError: a field is out of range.
        MissingExtra: a package that carries the icons or the names is not installed.
    """

    name = "openmoji-stories"
    what = "stories"
    sides: ClassVar[tuple[int, ...]] = SIDES

    def __init__(self, config: StoriesConfig, size: int = DEFAULT_SIZE) -> None:
        self.config = config
        self.frames = parse_range(config.frames, "frames", *FRAMES)
        scenes = ScenesConfig(
            objects="1",
            questions="none",
            icons=config.icons,
            kinds=config.kinds,
            background=config.background,
            seed=config.seed,
        )
        counts = {"train": config.train_stories, "val": config.val_stories, "test": config.test_stories}
        super().__init__(scenes, counts, changes=self.frames[1] - 1, size=size)
        self.version = f"{self.base.version}/stories{RULES}/{json.dumps({'frames': str(config.frames), **counts})}"

    def story(self, id: str) -> Story:
        """Return the description from which everything else follows.

        Raises:
            DataError: there is no such id.
        """
        found: Story = self._kept(id)
        return found

    def _compose(self, id: str) -> Story:
        split = self.split_of(id)
        pool, seed = self.base.pools[split], self.config.seed
        least, most = self.frames
        count = least + Stream("story-length", seed, id).below(most - least + 1)
        for attempt in range(ATTEMPTS):
            stream = Stream("story", seed, id, attempt)
            opening = self._opening(pool, stream)
            if self.owned(split, opening) and (story := self._told(opening, count, pool, stream)):
                return story
        raise DataError(f"no story of {count} frames is found for {id!r}; allow another number of frames")

    def _opening(self, pool: IconPool, stream: Stream) -> Scene:
        """Draw the character alone, small enough that others fit beside it."""
        row, size = pool.kinds(stream, 1)[0], stream.choice(self.sides)
        x, y = stream.below(UNITS - size + 1), stream.below(UNITS - size + 1)
        background = "white" if self.config.background == "white" else stream.choice(tuple(BACKGROUNDS))
        return Scene((Placed(pool.icons[row], pool.names[row], x, y, size),), background=background)

    @property
    def starts(self) -> tuple[int, ...]:
        return self.sides

    def _told(self, opening: Scene, count: int, pool: IconPool, stream: Stream) -> Story | None:
        """Draw what happens; None where a frame allows nothing new."""
        scenes, events = [opening], list[Edit]()
        who = opening.objects[0].name
        text = stream.choice(_OPENINGS).format(a=f"{an(who)} icon")
        if opening.background != "white":
            text += f", on {an(opening.background)} background"
        texts = [text]
        while len(scenes) < count:
            event = self._event(scenes, events, pool, stream)
            if event is None:
                return None
            scenes.append(apply(event, scenes[-1]))
            events.append(event)
            texts.append(filled(stream.choice(_EVENTS[form(event)]).replace("{who}", who), event))
        return Story(tuple(scenes), tuple(events), tuple(texts))

    def _event(self, scenes: list[Scene], events: list[Edit], pool: IconPool, stream: Stream) -> Edit | None:
        """Draw one event, of another kind than the last and not back to a picture that was there."""
        scene = scenes[-1]
        who, others = scene.objects[0].name, {placed.name for placed in scene.objects[1:]}
        on = {"add": {who}, "remove": others, "replace": others, "move": {who}, "resize": {who}}
        allowed = [kind for kind in (*on, "background") if not events or kind != events[-1].kind]
        if self.config.background == "white":
            allowed = [kind for kind in allowed if kind != "background"]
        if len(others) >= COMPANIONS:
            allowed = [kind for kind in allowed if kind != "add"]
        order = stream.shuffled(allowed)
        if not others and "add" in allowed and stream.below(2):  # what happens is mostly between two
            order = ["add", *order]
        for kind in order:
            found = draw(kind, scene, pool, stream, on.get(kind), "beside" if kind == "add" else None)
            if found is not None and apply(found, scene) not in scenes:
                return found
        return None

    def text_sample(self, id: str) -> Sample:
        """Return the sample without its images.

        ``texts`` is the whole story as one text. ``meta``: ``parts`` (a sentence, 0, a sentence, 1, ...), none of them
        ``given``; ``character`` (icon and name); ``frames``: of each its sentence ``text``, its ``event`` (a form of
        ``zoo.data.scenes_edits``, first ``opening``), ``objects`` (the character first) and ``background``;
        ``captions``: a prompt of each picture.
        """
        story = self.story(id)
        kinds = ("opening", *(form(event) for event in story.events))
        frames = [
            {"text": text, "event": kind, **described(scene, self.renderer)}
            for text, kind, scene in zip(story.texts, kinds, story.scenes, strict=True)
        ]
        parts: list[str | int] = []
        for place, text in enumerate(story.texts):
            parts += [text, place]
        character = story.scenes[0].objects[0]
        meta: dict[str, Any] = {
            "parts": tuple(parts),
            "given": 0,
            "character": {"icon": character.icon, "name": character.name},
            "frames": frames,
            "captions": tuple(prompt(scene) for scene in story.scenes),
        }
        return Sample(id, None, (". ".join(story.texts),), meta)

    def sample(self, id: str) -> Sample:
        """Return the frames at ``size`` pixels as ``meta["images"]``, the first also as ``image``."""
        from PIL import Image

        known = self.text_sample(id)
        images = tuple(Image.fromarray(self.renderer.image(scene)) for scene in self.story(id).scenes)
        return replace(known, image=images[0], meta={**known.meta, "images": images})

    def masks(self, id: str, size: int | None = None) -> NDArray[np.bool_]:
        """Return ``[frames, H, W]``: the pixels that show the character.

        Args:
            size: width in pixels; by default the source's.
        """
        renderer = Renderer(self.renderer.sprites, size or self.size)
        return np.stack([renderer.masks(scene)[0] for scene in self.story(id).scenes])
