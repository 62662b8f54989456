"""Goldens: what a published system computed on weights drawn at random, kept as NAME.safetensors and NAME.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Golden:
    """What a published system computed: official weights, inputs, outputs, and the json beside them."""

    info: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        """The published system's configuration, in its own words."""
        config: dict[str, Any] = self.info["config"]
        return config


@cache
def read_golden(folder: Path, name: str) -> Golden:
    """Read FOLDER/NAME.safetensors, whose tensors are called ``weights/...``, ``inputs/...`` and ``outputs/...``, and
    FOLDER/NAME.json. All readers share the tensors: treat them as read-only.

    Raises:
        FileNotFoundError: There is no such golden.
    """
    tensors = load_file(folder / f"{name}.safetensors")
    parts = {
        part: {key.removeprefix(part + "/"): t for key, t in tensors.items() if key.startswith(part + "/")}
        for part in ("weights", "inputs", "outputs")
    }
    return Golden(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), **parts)
