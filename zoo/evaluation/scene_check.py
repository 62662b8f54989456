"""Whether drawn scenes show what their captions state: objects, counts and positions ("a GenEval in small")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.errors import ConfigError, DataError
from zoo.evaluation.catalogue import METRICS, MetricInfo
from zoo.evaluation.drawing import Asked, DrawingConfig, DrawingTask
from zoo.evaluation.evaluator import load_evaluator
from zoo.evaluation.scene_facts import Facts, check, facts_of, stated
from zoo.evaluation.task import Progress, SourceLike, TaskResult, sample_ids, thumbnail

if TYPE_CHECKING:
    from PIL.Image import Image

    from zoo.evaluation.scene_gallery import Gallery

ICON_SIDE = 64
"""Pixels a side at which the gallery's icons are rendered: larger than in any scene of several objects."""
SETS = ("", "_other", "_real", "_blurred")
WHAT = ("objects", "counts", "positions", "scenes")


@dataclass(frozen=True, kw_only=True)
class SceneCheckConfig(DrawingConfig):
    """Fields of the task ``scene-check``: those of `DrawingConfig` and

    Attributes:
        keep: where the checker's threshold lies: it keeps this share of the objects that are named rightly in real
            scenes of half the resolution.
    """

    items: int = 100
    keep: float = 0.95

    task: ClassVar[str] = "scene-check"
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["scene-check"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise ConfigError(f"{self.task}.keep = {self.keep}: expected a share above 0, up to 1")

    def build(self) -> SceneCheck:
        return SceneCheck(self)


class SceneCheck(DrawingTask):
    """Shares of stated objects, counts and positions that the checker finds in drawn scenes, and of scenes in which all
    of them are right (`zoo.evaluation.scene_facts.check`).

    The checker cuts out what is not background (`zoo.evaluation.scene_objects`), names it by the nearest of all icons
    that the source's scenes are made of (`zoo.evaluation.scene_gallery`), and takes it for nothing below a likeness
    that it sets itself on the real scenes of the same items (`keep`), so that no drawn image has a say in it.

    Beside each share: ``*_other``, the same statements looked for in the images of other captions (chance);
    ``*_real``, in the real scenes, and ``*_blurred``, in the real scenes at half their resolution: the checker's error.
    """

    name = "scene-check"
    config: SceneCheckConfig

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        from zoo.evaluation.scene_gallery import Gallery
        from zoo.evaluation.scene_objects import softened

        config = self.config
        icons = scene_icons(source)
        judge = load_evaluator(config.evaluator, self.name, model)
        asked = self.asked(source, split)
        if len(asked) < 2:
            raise DataError(f"{self.name}: one scene has no other one to compare with; give at least 2 items")
        facts, owner = _facts(asked, source.name)
        gallery = Gallery(judge, list(icons.values()), list(icons), batch=config.batch_size)
        real = [one.image for one in asked]
        blurred = [softened(image, max(image.size) // 2) for image in real]
        gallery.least = threshold(gallery, blurred, asked, config.keep)

        pictures, cost = self.draw(model, [text for one in asked for text in one.texts], progress)
        found = gallery.objects(pictures)
        found_real, found_blurred = gallery.objects(real), gallery.objects(blurred)
        first = [owner.index(n) for n in range(len(asked))]  # sample -> the row of its first text
        items: list[dict[str, Any]] = []
        for r, n in enumerate(owner):
            k, far = r - first[n], (r + len(owner) // 2) % len(owner)
            sets = (found[r], found[far], found_real[n], found_blurred[n])
            row: dict[str, Any] = {
                "item": f"{asked[n].id}/{k}" if len(asked[n].texts) > 1 else asked[n].id,
                "cluster": asked[n].cluster,
                "text": asked[n].texts[k],
                "found": ", ".join(f.name for f in found[r]),
                **stated(facts[r]),
            }
            for suffix, own in zip(SETS, sets, strict=True):
                row |= {key + suffix: value for key, value in check(facts[r], own).items()}
            items.append(row)

        metrics: dict[str, float] = {}
        for what in WHAT:
            total = sum(row[f"stated_{what}"] for row in items)
            if total:  # captions of single objects state no position
                metrics |= {f"{what}{s}": sum(row[f"right_{what}{s}"] for row in items) / total for s in SETS}
        metrics |= {"images": float(len(pictures)), "kinds": float(len(icons)), "least": gallery.least} | cost
        shown = set(sample_ids([one.id for one in asked]))
        samples = [
            {
                "id": one.id,
                "output": f"found {items[r]['found'] or 'nothing'}",
                "picture": thumbnail(pictures[r]),
                "text": one.texts[0],
                "kind": "drawn scene",
            }
            for one, r in zip(asked, first, strict=True)
            if one.id in shown
        ]
        return TaskResult(
            name=self.name, metrics=metrics, items=items, spec_hash=self.spec_hash(source, split), samples=samples
        )


def _facts(asked: Sequence[Asked], source: str) -> tuple[list[Facts], list[int]]:
    """What each text states, and the place of the sample that it belongs to."""
    facts, owner = [], []
    for n, one in enumerate(asked):
        names = [str(o["name"]) for o in one.meta.get("objects", ())]
        for text in one.texts:
            try:
                facts.append(facts_of(text, list(dict.fromkeys(names))))
            except ValueError:
                raise DataError(
                    f"scene-check: the caption {text!r} of {one.id} of {source} states nothing that can be checked; use"
                    " data=openmoji-scenes"
                ) from None
            owner.append(n)
    return facts, owner


def scene_icons(source: Any) -> dict[str, Image]:
    """Name -> picture on white of every icon that the scenes of any split are made of.

    Raises:
        DataError: the source has no scenes of icons.
    """
    from PIL import Image as pil

    pools, renderer = getattr(source, "pools", None), getattr(source, "renderer", None)
    if not pools or renderer is None:
        raise DataError(f"scene-check needs scenes whose icons are known, not {source.name}: use data=openmoji-scenes")
    icons = {name: icon for pool in pools.values() for icon, name in zip(pool.icons, pool.names, strict=True)}
    out = {}
    for name, icon in icons.items():
        sprite = pil.fromarray(renderer.sprites.get(icon, ICON_SIDE), "RGBA")
        canvas = pil.new("RGBA", sprite.size, "white")
        canvas.alpha_composite(sprite)
        out[name] = canvas.convert("RGB")
    return out


def threshold(gallery: Gallery, images: Sequence[Image], asked: Sequence[Asked], keep: float) -> float:
    """The likeness that the share ``keep`` of the rightly named objects of these real scenes reaches.

    Raises:
        DataError: the checker names none of them rightly.
    """
    import torch

    right = []
    for one, own in zip(asked, gallery.find(images), strict=True):
        names = {str(o["name"]) for o in one.meta["objects"]}
        right += [likeness for found, likeness in own if found.name in names]
    if not right:
        raise DataError(
            "scene-check: the checker finds no object in the real scenes at half their resolution; give another"
            " evaluator, or larger images"
        )
    return float(torch.tensor(right).quantile(1 - keep))
