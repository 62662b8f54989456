"""Starting a model from the weights of another: what both have is taken, and the rest is said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.errors import WeightsError
from zoo.models.base import Model
from zoo.weights.files import locate
from zoo.weights.load import _resized, load
from zoo.weights.report import LoadReport, some
from zoo.weights.save import RECIPE

WEIGHTS = "weights"
"""The checkpoint inside a run directory."""


@dataclass(frozen=True, kw_only=True)
class StartReport(LoadReport):
    """What a model took over.

    Attributes:
        dropped: Paths of the source that the model does not have, as short as they name nothing else; ``*`` stands for
            numbers.
        started_new: Paths of the model that the source does not have.
    """

    dropped: tuple[str, ...] = ()
    started_new: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"started from {self.source}: {len(self.loaded)} tensors taken over"]
        if self.resized:
            lines.append(f"interpolated to the image size: {some(self.resized)}")
        lines.append(f"new: {', '.join(self.started_new) or 'nothing'}")
        lines.append(f"dropped: {', '.join(self.dropped) or 'nothing'}")
        return "\n".join(lines)

    def to_plain(self) -> dict[str, Any]:
        """JSON-like form, for a manifest."""
        return {
            "source": self.source,
            "loaded": len(self.loaded),
            "new": list(self.started_new),
            "dropped": list(self.dropped),
        }


def checkpoint_of(source: str | Path) -> Path:
    """The checkpoint folder or file of ``source``: a run directory, a checkpoint folder, a file, or a hub id.

    Raises:
        WeightsError: Nothing is there, or a run that has no weights yet.
    """
    path = locate(source)
    if path.is_dir() and (path / "run.yaml").is_file() and not (path / RECIPE).is_file():
        if not (path / WEIGHTS / RECIPE).is_file():
            raise WeightsError(
                f"the run {str(path)!r} has no weights yet: finish it (the same zoo train command goes on), or give"
                " another with init="
            )
        return path / WEIGHTS
    return path


def start_from(network: Model, source: str | Path, model: str | None = None) -> StartReport:
    """Fill what ``network`` shares with the model stored at ``source``; tensors are matched by their names.

    A module that knows itself in another form translates it (``adopt``, as the Q-Former with and without its text
    branch), and positions of another image size are interpolated (``fit_stored``).

    Args:
        source: As ``checkpoint_of``.
        model: The recipe a bare file of another library belongs to.

    Returns:
        What was taken over, what is new, and what was dropped.

    Raises:
        WeightsError: Unsafe or damaged files, tensors of one name and two shapes, or nothing in common.
    """
    path = checkpoint_of(source)
    recipe, stored, read = load(path, model if path.is_file() else None)
    own = network.state_dict()
    state = _adopted(network, stored)
    resized = _resized(network, own, state)
    taken = {name: tensor for name, tensor in state.items() if name in own}
    differ = [name for name, tensor in taken.items() if tensor.shape != own[name].shape]
    if differ:
        name = differ[0]
        raise WeightsError(
            f"cannot start from {str(source)!r} ({recipe.name}, scale {recipe.scale}): {name} is"
            f" {tuple(taken[name].shape)} there and {tuple(own[name].shape)} in the model ({len(differ)} such tensors):"
            " use one scale and equal sizes in both"
        )
    if not taken:
        raise WeightsError(
            f"cannot start from {str(source)!r}: {recipe.name} has {_tops(state)}, the model {_tops(own)}, and no"
            " tensor of one name is in both: give weights of a model that shares a part"
        )
    filled = {own[name].data_ptr() for name in taken if own[name].numel()}
    new = [n for n, t in own.items() if n not in taken and not (t.numel() and t.data_ptr() in filled)]
    network.load_state_dict(taken, strict=False)
    left = [name for name in state if name not in taken]
    return StartReport(
        source=str(source),
        form=read.form,
        loaded=sorted(taken),
        renamed=sum(name not in stored for name in taken),
        new=sorted(new),
        resized=resized,
        ignored=sorted({*left, *read.ignored}),
        dropped=(*shortest(left, [n for n in state if n in taken]), *_modules(read.ignored)),
        started_new=shortest(new, [n for n in own if n not in set(new)]),
    )


def joined(reports: Sequence[StartReport], network: Model) -> StartReport:
    """What several starts, one after the other, come to."""
    if len(reports) == 1:
        return reports[0]
    loaded = sorted({name for report in reports for name in report.loaded})
    new = sorted(set.intersection(*(set(report.new) for report in reports)))
    return StartReport(
        source=" + ".join(report.source for report in reports),
        form=reports[-1].form,
        loaded=loaded,
        renamed=sum(report.renamed for report in reports),
        new=new,
        resized=sorted({name for report in reports for name in report.resized}),
        ignored=sorted({name for report in reports for name in report.ignored}),
        dropped=tuple(dict.fromkeys(path for report in reports for path in report.dropped)),
        started_new=shortest(new, [name for name in network.state_dict() if name not in set(new)]),
    )


def _adopted(network: Model, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors with those below a module that has ``adopt`` as it wants to call them."""
    state = dict(stored)
    for path, module in network.named_modules():
        adopt = getattr(module, "adopt", None)
        if not callable(adopt):
            continue
        prefix = f"{path}." if path else ""
        inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        for name in inside:
            del state[prefix + name]
        renamed: dict[str, Tensor] = adopt(inside)
        state.update({prefix + name: tensor for name, tensor in renamed.items()})
    return state


def shortest(names: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """Paths that hold all of ``names`` and none of ``others``, as short as can be; numbers become ``*``."""
    taken = {".".join(steps[:i]) for steps in (n.split(".") for n in others) for i in range(1, len(steps) + 1)}
    paths: dict[str, None] = {}
    for name in sorted(names):
        steps = name.split(".")
        cut = next((i for i in range(1, len(steps) + 1) if ".".join(steps[:i]) not in taken), len(steps))
        paths[re.sub(r"(?<=layers\.)\d+", "*", ".".join(steps[:cut]))] = None
    return tuple(paths)


def _modules(names: Iterable[str]) -> tuple[str, ...]:
    """The modules of another library's names that no rule of the key map takes; numbers become ``*``."""
    return tuple(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", n.rpartition(".")[0] or n) for n in sorted(names)))


def _tops(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.split(".")[0] for name in names}))
