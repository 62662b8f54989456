"""Static facts of a layout: which kernels may do without a mask, where the pads stand, how it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from zoo.errors import ConfigError, near

NEVER, PAST, ALL = 0, 1, 2
RELATIONS: dict[str, int] = {"never": NEVER, "past": PAST, "all": ALL}
MODALITIES: dict[str, int] = {"text": 0, "image": 1}
"""Ids of the modality names a :class:`Segment` may use without a ``modalities`` table of its own."""

Reads = Literal["never", "past", "all"]
Kind = Literal["full", "causal", "table"]
Padding = Literal["none", "right", "any"]
Runs = tuple[tuple[int, int, int], ...]  # (segment, start, stop), in order, covering the sequence
Table = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Segment:
    """A stretch of the sequence.

    Attributes:
        name: its name, unique in the layout; exceptions of the table are written with it.
        length: its number of tokens (0 is allowed, e.g. for an empty prompt).
        modality: the expert route of its tokens, an id or a name of :data:`MODALITIES`.
        attends: how it reads itself: ``causal`` (tokens up to and including the own one) or ``full``.
        predicted: whether an objective predicts its tokens; a fact for objectives and pictures, attention does not
            use it.
    """

    name: str
    length: int
    modality: int | str = 0
    attends: Literal["causal", "full"] = "causal"
    predicted: bool = False

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ConfigError(f"segment {self.name!r} has length {self.length}; expected 0 or more")
        if self.attends not in ("causal", "full"):
            raise ConfigError(f"segment {self.name!r} attends {self.attends!r}; expected 'causal' or 'full'")
        if isinstance(self.modality, int) and self.modality < 0:
            raise ConfigError(f"segment {self.name!r} has modality {self.modality}; expected an id of 0 or more")


def static_table(segments: Sequence[Segment], relation: Mapping[tuple[str, str], Reads]) -> Table:
    """Return the default table of the segments with the exceptions ``relation`` written in; checks all names."""
    names = [s.name for s in segments]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise ConfigError(
            f"two segments are named {twice!r}; give each its own name,"
            " or use Layout.from_ids for one segment in several pieces"
        )
    table = [
        [ALL if i == j and s.attends == "full" else PAST for j in range(len(names))] for i, s in enumerate(segments)
    ]
    for (reader, read), value in relation.items():
        for name in (reader, read):
            if name not in names:
                raise ConfigError(f"the relation names a segment {name!r} that is not laid out{near(name, names)}")
        if value not in RELATIONS:
            raise ConfigError(f"relation {(reader, read)} is {value!r}; expected never, past or all")
        table[names.index(reader)][names.index(read)] = RELATIONS[value]
    return tuple(tuple(row) for row in table)


def static_runs(segments: Sequence[Segment], ids: Mapping[str, int]) -> tuple[Runs, tuple[tuple[int, int, int], ...]]:
    """Return ``(segment, start, stop)`` and ``(start, stop, modality)`` of every segment that has tokens."""
    runs: list[tuple[int, int, int]] = []
    spans: list[tuple[int, int, int]] = []
    at = 0
    for number, s in enumerate(segments):
        if isinstance(s.modality, str) and s.modality not in ids:
            hint = near(s.modality, ids)
            raise ConfigError(f"segment {s.name!r} has modality {s.modality!r}{hint}; or give `modalities`")
        route = ids[s.modality] if isinstance(s.modality, str) else s.modality
        if s.length:
            runs.append((number, at, at + s.length))
            spans.append((at, at + s.length, route))
        at += s.length
    return tuple(runs), tuple(spans)


def kind(runs: Runs | None, table: Table | None, padding: Padding, length: int) -> Kind:
    """Find out from static facts whether the mask is "everything" or "k <= q" on all real rows."""
    if table is None or padding == "any":
        return "table"
    if runs is None:
        values = {value for row in table for value in row}
        full, causal = values == {ALL}, values == {PAST}
    else:
        full = causal = True
        for n, (i, _, _) in enumerate(runs):
            for m, (j, start, stop) in enumerate(runs):
                if n == m:  # one token reads itself under "past" and under "all"
                    single = stop - start == 1
                    full &= table[i][i] == ALL or (single and table[i][i] == PAST)
                    causal &= table[i][i] == PAST or (single and table[i][i] == ALL)
                elif m < n:  # keys that stand before the rows: "past" and "all" are the same
                    full &= table[i][j] != NEVER
                    causal &= table[i][j] != NEVER
                else:  # keys behind the rows: "past" and "never" are the same
                    full &= table[i][j] == ALL
                    causal &= table[i][j] != ALL
    if full and padding == "none" and length:
        return "full"
    return "causal" if causal and length else "table"


def fitted(
    segment: Tensor,
    relation: Tensor | Sequence[Sequence[int]],
    modality: Tensor | None,
    names: Sequence[str] | None,
) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...], Table | None]:
    """What ``Layout.from_ids`` is given in one form: ``[B, T]``, ``[1 | B, S, S]``, ``[B, T]``, S names, and the
    relation as numbers where it is one for all rows and comes from the host; refuses shapes that do not fit together.
    """
    if segment.ndim != 2:
        raise ConfigError(f"segment has shape {tuple(segment.shape)}; expected [batch, tokens]")
    batch, segment = len(segment), segment.long()
    relation = torch.as_tensor(relation, dtype=torch.uint8)
    relation = relation[None] if relation.ndim == 2 else relation
    count = relation.shape[-1]
    if relation.ndim != 3 or relation.shape[-2] != count or relation.shape[0] not in (1, batch):
        raise ConfigError(f"relation has shape {tuple(relation.shape)}; expected [1 or {batch}, S, S]")
    modality = torch.zeros_like(segment) if modality is None else modality.long()
    if modality.shape != segment.shape:
        raise ConfigError(
            f"modality has shape {tuple(modality.shape)}; expected that of segment, {tuple(segment.shape)}"
        )
    names = tuple(names) if names is not None else tuple(f"s{i}" for i in range(count))
    if len(names) != count:
        raise ConfigError(f"{len(names)} segment names for a relation of {count} segments; give one name each")
    table = numbers(relation) if relation.device.type == "cpu" and relation.shape[0] == 1 else None
    return segment, relation.to(segment.device), modality, names, table


def check_ids(segment: Tensor, relation: Tensor, modality: Tensor) -> None:
    """Refuse ids outside their tables; the tensors are on the CPU and not empty."""
    low, high = int(segment.min()), int(segment.max())
    if low < -1 or high >= relation.shape[-1]:
        raise ConfigError(f"segment ids run from {low} to {high}; expected -1 (pad) to {relation.shape[-1] - 1}")
    if int(relation.max()) > ALL:
        raise ConfigError(f"relation holds {int(relation.max())}; expected 0 never, 1 past, 2 all")
    if int(modality.min()) < 0:
        raise ConfigError(f"modality holds {int(modality.min())}; expected ids of 0 or more, pads included")


def look_at_padding(real: Tensor) -> Padding:
    if bool(real.all()):
        return "none"
    return "any" if bool((real[:, 1:] & ~real[:, :-1]).any()) else "right"


def look_for_spans(modality: Tensor) -> tuple[tuple[int, int, int], ...] | None:
    if not modality.numel() or not bool((modality == modality[:1]).all()):
        return None
    return merged(tuple((i, i + 1, m) for i, m in enumerate(modality[0].tolist())))


def merged(spans: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
    merged: list[tuple[int, int, int]] = []
    for start, stop, route in spans:
        if merged and merged[-1][2] == route:
            merged[-1] = (merged[-1][0], stop, route)
        elif stop > start:
            merged.append((start, stop, route))
    return tuple(merged)


def merged_runs(runs: Runs) -> Runs:
    return tuple((s, a, b) for a, b, s in merged(tuple((a, b, s) for s, a, b in runs)))


def numbers(relation: Tensor) -> Table:
    return tuple(tuple(row) for row in relation[0].tolist())


def positions(
    position: Tensor | Literal["real"] | None, batch: int, length: int, device: torch.device, real: Tensor | None
) -> Tensor:
    if isinstance(position, str) and position != "real":
        raise ConfigError(f"position is {position!r}; expected a tensor, 'real' or None")
    if position is None or (isinstance(position, str) and real is None):
        return torch.arange(length, device=device).expand(batch, -1)
    if isinstance(position, str):
        assert real is not None
        return (real.long().cumsum(1) - 1).clamp(min=0)
    if position.shape[-1] != length or position.ndim not in (2, 3) or position.shape[0] not in (1, batch):
        raise ConfigError(
            f"position has shape {tuple(position.shape)}; expected [{batch}, {length}] or [{batch}, axes, {length}]"
        )
    return position.long().to(device).expand(batch, *position.shape[1:])


def picture(
    names: Sequence[str], segment: list[int], relation: list[list[int]], kind: Kind, allowed: list[list[bool]] | None
) -> str:
    """Draw one batch row: the table by segments, then what every token reads or, where ``allowed`` is not given, the
    stretches of the sequence in their order.
    """
    words = {value: word.replace("never", "-") for word, value in RELATIONS.items()}
    present = [i for i in range(len(names)) if i in segment]
    label = [f"{names[i]} ({segment.count(i)})" for i in present]
    left = max([len(text) for text in label] + [5])
    wide = [max(5, len(names[i])) for i in present]
    lines = [f"{len(segment)} tokens, {segment.count(-1)} pads, attention: {kind}. Rows read columns:"]
    lines.append(" " * (left + 2) + "  ".join(f"{names[i]:<{w}}" for i, w in zip(present, wide, strict=True)))
    for text, i in zip(label, present, strict=True):
        cells = [f"{words[relation[i][j]]:<{w}}" for j, w in zip(present, wide, strict=True)]
        lines.append(f"{text:<{left}}  " + "  ".join(cells))
    if allowed is not None:
        lines.append("")
        heads = [names[s] if s >= 0 else "pad" for s in segment]
        for i, reads in enumerate(allowed):
            head = heads[i] if i == 0 or heads[i] != heads[i - 1] else ""
            lines.append(f"{head:<{left}}  " + "".join("■" if r else "·" for r in reads))
    elif len(present) > 1:
        stretches = [(names[s] if s >= 0 else "pad", len(list(run))) for s, run in groupby(segment)]
        lines.append("order: " + " | ".join(f"{name} ({count})" for name, count in stretches))
    return "\n".join(line.rstrip() for line in lines)
