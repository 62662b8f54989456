"""What plugins stand on: public imports, and words of their own on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from zoo.cli import main
from zoo.plugin import Plugin, registered
from zoo.registry import Component
from zoo.testing import check_imports

PLUGINS = Path(__file__).parents[1] / "plugins"


def greet(arguments: Sequence[str]) -> int:
    print("hello", *arguments)
    return 3


@pytest.mark.parametrize("folder", sorted(p.parent for p in PLUGINS.glob("*/pyproject.toml")), ids=lambda p: p.name)
def test_plugins_import_public_names_only(folder: Path) -> None:
    (package,) = (p for p in folder.glob("zoo_*") if p.is_dir())
    check_imports(package)
    assert list(package.rglob("*.py"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from zoo.cli import main", "zoo_x/a.py:1 imports zoo.cli, which is not public"),
        ("import zoo.train", "imports zoo.train, which is not public"),
        ("from zoo import train", "imports zoo, which is not public"),
        ("from zoo.data.sample import _read", "imports _read of zoo.data.sample, which begins with an underscore"),
    ],
)
def test_private_imports_are_named(tmp_path: Path, line: str, message: str) -> None:
    package = tmp_path / "zoo_x"
    package.mkdir()
    (package / "a.py").write_text(line + "\n")
    with pytest.raises(AssertionError, match=message):
        check_imports(package)
    (package / "a.py").write_text("import zoo\nfrom zoo import Plugin, errors\nfrom zoo.part import Features\n")
    check_imports(package)


def test_a_command_of_a_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    word = Component(kind="command", name="greet", ref=f"{__name__}:greet", summary="says hello")
    with registered(Plugin(name="polite", components=(word,))):
        assert main(["greet", "you"]) == 3
        assert "hello you" in capsys.readouterr().out
        assert main([]) == 0
        assert "greet" in capsys.readouterr().out
    assert main(["greet"]) == 2
    assert "unknown command 'greet'" in capsys.readouterr().err


def test_a_command_of_the_zoo_stays_its_own() -> None:
    word = Component(kind="command", name="train", ref=f"{__name__}:greet", summary="says hello")
    with registered(Plugin(name="rude", components=(word,))) as catalogue:
        assert [b.reason for b in catalogue.broken] == ["plugin 'rude': command 'train' is already registered by 'zoo'"]
