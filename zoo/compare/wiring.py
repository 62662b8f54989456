"""What a model is made of, as text for the terminal and as HTML for notebooks."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.module import ZooModule
    from zoo.recipe import Recipe


@dataclass(frozen=True)
class PartRow:
    """One top-level part: where it is, what it is called, its size, and how much of it learns in the current stage."""

    path: str
    name: str
    parameters: int
    trained: int

    @property
    def state(self) -> str:
        if not self.parameters:
            return "no weights"
        if not self.trained:
            return "frozen"
        return "trained" if self.trained == self.parameters else f"{self.trained / self.parameters:.0%} trained"


def part_rows(module: ZooModule) -> list[PartRow]:
    """The parts of a module, in the order tokens pass through them; loose parameters come last as one row."""
    model, recipe = module.model, module.recipe
    rows: list[PartRow] = []
    seen: set[int] = set()
    for path, part in model.parts().items():
        parameters = list(part.parameters())
        seen.update(id(p) for p in parameters)
        name = recipe.parts[path][0] if path in recipe.parts else type(part).__name__
        rows.append(PartRow(path, name, _size(parameters), _size([p for p in parameters if p.requires_grad])))
    if module.momentum is not None:
        copies = list(module.momentum.parameters())
        seen.update(id(p) for p in copies)
        rows.append(PartRow("momentum", "moving average", _size(copies), 0))
    rest = [p for p in module.parameters() if id(p) not in seen]
    if rest:
        rows.append(PartRow("other", "scalars and heads", _size(rest), _size([p for p in rest if p.requires_grad])))
    return rows


def _size(parameters: list[Any]) -> int:
    return sum(p.numel() for p in parameters)


def short(number: float) -> str:
    """Three significant digits with a unit: 1.23 G."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def wiring_text(recipe: Recipe) -> str:
    """Parts with parameters and state in each stage, FLOPs of one sample, and the attention layouts. Builds on the
    meta device.
    """
    import torch

    from zoo.api import build_module
    from zoo.compare.flops import count

    with torch.device("meta"):
        module = build_module(recipe, seed=0)
    lines = [
        f"{recipe.name}  (scale {recipe.scale}, wiring {recipe.wiring[0]}, objectives {', '.join(recipe.objectives)})"
    ]
    for index, stage in enumerate(recipe.stages):
        module.set_stage(index)
        rows = part_rows(module)
        width = max(len(r.path) for r in rows)
        names = max(len(r.name) for r in rows)
        total = sum(r.parameters for r in rows)
        trained = sum(r.trained for r in rows)
        lines += ["", f"stage {index + 1} of {len(recipe.stages)}: {stage.name}"]
        lines += [f"  {r.path:<{width}}  {r.name:<{names}}  {short(r.parameters):>8}  {r.state}" for r in rows]
        share = f"{short(trained)} trained = {100 * trained / total:.3g} %"
        lines.append(f"  {'total':<{width}}  {'':<{names}}  {short(total):>8}  {share}")
        flops = count(module)
        lines.append(
            f"  FLOPs a sample: {short(flops.frozen_forward)} frozen forward, "
            f"{short(flops.trainable_forward)} trainable forward, {short(flops.backward)} backward "
            f"= {short(flops.per_sample)}"
        )
    with torch.device("cpu"):
        for name, layout in module.model.layouts().items():
            lines += ["", f"layout {name}", layout.draw()]
    return "\n".join(lines)


def wiring_html(module: ZooModule) -> str:
    """The wiring as a row of boxes: part, name, parameters, frozen or trained. Self-contained, for ``_repr_html_``."""
    stage = module.recipe.stages[module.stage]
    boxes = []
    for row in part_rows(module):
        colour = "#888" if not row.trained else "#2a7"
        boxes.append(
            f'<div style="border:2px solid {colour};border-radius:8px;padding:6px 10px;text-align:center">'
            f"<b>{html.escape(row.path)}</b><br>{html.escape(row.name)}<br>"
            f"<small>{short(row.parameters)} parameters<br>"
            f'<span style="color:{colour}">{row.state}</span></small></div>'
        )
    arrow = '<div style="align-self:center">&rarr;</div>'
    title = f"{html.escape(module.recipe.name)} <small>scale {module.recipe.scale}, stage {stage.name}</small>"
    return (
        f'<div style="font-family:sans-serif"><b>{title}</b>'
        f'<div style="display:flex;flex-wrap:wrap;gap:8px;margin-top:6px">{arrow.join(boxes)}</div></div>'
    )
