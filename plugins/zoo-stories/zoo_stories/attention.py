"""Consistent self-attention as attention processors of diffusers: an image reads itself and some tokens of the others.

The weights are the layer's own (arXiv 2405.01434, equations 1 to 3). The keys that an image reads are gathered, so that
no mask over all pairs of tokens is ever made: N (N + r N (m - 1)) products of queries and keys an image, in place of
the (m N)^2 of joint attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo_stories.consistency import Consistency, grid_of, windows

Rows = tuple[Tensor, Tensor]
"""Keys and values [branches, k, width] of one image's kept tokens, before heads are split."""


@dataclass(frozen=True)
class Cast:
    """Who is in the images of one batch, and so who reads whom.

    Attributes:
        numbers: Each image's place in the story: its draws depend on this, not on the batch.
        reads: For each image the places in this batch of the others that it reads.
        writes: For each image the banks that keep its tokens; usually its characters.
        banks: For each image the banks that it reads.
    """

    numbers: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]
    writes: tuple[tuple[str, ...], ...] = ()
    banks: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def together(cls, count: int, references: int | None = None) -> Cast:
        """``count`` images of one character; all read the first ``references`` (by default all), never the others."""
        known = count if references is None else references
        return cls(tuple(range(count)), tuple(tuple(j for j in range(known) if j != i) for i in range(count)))

    @classmethod
    def of(cls, characters: Sequence[frozenset[str]]) -> Cast:
        """Images that read each other where they share a character."""
        count = range(len(characters))
        reads = tuple(tuple(j for j in count if j != i and characters[i] & characters[j]) for i in count)
        return cls(tuple(count), reads)

    def select(self, places: Sequence[int]) -> Cast:
        """The cast of some of the images, who read each other alone."""
        new = {old: n for n, old in enumerate(places)}
        return Cast(
            tuple(self.numbers[i] for i in places),
            tuple(tuple(new[j] for j in self.reads[i] if j in new) for i in places),
            tuple(self.writes[i] for i in places) if self.writes else (),
            tuple(self.banks[i] for i in places) if self.banks else (),
        )

    def writing(self, banks: Sequence[Sequence[str]]) -> Cast:
        return replace(self, writes=tuple(map(tuple, banks)))


@dataclass
class Bank:
    """Keys and values of a character's reference images, by (layer, time): right for every sampler and number of
    steps."""

    rows: dict[tuple[str, float], dict[int, Rows]] = field(default_factory=dict)

    def write(self, layer: str, time: float, number: int, rows: Rows) -> None:
        self.rows.setdefault((layer, time), {})[number] = rows

    def read(self, layer: str, time: float) -> Mapping[int, Rows]:
        """Image -> its rows.

        Raises:
            ConfigError: Nothing was written there: another sampler or number of steps wrote this bank.
        """
        found = self.rows.get((layer, time))
        if found is None:
            raise ConfigError(
                f"the bank holds nothing of {layer} at time {time:g}: draw with the sampler and steps that wrote it"
            )
        return found

    @property
    def bytes(self) -> int:
        kept = (t for by_image in self.rows.values() for rows in by_image.values() for t in rows)
        return sum(t.numel() * t.element_size() for t in kept)


class Passes:
    """What the processors of one denoiser share while a story is drawn.

    Attributes:
        cast: Of the batch that is being denoised; None = every layer is plain.
        step: Number of the denoising step, from 0; ``time`` its noise level, as the denoiser is told.
        size: Height and width of the latents.
        banks: Name -> bank.
    """

    def __init__(self, consistency: Consistency) -> None:
        self.consistency = consistency
        self.cast: Cast | None = None
        self.banks: dict[str, Bank] = {}
        self.size = (0, 0)
        self.begin(None)

    def begin(self, cast: Cast | None) -> None:
        """Start to denoise a batch, from its first step."""
        self.cast, self.step, self.time = cast, -1, float("nan")

    def see(self, time: float, size: tuple[int, int]) -> None:
        """A forward pass begins; another time is another step, the same one (a further window) is not."""
        if time != self.time:
            self.step, self.time = self.step + 1, time
        self.size = size

    def places(self, number: int, tokens: int) -> Tensor:
        """See ``Consistency.kept``."""
        return self.consistency.kept(number, tokens, self.step, grid_of(tokens, *self.size))


class ConsistentAttention:
    """A processor for one self-attention layer.

    Rows come as [branches x images, n, C], all images of the first branch of guidance first: branches never mix.

    Args:
        plain: The processor that stood there; it does all that is not consistent, so that nothing changes there.
    """

    def __init__(self, passes: Passes, layer: str, plain: Callable[..., Tensor]) -> None:
        self.passes, self.layer, self.plain = passes, layer, plain

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **others: Any,
    ) -> Tensor:
        passes, cast = self.passes, self.passes.cast
        own = encoder_hidden_states is None and attention_mask is None
        if cast is None or not own or passes.consistency.off:
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **others)
        on = passes.consistency.consistent_at(self.layer, passes.step)
        early = passes.step < passes.consistency.start_step and passes.consistency.early == "bank"
        banks = on or early  # a later pass draws the same gates: what is plain here is read by nobody there
        writes, reads = banks and any(cast.writes), (on and any(cast.reads)) or (banks and any(cast.banks))
        if not writes and not reads:
            return self.plain(attn, hidden_states, None, None, temb, *args, **others)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # [b m, h w, C]
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        count = len(cast.numbers)
        if len(hidden_states) % count:
            raise ConfigError(f"{len(hidden_states)} rows are no whole branches of {count} images: draw them at once")
        x = torch.unflatten(hidden_states, 0, (-1, count))  # [b, m, n, C]
        layer = _Layer(attn, x, passes, self.layer)
        if writes:
            layer.write(cast, everything=early)
        if not reads:
            return self.plain(attn, residual, None, None, temb, *args, **others)
        out = torch.empty(*x.shape[:3], attn.to_v.out_features, dtype=x.dtype, device=x.device)  # [b, m, n, width]
        for i in range(count):
            out[:, i] = layer.read(cast, i, joint=on)
        hidden_states = attn.to_out[0](out.flatten(0, 1))
        hidden_states = attn.to_out[1](hidden_states)
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        scaled: Tensor = hidden_states / attn.rescale_output_factor
        return scaled


class _Layer:
    """One call of one layer: keys and values of all images are computed once, what an image reads is gathered when its
    turn comes.

    Args:
        x: [branches, images, n, C].
    """

    def __init__(self, attn: Any, x: Tensor, passes: Passes, name: str) -> None:
        self.attn, self.x, self.passes, self.name = attn, x, passes, name
        self.k, self.v = attn.to_k(x), attn.to_v(x)  # [b, m, n, width]

    def kept(self, cast: Cast, i: int) -> Rows:
        """Keys and values [b, k, width] of what others read of image ``i``."""
        tokens, rules = self.x.shape[2], self.passes.consistency
        if rules.sampling == "pool" and 0 < rules.share(tokens) < 1:
            grid = grid_of(tokens, *self.passes.size) or (1, tokens)
            # projections are linear, so that means of keys are keys of means
            return rules.pooled(self.k[:, i], grid), rules.pooled(self.v[:, i], grid)
        places = self.passes.places(cast.numbers[i], tokens).to(self.x.device)
        return self.k[:, i].index_select(1, places), self.v[:, i].index_select(1, places)

    def write(self, cast: Cast, everything: bool) -> None:
        """Keep what later images read of the images that write."""
        passes = self.passes
        for i, names in enumerate(cast.writes):
            if not names:
                continue
            rows = (self.k[:, i], self.v[:, i]) if everything else self.kept(cast, i)
            rows = rows[0].clone(), rows[1].clone()  # of their own: views would keep all images' keys alive
            for name in names:
                bank = passes.banks.setdefault(name, Bank())
                bank.write(self.name, passes.time, cast.numbers[i], rows)

    def read(self, cast: Cast, i: int, joint: bool) -> Tensor:
        """What image ``i`` reads, [b, n, width], before the output projection.

        Args:
            joint: It reads the other images of the batch, not only banks.
        """
        rules, count = self.passes.consistency, len(cast.numbers)
        others = cast.reads[i] if joint else ()
        if rules.window and rules.long == "layers" and joint:
            own = [w for w in windows(count, rules.window, rules.stride) if i in w]
            outs = [self._attend(cast, i, [j for j in others if j in w]) for w in own]
            return torch.stack(outs).mean(0)
        return self._attend(cast, i, others)

    def _attend(self, cast: Cast, i: int, others: Sequence[int]) -> Tensor:
        keys, values = [self.k[:, i]], [self.v[:, i]]
        banked: dict[int, Rows] = {}
        for name in cast.banks[i] if cast.banks else ():
            if name in self.passes.banks:
                banked |= self.passes.banks[name].read(self.name, self.passes.time)
        for rows in (*(self.kept(cast, j) for j in others), *banked.values()):
            keys.append(rows[0])
            values.append(rows[1])
        q = self._heads(self.attn.to_q(self.x[:, i]), self.attn.norm_q)  # [b, heads, n, d]
        k = self._heads(torch.cat(keys, 1) if len(keys) > 1 else keys[0], self.attn.norm_k)
        del keys
        v = self._heads(torch.cat(values, 1) if len(values) > 1 else values[0], None)
        del values
        parts = [
            F.scaled_dot_product_attention(part, k, v)
            for part in torch.split(q, self.passes.consistency.queries, dim=2)
        ]
        out = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
        return out.transpose(1, 2).flatten(2)

    def _heads(self, rows: Tensor, norm: Any) -> Tensor:
        split = torch.unflatten(rows, 2, (self.attn.heads, -1)).transpose(1, 2)
        normed: Tensor = split if norm is None else norm(split)
        return normed
