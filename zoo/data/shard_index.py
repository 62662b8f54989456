"""Where the samples of shards from elsewhere lie: listed once from the tar's headers, and remembered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zoo.data.sample import stable_hash


def listed(path: Path) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Keys and places [n, 2] of a tar's samples; from the zoo's cache folder while the file is the same.

    Raises:
        DataError: as ``zoo.data.shards.scan``.
    """
    from zoo.data.openmoji import cache_folder
    from zoo.data.shards import index_path, read_index, scan, write_index
    from zoo.errors import DataError

    state = path.stat()
    name = f"{stable_hash(str(path.resolve()), str(state.st_size), str(state.st_mtime_ns)):016x}.tar"
    kept = cache_folder() / "shards" / name
    if index_path(kept).is_file():
        try:
            return read_index(kept)
        except DataError:
            pass  # a cache that was cut short is made again
    keys, places = scan(path)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_index(index_path(kept), list(keys), [(int(a), int(b)) for a, b in places])
    except OSError:  # a full or read-only disk costs a second listing, no more
        pass
    return keys, places
