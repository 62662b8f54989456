"""``manifest.json`` of a run: what it is, what its conditions hash to, how it stands and what it cost."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.compare import record
from zoo.compare.characteristics import of_module
from zoo.compare.flops import Flops, count_recipe
from zoo.errors import RunError
from zoo.run_config import RunConfig, digest

if TYPE_CHECKING:
    from zoo.budget import Plan
    from zoo.data.sample import Source
    from zoo.frozen_features import RunFeatures
    from zoo.module import ZooModule


class Manifest:
    """``manifest.json``, rewritten whole on every change.

    Args:
        write: Whether this process writes the file.
    """

    def __init__(self, folder: Path, values: dict[str, Any], write: bool = True) -> None:
        self.path = folder / "manifest.json"
        self.values = values
        self.writes = write
        self.started = time.perf_counter()
        earlier = read_manifest(folder).get("wall_seconds")  # of attempts before
        self.earlier = float(earlier) if isinstance(earlier, int | float) else 0.0

    def update(self, **values: Any) -> None:
        self.values.update(values)
        # kept whatever happens next: a killed attempt's time counts up to its last change
        self.values["wall_seconds"] = round(self.earlier + time.perf_counter() - self.started, 3)
        if "cost" in self.values:
            self.values["cost"]["seconds"]["wall"] = self.values["wall_seconds"]
        if self.writes:
            write_json(self.path, self.values)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically.

    Raises:
        RunError: The folder cannot be written or the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; free space or choose another folder with out=FOLDER"
        ) from error


def start_manifest(config: RunConfig, module: ZooModule, source: Source, plan: Plan) -> dict[str, Any]:
    """What is known of a run before its first step."""
    from zoo.data.order import HASHED, training_order
    from zoo.data.sample import data_hash

    plain = config.to_plain()
    order = training_order(source, config.seed)
    # variants of an equal budget in tokens, FLOPs or seconds read different lengths of one order: its hash is then over
    # a length of its own
    places = (plan.total or 0) * config.batch_size if config.budget.fixed_order else HASHED
    trained = [name for name, parameter in module.model.named_parameters() if parameter.requires_grad]
    parts = [
        {
            "path": path,
            "name": config.recipe.parts[path][0] if path in config.recipe.parts else type(part).__name__,
            "parameters": sum(p.numel() for p in part.parameters()),
            "trained": any(name.startswith(path + ".") for name in trained),
        }
        for path, part in module.model.parts().items()
    ]
    return {
        "format": 1,
        "name": config.name,
        "model": config.recipe.model,
        "scale": config.recipe.scale,
        "changed": [list(pair) for pair in config.recipe.changed],
        "seed": config.seed,
        "lr_factor": config.lr_factor,
        "control": bool(config.data.get("blank_images")),
        "status": "starting",
        "error": None,
        "command": record.command(),
        "versions": record.versions(),
        "git": record.git_state(),
        "hardware": record.hardware(),
        "licence": source.licence,
        "parts": parts,
        "characteristics": of_module(module).to_plain(),
        "parameters": {
            "total": sum(p.numel() for name, p in module.named_parameters() if not name.startswith("objectives.")),
            "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
        },
        "budget": plain["budget"],
        "plan": plan.to_plain(),
        "stages": [s.name for s in config.recipe.stages],
        "batch_size": config.batch_size,
        "layout": "\n\n".join(f"{name}\n{layout.draw()}" for name, layout in module.model.layouts().items()),
        "hashes": {
            "data": data_hash(source, "train"),
            "order": order.hash(places),
            "budget": digest([plain["budget"], config.batch_size])[:16],
            "recipe": digest(config.recipe.to_plain())[:16],
        },
    }


def unstarted_manifest(config: RunConfig) -> dict[str, Any]:
    """The manifest of a run that did not come to writing one: enough for a report to name it."""
    return {
        "format": 1,
        "name": config.name,
        "model": config.recipe.model,
        "scale": config.recipe.scale,
        "seed": config.seed,
        "command": record.command(),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a run's manifest says, empty where there is none or it cannot be read."""
    try:
        values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def sample_flops(config: RunConfig, cached: RunFeatures | None = None) -> tuple[list[Flops], dict[str, Any]]:
    """FLOPs of one sample in each stage, and what the manifest says of them.

    With cached features a step has no forward pass of the encoder; one for every image the run reads is added, whether
    this run made it or one before: variants of a sweep then compare whichever came first.
    """
    stages = count_recipe(config.recipe, cached=cached is not None)
    plain = {**stages[-1].to_plain(), "stages": [f.to_plain() for f in stages]}
    if cached is not None:
        encoder = count_recipe(config.recipe)[0].forward - stages[0].forward  # what is frozen costs no backward
        plain["features"] = {"images": cached.images, "forward": encoder, "total": encoder * cached.images}
    return stages, plain
