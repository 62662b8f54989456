"""The plugin as a whole: its manifest, and the zoo's contracts for everything it adds."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoo_grounding import PLUGIN

from zoo.plugin import Catalogue
from zoo.testing import check_imports, check_light, check_plugin

ROOT = Path(__file__).parents[1]


def test_everything_is_in_the_catalogue(found: Catalogue) -> None:
    named = {"wiring": "segmenter", "mask_decoder": "sam-vit-h", "objective": "mask-dice", "task": "grounding"}
    named |= {"data": "openmoji-grounding", "command": "segment", "model": "lisa-7b", "checkpoint": "lisa-13b"}
    for kind, name in named.items():
        assert found[kind].plugin(name) == "zoo-grounding"
    assert {"lisa", "pixellm"} <= set(found["model"].names())


def test_manifest_is_light_and_imports_are_public() -> None:
    check_light("zoo_grounding", str(ROOT))
    check_imports(ROOT / "zoo_grounding")
    assert PLUGIN.conf_dir() == ROOT / "zoo_grounding" / "conf"


@pytest.mark.slow
def test_contracts(found: Catalogue) -> None:
    check_plugin(PLUGIN)
    assert "zoo-grounding" in {plugin.name for plugin in found.plugins}
