"""The characteristics of recipes on disk: one JSON file for one state of the code, the recipes and the plugins."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zoo.plugin import GROUP, conf_dir


def folder() -> Path:
    """Where the files lie."""
    from zoo.data.openmoji import cache_folder

    return cache_folder() / "characteristics"


def digest() -> str:
    """A digest of what decides the characteristics: names, sizes and times of change of every source and recipe."""
    seen = hashlib.sha256()
    for root in dict.fromkeys(_roots()):
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".yaml")):
            with suppress(OSError):
                about = path.stat()
                seen.update(f"{path}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
    return seen.hexdigest()[:16]


def _roots() -> Iterator[Path]:
    yield Path(__file__).resolve().parents[1]
    yield conf_dir()
    for point in entry_points(group=GROUP):
        with suppress(ImportError, ValueError, AttributeError):
            spec = find_spec(point.value.partition(":")[0].partition(".")[0])
            for place in (spec.submodule_search_locations or ()) if spec else ():
                yield Path(place)


def load(key: str) -> dict[str, Any]:
    """What was stored under ``key``; empty where there is nothing that can be read."""
    try:
        found = json.loads((folder() / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def store(key: str, found: Mapping[str, Any]) -> None:
    """Keep ``found`` and remove what belongs to other states; a folder that cannot be written is no error."""
    with suppress(OSError):
        place = folder()
        place.mkdir(parents=True, exist_ok=True)
        temporary = place / f"{key}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(found), encoding="utf-8")
        os.replace(temporary, place / f"{key}.json")
        for other in place.glob("*.json"):
            if other.stem != key:
                other.unlink(missing_ok=True)
