"""What a plugin may import of the zoo: `PUBLIC`, and of it no name that begins with an underscore."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from zoo.testing.config import expect

PUBLIC = (
    "zoo",
    "zoo.adapters",  # LoRA on any decoder
    "zoo.api",
    "zoo.capabilities",
    "zoo.connectors.*",
    "zoo.data.*",
    "zoo.data_tokenizers.*",
    "zoo.decoders.*",
    "zoo.denoisers.*",
    "zoo.diffusion.*",
    "zoo.draws",  # of training, equal under any number of processes
    "zoo.encoders.*",
    "zoo.errors",
    "zoo.evaluation.*",
    "zoo.layout",
    "zoo.mask_decoders.*",
    "zoo.models.*",
    "zoo.nn",
    "zoo.nn.*",
    "zoo.objectives.*",
    "zoo.output_connectors.*",
    "zoo.part",
    "zoo.plugin",
    "zoo.positions",
    "zoo.recipe",
    "zoo.registry",
    "zoo.sampling.*",
    "zoo.testing",
    "zoo.tokenizers.*",
    "zoo.torchvision_ops",  # before open_clip, timm or torchvision are imported
    "zoo.trunks.*",
    "zoo.weights.*",
)
"""Modules, ``.*`` for all of a room. Not public: how runs are executed, compared and claimed, and the command line."""


def check_imports(package: Path) -> None:
    """Check that the files of a plugin import public modules and names of the zoo only.

    Args:
        package: The folder of the plugin's code.

    Raises:
        AssertionError: With the file, the line and the import.
    """
    files = sorted(package.rglob("*.py"))
    expect(bool(files), f"{package.name} has no Python files")
    for file in files:
        for line, module, names in _imports(ast.parse(file.read_text(encoding="utf-8"))):
            where = f"{file.relative_to(package.parent)}:{line}"
            whole = [f"{module}.{name}" for name in names] if module == "zoo" else [module]
            public = all(is_public(name) or (module == "zoo" and not _is_module(name)) for name in whole)
            expect(public, f"{where} imports {module}, which is not public: zoo.testing.imports.PUBLIC lists what is")
            private = [name for name in names if name.startswith("_") and not name.startswith("__")]
            expect(not private, f"{where} imports {', '.join(private)} of {module}, which begins with an underscore")


def is_public(module: str) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in PUBLIC) and not any(
        part.startswith("_") for part in module.split(".")
    )


def _is_module(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _imports(tree: ast.AST) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(line, module, names) of every import of the zoo."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "zoo":
                    yield node.lineno, alias.name, ()
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "zoo":
            yield node.lineno, node.module or "", tuple(alias.name for alias in node.names)
