"""The plugin as a user meets it: its contracts, what it adds, and that nothing is left without it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import zoo_stories

from zoo.errors import ConfigError
from zoo.plugin import catalogue
from zoo.testing import check_imports, check_light, check_plugin


@pytest.mark.slow
def test_plugin_keeps_the_contracts() -> None:
    from pathlib import Path

    assert catalogue()["command"].plugin("story") == "zoo-stories"
    assert {"story-diffusion", "frame-diffusion", "motion-predictor"} <= set(catalogue()["model"].names())
    check_plugin(zoo_stories.PLUGIN)
    check_imports(Path(zoo_stories.__file__).parent)


def test_manifest_imports_nothing_heavy() -> None:
    from pathlib import Path

    assert zoo_stories.PLUGIN.name == "zoo-stories"
    check_light("zoo_stories", str(Path(zoo_stories.__file__).parents[1]))


def test_names_of_a_notebook() -> None:
    assert zoo_stories.tell.__module__ == "zoo_stories.telling"
    assert zoo_stories.Consistency().rate == 0.5
    with pytest.raises(AttributeError, match="no attribute 'tale'"):
        zoo_stories.__getattr__("tale")


def test_nothing_is_left_without_it() -> None:
    """The zoo by itself, with no plugin found: its own models are there, this one's are not."""
    code = (
        "import importlib.metadata as m; m.entry_points = lambda **k: ();\n"
        "import zoo.plugin as p; p.entry_points = m.entry_points\n"
        "c = p.catalogue(); assert 'latent-diffusion' in c['model'] and not c.broken\n"
        "assert 'story-diffusion' not in c['model'] and 'story' not in c['command']\n"
        "import sys; assert not any(name.startswith('zoo_stories') for name in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_word_is_suggested() -> None:
    with pytest.raises(ConfigError, match="did you mean story-diffusion"):
        catalogue()["model"].get("story-difusion")
