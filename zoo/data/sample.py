"""What a source gives: samples in named splits, the same ids in the same order every time."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from zoo.errors import ConfigError, DataError, near

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

SPLITS = ("train", "val", "test")

log = logging.getLogger("zoo.data")


@dataclass(frozen=True)
class Sample:
    """One item: an image with one or more texts, or either alone.

    ``meta`` may hold

    - ``images``: all images in order, where there are several; ``image`` is then the first (``images_of``);
    - ``turns``: a sequence of (question, answer) pairs, which the prompt processor lays out as a dialogue;
    - ``parts``: the sample as texts and images in one order: a tuple of ``str`` and of ``int``, the place of an image
      in ``images``, each image once and ascending. ``given`` (int, 0 if absent) is how many leading parts a model is
      given and never asked for. See :func:`parts_of` and :func:`interleaved`.
    """

    id: str
    image: Image.Image | None = None
    texts: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Source(Protocol):
    """Samples by id. ``ids(split)`` never changes for one ``version``; ``sample`` may raise :class:`BadSample`."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def licence(self) -> str: ...
    @property
    def max_bad(self) -> int: ...
    def ids(self, split: str) -> list[str]: ...
    def sample(self, id: str) -> Sample: ...


@runtime_checkable
class ArraySource(Source, Protocol):
    """A source whose images all have one size and lie ready as bytes, so that a batch is one indexing operation."""

    def images(self, ids: Sequence[str]) -> NDArray[np.uint8]:
        """Return the images of ``ids`` as ``[n, H, W, 3]``, RGB."""
        ...

    def text_sample(self, id: str) -> Sample:
        """Return the sample without its image."""
        ...


class BadSample(DataError):
    """One sample cannot be read. The reader counts it, skips it, and gives up beyond the source's ``max_bad``."""

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(f"sample {id!r}: {reason}")
        self.id = id
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.id, self.reason)  # it crosses from the worker to the main process


class BadSamples:
    """Counts bad samples by id, logs each once, and raises when there are more than ``limit``."""

    def __init__(self, source: str, limit: int) -> None:
        self.source = source
        self.limit = limit
        self.reasons: dict[str, str] = {}

    def add(self, id: str, reason: str) -> None:
        """Count one bad sample.

        Raises:
            DataError: the limit is passed; the message names the first one.
        """
        if id in self.reasons:
            return
        self.reasons[id] = reason
        log.warning("%s: skipped sample %r: %s", self.source, id, reason)
        if len(self.reasons) > self.limit:
            first = next(iter(self.reasons))
            raise DataError(
                f"{self.source}: {len(self.reasons)} samples cannot be read, more than max_bad={self.limit}; "
                f"the first is {first!r} ({self.reasons[first]}); repair them or raise max_bad"
            )

    def __len__(self) -> int:
        return len(self.reasons)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Base of the configurations of sources.

    ``blank_images`` gives the text-only control of any source. ``text_only`` takes the images away, so that the texts
    are left to a language model. ``shuffled_captions`` is the fraction of the training
    samples that get each other's texts, ``trusted`` the fraction that never does and is marked so
    (``zoo.data.shuffled``).
    """

    kind: ClassVar[str] = ""
    blank_images: bool = False
    text_only: bool = False
    shuffled_captions: float = 0.0
    trusted: float = 0.0

    def build(self, image_size: int | None = None) -> Source:
        """Open the source.

        Args:
            image_size: the size the model reads, in pixels; a source that can render at any size takes it.

        Raises:
            DataError: the source cannot be used; nothing long has been done by then.
        """
        if not 0 <= self.shuffled_captions <= 1 or not 0 <= self.trusted <= 1:
            raise ConfigError(
                f"data.shuffled_captions = {self.shuffled_captions}, data.trusted = {self.trusted}: expected fractions"
                " between 0 and 1"
            )
        if self.blank_images and self.text_only:
            raise ConfigError("data.blank_images keeps images and data.text_only takes them away: set one of the two")
        source = self.open(image_size)
        if self.shuffled_captions or self.trusted:
            from zoo.data.shuffled import ShuffledCaptions

            source = ShuffledCaptions(source, self.shuffled_captions, self.trusted)
        if self.text_only:
            return TextOnly(source)
        return BlankImages(source) if self.blank_images else source

    def open(self, image_size: int | None) -> Source:
        """Open the source itself, before wrapping."""
        raise TypeError(f"{type(self).__name__} defines no open")


class Wrapped:
    """Base of what shows another source differently: ids, order and everything not said otherwise are the source's."""

    source: Source
    hidden: ClassVar[frozenset[str]] = frozenset({"source", "images", "text_sample"})
    """What is not passed on: it is of the other source's images, or this one's own."""

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def version(self) -> str:
        return self.source.version

    @property
    def licence(self) -> str:
        return self.source.licence

    @property
    def max_bad(self) -> int:
        return self.source.max_bad

    def ids(self, split: str) -> list[str]:
        return self.source.ids(split)

    def __getattr__(self, name: str) -> Any:
        # what else the wrapped source offers (attributes, candidates, ...) stays reachable
        if name.startswith("_") or name in self.hidden:
            raise AttributeError(name)
        return getattr(self.source, name)


class BlankImages(Wrapped):
    """Any source with every image replaced by one colour of the same size: the control that reads only the text.

    Ids, order and texts, and therefore ``version``, are those of the wrapped source; ``control`` tells the two apart.
    """

    control = True

    def __init__(self, source: Source, color: tuple[int, int, int] = (255, 255, 255)) -> None:
        self.source = source
        self.color = color
        if isinstance(source, ArraySource):
            self.images = self._images
            self.text_sample = source.text_sample

    def sample(self, id: str) -> Sample:
        from PIL import Image

        sample = self.source.sample(id)
        if sample.image is None:
            return sample
        meta = dict(sample.meta)
        if meta.get("images"):
            meta["images"] = tuple(Image.new("RGB", image.size, self.color) for image in meta["images"])
        return Sample(sample.id, Image.new("RGB", sample.image.size, self.color), sample.texts, meta)

    def _images(self, ids: Sequence[str]) -> NDArray[np.uint8]:
        import numpy as np

        assert isinstance(self.source, ArraySource)
        shape = (len(ids), *self.source.images(ids[:1]).shape[1:])
        return np.broadcast_to(np.asarray(self.color, np.uint8), shape).copy()  # [n, H, W, 3]


class TextOnly(Wrapped):
    """Any source without its images: the texts for a language model. Ids and order are those of the wrapped source."""

    # what is of the images, which need not even be rendered
    hidden: ClassVar[frozenset[str]] = frozenset({"source", "images", "masks", "prepare", "image_stamp"})

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def version(self) -> str:
        return f"{self.source.version}/text-only"

    def sample(self, id: str) -> Sample:
        """Return the sample without images; of ``meta["parts"]`` the texts are left.

        Raises:
            BadSample: it has no text.
        """
        alone: Any = getattr(self.source, "text_sample", self.source.sample)
        found: Sample = alone(id)
        if not found.texts:
            raise BadSample(id, "it has no text, and data.text_only leaves nothing else")
        meta = {key: value for key, value in found.meta.items() if key != "images"}
        if "parts" in meta:
            meta["parts"] = tuple(part for part in meta["parts"] if isinstance(part, str))
            meta["given"] = 0
        return replace(found, image=None, meta=meta)

    text_sample = sample


def parts_of(sample: Sample) -> tuple[str | int, ...]:
    """Return the sample as texts and places of images (``meta["parts"]``); else its one image before its first text.

    Raises:
        DataError: ``meta["parts"]`` holds something else, or not every image once and in order.
    """
    stored = sample.meta.get("parts")
    if stored is None:
        shown = (0,) if sample.image is not None or sample.meta.get("images") else ()
        return (*shown, *sample.texts[:1])
    parts = tuple(stored)
    places = [part for part in parts if isinstance(part, int) and not isinstance(part, bool)]
    texts = [part for part in parts if isinstance(part, str)]
    if len(places) + len(texts) != len(parts) or places != list(range(len(places))):
        raise DataError(
            f"sample {sample.id!r}: meta['parts'] must be texts and the places 0, 1, ... of its images in order"
        )
    given = sample.meta.get("given", 0)
    if not isinstance(given, int) or not 0 <= given <= len(parts):
        raise DataError(f"sample {sample.id!r}: meta['given'] = {given!r} must be from 0 to its {len(parts)} parts")
    return parts


def interleaved(sample: Sample) -> list[str | Image.Image]:
    """Return :func:`parts_of` with the images themselves.

    Raises:
        DataError: the parts name another number of images than the sample has.
    """
    several = sample.meta.get("images")
    images = list(several) if several else [] if sample.image is None else [sample.image]
    parts = parts_of(sample)
    named = sum(isinstance(part, int) for part in parts)
    if named != len(images):
        raise DataError(f"sample {sample.id!r}: its parts name {named} images, and it has {len(images)}")
    return [images[part] if isinstance(part, int) else part for part in parts]


def check_split(split: str) -> None:
    """Raise a ConfigError with near names unless ``split`` is train, val or test."""
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}{near(split, SPLITS)}")


def split_of(id: str, counts: Mapping[str, int], name: str) -> str:
    """Return the split of an id such as ``train-000012`` of a source that numbers its samples.

    Args:
        counts: how many samples each split has.
        name: the source, for the message.

    Raises:
        DataError: there is no such id.
    """
    split, _, number = id.partition("-")
    if split not in SPLITS or not number.isdigit() or len(number) < 6 or int(number) >= counts[split]:
        known = ", ".join(f"{s}-000000 to {s}-{n - 1:06d}" for s, n in counts.items() if n)
        raise DataError(f"unknown id {id!r} of {name}; there are {known}")
    return split


def read(source: Source, ids: Iterable[str]) -> Iterator[Sample]:
    """Yield the samples of ``ids`` in order, skipping bad ones up to ``source.max_bad``.

    Raises:
        DataError: more than ``max_bad`` samples cannot be read.
    """
    bad = BadSamples(source.name, source.max_bad)
    for id in ids:
        try:
            sample = source.sample(id)
        except BadSample as error:
            bad.add(error.id, error.reason)
            continue
        yield sample


def stable_hash(*parts: object) -> int:
    """Return 64 bits that depend on nothing but ``parts``: equal on every machine, process and library version."""
    text = json.dumps([str(p) for p in parts], ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def data_hash(source: Source, split: str) -> str:
    """Return the sha256 (hex) of what the split is: name, version, and each id in order.

    ``version`` covers texts and images; a text-only control hashes like the source it blanks, as its manifest says so.
    """
    digest = hashlib.sha256(json.dumps([source.name, source.version, split]).encode())
    for id in source.ids(split):
        digest.update(id.encode() + b"\0")
    return digest.hexdigest()
