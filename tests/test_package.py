"""The package as installed: what the wheel holds, what importing it does, and what its source may not contain."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import zoo

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("zoo/**/*.py"), *ROOT.glob("plugins/*/zoo_*/**/*.py")])
CONFIGURATIONS = sorted([*ROOT.glob("conf/**/*.yaml"), *ROOT.glob("plugins/*/zoo_*/conf/**/*.yaml")])


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# -- the wheel -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout with the installed hatchling."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_its_configuration_and_nothing_else(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    inside = {f for f in files if ".dist-info/" not in f}
    assert wheel.name.startswith(f"mmzoo-{zoo.__version__}-py3-none-any")
    assert all(f.startswith("zoo/") for f in inside)
    assert not [f for f in inside if "test_" in f or "__pycache__" in f or f.endswith(".pyc")]
    assert "zoo/py.typed" in inside
    assert {f"zoo/{name(p)}" for p in ROOT.glob("conf/**/*.yaml")} <= inside
    assert {name(p) for p in ROOT.glob("zoo/**/*") if p.is_file() and "__pycache__" not in p.parts} <= inside
    info = [f.partition(".dist-info/")[2] for f in files if ".dist-info/" in f]
    assert "licenses/LICENSE" in info
    assert "entry_points.txt" in info


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, which borrows other packages from this one and does not see the checkout."""
    root = tmp_path_factory.mktemp("installed")
    environment = root / "env"
    venv.create(environment, with_pip=False)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    line = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    result = subprocess.run([*line, "--disable-pip-version-check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    # Packages only: an editable install of the checkout works through .pth files, which a path entry does not read.
    site = python_says(python, root, "import sysconfig; print(sysconfig.get_path('purelib'))")
    borrowed = sorted({p for p in sys.path if p.endswith("site-packages")})
    assert borrowed
    (Path(site) / "borrowed.pth").write_text("\n".join(borrowed))
    return python


def python_says(python: Path, folder: Path, code: str) -> str:
    return run(python, folder, "-c", code).stdout.strip()


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    result = subprocess.run([str(python), *arguments], cwd=folder, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def test_installed_package_and_its_configuration_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = "import zoo, json; from zoo.plugin import conf_dir; print(json.dumps([zoo.__file__, str(conf_dir())]))"
    package, conf = json.loads(python_says(installed, tmp_path, code))
    environment = installed.parents[1]
    assert Path(package).is_relative_to(environment)
    assert Path(conf) == Path(package).parent / "conf"
    assert not Path(package).is_relative_to(ROOT)


def test_installed_command_works_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    command = installed.with_name("zoo")
    assert run(command, tmp_path, "--version").stdout.strip() == f"zoo {zoo.__version__}"
    listed = run(command, tmp_path, "list").stdout
    assert all(model in listed for model in ("clip", "llava", "blip2-opt"))
    assert list(tmp_path.iterdir()) == []


def test_installed_package_resolves_and_builds_a_model(installed: Path, tmp_path: Path) -> None:
    code = "import zoo; m = zoo.build('clip', scale='tiny'); print(zoo.list_models('cl*p'), m.recipe.name)"
    assert python_says(installed, tmp_path, code) == "['clip'] clip"


# -- importing -----------------------------------------------------------------------------------------------------

STATE = """
import json, logging, os, random, signal, sys, warnings
def state():
    seen = {
        "environment": dict(os.environ), "filters": [str(f) for f in warnings.filters], "path": list(sys.path),
        "handlers": [str(h) for h in logging.getLogger().handlers], "level": logging.getLogger().level,
        "random": str(random.getstate()), "cwd": os.getcwd(), "signals": [str(signal.getsignal(s)) for s in (2, 15)],
        "excepthook": str(sys.excepthook), "locale": sys.getdefaultencoding(), "limit": sys.getrecursionlimit(),
    }
    if "torch" in sys.modules:
        import numpy, torch
        seen |= {
            "dtype": str(torch.get_default_dtype()), "device": str(torch.get_default_device()),
            "threads": torch.get_num_threads(), "grad": torch.is_grad_enabled(), "numpy": str(numpy.random.get_state()),
            "torch": torch.get_rng_state().tolist(), "tf32": torch.get_float32_matmul_precision(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
    return seen
"""

HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "lightning",
    "hydra",
    "omegaconf",
    "pydantic",
    "timm",
    "open_clip",
    "PIL",
    "yaml",
)


def fresh(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_zoo_imports_nothing_heavy() -> None:
    modules = set(fresh("import sys, zoo; print(*sys.modules)").split())
    assert "zoo" in modules
    assert set(HEAVY).isdisjoint(modules)


def test_importing_zoo_changes_no_global_state() -> None:
    code = STATE + "before = state()\nimport zoo\nprint(json.dumps([before, state()]))"
    before, after = json.loads(fresh(code))
    assert before == after


def test_importing_every_part_changes_no_global_state() -> None:
    modules = ["zoo.api", "zoo.models.base", "zoo.recipe", "zoo.layout", "zoo.capabilities", "zoo.testing"]
    code = (
        STATE
        + f"""
import numpy, torch, torch.nn, pydantic
before = state()
from zoo.plugin import catalogue
for kind, registry in catalogue().registries.items():
    for component in registry:
        if component.ref:
            registry.load(component.name)
for module in {modules!r}:
    __import__(module)
after = state()
heavy = [m for m in ("timm", "open_clip", "transformers", "matplotlib", "torchvision", "hydra") if m in sys.modules]
print(json.dumps([before, after, heavy]))
"""
    )
    before, after, heavy = json.loads(fresh(code))
    assert before == after
    assert heavy == []  # a Config says which library it needs; only building its part imports it


def test_listing_models_imports_no_torch() -> None:
    modules = set(fresh("import sys, zoo; assert 'clip' in zoo.list_models(); print(*sys.modules)").split())
    assert {"torch", "transformers", "lightning", "hydra"}.isdisjoint(modules)


def test_importing_zoo_is_quick() -> None:
    """It imports itself, and ``typing`` with what that needs; a name's own module when the name is asked for."""
    code = "import sys, typing; before = set(sys.modules); import zoo; print(*(set(sys.modules) - before))"
    assert set(fresh(code).split()) <= {"zoo", "__future__"}


def test_public_names_exist_and_unknown_ones_do_not() -> None:
    assert sorted(zoo.__all__) == dir(zoo)
    assert all(getattr(zoo, public) is not None for public in zoo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'bulid'"):
        _ = zoo.bulid


# -- the source ----------------------------------------------------------------------------------------------------

FORBIDDEN = {
    r"\binstantiate\(": "configurations name parts of the registry, they do not call",
    r"\b(pickle|dill|cloudpickle|marshal|shelve)\.(loads?|dumps?|open|Pickler|Unpickler)\b|from pickle": "it runs code",
    r"trust_remote_code\s*=\s*True": "code of a checkpoint is never run",
    r"(?<![\w.])eval\(|(?<![\w.])exec\(": "text is never run",
    r"torch\.(tril|triu)\b": "masks come from zoo.layout",
    r"shell\s*=\s*True": "commands are lists",
    r"yaml\.(unsafe_load|full_load)|yaml\.Loader\b": "YAML may hold code",
}


def code_without_texts(path: Path) -> str:
    """The source with docstrings, comments and messages blanked: what they say is no use of it."""
    import io
    import tokenize

    out = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and len(token.string) > 20):
            continue
        out.append((token.type, '""' if token.type == tokenize.STRING and "\n" in token.string else token.string))
    return tokenize.untokenize(out)


def test_source_holds_nothing_unsafe() -> None:
    found = []
    for path in SOURCES:
        code = re.sub(r"\s*([(.=])\s*", r"\1", code_without_texts(path))
        for pattern, reason in FORBIDDEN.items():
            use = re.search(pattern, code)
            if use:
                found.append(f"{name(path)} has {use.group(0)!r}: {reason}")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call):
                given = {k.arg: ast.unparse(k.value) for k in call.keywords}
                loads = ast.unparse(call.func).endswith(("torch.load", ".load_from_checkpoint"))
                saves = ast.unparse(call.func).endswith(".save_checkpoint")  # there it means "without the optimizer"
                if (given.get("weights_only") == "False" and not saves) or (
                    loads and given.get("weights_only") != "True"
                ):
                    found.append(f"{name(path)}, line {call.lineno}: loads without weights_only=True")
    assert SOURCES
    assert found == []


def test_configurations_hold_no_code_and_no_interpolation() -> None:
    code = re.compile(r"_(target|partial|args|recursive|convert)_|!!python|\$\{")
    assert CONFIGURATIONS
    assert [name(path) for path in CONFIGURATIONS if code.search(path.read_text(encoding="utf-8"))] == []


CALLS = {
    "TypeVar", "ParamSpec", "NewType", "frozenset", "tuple", "dict", "list", "set", "range", "sorted", "object",
    "float", "re.compile", "Path", "field", "dataclass", "logging.getLogger", "math.log", "math.sqrt", "cache",
    "partial",
    "MappingProxyType", "dict.fromkeys", "threading.Lock", "ContextVar", "struct.Struct", "_VICUNA.format",
}  # fmt: skip
"""Calls a module may make when it is imported, beside the zoo's own: they make constants."""

PREPARES = {"zoo.averaging", "zoo.module", "zoo.train", "zoo.curve", "zoo.resuming"}
"""Modules that import lightning, and must make torchvision importable before they do."""


def effects(body: list[ast.stmt], own: set[str]) -> Iterator[str]:
    """Statements at module level that may do more than define names."""
    plain = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.Pass)
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from effects(node.body, own)
        elif isinstance(node, ast.If):
            if ast.unparse(node.test) not in ("TYPE_CHECKING", "__name__ == '__main__'", "os.name == 'nt'"):
                yield ast.unparse(node.test)
        elif isinstance(node, ast.AugAssign) and ast.unparse(node.target) in own:
            continue
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if not all(isinstance(t, ast.Name | ast.Tuple) for t in targets):
                yield ast.unparse(node)
            for call in ast.walk(node.value) if node.value else []:
                if isinstance(call, ast.Call):
                    function = ast.unparse(call.func)
                    method = isinstance(call.func, ast.Attribute) and isinstance(
                        call.func.value, ast.Constant | ast.Call
                    )
                    if function not in CALLS and function.split(".")[0] not in own and not method:
                        yield ast.unparse(call)
        elif not isinstance(node, plain) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            yield ast.unparse(node)


def test_importing_a_module_only_defines_names() -> None:
    found: dict[str, list[str]] = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        for node in tree.body:  # what it defined itself, it may finish
            own |= {t.id for t in getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(t, ast.Name)}
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("zoo.", "zoo_")):
                own |= {alias.asname or alias.name for alias in node.names}
        statements = list(effects(tree.body, own))
        if ".".join(path.relative_to(ROOT).with_suffix("").parts) in PREPARES:
            statements = [statement for statement in statements if statement != "ensure()"]
        if statements:
            found[name(path)] = statements
    assert found == {}, json.dumps(found, indent=1)


def test_files_are_short_enough_to_read() -> None:
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: length for path, length in lengths.items() if length > 500} == {}


def test_dependencies_point_one_way() -> None:
    """Parts know no model, models no comparison, and nothing in the zoo a plugin."""
    rooms = {
        "nn": {"nn", "layout", "layout_facts", "part", "errors", "capabilities"},
        "encoders": {"encoders", "nn", "layout", "layout_facts", "part", "errors", "torchvision_ops", "registry"},
        "connectors": {"connectors", "nn", "layout", "layout_facts", "part", "errors", "encoders"},
    }
    for room, allowed in rooms.items():
        for path in sorted((ROOT / "zoo" / room).glob("**/*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("zoo."):
                    assert node.module.split(".")[1] in allowed, f"{name(path)} imports {node.module}"
    plugins = {p.name for p in ROOT.glob("plugins/*/zoo_*")}
    for path in ROOT.glob("zoo/**/*.py"):
        imported = {
            n.module.split(".")[0]
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.ImportFrom) and n.module
        }
        assert plugins.isdisjoint(imported), name(path)


# -- the tested set ------------------------------------------------------------------------------------------------


def test_constraints_pin_every_dependency_without_a_build_suffix() -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(r) for r in (*project["dependencies"], *project["optional-dependencies"]["test"])]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    assert all(version and "+" not in version for version in pins.values())
    assert len(pins) == len(lines)
    assert {"pip", "setuptools", "mmzoo"}.isdisjoint(pins)
    for requirement in wanted:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
