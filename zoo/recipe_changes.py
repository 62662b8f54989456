"""What sets a recipe apart from the published one, for its name."""

from __future__ import annotations

from typing import Any

from zoo.recipe_files import SECTIONS, SLOTS


def difference(new: dict[str, Any], chosen: dict[str, Any], published: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """What a name must show: parts that are not the published ones, then single fields the user set."""
    changed: list[tuple[str, str]] = []

    def fields(prefix: str, now: Any, was: Any) -> None:
        if isinstance(now, dict) and isinstance(was, dict):
            for key in sorted(now):
                fields(f"{prefix}.{key}", now[key], was.get(key))
        elif now != was:
            changed.append((prefix, _short(now)))

    for key in SECTIONS:
        now, chose, was = new.get(key), chosen.get(key), published.get(key)
        if key == "stages":
            if now != was:
                changed.append((key, ",".join(stage["name"] for stage in now or ())))
            continue
        if key == "objective" and set(now or {}) != set(was or {}):
            changed.append((key, ",".join(now or ())))
        elif key in (*SLOTS, "wiring") and now and (was is None or now["name"] != was["name"]):
            changed.append((key, now["name"]))
        fields(key, now, chose)
    return tuple(changed)


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(_short(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
