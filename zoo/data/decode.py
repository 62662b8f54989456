"""Reading one image file that may be damaged or hostile."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.data.sample import BadSample

if TYPE_CHECKING:
    from PIL import Image


def decode(file: Path | BytesIO, id: str, max_pixels: int) -> Image.Image:
    """Read an image as RGB, from its file or its bytes, refusing a decompression bomb by the size in its header.

    Raises:
        BadSample: the file is no image, is cut short, or has more than ``max_pixels`` pixels.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.width * image.height > max_pixels:
                raise BadSample(
                    id, f"{image.width}x{image.height} pixels are more than max_pixels={max_pixels}; refused"
                )
            return image.convert("RGB")
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample(id, f"refused: {error}") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow's decoders raise on damaged files
        reason = f"the image cannot be read ({error})"
        if isinstance(file, Path):
            reason = reason.replace(str(file), file.name)
        raise BadSample(id, reason) from None
