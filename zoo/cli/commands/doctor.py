"""zoo doctor: versions, devices, data caches, plugins, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Print the findings; returns 1 when something is wrong."""
    import argparse

    from rich.console import Console

    from zoo.compare.record import git_state, hardware, versions
    from zoo.plugin import catalogue
    from zoo.torchvision_ops import ensure

    argparse.ArgumentParser("zoo doctor", description="Versions, devices, plugins, and what is wrong.").parse_args(argv)
    console = Console()

    def line(good: bool, text: str) -> None:
        console.print(f"[{'green' if good else 'red'}]{'ok ' if good else 'BAD'}[/] ", end="")
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    wrong = 0
    found = versions()
    line(True, "  ".join(f"{name} {version}" for name, version in found.items()))
    declared = ensure()
    line(
        True,
        "torchvision: operators declared in its place (CPU torch beside a CUDA build)"
        if declared
        else "torchvision: own operators",
    )
    for name, value in hardware().items():
        line(True, f"{name}: {value}")
    state = git_state()
    if state:
        line(True, f"checkout: {state['commit'][:12]}{' with uncommitted changes' if state['dirty'] else ''}")
    for package, what in (("timm", "vision towers"), ("open_clip", "CLIP towers"), ("transformers", "language models")):
        try:
            __import__(package)
            line(True, f"{package} imports ({what})")
        except Exception as error:  # a broken installation can raise anything
            wrong += 1
            line(False, f"{package} does not import ({what}): {type(error).__name__}: {' '.join(str(error).split())}")
    catalog = catalogue()
    for plugin in catalog.plugins:
        line(True, f"plugin {plugin.name}: {len(plugin.components)} components")
    for broken in catalog.broken:
        wrong += 1
        line(False, f"plugin {broken.name}: {broken.reason}")
    for kind, registry in catalog.registries.items():
        for component in registry:
            if component.ref:
                try:
                    registry.load(component.name)
                except Exception as error:
                    wrong += 1
                    line(False, f"{kind} {component.name}: {' '.join(str(error).split())}")
    console.print(f"{wrong} things are wrong" if wrong else "nothing is wrong")
    return 1 if wrong else 0
