"""The layout of one sequence: who is in it, and what each part reads of the others.

A model lays its inputs out as *segments* of one sequence. One small table says what a row of one segment reads of
another, and every self-attention mask and every expert route follows from it::

    r = relation[segment(q), segment(k)]                      # 0 never, 1 past, 2 all
    allowed(q, k) = real(k) and (r == all or (r == past and k <= q))
    a pad (segment -1) is read by nobody else and reads only itself

The table is ``past`` everywhere and ``all`` where a full segment meets itself, unless the layout says otherwise.
Layouts that come out as "everything" or "plain causal" say so when they are built (``kind``), from static facts only,
so that attention needs no mask for them.

Layouts are best built on the CPU (a data worker, a wiring that knows its lengths) and moved with :meth:`Layout.to`:
there the padding can be looked at for free. Nothing here reads a value back from an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError, near
from zoo.layout_facts import (
    ALL,
    MODALITIES,
    NEVER,
    PAST,
    RELATIONS,
    Kind,
    Padding,
    Reads,
    Runs,
    Segment,
    Table,
    check_ids,
    fitted,
    kind,
    look_at_padding,
    look_for_spans,
    merged,
    merged_runs,
    picture,
    positions,
    static_runs,
    static_table,
)

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["ALL", "MODALITIES", "NEVER", "PAST", "RELATIONS", "Layout", "MaskMod", "Segment", "TokenBatch", "lay_out"]

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Layout:
    """The laid-out sequence; build it with :func:`lay_out` or :meth:`from_ids`, not directly.

    Attributes:
        segment: ``[B, T]`` int64, the segment of each token, -1 for a pad. B may be 1 and then stands for any batch.
        modality: ``[B, T]`` int64, the expert route of each token (pads keep the one of their place).
        relation: ``[B|1, S, S]`` uint8, what a row of segment i reads of segment j: 0 never, 1 past, 2 all.
        position: ``[B, T]`` or ``[B, axes, T]`` int64 position ids; a negative id means "no rotation row" to rotary
            attention.
        names: the S segment names.
        spans: ``(start, stop, modality)`` runs when every row of the batch has the same modalities in the same
            places, else None.
        kind: ``full`` (every row reads every key), ``causal`` (k <= q), or ``table`` (a mask is needed).
        padding: ``none``, ``right`` (pads only behind the last real token), or ``any``.
        predicted: names of the segments whose tokens are predicted.
        document: ``[B, T]`` int64 where several documents share a row (:meth:`separate`); they never read each other.

    Pads: no real row ever reads a pad, and in :meth:`mask` and :meth:`mask_mod` a pad row reads exactly itself. Where
    ``kind`` is ``causal`` the mask is not used and right pads read what stands before them; their outputs are finite,
    and mean nothing in either case.
    """

    segment: Tensor
    modality: Tensor
    relation: Tensor
    position: Tensor
    names: tuple[str, ...]
    spans: tuple[tuple[int, int, int], ...] | None
    kind: Kind
    padding: Padding = "any"
    predicted: tuple[str, ...] = ()
    uniform: bool = False  # every row of the batch has the same segments and no pads
    runs: Runs | None = field(default=None, repr=False)
    table: Table | None = field(default=None, repr=False)  # the relation as Python numbers, where it is all there is
    document: Tensor | None = field(default=None, repr=False)

    @classmethod
    def from_ids(
        cls,
        segment: Tensor,
        relation: Tensor | Sequence[Sequence[int]],
        *,
        modality: Tensor | None = None,
        position: Tensor | None = None,
        names: Sequence[str] | None = None,
        spans: tuple[tuple[int, int, int], ...] | None = None,
        padding: Padding | None = None,
        predicted: Sequence[str] = (),
    ) -> Layout:
        """Build a layout given token by token: segments in several pieces, batches whose rows disagree, tables of one
        row each.

        Args:
            segment: ``[B, T]`` integers, -1 for pads.
            relation: ``[S, S]``, ``[1, S, S]`` or ``[B, S, S]`` of 0 never, 1 past, 2 all; row index reads column
                index.
            modality: ``[B, T]`` expert routes, 0 everywhere by default.
            position: ``[B, T]`` or ``[B, axes, T]``; counts from 0 by default, pads included.
            names: names of the S segments.
            spans: promise of equal modalities in every row; found by looking when the tensors are on the CPU.
            padding: promise about the pads (``none``, ``right``); found by looking when the tensors are on the CPU.
            predicted: names of predicted segments.

        Raises:
            ConfigError: shapes or values do not fit together, or a real row would read nothing.
        """
        segment, relation, modality, names, table = fitted(segment, relation, modality, names)
        batch, length = segment.shape
        if segment.device.type == "cpu" and segment.numel():
            check_ids(segment, relation, modality)
            padding = padding or look_at_padding(segment >= 0)
            spans = spans or look_for_spans(modality)
        padding = padding or "any"
        layout = cls(
            segment=segment,
            modality=modality,
            relation=relation,
            position=positions(position, batch, length, segment.device, None),
            names=names,
            spans=spans,
            kind=kind(None, table, padding, length),
            padding=padding,
            predicted=tuple(predicted),
            uniform=batch == 1 and padding == "none" and relation.shape[0] == 1,
            table=table,
        )
        return layout._checked()

    def _checked(self) -> Layout:
        """Refuse a real row that would read nothing. Only a segment that never reads itself can hold one."""
        if self.table is not None and all(self.table[i][i] != NEVER for i in range(len(self.table))):
            return self
        if self.segment.device.type == "meta":
            return self
        reads = self.mask()[:, 0].any(-1)  # [B|1, T]
        if self.segment.device.type != "cpu":
            torch._assert_async(reads.all(), "a row of the layout reads nothing")
            return self
        if not bool(reads.all()):
            row, token = (int(i) for i in (~reads).nonzero()[0])
            name = self.names[int(self.segment[row, token])]
            raise ConfigError(
                f"token {token} of batch row {row} (segment {name!r}) would read nothing;"
                f" let {name!r} read itself or a segment that is there"
            )
        return self

    @property
    def length(self) -> int:
        """Number of keys T."""
        return self.segment.shape[1]

    @property
    def batch(self) -> int:
        """Batch size B of the layout (1 fits any batch)."""
        return self.segment.shape[0]

    @property
    def real(self) -> Tensor:
        """``[B, T]`` bool, True where a token is not a pad."""
        return self.segment >= 0

    def index(self, name: str) -> int:
        """Return the number of the segment ``name``; raises ConfigError with near names."""
        if name not in self.names:
            raise ConfigError(f"no segment named {name!r}{near(name, self.names)}")
        return self.names.index(name)

    def where(self, name: str) -> slice:
        """Return the place of a segment of a static layout, pads included; raises ConfigError where it has none."""
        wanted = self.index(name)
        places = [(a, b) for s, a, b in self.runs or () if s == wanted]
        if len(places) != 1:
            raise ConfigError(
                f"segment {name!r} has no single static place in this layout; read it from layout.segment"
            )
        return slice(*places[0])

    def mask(self, rows: slice | None = None) -> Tensor:
        """Return the dense mask ``[B|1, 1, rows, T]`` bool, True = may attend (the convention of
        scaled_dot_product_attention).

        Args:
            rows: the query rows wanted, all by default; the keys are always all T.
        """
        segment = self.segment[:1] if self.uniform else self.segment
        start, stop, _ = (rows or slice(None)).indices(self.length)
        key = torch.arange(self.length, device=segment.device)
        query = key[start:stop, None]
        of_query, of_key = segment[:, start:stop, None].clamp(min=0), segment[:, None].clamp(min=0)
        if self.relation.shape[0] == 1:
            reads = self.relation[0][of_query, of_key]  # [B, rows, T]
        else:
            reads = self.relation[torch.arange(self.batch, device=segment.device)[:, None, None], of_query, of_key]
        allowed = (reads == ALL) | ((reads == PAST) & (key <= query))
        if self.document is not None:
            allowed = allowed & (self.document[:, start:stop, None] == self.document[:, None, :])
        if self.padding != "none":
            real = segment >= 0
            allowed = allowed & real[:, None, :] & real[:, start:stop, None] | (~real[:, None, :] & (key == query))
        return allowed[:, None]

    def attend(self, rows: int | None = None) -> tuple[Tensor | None, bool]:
        """Return ``(mask, is_causal)`` for the last ``rows`` rows, with no mask wherever none is needed.

        A single last row of a causal layout reads every key, so cached decoding of unpadded rows needs no mask either.
        """
        rows = self.length if rows is None else rows
        if self.kind == "full" or (self.kind == "causal" and rows == 1 and self.padding == "none"):
            return None, False
        if self.kind == "causal" and rows == self.length:
            return None, True
        return self.mask(slice(self.length - rows, self.length)), False

    def mask_mod(self, first: int = 0) -> MaskMod:
        """Return the rule as a FlexAttention ``mask_mod(b, h, q, k)``.

        Args:
            first: the number of the first query row, where the queries are only the last rows.
        """
        segment, relation, document = self.segment, self.relation, self.document
        one_row, one_table = self.batch == 1, self.relation.shape[0] == 1

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            q = q + first
            row = torch.zeros_like(b) if one_row else b
            of_query, of_key = segment[row, q], segment[row, k]
            reads = relation[torch.zeros_like(b) if one_table else b, of_query.clamp(min=0), of_key.clamp(min=0)]
            read = (reads == ALL) | ((reads == PAST) & (k <= q))
            if document is not None:
                read = read & (document[row, q] == document[row, k])
            return (read & (of_query >= 0) & (of_key >= 0)) | ((q == k) & (of_key < 0))

        return allowed

    def block_mask(self, rows: slice | None = None, make: Callable[..., BlockMask] | None = None) -> BlockMask:
        """Return the FlexAttention block mask of the query rows ``rows`` (all by default) over all keys.

        ``make`` stands in for ``create_block_mask``, which may be compiled.
        """
        from torch.nn.attention.flex_attention import create_block_mask

        start, stop, _ = (rows or slice(None)).indices(self.length)
        batch = None if self.uniform or self.batch == 1 else self.batch  # one mask for every row where it may
        return (make or create_block_mask)(
            self.mask_mod(start), B=batch, H=None, Q_LEN=stop - start, KV_LEN=self.length, device=self.segment.device
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Layout:
        """Return the layout with its tensors on ``device``."""
        tensors = ("segment", "modality", "relation", "position")
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in tensors}
        document = None if self.document is None else self.document.to(device, non_blocking=non_blocking)
        return replace(self, **moved, document=document)

    def append(
        self,
        segment: str | int,
        count: int = 1,
        *,
        modality: int | None = None,
        real: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Layout:
        """Return the layout with ``count`` more tokens of an existing segment at the end, as decoding with a cache
        needs.

        Args:
            segment: name or number of the segment the tokens belong to.
            count: how many.
            modality: their route; that of the last token by default.
            real: ``[B, count]`` bool, False for rows that are already finished; all True by default.
            position: ``[B, count]`` or ``[B, axes, count]``; by default the ids after the last one (on every axis).
        """
        number = self.index(segment) if isinstance(segment, str) else segment
        if not 0 <= number < len(self.names):
            raise ConfigError(f"segment number {number} in a layout of {len(self.names)} segments")
        batch, device = self.batch, self.segment.device
        new = torch.full((batch, count), number, dtype=torch.long, device=device)
        if real is not None:
            new = torch.where(real.to(device), new, -1)
        if modality is None:
            route = self.modality[:, -1:].expand(batch, count)
            spans = self.spans and (*self.spans[:-1], (self.spans[-1][0], self.spans[-1][1] + count, self.spans[-1][2]))
        else:
            route = torch.full_like(new, modality)
            spans = self.spans and merged((*self.spans, (self.length, self.length + count, modality)))
        if position is None:
            position = self.position[..., -1:] + torch.arange(1, count + 1, device=device)
        padding: Padding = "none" if self.padding == "none" and real is None else "any"
        runs = self.runs and merged_runs((*self.runs, (number, self.length, self.length + count)))
        return replace(
            self,
            segment=torch.cat([self.segment, new], 1),
            modality=torch.cat([self.modality, route], 1),
            position=torch.cat([self.position, position.to(self.position)], -1),
            spans=spans,
            runs=runs,
            padding=padding,
            kind=kind(runs, self.table, padding, self.length + count),
            uniform=self.uniform and real is None,
            document=None if self.document is None else F.pad(self.document, (0, count), mode="replicate"),
        )

    def truncate(self, length: int) -> Layout:
        """Return the layout of the first ``length`` tokens (with the cache truncated to the same length)."""
        if not 0 <= length <= self.length:
            raise ConfigError(f"cannot cut a layout of {self.length} tokens to {length}")
        spans = self.spans and tuple((a, min(b, length), m) for a, b, m in self.spans if a < length)
        runs = self.runs and tuple((s, a, min(b, length)) for s, a, b in self.runs if a < length)
        return replace(
            self,
            segment=self.segment[:, :length],
            modality=self.modality[:, :length],
            position=self.position[..., :length],
            spans=spans,
            runs=runs,
            kind=kind(runs, self.table, self.padding, length),
            document=None if self.document is None else self.document[:, :length],
        )

    def select(self, index: Tensor) -> Layout:
        """Return the layout of the batch rows ``index`` ``[N]`` (repeats allowed), as beam search needs."""
        return replace(
            self,
            segment=self.segment[index],
            modality=self.modality[index],
            position=self.position[index],
            relation=self.relation if self.relation.shape[0] == 1 else self.relation[index],
            document=None if self.document is None else self.document[index],
        )

    def hide(self, keys: Tensor) -> Layout:
        """Return the layout in which nobody reads the tokens ``keys`` ``[B, T]`` bool, whose own rows live on."""
        count, batch = len(self.names), max(self.batch, keys.shape[0])
        relation = self.relation.repeat(1, 2, 2)
        relation[:, :, count:] = NEVER
        hidden = Layout.from_ids(
            torch.where(keys.to(self.segment.device) & self.real, self.segment + count, self.segment),
            relation,
            modality=self.modality.expand(batch, -1),
            position=self.position,
            names=(*self.names, *(f"{name} (hidden)" for name in self.names)),
            spans=self.spans,
            padding=self.padding,
            predicted=self.predicted,
        )
        return hidden if self.document is None else hidden.separate(self.document)

    def separate(self, document: Tensor) -> Layout:
        """Return the layout in which tokens of different documents never read each other (packing).

        Args:
            document: ``[B, T]`` integers, the document of each token; ignored at pads.
        """
        document = document.to(self.segment.device).long()
        if self.document is not None:  # documents inside documents
            document = self.document * (document.max() + 1) + document
        batch = max(self.batch, document.shape[0])
        layout = replace(
            self,
            segment=self.segment.expand(batch, -1),
            modality=self.modality.expand(batch, -1),
            position=self.position.expand(batch, *self.position.shape[1:]),
            document=document.expand(batch, -1),
            uniform=False,
            kind="table",
        )
        return replace(layout._checked(), table=None)  # alone it would say too little from here on

    def draw(self, row: int = 0, most: int = 64) -> str:
        """Return a picture for the terminal: the table by segments, and every token's reads if T <= ``most``.

        Args:
            row: the batch row to draw (its relation and pads).
            most: the longest sequence that is drawn token by token.
        """
        dense = self.mask() if self.length <= most else None
        return picture(
            self.names,
            self.segment[row].tolist(),
            self.relation[row if self.relation.shape[0] > 1 else 0].tolist(),
            self.kind,
            None if dense is None else dense[row if dense.shape[0] > 1 else 0, 0].tolist(),
        )


def lay_out(
    segments: Sequence[Segment],
    batch: int = 1,
    *,
    real: Tensor | None = None,
    relation: Mapping[tuple[str, str], Reads] | None = None,
    position: Tensor | Literal["real"] | None = None,
    modalities: Mapping[str, int] | None = None,
    padding: Padding | None = None,
    device: torch.device | str | None = None,
) -> Layout:
    """Lay segments out one after the other.

    Args:
        segments: the segments in order, names unique.
        batch: batch size B; 1 fits any batch, as long as nothing is padded.
        real: ``[B, T]`` bool (or 0/1), False for pads; None where there are none. Sets B.
        relation: exceptions of the table, ``{(reader, read): "never" | "past" | "all"}``.
        position: ``[B, T]`` or ``[B, axes, T]`` ids; counts 0..T-1 over the padded sequence by default; ``"real"``
            counts real tokens only (pads get the id of the last real token before them, or 0).
        modalities: ids of modality names, :data:`MODALITIES` by default.
        padding: what is known of ``real``: ``none``, ``right`` (pads only after the last real token of the whole
            sequence). On the CPU it is looked at; on an accelerator it is believed, and ``any`` if not given, which
            costs a causal layout its maskless kernel.
        device: where the tensors go; that of ``real`` by default.

    Raises:
        ConfigError: duplicate or unknown names, shapes that do not fit, or a real row that would read nothing.
    """
    names = tuple(s.name for s in segments)
    table = static_table(segments, relation or {})
    runs, spans = static_runs(segments, MODALITIES if modalities is None else modalities)
    at = sum(s.length for s in segments)
    if real is not None:
        device = real.device if device is None else torch.device(device)
        real = real.to(device).bool()
        if real.ndim != 2 or real.shape[1] != at:
            raise ConfigError(f"real has shape {tuple(real.shape)}; expected [batch, {at}], one value a token")
        batch = real.shape[0]
        if real.device.type == "cpu":
            padding = look_at_padding(real)
        padding = padding or "any"
    else:
        padding = "none"
    rows = [(number, route) for (number, a, b), (_, _, route) in zip(runs, spans, strict=True) for _ in range(a, b)]
    of_token = torch.tensor(rows, dtype=torch.long).reshape(-1, 2).to(device)  # [T, 2] segment, modality
    segment = of_token[:, 0].expand(batch, -1)  # [B, T]
    if real is not None and padding != "none":
        segment = torch.where(real, segment, -1)
    layout = Layout(
        segment=segment,
        modality=of_token[:, 1].expand(batch, -1),
        relation=torch.tensor(table, dtype=torch.uint8).reshape(1, len(names), len(names)).to(device),
        position=positions(position, batch, at, segment.device, real),
        names=names,
        spans=merged(spans),
        kind=kind(runs, table, padding, at),
        padding=padding,
        predicted=tuple(s.name for s in segments if s.predicted),
        uniform=padding == "none",
        runs=runs,
        table=table,
    )
    return layout._checked()


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """What a decoder reads: embedded tokens and their layout.

    Attributes:
        embeds: ``[B, T, D]``.
        layout: who is where.
        ids: ``[B, T]`` int64 token ids where there are any.
        targets: ``[B, T]`` int64, the id each row should predict, -100 for none.
    """

    embeds: Tensor
    layout: Layout
    ids: Tensor | None = None
    targets: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        """Return the batch with its tensors on ``device``."""

        def move(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return TokenBatch(move(self.embeds), self.layout.to(device, non_blocking), move(self.ids), move(self.targets))
