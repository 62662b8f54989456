"""The frozen-feature cache of one run: whether it may be used, filling it, and checking it against the encoder.

``trainer.cache_features=true`` makes a run read its frozen encoder's tokens, or its frozen image tokenizer's codes or
latents, from ``zoo.data.feature_cache``. What the
run learns is what it learns without (``cache_dtype=float16`` rounds the tokens and is part of the run's hash);
evaluation reads pixels as always.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from zoo.data.feature_cache import GB, CachedFeatures, FeatureStore, image_transform, weights_hash
from zoo.data.processor import images_of
from zoo.data.sample import ArraySource, BadSample, BadSamples, Sample, Source
from zoo.errors import ConfigError, DataError
from zoo.models.base import Model, square_grid
from zoo.part import Features
from zoo.registry import to_plain

if TYPE_CHECKING:
    from zoo.data.images import ImageTransform
    from zoo.module import ZooModule
    from zoo.run_config import RunConfig

CHECKED = 4
"""Images whose cached tokens are compared with recomputed ones when a run starts."""

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Stored dtype -> largest difference from recomputed tokens, as a share of the image's largest value (at least 1).
Rounding depends on how many images are encoded at once; in fp32 it moves a token by about 1e-6."""

CODES_TOLERANCE = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Precision -> largest share of codes that may differ from recomputed ones: rounding flips what lies between two."""

BATCH = 32
"""Images encoded at once while filling."""


@dataclass
class RunFeatures:
    """What a run has of its cache.

    Attributes:
        features: For ``zoo.data.loader.loader``.
        images: Distinct images the run reads.
        computed: How many of them this process encoded; the others were there.
        seconds: Spent on checking and filling.
    """

    features: CachedFeatures
    images: int
    computed: int
    seconds: float

    def to_plain(self) -> dict[str, Any]:
        return {
            "set": self.features.store.name,
            "stored": str(self.features.store.dtype).removeprefix("torch."),
            "images": self.images,
            "computed": self.computed,
            "bytes": self.images * self.features.store.row_bytes,
            "seconds": round(self.seconds, 3),
        }


def check_cacheable(config: RunConfig, module: ZooModule | None = None) -> None:
    """Refuse a run whose features cannot be cached; nothing is computed.

    Args:
        module: The run's model; built on the meta device when not given.

    Raises:
        ConfigError: The wiring reads the encoder otherwise, the encoder learns in a stage, or images are augmented.
    """
    if not config.trainer.cache_features:
        return
    recipe = config.recipe
    if module is None:
        from zoo.api import build_module

        with torch.device("meta"):
            module = build_module(recipe, config.seed)
    off = "leave trainer.cache_features off"
    slot = cached_slot(module.model)
    if not slot:
        raise ConfigError(
            f"{recipe.name}: wiring {recipe.wiring[0]!r} reads more of its encoder than the tokens a cache keeps: {off}"
        )
    if getattr(getattr(module.model, slot), "stored", False):
        raise ConfigError(f"{recipe.name}: its image tokenizer stores its codes, so nothing is computed: {off}")
    now = module.stage
    for index, stage in enumerate(recipe.stages):
        module.set_stage(index)
        encoder: Any = getattr(module.model, slot)
        trains = any(p.requires_grad for p in encoder.parameters())
        module.set_stage(now)
        if trains:
            raise ConfigError(
                f"{recipe.name}: the {slot} learns in stage {stage.name!r}, so that its features change: {off}, or"
                f" keep the {slot} out of every stage's train"
            )
        augment = getattr(recipe.stage_wiring(index), "augment", "none")
        if augment != "none":
            raise ConfigError(
                f"{recipe.name}: wiring.augment = {augment} draws another image each time, which no cache can hold:"
                f" {off}, or set wiring.augment=none"
            )


def open_features(
    config: RunConfig,
    module: ZooModule,
    source: Source,
    drawn: int | None,
    weights: Mapping[str, Any] | None = None,
    progress: Any = None,
) -> RunFeatures:
    """Open the run's set, compare a few images with what is there, and encode what is not.

    Several processes may call this at once: one encodes, the others wait and read its rows.

    Args:
        drawn: Places of the order that the run's steps draw; None where the clock ends them, and every sample may be.
        weights: Those that the run resumes from: their encoder need not be the module's new one (``init``).
        progress: Called as ``progress(phase, done, total, values)``.

    Raises:
        ConfigError: As ``check_cacheable``, or the features are larger than ``trainer.cache_max_gb``.
        DataError: Cached features differ from recomputed ones, or images cannot be read.
        RunError: The folder cannot be written, or the disk has no room.
    """
    check_cacheable(config, module)
    if weights is not None:
        module.load_state_dict(weights)
    started = time.perf_counter()
    filler = _Filler(config, module, source, drawn)
    try:
        ids = filler.wanted()
        filler.fill(ids, progress)
    finally:
        filler.close()
    images = sum(map(filler.features.count, ids))
    return RunFeatures(filler.features, images, filler.computed, time.perf_counter() - started)


class _Filler:
    """Encodes a run's images on its device."""

    def __init__(self, config: RunConfig, module: ZooModule, source: Source, drawn: int | None) -> None:
        self.config = config
        self.source = source
        self.model = module.model
        self.slot = cached_slot(module.model)
        self.encoder: Any = cast("Any", getattr(module.model, self.slot))
        self.transform: ImageTransform = image_transform(module.processor)
        if self.transform.augment != "none":
            raise ConfigError(f"{config.recipe.name}: its images are augmented: leave trainer.cache_features off")
        self.device = fill_device(config.trainer.accelerator)
        self.home = next(self.encoder.parameters()).device
        self.name = row_name(self.model)
        self.weights = weights_hash(self.encoder)
        self.training: bool = self.encoder.training
        self.encoder.to(self.device).eval()
        self.bad = BadSamples(source.name, source.max_bad)
        self.computed = 0
        size = self.transform.size
        probe = self._rows(torch.zeros(1, 3, size, size))
        computed = probe.dtype
        stored = torch.float16 if config.trainer.cache_dtype == "float16" else computed
        if self.name == "image_codes":
            stored = torch.int16 if self.encoder.codes <= torch.iinfo(torch.int16).max + 1 else torch.int32
        self.store = FeatureStore(cache_root(config), self._about(), tuple(probe.shape[1:]), stored)
        self.drawn = drawn
        stamp = getattr(source, "image_stamp", None)
        self.features = CachedFeatures(self.store, computed, stamp, self.drawn, self.name)

    def close(self) -> None:
        self.encoder.to(self.home)
        self.encoder.train(self.training)

    def _about(self) -> dict[str, Any]:
        """Everything that decides a row beside the image's key."""
        from zoo.data.shuffled import ShuffledCaptions
        from zoo.plugin import catalogue

        name, part = self.config.recipe.parts[self.slot]
        values = {k: v for k, v in self.config.data.items() if k != "name"}
        data = to_plain(catalogue()["data"].parse(self.config.data["name"], values, "data"))
        source: Any = self.source
        if isinstance(source, ShuffledCaptions):  # its images are those of the source inside
            source = source.source
        return {
            "format": 1,
            self.slot: {"name": name, "config": to_plain(part), "weights": self.weights},
            "transform": {k: v for k, v in asdict(self.transform).items() if k in TRANSFORM},
            "source": {"name": source.name, "version": source.version},
            "data": {k: v for k, v in data.items() if k not in ("shuffled_captions", "trusted")},
            "image_size": self.config.recipe.image_size,
            "precision": self.config.trainer.precision,
            "device": self.device.type,  # kernels differ by more than a check allows
        }

    def wanted(self) -> list[str]:
        """Ids of the samples that the run's steps draw."""
        from zoo.data.order import SampleOrder, training_order

        ids = self.source.ids("train")
        order = training_order(self.source, self.config.seed)
        if self.drawn is None or (isinstance(order, SampleOrder) and self.drawn >= len(ids)):
            return ids
        kept = {draw.id for draw in order.slice(0, self.drawn)}
        return [id for id in ids if id in kept]

    def fill(self, ids: Sequence[str], progress: Any) -> None:
        """Bring every image of ``ids`` into the store."""
        known, missing = self._split(ids)
        self._check(known)
        limit = int(self.config.trainer.cache_max_gb * GB)

        def tell(phase: str, done: int) -> None:
            if progress is not None:
                progress(phase, done, len(missing), {})

        if missing:
            with self.store.filling(lambda: tell("waiting for another run to encode", 0)):
                found, missing = self._split(missing)  # another process may have been quicker
                self._check(found)
                # a sample has one image as a rule: too little room is found out before the first is encoded
                self.store.reserve(len(missing), limit)
                done = 0
                for keys, pixels, samples in self._images(missing):
                    if keys:
                        self.store.reserve(len(keys), limit)
                        self.store.append(keys, self._rows(pixels))
                    self.computed += len(keys)
                    done += samples
                    tell("features", done)
        if len(self.bad) and len(ids) < len(self.source.ids("train")):
            # what stands in for a sample that cannot be read comes from later in the order
            self.fill(self.source.ids("train"), progress)

    def _split(self, ids: Sequence[str]) -> tuple[list[str], list[str]]:
        known = [id for id in ids if self.features.knows(id)]
        there = set(known)
        return known, [id for id in ids if id not in there and id not in self.bad.reasons]

    def _check(self, known: Sequence[str]) -> None:
        """Compare the tokens of a few images with recomputed ones.

        Raises:
            DataError: They differ by more than ``TOLERANCE``.
        """
        if not known:
            return
        picked = [known[i * (len(known) - 1) // max(1, CHECKED - 1)] for i in range(min(CHECKED, len(known)))]
        for keys, pixels, _ in self._images(list(dict.fromkeys(picked))):
            rows = [self.store.row(key) for key in keys]
            if None in rows or not rows:
                continue
            cached = self.store.read([row for row in rows if row is not None])
            fresh = self._rows(pixels).cpu()  # [N, ...]
            if self.name == "image_codes":
                worst, of = float((cached != fresh).float().mean()), "as a share of all codes"
                limit = CODES_TOLERANCE[self.precision]
            else:
                scale = fresh.double().flatten(1).abs().amax(1).clamp(min=1)  # [N]
                worst = float(((cached.double() - fresh.double()).flatten(1).abs().amax(1) / scale).max())
                limit, of = max(TOLERANCE[self.store.dtype], TOLERANCE[self.precision]), "of their largest value"
            if not worst <= limit:
                raise DataError(
                    f"the cached features in {self.store.folder} are stale: recomputed ones differ by {worst:.2g} {of}"
                    " (images or libraries have changed): delete that folder and run again"
                )

    def _images(self, ids: Sequence[str]) -> Iterator[tuple[list[bytes], Tensor, int]]:
        """Keys [N], pixel values [N, 3, S, S] and the number of samples of some ids at a time.

        The images of a sample come last one first: where its first one is in the store, all of them are.
        """
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            if isinstance(self.source, ArraySource):
                yield [self.features.key(id) for id in part], self._pixels(self.source, part), len(part)
                continue
            keys: list[bytes] = []
            images: list[Any] = []
            for id in part:
                sample = self._read(id)
                if sample is not None:
                    own = images_of(sample)
                    keys += [self.features.key(id, place) for place in reversed(range(len(own)))]
                    images += reversed(own)
            yield keys, self.transform(images) if images else torch.empty(0), len(part)

    def _pixels(self, source: ArraySource, ids: Sequence[str]) -> Tensor:
        pixels = source.images(ids)  # [N, H, W, 3]
        if self.transform.takes_arrays(pixels.shape[1], pixels.shape[2], True):
            return self.transform.from_array(pixels)
        from PIL import Image

        return self.transform([Image.fromarray(p) for p in pixels])

    def _read(self, id: str) -> Sample | None:
        try:
            return self.source.sample(id)
        except BadSample as error:
            self.bad.add(error.id, error.reason)
            return None

    def _rows(self, pixels: Tensor) -> Tensor:
        """What the cache keeps of images [N, 3, S, S]: tokens [N, n, D], codes [N, n] or latents [N, C or 2C, h, w].

        Raises:
            ConfigError: An encoder that returns more than its tokens.
        """
        with torch.no_grad(), self._autocast():
            made: Any
            if self.slot == "image_tokenizer":
                part = self.encoder.statistics if self.name != "image_codes" else self.encoder.encode
                made = part(pixels.to(self.device))
                if self.name == "image_latents" and not self.model.draws_latents:
                    made = self.encoder.drawn(made)
                return cast("Tensor", made)
            made = self.encoder(pixels.to(self.device))
        features = cast("Features", made)
        if features.mask is not None or features.grid not in (None, square_grid(features.tokens.shape[1])):
            raise ConfigError(
                f"encoder {self.config.recipe.parts['encoder'][0]!r} returns a mask or a grid that is not square, which"
                " cached features do not have: leave trainer.cache_features off"
            )
        return features.tokens

    @property
    def precision(self) -> torch.dtype:
        """What the run computes in."""
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return dtypes.get(self.config.trainer.precision, torch.float32)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)


def cached_slot(model: Model) -> str:
    """The slot whose outputs a cache may keep for a model: ``encoder``, ``image_tokenizer``, or none."""
    if model.reads_image_tokens:
        return "encoder"
    return "image_tokenizer" if model.reads_image_codes else ""


def row_name(model: Model) -> str:
    """What a batch of cached rows calls them: ``image_tokens``, ``image_codes`` or ``image_latents``."""
    if model.reads_image_tokens:
        return "image_tokens"
    tokenizer: Any = model.image_tokenizer
    return "image_codes" if tokenizer.discrete else "image_latents"


def without_pixels(model: Model, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of the right shapes with zeros for cached rows in place of ``pixel_values``, for counting FLOPs."""
    other = dict(batch)
    pixels = other.pop("pixel_values")
    part: Any = getattr(model, cached_slot(model))
    name = row_name(model)
    if name == "image_tokens":
        other[name] = pixels.new_zeros(len(pixels), part.tokens, part.width)
    elif name == "image_codes":
        other[name] = pixels.new_zeros(len(pixels), math.prod(part.grid), dtype=torch.long)
    else:
        other[name] = pixels.new_zeros(len(pixels), part.channels * (2 if model.draws_latents else 1), *part.grid)
    return other


TRANSFORM = ("size", "mean", "std", "mode", "interpolation")
"""Fields of the image transform that decide pixels without augmentation."""


def cache_root(config: RunConfig) -> Path:
    """Where sets of features lie: below ``trainer.cache_dir``, else below the zoo's cache folder (``$ZOO_CACHE``)."""
    from zoo.data.openmoji import cache_folder

    own = config.trainer.cache_dir
    return (Path(own).expanduser() if own else cache_folder()) / "features"


def fill_device(accelerator: str) -> torch.device:
    """The device this process's Trainer will use."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
