"""Pictures before and after a change, with the instruction that leads from one to the other."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.data.openmoji import DEFAULT_SIZE
from zoo.data.sample import Sample, SourceConfig
from zoo.data.scenes import ATTEMPTS, ScenesConfig, compose, described
from zoo.data.scenes_derived import Derived
from zoo.data.scenes_edits import VARIANTS, Edit, apply, draw, form, parse_edits, wordings
from zoo.data.scenes_layout import Scene, Stream
from zoo.data.scenes_render import Renderer
from zoo.data.scenes_texts import prompt
from zoo.errors import ConfigError, DataError

RULES = 1
"""Raised whenever the same fields make other scenes, other changes or other instructions."""
TRIES = 12
"""Changes drawn for one scene before another scene is drawn."""
INSISTS = 500
"""Scenes drawn for one variant of a kind (larger, beside another, ...) before the other one is taken too."""


@dataclass(frozen=True, kw_only=True)
class EditsConfig(SourceConfig):
    """Edit pairs over scenes of OpenMoji icons: a picture, an instruction, and the picture that it leads to.

    All follows from ``seed`` and the id alone. ``edits`` is ``all`` or kinds joined by ``+``: add, remove, replace,
    move, resize, background (``zoo.data.scenes_edits`` says where things come to lie); each kind is drawn equally
    often, and so are larger and smaller, beside another and in a corner, beside another and to the edge. ``objects`` is
    how many icons the first picture has, as ``3`` or ``1..4`` (at most 8). ``icons``, ``kinds`` (of icons) and
    ``background`` are as for scenes: with ``icons="train"`` both pictures belong to the split that also
    ``data=openmoji-scenes`` shows them in. ``size`` None takes the model's image size.
    """

    kind: ClassVar[str] = "openmoji-edits"
    size: int | None = None
    edits: str = "all"
    objects: str | int = "1..4"
    icons: Literal["heldout", "train"] = "heldout"
    kinds: int = 0
    background: Literal["white", "coloured"] = "coloured"
    train_edits: int = 20_000
    val_edits: int = 500
    test_edits: int = 1_000
    seed: int = 0

    def open(self, image_size: int | None) -> Edits:
        return Edits(self, self.size or image_size or DEFAULT_SIZE)


@dataclass(frozen=True, slots=True)
class EditPair:
    """``after`` is ``before`` with ``edit`` applied; ``texts`` say so in several wordings, in a random order."""

    before: Scene
    edit: Edit
    after: Scene
    texts: tuple[str, ...]


class Edits(Derived):
    """See :class:`EditsConfig`. Ids are ``train-000000`` and so on.

    Raises:
        ConfigError: a field is out of range, or no scene of so few objects allows the wanted changes.
        MissingExtra: a package that carries the icons or the names is not installed.
    """

    name = "openmoji-edits"
    what = "edits"

    def __init__(self, config: EditsConfig, size: int = DEFAULT_SIZE) -> None:
        self.config = config
        self.kinds = parse_edits(config.edits)
        scenes = ScenesConfig(
            objects=config.objects,
            questions="none",
            icons=config.icons,
            kinds=config.kinds,
            background=config.background,
            seed=config.seed,
        )
        counts = {"train": config.train_edits, "val": config.val_edits, "test": config.test_edits}
        super().__init__(scenes, counts, changes=1, size=size)
        if self.base.objects[1] == 1:  # of one object none can be taken away: something must be left
            self.kinds = tuple(kind for kind in self.kinds if kind != "remove")
            if not self.kinds:
                raise ConfigError(f'edits = "remove" needs two objects, and objects = {config.objects!r} gives one')
        own = {"edits": config.edits, **counts}
        self.version = f"{self.base.version}/edits{RULES}/{json.dumps(own, sort_keys=True)}"

    def pair(self, id: str) -> EditPair:
        """Return the description from which everything else follows.

        Raises:
            DataError: there is no such id.
        """
        found: EditPair = self._kept(id)
        return found

    def _compose(self, id: str) -> EditPair:
        split = self.split_of(id)
        pool, seed = self.base.pools[split], self.config.seed
        first = Stream("edit-kind", seed, id)  # before the scene, so that none is drawn less often
        kind = first.choice(self.kinds)
        variant = first.choice(VARIANTS.get(kind, (None,)))
        for attempt in range(ATTEMPTS):
            stream = Stream("edit", seed, id, attempt)
            before = compose(pool, stream, self.base.objects, self.base.config)
            if not self.owned(split, before):
                continue
            for _ in range(TRIES):
                edit = draw(kind, before, pool, stream, None, variant if attempt < INSISTS else None)
                if edit is None:
                    break
                after = apply(edit, before)
                if self.owned(split, after):
                    return EditPair(before, edit, after, tuple(stream.shuffled(wordings(edit))))
        raise DataError(
            f"no scene of {self.config.objects} objects with icons={self.config.icons} allows the change {kind!r};"
            " allow other edits or fewer objects"
        )

    def text_sample(self, id: str) -> Sample:
        """Return the sample without its images.

        ``texts`` are wordings of the instruction. ``meta``: ``parts`` (0, the first wording, 1) of which the first two
        are ``given``; ``edit``: the fields of :class:`~zoo.data.scenes_edits.Edit` but ``targets`` and ``placed``, and
        its ``form`` (kind and what sets it apart); ``before`` and ``after``: ``objects`` (icon, name, box in pixels,
        group) and ``background``; ``captions``: a prompt of each picture.
        """
        pair = self.pair(id)
        known = {k: v for k, v in asdict(pair.edit).items() if k not in ("targets", "placed")}
        meta = {
            "parts": (0, pair.texts[0], 1),
            "given": 2,
            "edit": {**known, "form": form(pair.edit)},
            "before": described(pair.before, self.renderer),
            "after": described(pair.after, self.renderer),
            "captions": (prompt(pair.before), prompt(pair.after)),
        }
        return Sample(id, None, pair.texts, meta)

    def sample(self, id: str) -> Sample:
        """Return both pictures at ``size`` pixels as ``meta["images"]``, the first also as ``image``."""
        from PIL import Image

        known, pair = self.text_sample(id), self.pair(id)
        images = tuple(Image.fromarray(self.renderer.image(scene)) for scene in (pair.before, pair.after))
        return replace(known, image=images[0], meta={**known.meta, "images": images})

    def masks(self, id: str, size: int | None = None) -> NDArray[np.bool_]:
        """Return ``[2, H, W]``: the pixels before and after of what the instruction concerns: objects that are changed
        or taken away, and what stands there afterwards; for ``background`` everything that is no object.

        Args:
            size: width in pixels; by default the source's.
        """
        pair = self.pair(id)
        renderer = Renderer(self.renderer.sprites, size or self.size)
        before, after = renderer.masks(pair.before), renderer.masks(pair.after)  # [objects, H, W]
        if pair.edit.kind == "background":
            return np.stack([~before.any(0), ~after.any(0)])
        old = pair.edit.targets
        new = (len(after) - 1,) if pair.edit.kind == "add" else () if pair.edit.kind == "remove" else old
        return np.stack([before[list(old)].any(0), after[list(new)].any(0)])
