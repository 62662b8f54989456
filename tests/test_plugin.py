"""Plugins: found through entry points, added whole or not at all, and never fatal."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zoo import plugin, testing
from zoo.cli.new_plugin import new_plugin
from zoo.errors import ConfigError, RunError
from zoo.plugin import API, GROUP, Catalogue, Plugin, catalogue, registered
from zoo.recipe import scales
from zoo.registry import Component


class Point:
    """An entry point whose package does whatever ``load`` does."""

    def __init__(self, name: str, load: Callable[[], Any]) -> None:
        self.name, self.value, self.load = name, f"{name}:PLUGIN", load


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Catalogue]]:
    """``install(a, b)``: the catalogue of an environment with these entry points and no others."""

    def installed(*points: Point) -> Catalogue:
        monkeypatch.setattr(plugin, "entry_points", lambda *, group: list(points) if group == GROUP else [])
        catalogue.cache_clear()
        return catalogue()

    yield installed
    monkeypatch.undo()
    catalogue.cache_clear()


def connector(name: str) -> Component:
    return Component(kind="connector", name=name, ref="zoo.connectors.simple:LinearConfig", summary="linear")


def raising(error: BaseException) -> Callable[[], Any]:
    def load() -> Any:
        raise error

    return load


GOOD = Plugin(name="good", components=(connector("good-linear"),))


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (raising(ImportError("No module named 'absent'")), "ImportError: No module named 'absent'"),
        (raising(RuntimeError("first\nsecond")), "RuntimeError: first second"),
        (raising(SystemExit(3)), "SystemExit: 3"),
        (raising(ValueError()), "ValueError: no message"),
        (lambda: "no plugin", "is a str, expected a zoo.plugin.Plugin"),
        (lambda: Plugin(name="old", api=API + 1), f"it speaks plugin API {API + 1}, this zoo speaks {API}"),
        (lambda: Plugin(name="x", components=(connector("fresh"), connector("fresh"))), "already registered by 'x'"),
        (lambda: Plugin(name="x", components=(connector("Bad Name"),)), "must be lower-case"),
        (lambda: Plugin(name="x", components=(Component(kind="engine", name="v8"),)), "unknown kind 'engine'"),
        (lambda: Plugin(name="x", components=(Component(kind="model", name="v8"),)), "without a recipe file: v8"),
        (lambda: Plugin(name="x", conf="/etc"), "must be 'pkg://package/folder'"),
        (lambda: Plugin(name="x", conf="pkg://zoo/nowhere"), "does not exist"),
        (lambda: Plugin(name="x", conf="pkg://zoo_no_such/conf"), "ModuleNotFoundError"),
    ],
)
def test_broken_plugin_is_reported_and_everything_else_works(
    install: Callable[..., Catalogue], load: Callable[[], Any], reason: str
) -> None:
    found = install(Point("a-bad", load), Point("good", lambda: GOOD))
    assert [b.name for b in found.broken] == ["a-bad"]
    assert reason in found.broken[0].reason
    assert "\n" not in found.broken[0].reason
    assert [p.name for p in found.plugins] == ["zoo", "good"]
    assert found["connector"].plugin("good-linear") == "good"
    assert {"fresh", "Bad Name"}.isdisjoint(found["connector"].names())
    assert "clip" in found["model"]


def test_interrupting_the_import_of_a_plugin_is_no_broken_plugin(install: Callable[..., Catalogue]) -> None:
    with pytest.raises(KeyboardInterrupt):
        install(Point("slow", raising(KeyboardInterrupt())))


def test_taken_name_refuses_the_whole_plugin(install: Callable[..., Catalogue]) -> None:
    taken = catalogue()["encoder"].names()[0]
    thief = Plugin(name="thief", components=(connector("spare"), Component(kind="encoder", name=taken, ref="a:B")))
    found = install(Point("thief", lambda: thief))
    assert f"encoder '{taken}' is already registered by 'zoo'" in found.broken[0].reason
    assert "spare" not in found["connector"]
    assert found["encoder"].plugin(taken) == "zoo"


def test_second_of_two_plugins_with_one_name_is_refused(install: Callable[..., Catalogue]) -> None:
    twin = Plugin(name="twin", components=(connector("good-linear"),))
    found = install(Point("z-twin", lambda: twin), Point("a-good", lambda: GOOD))
    assert found["connector"].plugin("good-linear") == "good"
    assert "already registered by 'good'" in found.broken[0].reason


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package ``zoo_conf_plugin`` with an empty conf folder."""
    root = tmp_path / "zoo_conf_plugin"
    (root / "conf" / "model").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield root
    sys.modules.pop("zoo_conf_plugin", None)


def test_recipes_of_a_plugin_are_found_with_their_summary(package: Path, install: Callable[..., Catalogue]) -> None:
    own = (plugin.conf_dir() / "model" / "clip.yaml").read_text()
    text = own.replace(own.splitlines()[1], "# a borrowed tower")
    (package / "conf" / "model" / "clip-borrowed.yaml").write_text(text)
    found = install(Point("conf", lambda: Plugin(name="conf", conf="pkg://zoo_conf_plugin/conf")))
    assert not found.broken
    assert found["model"].plugin("clip-borrowed") == "conf"
    assert found["model"].get("clip-borrowed").summary == "a borrowed tower"
    assert found.recipes["clip-borrowed"] == package / "conf" / "model" / "clip-borrowed.yaml"
    from zoo.recipe import resolve

    assert resolve("clip-borrowed", scale="tiny").parts == resolve("clip", scale="tiny").parts


@pytest.mark.parametrize("file", ["model/clip.yaml", "scale/tiny.yaml"])
def test_plugin_may_not_replace_a_file_of_the_zoo(file: str, package: Path, install: Callable[..., Catalogue]) -> None:
    before = dict(scales())
    (package / "conf" / file).parent.mkdir(exist_ok=True)
    (package / "conf" / file).write_text("sizes: {width: 8}\n")
    found = install(Point("conf", lambda: Plugin(name="conf", conf="pkg://zoo_conf_plugin/conf")))
    assert "already" in found.broken[0].reason
    assert scales() == before
    assert found.recipes["clip"].parent == plugin.conf_dir() / "model"


def test_registered_adds_a_plugin_for_the_time_of_the_block() -> None:
    assert "good-linear" not in catalogue()["connector"]
    with registered(GOOD) as found:
        assert "good-linear" in found["connector"]
        assert catalogue() is found
    assert "good-linear" not in catalogue()["connector"]


def test_reading_the_catalogue_imports_no_part() -> None:
    code = "import sys; from zoo.plugin import catalogue; catalogue(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "hydra", "pydantic", "yaml", "transformers"}.isdisjoint(modules)


def test_new_plugin_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_plugin("two-words", tmp_path)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "README.md",
        "pyproject.toml",
        "tests/test_contracts.py",
        "two_words/__init__.py",
        "two_words/conf/model/llava-two-words.yaml",
        "two_words/connector.py",
    ]
    texts = [p.read_text().replace("@package", "").replace("@dataclass", "") for p in folder.rglob("*") if p.is_file()]
    assert not any("@" in text for text in texts)
    monkeypatch.syspath_prepend(str(folder))
    import two_words  # type: ignore[import-not-found]

    testing.check_light("two_words", str(folder))
    testing.check_plugin(two_words.PLUGIN)
    with registered(two_words.PLUGIN):
        from zoo.recipe import resolve

        assert resolve("llava-two-words").parts["connector"][0] == "two-words"
        assert resolve("llava-two-words").parts["encoder"] == resolve("llava").parts["encoder"]


def test_new_plugin_as_written_is_formatted_and_installable(tmp_path: Path) -> None:
    import tomllib

    folder = new_plugin("words", tmp_path)
    for command in (["check", "--extend-select=I,UP,B"], ["format", "--check"]):
        line = [sys.executable, "-m", "ruff", *command, "-q", "--isolated", "--line-length=120", "."]
        result = subprocess.run(line, cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][GROUP] == {"words": "words:PLUGIN"}


@pytest.mark.parametrize("name", ["", "Bad", "a_b", "1a", "a--b", "../a", "class", "a b", "clip"])
def test_new_plugin_refuses_names(name: str, tmp_path: Path) -> None:
    if name == "clip":
        (tmp_path / "clip").mkdir()
        with pytest.raises(RunError, match="already there"):
            new_plugin(name, tmp_path)
    else:
        with pytest.raises(ConfigError, match="must be lower-case"):
            new_plugin(name, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == (["clip"] if name == "clip" else [])


def test_new_plugin_refuses_a_taken_name_and_an_unwritable_folder(tmp_path: Path) -> None:
    with registered(GOOD), pytest.raises(ConfigError, match="taken by a connector"):
        new_plugin("good-linear", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        new_plugin("fine", tmp_path / "file" / "below")


def test_doctor_names_a_broken_plugin_and_everything_else_works(
    install: Callable[..., Catalogue], capsys: pytest.CaptureFixture[str]
) -> None:
    from zoo.cli import main

    install(Point("torn", raising(RuntimeError("its module does not import"))), Point("good", lambda: GOOD))
    assert main(["doctor"]) == 1
    found = capsys.readouterr().out
    assert "BAD plugin torn: RuntimeError: its module does not import" in found
    assert "ok  plugin good" in found
    assert "1 things are wrong" in found
    assert main(["list", "connector"]) == 0
    captured = capsys.readouterr()
    assert "good-linear" in captured.out
    assert "torn" in captured.err
    install(Point("good", lambda: GOOD))
    assert main(["doctor"]) == 0
