"""MUSE-style questions written from templates about any annotated instances: COCO's JSON, and scenes of icons."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.data.public.base import Item, PublicConfig
from zoo.data.sample import BadSample, Sample, SourceConfig
from zoo.data.scenes import Scenes, ScenesConfig, parse_range
from zoo.data.scenes_layout import Stream
from zoo.errors import ConfigError
from zoo_grounding.muse import MaskedAnswers
from zoo_grounding.muse_templates import Instance, Triple, parse_kinds, triples

MOST_TARGETS = 20


@dataclass(frozen=True, kw_only=True)
class MuseCocoConfig(PublicConfig):
    """Questions about the instances of COCO's annotations: ``train``, ``val`` and ``test`` name files like
    instances_val2017.json (``images``, ``annotations`` with polygons or runs, ``categories``).

    ``ask`` is ``any`` or kinds joined by ``+``: names, every, group, largest, smallest, beside, all
    (``zoo_grounding.muse_templates``). ``questions`` bounds those about one image, ``targets`` those of one answer, as
    ``3`` or ``2..5``. Instances smaller than ``min_area`` of the image are left out, and so are crowds. Everything
    follows from ``seed`` and the image's name.
    """

    kind: ClassVar[str] = "muse-coco"
    train: str = ""
    val: str = ""
    test: str = ""
    ask: str = "any"
    questions: int = 3
    targets: str | int = "1..5"
    min_area: float = 0.002
    seed: int = 0

    def open(self, image_size: int | None) -> MuseCoco:
        return MuseCoco(self)


class MuseCoco(MaskedAnswers):
    """See :class:`MuseCocoConfig`. Ids are ``IMAGE/NUMBER``."""

    name = "muse-coco"
    layout = (
        'expected COCO\'s instances: {"images", "annotations": [{"image_id", "category_id", "segmentation"}],'
        ' "categories"}'
    )

    def _check(self) -> None:
        super()._check()
        c: MuseCocoConfig = self.config
        self.kinds = parse_kinds(c.ask)
        self.range = parse_range(c.targets, "data.targets", 1, MOST_TARGETS)
        if c.questions < 1 or not 0 <= c.min_area < 1 or c.seed < 0:
            raise ConfigError(
                f"data.questions = {c.questions}, data.min_area = {c.min_area}, data.seed = {c.seed}: expected 1 or"
                " more, a fraction of the image, and 0 or more"
            )

    def _read(self) -> Iterator[tuple[str, Item]]:
        if not any(getattr(self.config, split) for split in self.wanted):
            raise ConfigError(f"the muse-coco source needs data.train=, data.val= or data.test=FILE: {self.layout}")
        for split in self.wanted:
            if file := getattr(self.config, split):
                for image, asked, marked in self.asked(file, split):
                    name = image_name(image)
                    for number, one in enumerate(asked):
                        own = [marked[place] for place in one.targets]
                        wanted = [(str(annotation["name"]), annotation["segmentation"]) for annotation in own]
                        turn = (one.question, one.answer)
                        yield self.question(f"{image['file_name']}/{number}", name, turn, wanted, split)

    def asked(self, file: str, split: str) -> Iterator[tuple[dict[str, Any], list[Triple], list[dict[str, Any]]]]:
        """Every image that something can be asked about: its row, its triples, and the annotations they speak of."""
        for image, marked, instances in self.annotated(file, split):
            stream = Stream("muse-coco", self.config.seed, image["file_name"])
            asked = triples(instances, stream, self.kinds, self.config.questions, self.range)
            if asked:
                yield image, asked, marked

    def annotated(self, file: str, split: str) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]], list[Instance]]]:
        """The rows of the images of a file, their annotations (with ``name``) and these as instances."""
        path = self.file(file, f"data.{split}")
        whole = self.json(path)
        groups = {
            row["id"]: (str(row["name"]), str(row.get("supercategory") or ""))
            for _, row in self.checked(self.rows(whole, "categories", path), ("id", "name"), path)
        }
        images = {
            row["id"]: row
            for _, row in self.checked(self.rows(whole, "images", path), ("id", "file_name", "height", "width"), path)
        }
        of_image: dict[Any, tuple[list[dict[str, Any]], list[Instance]]] = {}
        needed = ("image_id", "category_id", "segmentation")
        for place, row in self.checked(self.rows(whole, "annotations", path), needed, path):
            image = images.get(row["image_id"])
            if row.get("iscrowd") or image is None:
                continue
            try:
                instance = _instance(row, image, groups)
            except BadSample as error:
                self.bad.add(place, error.reason)
                continue
            if instance.area < self.config.min_area * image["height"] * image["width"]:
                continue
            rows, known = of_image.setdefault(row["image_id"], ([], []))
            rows.append({**row, "name": instance.name})
            known.append(instance)
        for id, (rows, known) in of_image.items():
            yield images[id], rows, known


def image_name(row: Mapping[str, Any]) -> str:
    """The image of a row of COCO's ``images``, with its folder where ``coco_url`` says it."""
    url = row.get("coco_url")
    return "/".join(url.split("/")[-2:]) if isinstance(url, str) and url.count("/") else str(row["file_name"])


def _instance(row: Mapping[str, Any], image: Mapping[str, Any], groups: Mapping[Any, tuple[str, str]]) -> Instance:
    if row["category_id"] not in groups:
        raise BadSample("", f"the category {row['category_id']!r} is not among the categories")
    name, group = groups[row["category_id"]]
    box = row.get("bbox")
    if isinstance(box, list) and len(box) == 4 and isinstance(row.get("area"), int | float):
        x, y, width, height = map(float, box)
        return Instance(name, group, (x, y, x + width, y + height), float(row["area"]))
    from zoo.data.public.masks import mask_of

    try:
        mask = mask_of(row["segmentation"], int(image["height"]), int(image["width"]))
    except (ValueError, TypeError) as error:
        raise BadSample("", f"a mask cannot be read: {error}") from None
    return Instance(name, group, *_extent(mask))


def _extent(mask: NDArray[np.bool_]) -> tuple[tuple[float, float, float, float], float]:
    """Box and area of a mask [H, W]; nothing at 0 where it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0), 0.0
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return box, float(mask.sum())


# -- released layout, for other tools ----------------------------------------------------------------------------------


def muse_rows(source: MuseCoco, file: str, split: str) -> Iterator[dict[str, Any]]:
    """The generated questions of a file of annotations as rows of MUSE's JSON, which ``data=muse`` and the released
    loader read.

    Args:
        source: Which kinds of questions, how many, and the seed.
        file: COCO's annotations, as the source's own field has them.
        split: For messages.
    """
    for image, asked, marked in source.asked(file, split):
        listed = [
            {
                "segmentation": row["segmentation"],
                "bbox": row.get("bbox"),
                "category_id": row["category_id"],
                "category_name": row["name"],
                "rephrased_name": row["name"],
            }
            for row in marked
        ]
        kept: dict[str, Any] = {
            key: image[key] for key in ("file_name", "coco_url", "height", "width", "id") if key in image
        }
        yield {
            **kept,
            "ann_list": listed,
            "questions": [one.question for one in asked],
            "answers": [[listed[place] for place in one.targets] for one in asked],
            "text_answers": [one.answer for one in asked],
        }


# -- scenes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MuseScenesConfig(SourceConfig):
    """Scenes of icons with one question a scene, answered with a mask of each instance that it asks for.

    Scenes are those of ``data=openmoji-scenes`` without questions (see its fields of the same names); ``ask`` and
    ``targets`` are as in ``muse-coco``.
    """

    kind: ClassVar[str] = "muse-scenes"
    size: int | None = None
    objects: str | int = "2..5"
    ask: str = "any"
    targets: str | int = "1..4"
    icons: Literal["heldout", "train"] = "heldout"
    kinds: int = 0
    overlap: bool = False
    background: Literal["white", "coloured"] = "white"
    train_scenes: int = 20_000
    val_scenes: int = 500
    test_scenes: int = 1_000
    seed: int = 0

    def open(self, image_size: int | None) -> MuseScenes:
        scenes = ScenesConfig(
            size=self.size,
            objects=self.objects,
            questions="none",
            icons=self.icons,
            kinds=self.kinds,
            overlap=self.overlap,
            background=self.background,
            train_scenes=self.train_scenes,
            val_scenes=self.val_scenes,
            test_scenes=self.test_scenes,
            seed=self.seed,
        )
        return MuseScenes(self, scenes.open(image_size))


class MuseScenes:
    """See :class:`MuseScenesConfig`. Ids, pictures and splits are those of the scenes."""

    name = "muse-scenes"
    max_bad = 0

    def __init__(self, config: MuseScenesConfig, scenes: Scenes) -> None:
        self.scenes = scenes
        self.kinds = parse_kinds(config.ask)
        self.range = parse_range(config.targets, "data.targets", 1, MOST_TARGETS)
        self.seed = config.seed
        self.licence = scenes.licence
        self.version = f"{scenes.version}/muse1/{json.dumps([self.kinds, self.range])}"

    def ids(self, split: str) -> list[str]:
        return self.scenes.ids(split)

    def text_sample(self, id: str) -> Sample:
        """Return the sample without its image and masks; ``meta`` as the scene's, and ``turns``, ``targets`` (names in
        order of mention) and ``target_objects`` (their places in ``meta["objects"]``).

        Raises:
            BadSample: nothing that was wanted can be asked about this scene.
        """
        known = self.scenes.text_sample(id)
        objects = known.meta["objects"]
        instances = []
        for one in objects:
            left, top, right, bottom = map(float, one["box"])
            instances.append(Instance(one["name"], "", (left, top, right, bottom), (right - left) * (bottom - top)))
        asked = triples(instances, Stream("muse-scenes", self.seed, id), self.kinds, 1, self.range)
        if not asked:  # a fixed question keeps every id usable: all that is there, or as many as an answer may have
            asked = triples(instances, Stream("muse-scenes", self.seed, id, "names"), ("names",), 1, (1, self.range[1]))
        if not asked:
            raise BadSample(id, f"no scene of {len(objects)} objects has an answer of {self.range[1]} targets")
        (one,) = asked
        names = [objects[place]["name"] for place in one.targets]
        meta = {"turns": [(one.question, one.answer)], "targets": names, "target_objects": list(one.targets)}
        return replace(known, meta={**known.meta, **meta})

    def sample(self, id: str) -> Sample:
        """Return the picture, its question and answer, and ``meta["masks"]``, [H, W] bool each."""
        from PIL import Image

        known = self.text_sample(id)
        picture = Image.fromarray(self.scenes.renderer.image(self.scenes.scene(id)))
        masks = self.scenes.masks(id)[known.meta["target_objects"]]
        return replace(known, image=picture, meta={**known.meta, "masks": list(masks)})

    def masks(self, id: str, size: int | None = None) -> NDArray[np.bool_]:
        """Return ``[objects, H, W]`` of ``meta["objects"]``, as the scenes do."""
        return self.scenes.masks(id, size)

    def prepare(self) -> None:
        self.scenes.prepare()

    @property
    def icon_sizes(self) -> tuple[int, ...]:
        return self.scenes.icon_sizes
