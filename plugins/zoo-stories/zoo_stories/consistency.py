"""What consistent self-attention depends on (StoryDiffusion, arXiv 2405.01434, section 3.1), and its random draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError, near
from zoo.part import derived_seed

SAMPLING = ("random", "grid", "pool")
EARLY = ("plain", "bank")
LONG = ("passes", "layers", "banks")
AUTO = "auto"
LATE_FROM = 20


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """How the images of one story read each other. None of it adds a weight.

    Attributes:
        rate: Share of another image's tokens that is read; 0 = the stock model, 1 = all of them. The paper's is 0.5.
        rates: Tokens of an image in a layer -> another share there (the released sa32 and sa64).
        layers: Which self-attention layers: ``auto`` (those of a U-Net's up blocks, as released; the later half of a
            transformer's), ``all``, or beginnings of their names joined by ``+`` (``mid_block+up_blocks.1``).
        start_step: Steps at the beginning, where the layout forms, that stay plain; the release has 1 or 5.
        chances: Probability that a layer is consistent before the step ``late_from`` and from it on, drawn for each
            layer and step; (1, 1) = always. The release has (0.7, 0.9).
        late_from: That step.
        sampling: Which tokens: ``random`` (each for itself, as released), ``grid`` (evenly over the image), ``pool``
            (means of cells).
        early: What an image that reads banks does in the plain steps: ``plain``, or ``bank``: read every banked token
            (the release).
        window: Images that read each other at a time; 0 = all. Memory then does not grow with the story.
        stride: Images by which the window moves on; the paper's is 1.
        long: What is done with a story of more images than ``window``. ``passes``: every pass of the denoiser goes over
            it window by window, and predictions are averaged where windows overlap. ``layers`` (the paper's algorithm):
            every such layer does so with its own output; what is no attention then takes the memory of the whole story.
            ``banks`` (the release): a character's first images are drawn together and keep their tokens, later ones
            read these.
        queries: Rows of the attention matrix that are computed at once, at most.
        seed: Of the draws.
    """

    rate: float = 0.5
    rates: Mapping[int, float] = field(default_factory=dict)
    layers: str = AUTO
    start_step: int = 1
    chances: tuple[float, float] = (1.0, 1.0)
    late_from: int = LATE_FROM
    sampling: str = "random"
    early: str = "plain"
    window: int = 0
    stride: int = 1
    long: str = "passes"
    queries: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        shares = {"rate": self.rate, **{f"rates[{n}]": r for n, r in self.rates.items()}}
        for name, share in {**shares, "chances[0]": self.chances[0], "chances[1]": self.chances[1]}.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"{name} = {share}: expected a share between 0 and 1")
        for name, value, known in (
            ("sampling", self.sampling, SAMPLING),
            ("early", self.early, EARLY),
            ("long", self.long, LONG),
        ):
            if value not in known:
                raise ConfigError(f"{name} = {value!r}{near(value, known)}; expected one of {', '.join(known)}")
        if self.window == 1 or self.window < 0:
            raise ConfigError(f"window = {self.window}: expected at least 2 images that read each other, or 0 for all")
        if self.window and not 1 <= self.stride <= self.window:
            raise ConfigError(f"stride = {self.stride}: expected 1 to window = {self.window}")
        if self.start_step < 0 or self.queries < 1 or not self.layers:
            raise ConfigError(
                f"start_step = {self.start_step}, queries = {self.queries}, layers = {self.layers!r}: expected"
                " at least 0, at least 1, and a name"
            )

    def share(self, tokens: int) -> float:
        """The share of tokens that is read of an image of so many."""
        return self.rates.get(tokens, self.rate)

    @property
    def off(self) -> bool:
        """Whether nothing is ever read of another image."""
        return not self.rate and not any(self.rates.values())

    def consistent_at(self, layer: str, step: int) -> bool:
        """Whether a layer is consistent in a step (from 0): the start step, and a draw of (seed, layer, step)."""
        if step < self.start_step:
            return False
        chance = self.chances[step >= self.late_from]
        if chance >= 1:
            return True
        generator = torch.Generator().manual_seed(derived_seed(self.seed, f"gate/{layer}/{step}"))
        return bool(torch.rand((), generator=generator) < chance)

    def kept(self, number: int, tokens: int, step: int, grid: tuple[int, int] | None = None) -> Tensor:
        """The tokens [k] int64 that others read of image ``number`` in a step, the same in every layer of this size.

        Each is kept with probability ``share`` by a draw of (seed, image, step, tokens), or lies on an even grid.
        """
        share = self.share(tokens)
        if share >= 1:
            return torch.arange(tokens)
        if share <= 0:
            return torch.arange(0)
        if self.sampling == "grid":
            return evenly(share, *(grid or (1, tokens)))
        generator = torch.Generator().manual_seed(derived_seed(self.seed, f"keep/{number}/{step}/{tokens}"))
        return kept_below(torch.rand(tokens, generator=generator), share)

    def pooled(self, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        """Means [b, k, C] of cells of an image's tokens [b, h w, C], about ``share`` of their number."""
        height, width = grid
        scale = math.sqrt(self.share(height * width))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        image = torch.unflatten(rows.transpose(1, 2), 2, grid)  # [b, C, h, w]
        return F.adaptive_avg_pool2d(image, size).flatten(2).transpose(1, 2)


def kept_below(uniform: Tensor, share: float) -> Tensor:
    """Places [k] of a row of uniform draws [n] below ``share``: the released rule (``cal_attn_mask_xl``)."""
    return (uniform < share).nonzero().flatten()


def evenly(share: float, height: int, width: int) -> Tensor:
    """Places [k] of about ``share`` of a grid's cells, evenly over it: every cell where the running total passes a
    whole number, each row beginning where the one above has its gaps."""
    totals = torch.arange(1, width + 1)[None] * share + torch.arange(height)[:, None] * (share * width + 0.5)
    before = totals - share
    # a whole number lies in (before, total]; the small term keeps totals such as 0.1 * 10 from missing theirs
    return ((totals + 1e-9).floor() > (before + 1e-9).floor()).flatten().nonzero().flatten()


def windows(count: int, size: int, stride: int) -> list[range]:
    """Windows of ``size`` images over ``count``, the last one flush with the end; one window where size is 0."""
    if not size or size >= count:
        return [range(count)]
    starts = [*range(0, count - size, stride), count - size]
    return [range(start, start + size) for start in starts]


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The grid of a layer's tokens in a denoiser of latents of ``height`` x ``width``; None where it has none.

    U-Nets halve the sides, rounding up; transformers cut them into patches.
    """
    for factor in range(1, max(height, width) + 1):
        grid = -(-height // factor), -(-width // factor)
        if grid[0] * grid[1] == tokens:
            return grid
    return None


def choose_layers(names: Iterable[str], layers: str) -> list[str]:
    """Names of processors of self-attention that ``layers`` chooses, in order.

    Raises:
        ConfigError: There are none, or none of such a name.
    """
    own = [name for name in names if name.endswith("attn1.processor") or ".attn1." in name]
    if not own:
        raise ConfigError("the denoiser has no self-attention (attn1) that could be consistent: choose another one")
    if layers == "all":
        return own
    if layers == AUTO:
        up = [name for name in own if name.startswith("up_blocks")]
        return up or own[len(own) // 2 :]
    wanted = tuple(part.strip() for part in layers.split("+"))
    for part in wanted:
        if not any(name.startswith(part) for name in own):
            known: Sequence[str] = sorted({name.partition(".attn")[0] for name in own})
            raise ConfigError(f"layers = {layers!r}: no self-attention begins with {part!r}{near(part, known)}")
    return [name for name in own if name.startswith(wanted)]
