"""The contract of a plugin: everything it adds passes its own contract, whether it is installed or only importable."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext

from zoo.errors import ZooError
from zoo.plugin import API, Plugin, catalogue, registered
from zoo.registry import FUNCTIONS
from zoo.testing.codecs import check_patch_codec
from zoo.testing.config import check_config, expect
from zoo.testing.data_tokenizers import check_data_tokenizer
from zoo.testing.denoisers import check_denoiser
from zoo.testing.mask_decoders import check_mask_decoder
from zoo.testing.output_connectors import check_output_connector
from zoo.testing.parts import (
    check_connector,
    check_decoder,
    check_encoder,
    check_modality_encoder,
    check_text_encoder,
)
from zoo.testing.recipes import check_objective, check_published, check_recipe
from zoo.testing.trunks import check_trunk

HEAVY = ("torch", "transformers", "timm", "open_clip", "lightning", "hydra", "torchvision")

CHECKS: dict[str, Callable[[str], None]] = {
    "model": check_recipe,
    "encoder": check_encoder,
    "text_encoder": check_text_encoder,
    "modality_encoder": check_modality_encoder,
    "connector": check_connector,
    "decoder": check_decoder,
    "trunk": check_trunk,
    "patch_codec": check_patch_codec,
    "denoiser": check_denoiser,
    "mask_decoder": check_mask_decoder,
    "data_tokenizer": check_data_tokenizer,
    "output_connector": check_output_connector,
    "objective": check_objective,
}


def check_component(kind: str, name: str) -> None:
    """Check one registered name by the contract of its kind.

    Raises:
        AssertionError: Naming the broken promise.
    """
    check = CHECKS.get(kind)
    if kind in FUNCTIONS:
        known = kind != "checkpoint" or name in catalogue()["model"]
        expect(known, f"checkpoint {name!r}: there is no recipe of this name")
        try:
            catalogue()[kind].load(name)
        except ZooError as error:
            raise AssertionError(str(error)) from error
    elif check is not None:
        check(name)
    else:
        check_config(kind, name)


def check_plugin(plugin: Plugin) -> None:
    """Check a plugin's manifest, then every component and recipe it adds.

    A plugin that is not installed is added to the catalogue for the time of the check.

    Raises:
        AssertionError: Naming the broken promise.
    """
    what = f"plugin {plugin.name!r}"
    expect(plugin.api == API, f"{what} speaks plugin API {plugin.api}, this zoo speaks {API}")
    installed = plugin.name in {p.name for p in catalogue().plugins}
    with nullcontext() if installed else registered(plugin):
        reasons = "; ".join(b.reason for b in catalogue().broken if b.name == plugin.name)
        expect(plugin.name in {p.name for p in catalogue().plugins}, f"{what} cannot be added: {reasons}")
        added = [
            (kind, c.name) for kind, r in catalogue().registries.items() for c in r if r.plugin(c.name) == plugin.name
        ]
        expect(bool(added), f"{what} adds nothing")
        for component in plugin.components:
            expect(bool(component.summary), f"{what}: {component.kind} {component.name!r} has no summary for zoo list")
        for kind, name in added:
            check_component(kind, name)
            if kind == "model":
                check_published(name)


def check_light(module: str, path: str | None = None) -> None:
    """Check that importing ``module``, a plugin's manifest, imports none of the heavy libraries.

    Args:
        path: A folder to put on the import path first.

    Raises:
        AssertionError: Naming the libraries.
    """
    code = "import sys; sys.path[:0] = sys.argv[2:]; __import__(sys.argv[1]); print(*sys.modules)"
    arguments = [sys.executable, "-c", code, module, *([path] if path else [])]
    result = subprocess.run(arguments, capture_output=True, text=True)
    expect(result.returncode == 0, f"import {module} fails: {result.stderr.strip().splitlines()[-1:]}")
    found = sorted(set(HEAVY) & set(result.stdout.split()))
    expect(not found, f"import {module} imports {', '.join(found)}")
