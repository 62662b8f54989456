"""One sample as members of a tar shard, and back.

A sample is the files of one key, as WebDataset has it: ``KEY.json`` with id, texts and meta, its images as ``KEY.png``
or ``KEY.0.png``, ``KEY.1.png``, ..., and arrays of its meta as ``KEY.array0.npy``. Of shards that others wrote, any
image beside a ``.txt``, ``.caption`` or ``.json`` with a text is read.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np

from zoo.data.decode import decode
from zoo.data.image_files import EXTENSIONS
from zoo.data.sample import BadSample, Sample
from zoo.errors import DataError

ARRAY = "__array__"
"""In meta: the number of an array that has a member of its own."""
TEXTS = ("caption", "text", "texts", "captions")
"""Keys of a foreign ``.json`` that may hold a text or several."""
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}
SUFFIX = {"png": "png", "jpeg": "jpg"}


def members_of(sample: Sample, image_format: str = "png") -> dict[str, bytes]:
    """Suffix -> content of the files that hold a sample.

    Raises:
        DataError: its meta holds something that is no number, text, list, mapping or array.
    """
    arrays: list[Any] = []
    meta = {key: _plain(value, arrays, sample.id, key) for key, value in sample.meta.items() if key != "images"}
    images = list(sample.meta.get("images") or ([] if sample.image is None else [sample.image]))
    head = {"id": sample.id, "texts": list(sample.texts), "meta": meta, "images": len(images)}
    out = {"json": json.dumps(head, ensure_ascii=False, sort_keys=True).encode()}
    several = bool(sample.meta.get("images"))
    for number, image in enumerate(images):
        buffer = BytesIO()
        image.convert("RGB").save(buffer, **FORMATS[image_format])
        out[f"{number}.{SUFFIX[image_format]}" if several else SUFFIX[image_format]] = buffer.getvalue()
    for number, array in enumerate(arrays):
        buffer = BytesIO()
        np.save(buffer, array, allow_pickle=False)
        out[f"array{number}.npy"] = buffer.getvalue()
    return out


def sample_of(members: Mapping[str, bytes], id: str, max_pixels: int) -> Sample:
    """The sample that files hold, of the zoo's writing or another's.

    Raises:
        BadSample: a member that cannot be read.
    """
    try:
        head = json.loads(members["json"]) if "json" in members else {}
    except ValueError as error:
        raise BadSample(id, f"its .json cannot be read ({error})") from None
    if not isinstance(head, dict):
        raise BadSample(id, "its .json holds no mapping")
    own = isinstance(head.get("meta"), dict) and "images" in head
    names = sorted(name for name in members if f".{name.rpartition('.')[2].lower()}" in EXTENSIONS)
    if own:
        names.sort(key=lambda name: int(name.split(".")[0]) if name[0].isdigit() else 0)
    images = [decode(BytesIO(members[name]), id, max_pixels) for name in names]
    if not own:
        texts = _foreign_texts(members, head)
        meta = {key: value for key, value in head.items() if key not in TEXTS}
        return Sample(id, images[0] if images else None, texts, {**meta, **_several(images)})
    if head["images"] != len(images):
        raise BadSample(id, f"it has {len(images)} images and should have {head['images']}")
    try:
        meta = {key: _filled(value, members) for key, value in head["meta"].items()}
    except (KeyError, ValueError) as error:
        raise BadSample(id, f"an array of it cannot be read ({error})") from None
    several = _several(images) if any("." in name for name in names) else {}
    return Sample(head["id"], images[0] if images else None, tuple(head["texts"]), {**meta, **several})


def read_members(data: bytes, id: str) -> dict[str, bytes]:
    """Suffix -> content of the files in a stretch of a tar.

    Raises:
        BadSample: the stretch is damaged.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    file = tar.extractfile(member)
                    assert file is not None
                    found[key_of(member.name)[1]] = file.read()
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise BadSample(id, f"damaged ({error})") from None
    if not found:
        raise BadSample(id, "damaged (no files)")
    return found


def tar_bytes(key: str, members: Mapping[str, bytes]) -> bytes:
    """The stretch of a tar with the files of a key; equal content gives equal bytes."""
    out = BytesIO()
    for suffix, content in members.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size, info.mode = len(content), 0o644
        out.write(info.tobuf(tarfile.USTAR_FORMAT, errors="surrogateescape"))
        out.write(content)
        out.write(b"\0" * (-len(content) % tarfile.BLOCKSIZE))
    return out.getvalue()


def key_of(name: str) -> tuple[str, str]:
    """``a/b.0.png`` -> (``a/b``, ``0.png``), as WebDataset divides names: at the first dot behind the last slash."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix


def _plain(value: Any, arrays: list[Any], id: str, key: str) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {ARRAY: len(arrays) - 1}
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, arrays, id, key) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(inner, arrays, id, key) for inner in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise DataError(
        f"sample {id!r}: meta[{key!r}] holds a {type(value).__name__}, which a shard cannot: expected numbers, texts,"
        " lists, mappings and arrays"
    )


def _filled(value: Any, members: Mapping[str, bytes]) -> Any:
    if isinstance(value, dict):
        if set(value) == {ARRAY}:
            return np.load(io.BytesIO(members[f"array{value[ARRAY]}.npy"]), allow_pickle=False)
        return {name: _filled(inner, members) for name, inner in value.items()}
    return tuple(_filled(inner, members) for inner in value) if isinstance(value, list) else value


def _several(images: list[Any]) -> dict[str, Any]:
    return {"images": tuple(images)} if len(images) > 1 else {}


def _foreign_texts(members: Mapping[str, bytes], head: Mapping[str, Any]) -> tuple[str, ...]:
    for name in ("txt", "caption", "text"):
        if name in members:
            return (members[name].decode("utf-8", "replace").strip(),)
    for name in TEXTS:
        found = head.get(name)
        if isinstance(found, str):
            return (found,)
        if isinstance(found, list) and all(isinstance(text, str) for text in found):
            return tuple(found)
    return ()
