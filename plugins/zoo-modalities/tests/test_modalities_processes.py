"""ImageBind and Meta-Transformer in several processes, under DDP and FSDP2: the losses of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.testing.processes import check_processes

ICONS = {"name": "openmoji-modalities", "modalities": ["audio", "depth"], "voice": "simulated"}
BIND = {"modalities": ["audio", "depth"], "augment": "none"}
MODELS: list[dict[str, Any]] = [
    {"recipe": "imagebind", "data": ICONS, "values": {"wiring": BIND}, "batch_size": 8},
    {"recipe": "meta-transformer", "data": {"name": "digits"}, "values": {"wiring": {"labels_of": "digits"}}},
]


def test_several_processes_train_to_the_losses_of_one(tmp_path: Path) -> None:
    check_processes(MODELS, tmp_path, plugin=("modalities", "zoo_modalities"))
