"""zoo generate where the result is pictures: from texts, within a mask, by an instruction, or in turn with texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ConfigError, DataError, RunError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from zoo.module import ZooModule

NEEDS = {
    "generate_images": "draws no images from texts: take a model that does, e.g. show-o or transfusion",
    "inpaint_images": "does not inpaint: take a model that does, e.g. show-o",
    "edit_images": "does not edit images: take a model that does, e.g. transfusion",
    "generate_interleaved": "does not continue texts and images: take a model that does, e.g. chameleon",
}
"""Capability -> what to say of a model without it."""

WHITE = 128
"""Gray from which a pixel of a mask is drawn anew."""


@dataclass(frozen=True)
class Request:
    """What is to be drawn; checked before a model is loaded.

    Attributes:
        capability: of `NEEDS`.
        texts: prompts or instructions, one a row of the result.
        images: given pictures, one a row.
        masks: gray pictures, one a row.
        parts: texts and pictures to continue.
    """

    capability: str
    out: Path
    texts: tuple[str, ...] = ()
    images: tuple[Image.Image, ...] = ()
    masks: tuple[Image.Image, ...] = ()
    parts: tuple[str | Image.Image, ...] = ()
    seed: int = 0
    count: int = 1
    steps: int | None = None
    guidance: float | None = None
    max_images: int = 4
    max_new_tokens: int = 64


def request(arguments: Any) -> Request | None:
    """Read what the command line asks to be drawn; None where it asks for text.

    Raises:
        ConfigError: options that do not go together, or no place for the result.
        DataError: a file that is no image.
    """
    from zoo.cli.images import open_image

    capability = asked(arguments)
    if capability is None:
        for name in ("out", "steps", "guidance", "count"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name} is for drawing: give --text, --edit or --part")
        return None
    if arguments.prompt is not None:
        raise ConfigError("--prompt asks about an image; what is to be drawn is --text, --edit or --part")
    if arguments.out is None:
        raise ConfigError("drawing needs a place for the result: --out FILE.png")
    out = Path(arguments.out)
    if out.suffix.lower() != ".png" or not out.parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: expected a file ending in .png in a folder that exists")
    count = 1 if arguments.count is None else arguments.count
    if count < 1 or arguments.seed < 0 or arguments.max_images < 1:
        raise ConfigError(
            f"--count {count}, --seed {arguments.seed}, --max-images {arguments.max_images}: expected at least 1, 0, 1"
        )
    same = {
        "capability": capability,
        "out": out,
        "seed": arguments.seed,
        "count": count,
        "steps": arguments.steps,
        "guidance": arguments.guidance,
    }
    if capability == "generate_interleaved":
        if count > 1:
            raise ConfigError("--part is continued once: leave --count out, and try other values of --seed")
        parts = tuple(open_image(part[1:]) if part.startswith("@") else part for part in arguments.part)
        return Request(
            **same, parts=parts, max_images=arguments.max_images, max_new_tokens=arguments.max_new_tokens or 64
        )
    texts = tuple(arguments.edit or arguments.text)
    if any(not text.strip() for text in texts):
        raise ConfigError("an empty text says nothing to draw")
    images = tuple(open_image(path) for path in arguments.image)
    masks = tuple(open_mask(path) for path in arguments.mask)
    if images:
        rows = max(len(images), len(texts), len(masks))
        texts, images = _each("texts", texts, rows), _each("images", images, rows)
        masks = _each("masks", masks, rows) if masks else ()
    return Request(**same, texts=texts, images=images, masks=masks)


def asked(arguments: Any) -> str | None:
    """Return the capability that the options ask for; None for writing text.

    Raises:
        ConfigError: options that do not go together.
    """
    text, edit, mask, part = (bool(getattr(arguments, name)) for name in ("text", "edit", "mask", "part"))
    if part:
        if text or edit or mask or arguments.image:
            raise ConfigError("--part gives all texts and images in order, images as @FILE: leave the others out")
        return "generate_interleaved"
    if edit:
        if text or mask:
            raise ConfigError("--edit changes a whole image by an instruction: leave --text and --mask out")
        if not arguments.image:
            raise ConfigError("--edit needs the image to change: --image FILE")
        return "edit_images"
    if mask:
        if not text or not arguments.image:
            raise ConfigError("--mask draws a part of an image anew: give --image FILE and --text too")
        return "inpaint_images"
    if text:
        if arguments.image:
            raise ConfigError(
                "--text with --image: add --mask FILE to draw a part of it anew, or say --edit to change it"
            )
        return "generate_images"
    return None


def _each(what: str, values: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    if len(values) not in (1, rows):
        raise ConfigError(f"{len(values)} {what} for {rows} images to draw: give one for all, or one each")
    return values * rows if len(values) == 1 else values


def open_mask(path: str) -> Image.Image:
    """Read a mask as gray.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    from zoo.cli.images import open_image

    return open_image(path).convert("L")


def mask_of(mask: Image.Image, image: Image.Image, transform: Any) -> Tensor:
    """Return ``[S, S]`` bool, True where the mask is white: of the picture as the model is shown it.

    A mask of the image's size is resized and cropped as the image is; one of the model's own size is taken as it is.

    Args:
        transform: the model's :class:`~zoo.data.images.ImageTransform`, of S pixels.

    Raises:
        DataError: a mask of another size, or one without white.
    """
    import numpy as np
    import torch
    from PIL import Image as PIL

    size = (transform.size, transform.size)
    sharp = mask.point(lambda gray: 255 if gray >= WHITE else 0)
    if mask.size == size:
        found = torch.from_numpy(np.asarray(sharp) > 0)  # [S, S]
    elif mask.size == image.size:
        ends = [PIL.new("RGB", size, colour) for colour in ("black", "white")]
        black, white, shown = transform([*ends, sharp.convert("RGB")])[:, 0]  # [S, S] each, normalised
        found = shown - black >= (white - black) / 2
    else:
        raise DataError(
            f"the mask is {mask.width} x {mask.height} pixels, the image {image.width} x {image.height}: expected a"
            f" mask of the image's size, or of {size[0]} x {size[1]}, which the model draws"
        )
    if not found.any():
        raise DataError("the mask has no white: nothing would be drawn anew")
    return found


def draw(module: ZooModule, request: Request) -> str:
    """Draw, write the PNG, and return what was written as a line.

    One picture is written as it is, several as a labelled sheet.

    Raises:
        ConfigError: the model cannot do it, or refuses a value.
        RunError: the file cannot be written.
    """
    from zoo.data.sheet import labelled_sheet, to_picture

    name = module.recipe.name
    if not hasattr(module.model, request.capability):
        raise ConfigError(f"{name} {NEEDS[request.capability]}")
    how = {"steps": request.steps, "guidance": request.guidance}
    if request.capability == "generate_interleaved":
        return _continued(module, request)
    columns = [_drawn(module, request, request.seed + n, how) for n in range(request.count)]
    rows: list[list[Any]] = [list(row) for row in zip(*columns, strict=True)]
    seeds = [f"seed {request.seed + n}" for n in range(request.count)]
    if len(rows) == 1 and len(seeds) == 1:
        page = to_picture(rows[0][0])
    else:
        if request.images:
            rows = [[image, *row] for image, row in zip(request.images, rows, strict=True)]
            seeds = ["given", *seeds]
        page = labelled_sheet(rows, request.texts, seeds, cell=max(128, columns[0].shape[-1]))
    _save(page, request.out)
    count = len(request.texts) * request.count
    return f"{request.out}: {count} image{'s' if count > 1 else ''} of {name}, {', '.join(seeds[-request.count :])}"


def _drawn(module: ZooModule, request: Request, seed: int, how: dict[str, Any]) -> Tensor:
    """Return [N, 3, H, W]: an image a row."""
    import torch

    model: Any = module.model
    if request.capability == "generate_images":
        drawn = model.generate_images(request.texts, seed=seed, **how)
    elif request.capability == "edit_images":
        drawn = model.edit_images(request.images, request.texts, seed=seed, **how)
    else:
        pairs = zip(request.masks, request.images, strict=True)
        masks = torch.stack([mask_of(mask, image, model.processor.transform) for mask, image in pairs])
        drawn = model.inpaint_images(request.images, masks, request.texts, seed=seed, **how)
    assert isinstance(drawn, torch.Tensor)
    return drawn


def _continued(module: ZooModule, request: Request) -> str:
    """Write the given and the new parts as a row of pictures with their texts; return the new texts, a line each."""
    from zoo.data.sheet import labelled_sheet, to_picture

    model: Any = module.model
    (new,) = model.generate_interleaved(
        [request.parts],
        max_images=request.max_images,
        max_new_tokens=request.max_new_tokens,
        seed=request.seed,
        steps=request.steps,
        guidance=request.guidance,
    )
    pictures: list[Any] = []
    notes: list[str] = []
    for part in (*request.parts, *new):
        if isinstance(part, str):
            pictures.append(None)
            notes.append(part)
        else:
            pictures.append(to_picture(part))
            notes.append("")
    marks = ["given"] * len(request.parts) + ["drawn" if not isinstance(part, str) else "written" for part in new]
    cell = max(128, max((picture.width for picture in pictures if picture is not None), default=0))
    _save(labelled_sheet([pictures], (), marks, [notes], cell=cell), request.out)
    drawn = sum(not isinstance(part, str) for part in new)
    lines = [part for part in new if isinstance(part, str)]
    return "\n".join([*lines, f"{request.out}: {drawn} image{'' if drawn == 1 else 's'} of {module.recipe.name}"])


def _save(page: Image.Image, out: Path) -> None:
    try:
        page.save(out)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from None


def examples() -> Sequence[str]:
    """Lines for the help of the command."""
    return (
        "zoo generate RUN --image photo.jpg --prompt 'What is this?'",
        "zoo generate RUN --text 'a cat icon' --text 'two dog icons' --count 4 --out sheet.png",
        "zoo generate RUN --image a.png --mask hole.png --text 'a cat icon' --out filled.png",
        "zoo generate RUN --image a.png --edit 'make the background blue' --out changed.png",
        "zoo generate RUN --part 'once there was a cat icon' --max-images 3 --out story.png",
    )
