"""The skeleton ``zoo plugin new NAME`` writes: a package with one connector, one recipe and its contract tests."""

from __future__ import annotations

import keyword
import re
import shutil
import tempfile
from pathlib import Path

from zoo.errors import ConfigError, RunError
from zoo.plugin import catalogue

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

_PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.25"]
build-backend = "hatchling.build"

[project]
name = "@NAME@"
version = "0.1.0"
description = "A plugin of mmzoo"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["mmzoo>=0.1"]

[project.entry-points."zoo.plugins"]
@NAME@ = "@PACKAGE@:PLUGIN"

[tool.hatch.build.targets.wheel]
packages = ["@PACKAGE@"]
"""

_README = """\
# @NAME@

A plugin of the model zoo: the connector `@NAME@` and the recipe `llava-@NAME@`.

```
pip install -e .
zoo list
zoo train -m model=llava connector=mlp,@NAME@ scale=tiny
pytest tests
```
"""

_INIT = '''\
"""What this plugin adds. Every zoo command reads this file, so nothing heavy is imported here."""

from __future__ import annotations

from zoo.plugin import Plugin
from zoo.registry import Component

PLUGIN = Plugin(
    name="@NAME@",
    components=(
        Component(
            kind="connector",
            name="@NAME@",
            ref="@PACKAGE@.connector:@CLASS@Config",
            summary="layer norm and a bottleneck MLP, one token in, one out",
        ),
    ),
    conf="pkg://@PACKAGE@/conf",
)
'''

_CONNECTOR = '''\
"""A connector: tokens of the encoder in, tokens the decoder can read out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from zoo.connectors.base import Connector, ConnectorConfig
from zoo.part import Features


class @CLASS@(Connector):
    """Layer norm, then an MLP through ``hidden`` units, on every token alone."""

    def __init__(self, in_width: int, in_tokens: int, out_width: int, hidden: int) -> None:
        super().__init__()
        self.width = out_width
        self.tokens = in_tokens
        self.norm = nn.LayerNorm(in_width)
        self.proj = nn.Sequential(nn.Linear(in_width, hidden), nn.GELU(), nn.Linear(hidden, out_width))

    def forward(self, features: Features, text: Features | None = None) -> Features:
        """Map tokens [B, N, in_width] to [B, N, out_width]; ``text`` is not read."""
        tokens: Tensor = self.proj(self.norm(features.tokens))
        return Features(tokens, mask=features.mask, grid=features.grid)


@dataclass(frozen=True, kw_only=True)
class @CLASS@Config(ConnectorConfig):
    """Its fields are what ``connector.FIELD=VALUE`` sets; widths are derived when parts are joined.

    Attributes:
        hidden: Width of the bottleneck.
    """

    hidden: int = 256

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden = {self.hidden} must be 1 or more")

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> @CLASS@:
        return @CLASS@(in_width, in_tokens, out_width, self.hidden)
'''

_TESTS = '''\
"""The contracts every part of the zoo keeps, on this plugin's."""

from __future__ import annotations

from zoo.testing import check_light, check_plugin

from @PACKAGE@ import PLUGIN


def test_plugin_keeps_the_contracts() -> None:
    assert [component.name for component in PLUGIN.components] == ["@NAME@"]
    check_plugin(PLUGIN)


def test_manifest_imports_nothing_heavy() -> None:
    assert PLUGIN.conf is not None
    check_light("@PACKAGE@")
'''


def new_plugin(name: str, folder: str | Path = ".") -> Path:
    """Write a plugin that can be installed, and passes its tests, as it stands.

    Args:
        name: Lower-case words joined by ``-``; also the name of its connector.
        folder: Where the new folder ``name`` goes.

    Returns:
        The new folder.

    Raises:
        ConfigError: A malformed or taken name.
        RunError: The folder exists, or cannot be written.
    """
    package = name.replace("-", "_")
    if not _NAME.fullmatch(name) or keyword.iskeyword(package):
        raise ConfigError(f"plugin name {name!r} must be lower-case words of letters and digits joined by '-'")
    taken = [kind for kind, known in (("connector", name), ("model", f"llava-{name}")) if known in catalogue()[kind]]
    if taken or name in {p.name for p in catalogue().plugins}:
        raise ConfigError(f"plugin name {name!r} is taken by a {taken[0] if taken else 'plugin'}: choose another")
    target = Path(folder) / name
    if target.exists():
        raise RunError(f"{target} is already there: choose another name, or --folder")
    words = {"@NAME@": name, "@PACKAGE@": package, "@CLASS@": "".join(w.capitalize() for w in name.split("-"))}
    files = {
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
        f"{package}/__init__.py": _INIT,
        f"{package}/connector.py": _CONNECTOR,
        f"{package}/conf/model/llava-{name}.yaml": _recipe(),
        "tests/test_contracts.py": _TESTS,
    }
    unfinished: Path | None = None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
        for path, text in files.items():
            for word, value in words.items():
                text = text.replace(word, value)
            (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / path).write_text(text, encoding="utf-8")
        unfinished.chmod(0o755)
        unfinished.rename(target)
    except OSError as error:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise RunError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _recipe() -> str:
    """LLaVA's recipe with the new connector."""
    text = catalogue().recipes["llava"].read_text(encoding="utf-8")
    text = re.sub(r"(override /connector: ).*", r"\1@NAME@", text)
    _, _, rest = text.partition("defaults:")
    return f"# @package _global_\n# LLaVA with the connector of this plugin\ndefaults:{rest}"
