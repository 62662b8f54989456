"""Judges of generated images: a two-tower checkpoint that the zoo trained, which no run that it judges learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from zoo.capabilities import EmbedImages, EmbedTexts, capabilities_of
from zoo.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

HOW = "train one with `zoo train model=clip data=openmoji scale=tiny` and give its run directory: evaluator=PATH"


class Judge(Protocol):
    """What the tasks ask of an evaluator: images and texts as vectors [N, D] of unit length in one space."""

    def embed_images(self, images: Sequence[Any]) -> Tensor: ...
    def embed_texts(self, texts: Sequence[str]) -> Tensor: ...


def evaluator_folder(path: str, task: str) -> Path:
    """Return the checkpoint folder of a run directory or checkpoint, without reading its weights.

    Raises:
        ConfigError: no path is given, or it holds no checkpoint of the zoo.
    """
    if not path:
        raise ConfigError(f"{task} judges images with an evaluator and none is given: {HOW}")
    from zoo.weights.save import RECIPE, WEIGHTS

    given = Path(path).expanduser()
    for folder in (given, given / "weights"):
        if (folder / RECIPE).is_file() and (folder / WEIGHTS).is_file():
            return folder
    what = "has no finished checkpoint" if given.is_dir() else "does not exist"
    raise ConfigError(f"{task}: the evaluator {path!r} {what}; {HOW}")


def evaluator_hash(path: str, task: str) -> str:
    """Return 16 hex digits of the SHA-256 of the evaluator's recipe, tokenizer and weights: what makes two judges one.

    Where the checkpoint lies does not count.

    Raises:
        ConfigError: as `evaluator_folder`.
    """
    folder = evaluator_folder(path, task)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return _hash(folder, tuple((str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@lru_cache(maxsize=8)
def _hash(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, size, _ in files:
        digest.update(f"{name}\0{size}\0".encode())
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def load_evaluator(path: str, task: str, judged: Any = None) -> Judge:
    """Load the evaluator, frozen and in eval mode, on the device of the model that it judges.

    Raises:
        ConfigError: as `evaluator_folder`, or the model does not embed images and texts in one space.
        WeightsError: its files are damaged.
    """
    from zoo.api import from_pretrained

    folder = evaluator_folder(path, task)
    model: Any = from_pretrained(folder).requires_grad_(False).model
    missing = [
        name
        for name, kind in (("embed_images", EmbedImages), ("embed_texts", EmbedTexts))
        if not isinstance(model, kind)
    ]
    if missing:
        offers = ", ".join(capabilities_of(model)) or "nothing"
        raise ConfigError(f"{task}: the evaluator {path!r} lacks {' and '.join(missing)} (it offers {offers}); {HOW}")
    weights = getattr(judged, "parameters", None)
    if callable(weights) and (first := next(iter(weights()), None)) is not None:
        model.to(first.device)
    judge: Judge = model
    return judge


def embed_images(judge: Judge, images: Sequence[Image], size: int, task: str) -> Tensor:
    """Embed images ``size`` at a time: [N, D] float32 on the CPU, rows of unit length.

    Raises:
        ConfigError: the evaluator gives an image several vectors, in which no distance of sets is defined.
    """
    import torch

    parts = []
    for start in range(0, len(images), size):
        part = judge.embed_images(list(images[start : start + size])).float().cpu()
        if part.ndim != 2:
            raise ConfigError(
                f"{task}: the evaluator gives {part.shape[1]} vectors an image, expected one; take a two-tower model"
            )
        parts.append(part)
    return torch.cat(parts)


def embed_texts(judge: Judge, texts: Sequence[str], size: int) -> Tensor:
    """Embed texts ``size`` at a time, each distinct one once: [N, D] float32 on the CPU, rows of unit length."""
    import torch

    distinct = list(dict.fromkeys(texts))
    rows = torch.cat([judge.embed_texts(distinct[i : i + size]).float().cpu() for i in range(0, len(distinct), size)])
    row_of = {text: row for row, text in enumerate(distinct)}
    return rows[[row_of[text] for text in texts]]


def to_pictures(images: Tensor, count: int, task: str) -> list[Image]:
    """Turn what ``generate_images`` returned, [N, 3, H, W] in [0, 1], into RGB pictures of 8 bits, as real ones are.

    Raises:
        ConfigError: another shape, another number than ``count``, or values that are not finite.
    """
    import torch

    from zoo.data.sheet import to_picture

    if images.ndim != 4 or images.shape[1] != 3 or len(images) != count:
        raise ConfigError(
            f"{task}: generate_images gave {tuple(images.shape)} for {count} texts, expected [N, 3, H, W]"
        )
    if not bool(torch.isfinite(images).all()):
        raise ConfigError(f"{task}: generate_images gave values that are not finite; the model has diverged")
    return [to_picture(image) for image in images]
