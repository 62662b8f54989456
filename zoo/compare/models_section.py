"""What the page says of each model: its characteristics, wiring and attention, its samples and its runs' manifests."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from zoo.compare import attention
from zoo.compare.characteristics import Characteristics
from zoo.compare.figures import is_number
from zoo.compare.leaderboard import Leaderboard, Row
from zoo.compare.plotting import compact
from zoo.compare.rundir import Run
from zoo.evaluation.naming import normalise

PICTURE_LIMIT = 400_000
"""Base64 characters of one sample picture; a larger one is left out, as a page must stay easy to send."""
MOST_SAMPLED = 16
"""Rows whose outputs stand side by side."""
MOST_BUILT = 30
"""Recipes that a report builds, at most, to know the characteristics of runs whose manifests have none."""


def characteristics(rows: Sequence[Row]) -> dict[str, Characteristics]:
    """Row -> characteristics: from the manifest; of older runs from their recipe, which is then built on the meta
    device (and needs torch), and kept in the zoo's cache folder. Rows whose recipe says too little are left out."""
    found: dict[str, Characteristics] = {}
    missing: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for row in rows:
        known = Characteristics.from_plain(row.runs[0].manifest.get("characteristics"))
        recipe = row.runs[0].config.get("recipe")
        if known is not None:
            found[row.name] = known
        elif isinstance(recipe, Mapping) and recipe.get("format") == 1 and isinstance(recipe.get("wiring"), Mapping):
            what = {k: v for k, v in recipe.items() if k not in ("changed", "optimizer")}
            key = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]
            missing.setdefault(key, (recipe, []))[1].append(row.name)
    if missing:
        built = _build({key: recipe for key, (recipe, _) in missing.items()})
        found |= {name: built[key] for key, (_, names) in missing.items() if key in built for name in names}
    return {row.name: found[row.name] for row in rows if row.name in found}


def _build(recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, Characteristics]:
    from zoo.compare import characteristics_cache as cache
    from zoo.errors import ZooError

    state = cache.digest()
    kept = cache.load(state)
    found = {k: c for k in recipes if (c := Characteristics.from_plain(kept.get(f"run-{k}"))) is not None}
    wanted = [key for key in recipes if key not in found]
    if len(wanted) > MOST_BUILT:
        return found
    fresh = {}
    for key in wanted:
        from zoo.compare.characteristics import of_recipe
        from zoo.recipe import Recipe

        try:
            found[key] = of_recipe(Recipe.from_plain(recipes[key]))
        except ZooError:  # of another version, or of a plugin that is not here
            continue
        fresh[f"run-{key}"] = found[key].to_plain()
    if fresh:
        cache.store(state, {**kept, **fresh})
    return found


def models(board: Leaderboard, facts: Mapping[str, Characteristics]) -> list[dict[str, Any]]:
    """Rows that are one model (same parts, layouts and stages, other data or budget) share a drawing."""
    groups: dict[str, list[Row]] = {}
    for row in board.rows:
        manifest = row.runs[0].manifest
        known = facts.get(row.name)
        key = json.dumps([manifest.get("parts"), manifest.get("layout"), known and known.to_plain()], default=str)
        groups.setdefault(key, []).append(row)
    pictures: dict[attention.Drawn, str] = {}
    out = []
    for rows in groups.values():
        layouts, rest = attention.read_layouts(str(rows[0].runs[0].manifest.get("layout") or ""))
        drawn = []
        for layout in layouts:
            if layout not in pictures:
                pictures[layout] = attention.picture(layout, f"Attention in {layout.name}: {layout.words}")
            drawn.append((layout, pictures[layout]))
        known = facts.get(rows[0].name)
        out.append({"rows": rows, "levels": _wiring(rows[0], known), "layouts": drawn, "rest": rest, "facts": known})
    return out


def _wiring(row: Row, facts: Characteristics | None) -> list[list[dict[str, Any]]]:
    """The parts with their share of the parameters and what each stage does with them, level by level: neighbours of
    one kind (image and text encoder) stand side by side."""
    parts = row.runs[0].manifest.get("parts")
    rows = [p for p in parts if isinstance(p, Mapping)] if isinstance(parts, list) else []
    counts = [float(p["parameters"]) if is_number(p.get("parameters")) else 0.0 for p in rows]
    most = max([*counts, 1.0])

    def boxed(p: Mapping[str, Any], n: float) -> dict[str, Any]:
        path = str(p.get("path", ""))
        return {
            "path": path,
            "name": str(p.get("name", "")),
            "parameters": compact(n),
            "share": round(100 * n / most, 1),
            "state": "no weights" if not n else "trained" if p.get("trained") else "frozen",
            "stages": list(_by_stage(path, facts)) if n else [],
        }

    boxes = [boxed(p, n) for p, n in zip(rows, counts, strict=True)]
    for box in boxes:
        states = {state for _, state in box["stages"]}
        box["state"] = states.pop() if len(states) == 1 else "trained at times" if states else box["state"]
    return [list(level) for _, level in groupby(boxes, key=lambda box: box["path"].rpartition("_")[2])]


def _by_stage(path: str, facts: Characteristics | None) -> Iterator[tuple[str, str]]:
    for stage in facts.stages if facts else ():
        own = next((text for text in stage.trained if text == path or text.startswith(f"{path} (")), None)
        if own is not None:
            yield stage.name, "trained" + own[len(path) :]
        elif path in stage.frozen:
            yield stage.name, "frozen"


def samples(board: Leaderboard) -> tuple[list[dict[str, Any]], list[Row]]:
    """Bring the outputs of the rows for one item together, and say which rows these are; the picture is that of a row
    that saw it."""
    rows = sorted(board.rows, key=lambda row: (not row.comparable, row.control))
    shown = [row for row in rows if row.runs[0].samples][:MOST_SAMPLED]
    shown = [row for row in board.rows if row in shown]
    merged: dict[str, dict[str, Any]] = {}
    for row in shown:
        for sample in row.runs[0].samples:
            item = merged.setdefault(
                str(sample.get("id")), {"image": "", "reference": str(sample.get("reference", "")), "outputs": []}
            )
            image = picture(sample.get("image"))
            if image and not row.control and not item["image"]:  # a control's pictures are blank
                item["image"] = image
            item["outputs"].append(_output(row, sample, item["reference"]))
    return [{"id": key, **item} for key, item in merged.items()], shown


def _output(row: Row, sample: Mapping[str, Any], reference: str) -> dict[str, Any]:
    output = sample.get("output", "")
    texts = [str(o) for o in output] if isinstance(output, list) else [str(output)]
    tasks = sample.get("outputs")
    entries = [v for v in tasks.values() if isinstance(v, Mapping)] if isinstance(tasks, Mapping) else []
    right = bool(texts) and normalise(texts[0]) == normalise(reference)
    likelihood_only = [entry.get("kind") for entry in entries] == ["likelihood"]
    pictures = [
        (str(entry.get("text", reference)), str(key).replace("_", " "), drawn)
        for entry in entries
        for key, value in entry.items()
        if ("picture" in str(key) or "mask" in str(key)) and (drawn := picture(value))
    ]
    return {"row": row, "texts": texts, "right": right and not likelihood_only, "pictures": pictures}


def picture(value: Any) -> str:
    """Return base64 that is a PNG for certain, else nothing."""
    if not isinstance(value, str) or len(value) > PICTURE_LIMIT:
        return ""
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return ""
    return base64.b64encode(data).decode() if data.startswith(b"\x89PNG\r\n\x1a\n") else ""


def manifests(board: Leaderboard) -> list[tuple[Run, str]]:
    """Every run, those outside the table included, with its manifest but for what the page shows as pictures."""
    runs = [run for row in board.rows for run in row.runs] + [run for run, _ in board.unfinished]
    left_out = ("layout", "characteristics")
    return [(run, _json({k: v for k, v in run.manifest.items() if k not in left_out})) for run in runs]


def _json(value: Any) -> str:
    """JSON with short lists and mappings in one line."""

    def written(value: Any, indent: str) -> str:
        flat = json.dumps(value, ensure_ascii=False, default=str)
        if len(flat) + len(indent) <= 100 or not isinstance(value, (Mapping, list)) or not value:
            return flat
        inner = indent + "  "
        if isinstance(value, Mapping):
            lines = [f"{inner}{json.dumps(str(k), ensure_ascii=False)}: {written(v, inner)}" for k, v in value.items()]
            return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
        return "[\n" + ",\n".join(inner + written(v, inner) for v in value) + f"\n{indent}]"

    return written(value, "")
