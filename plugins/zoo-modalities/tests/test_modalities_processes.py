"""ImageBind and Meta-Transformer in several processes, under DDP and FSDP2: the losses of one."""

from __future__ import annotations

from typing import Any

import pytest
from zoo_modalities import PLUGIN

from zoo.plugin import Catalogue
from zoo.recipe import resolve
from zoo.testing.processes import STRATEGIES, WORLDS, Trained, check_losses, train_in_processes

ICONS = {"name": "openmoji-modalities", "modalities": ["audio", "depth"], "voice": "simulated"}
BIND = {"modalities": ["audio", "depth"], "augment": "none"}
MODELS: list[dict[str, Any]] = [
    {"recipe": "imagebind", "data": ICONS, "values": {"wiring": BIND}, "batch_size": 8},
    {"recipe": "meta-transformer", "data": {"name": "digits"}, "values": {"wiring": {"labels_of": "digits"}}},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_in_processes(MODELS, tmp_path_factory.mktemp("processes"), plugin=("modalities", "zoo_modalities"))


@pytest.mark.parametrize("model", [m["recipe"] for m in MODELS])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks", WORLDS)
def test_several_processes_train_to_the_losses_of_one(model: str, ranks: int, strategy: str, trained: Trained) -> None:
    check_losses(trained, model, ranks, strategy)


def test_every_wiring_of_the_plugin_is_among_them(found: Catalogue) -> None:
    tried = {resolve(m["recipe"], scale="micro").wiring[0] for m in MODELS}
    assert tried == {c.name for c in PLUGIN.components if c.kind == "wiring"}
