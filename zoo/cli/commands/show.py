"""zoo show: what a model resolves to, before anything is built or trained."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from zoo.errors import ConfigError

USAGE = """usage: zoo show NAME [KEY=VALUE ...] [--fields | --template | --memory]

  zoo show blip2-opt                       parts, parameters, frozen or trained, FLOPs, attention layout
  zoo show llava connector=qformer scale=tiny
  zoo show qformer                         a part: its fields, their defaults, what they mean
  --fields                                 every field of every part of the model, as KEY=VALUE can set it
  --template                               a caption and a dialogue token by token, as every stage trains on them
  --memory                                 what a training step takes on each device, stage by stage; with --devices N,
                                           --strategy single|ddp|fsdp, --batch-size N (of all devices),
                                           --precision fp32|bf16, --accelerator gpu|cpu,
                                           --checkpointing none|blocks"""


def main(argv: Sequence[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    from zoo.cli.memory import parse
    from zoo.errors import near
    from zoo.plugin import catalogue
    from zoo.registry import KINDS

    argv, memory = parse(argv)
    names = [a for a in argv if "=" not in a and not a.startswith("-")]
    overrides = [a for a in argv if "=" in a]
    unknown = [a for a in argv if a.startswith("-") and a not in ("--fields", "--template")]
    if unknown or len(names) != 1:
        raise ConfigError(
            "zoo show takes one NAME, KEY=VALUE, --fields and --template, not "
            f"{' '.join(unknown or names) or 'nothing'}"
        )
    name = names[0]
    if name in catalogue()["model"]:
        return show_model(name, overrides, "--fields" in argv, "--template" in argv, memory)
    if memory is not None:
        raise ConfigError(f"{name!r} is no model: only whole models are trained")
    if "--template" in argv:
        raise ConfigError(f"{name!r} is no model: only whole models have a template")
    kinds = [kind for kind in KINDS if kind != "model" and name in catalogue()[kind]]
    if not kinds:
        known = [n for kind in KINDS for n in catalogue()[kind].names()]
        raise ConfigError(f"unknown model or part {name!r}{near(name, known)}")
    for kind in kinds:
        show_part(kind, name)
    return 0


def show_model(
    name: str, overrides: Sequence[str], fields: bool, template: bool = False, memory: Namespace | None = None
) -> int:
    import yaml
    from rich.console import Console
    from rich.syntax import Syntax

    from zoo.cli.overrides import composed, prepare, to_recipe, written_keys
    from zoo.compare.wiring import wiring_text

    plain, choices = composed(prepare([f"model={name}", *overrides]))
    recipe = to_recipe(plain, choices, written_keys(overrides))
    if fields:
        text = yaml.safe_dump(recipe.to_plain(), sort_keys=False, allow_unicode=True)
        Console().print(Syntax(text, "yaml", background_color="default"))
        return 0
    if template:
        from zoo.cli.template import show_template

        show_template(recipe)
        return 0
    if memory is not None:
        from zoo.cli.memory import show_memory

        show_memory(recipe, memory)
        return 0
    console = Console()
    with console.status(f"building {recipe.name} on the meta device"):
        text = wiring_text(recipe)
    console.print(text, markup=False, highlight=False)
    return 0


def show_part(kind: str, name: str) -> None:
    import dataclasses
    import inspect

    from rich.console import Console

    from zoo.plugin import catalogue

    component = catalogue()[kind].get(name)
    cls = catalogue()[kind].load(name)
    console = Console()
    console.print(
        f"[bold]{name}[/bold]  {kind}, from {catalogue()[kind].plugin(name)}: {component.summary}", highlight=False
    )
    console.print(inspect.cleandoc(cls.__doc__ or ""), markup=False, highlight=False)
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        default = None
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        preset = component.preset.get(field.name, default)
        console.print(f"  {kind}.{field.name} = {preset!r}  ({field.type})", markup=False, highlight=False)
