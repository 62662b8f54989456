"""Images named on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.errors import DataError

if TYPE_CHECKING:
    from PIL import Image


def open_image(path: str) -> Image.Image:
    """Read an image as RGB.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"no image {path}") from error
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read image {path}: {error}") from error
