"""What kind of model a recipe is, in a row of words and numbers: the table that Show-o's paper opens with.

Nothing here knows a model. Everything is read off the built module (on the meta device: no memory, any published size):
capabilities, objectives, the slots' tokenizers, the layouts, and which parameters each stage trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from zoo.errors import ConfigError

if TYPE_CHECKING:
    from zoo.models.base import Model
    from zoo.module import ZooModule
    from zoo.recipe import Recipe

UNDERSTANDS = ("embed_images", "score_text", "generate_text", "match", "classify")
"""Capabilities that answer something about an image."""
SEGMENTS = "segment_"
"""How the names of capabilities that mark regions begin."""
GENERATIVE = ("autoregressive", "masked", "diffusion", "flow")
"""Kinds of learning (``Objective.learns``) that a sample can be drawn from."""
HELPERS = ("before", "prefix", "cls", "condition", "prompt", "boi", "eoi", "pad")
"""Names of segments that hold neither the text nor the image themselves."""
CROSS = ("cross", "crossattention", "EncDecAttention", "encoder_attn")
"""Names of the modules that read a context, in the zoo's blocks and in transformers'."""

LOOSE = "other"
"""Parameters that belong to no part."""


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """What learns in one stage: parts of the model, with the share of their weights where it is not all of them."""

    name: str
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    parameters: int = 0
    objectives: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Characteristics:
    """A model in a row.

    Attributes:
        understands: it embeds, scores, describes, matches or classifies images.
        writes: how it writes text: ``autoregressive`` or ``masked``; empty = it does not.
        draws: how it draws images: one of `GENERATIVE`; empty = it does not.
        segments: it marks regions of images.
        learns: kinds of learning, in the order of the objectives.
        images: whether it meets images as ``continuous`` features or latents, or as ``discrete`` codes.
        attention: who reads whom, in words.
        parameters: all of them.
        visual_tokens: an image's tokens where they meet the text; None = it has none.
        drawing_passes: forward passes over one image it draws, by default; None = it draws none.
    """

    understands: bool = False
    writes: str = ""
    draws: str = ""
    segments: bool = False
    capabilities: tuple[str, ...] = ()
    learns: tuple[str, ...] = ()
    images: str = ""
    attention: str = ""
    stages: tuple[StageFacts, ...] = field(default=())
    parameters: int = 0
    visual_tokens: int | None = None
    drawing_passes: int | None = None

    def to_plain(self) -> dict[str, Any]:
        """JSON-like form, as in manifests."""
        return asdict(self)

    @staticmethod
    def from_plain(plain: Any) -> Characteristics | None:
        """Read what ``to_plain`` wrote, by this version or another; None for anything else."""
        if not isinstance(plain, Mapping) or not isinstance(plain.get("parameters"), int):
            return None
        stages = plain.get("stages")
        return Characteristics(
            understands=plain.get("understands") is True,
            segments=plain.get("segments") is True,
            writes=str(plain.get("writes") or ""),
            draws=str(plain.get("draws") or ""),
            images=str(plain.get("images") or ""),
            attention=str(plain.get("attention") or ""),
            capabilities=_words(plain.get("capabilities")),
            learns=_words(plain.get("learns")),
            stages=tuple(
                StageFacts(
                    name=str(stage.get("name", "")),
                    trained=_words(stage.get("trained")),
                    frozen=_words(stage.get("frozen")),
                    parameters=_count(stage.get("parameters")) or 0,
                    objectives=_words(stage.get("objectives")),
                )
                for stage in (stages if isinstance(stages, (list, tuple)) else ())
                if isinstance(stage, Mapping)
            ),
            parameters=plain["parameters"],
            visual_tokens=_count(plain.get("visual_tokens")),
            drawing_passes=_count(plain.get("drawing_passes")),
        )


def _words(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else ()


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def of_recipe(recipe: Recipe) -> Characteristics:
    """The characteristics of a recipe at its own size; builds it on the meta device.

    Raises:
        ZooError: Its parts do not fit, or need what is not installed.
    """
    import torch

    from zoo.api import build_module

    with torch.device("meta"):
        module = build_module(recipe, seed=0)
    return of_module(module)


def of_module(module: ZooModule) -> Characteristics:
    """The characteristics of a built module, on any device; nothing of it is changed."""
    from zoo.capabilities import capabilities_of

    model, recipe = module.model, module.recipe
    capabilities = capabilities_of(model)
    learns = tuple(dict.fromkeys(word for o in module.objectives.values() if (word := _learns(o))))
    tokens = visual_tokens(model)
    draws = _drawn_by(learns) if "generate_images" in capabilities else ""
    return Characteristics(
        understands=any(name in capabilities for name in UNDERSTANDS),
        writes=_written_by(learns) if "generate_text" in capabilities else "",
        draws=draws,
        segments=any(name.startswith(SEGMENTS) for name in capabilities),
        capabilities=capabilities,
        learns=learns,
        images=_images(model, recipe),
        attention=_attention(model, tokens),
        stages=_stages(model, recipe),
        parameters=sum(p.numel() for p in model.parameters()),
        visual_tokens=tokens,
        drawing_passes=_passes(model, recipe, draws),
    )


def _learns(objective: Any) -> str:
    word: str = objective.learns
    return word


def _drawn_by(learns: Sequence[str]) -> str:
    """Images are drawn as the objective of images says; one without an objective of its own predicts their codes as
    the next token."""
    return next((word for word in ("diffusion", "flow", "masked") if word in learns), "autoregressive")


def _written_by(learns: Sequence[str]) -> str:
    return next((word for word in ("autoregressive", "masked") if word in learns), "autoregressive")


def _images(model: Model, recipe: Recipe) -> str:
    tokenizer: Any = getattr(model, "image_tokenizer", None)
    kind = "" if tokenizer is None else "discrete" if tokenizer.discrete else "continuous"
    if "encoder" not in recipe.parts and "trunk" not in recipe.parts:  # both read pixels
        return kind
    return "continuous" if kind != "discrete" else "continuous read, discrete predicted"


def visual_tokens(model: Model) -> int | None:
    """Tokens of one image where they meet the text: the connector's, else the places in the sequence, else the
    encoder's, class token included; of an image tokenizer alone its grid."""
    encoder = getattr(model, "encoder", None)
    connector = getattr(model, "connector", None) if encoder is not None else None  # else it connects a text
    candidates = (
        (connector, "tokens"),
        (model, "places"),
        (encoder, "tokens"),
        (getattr(model, "trunk", None), "tokens"),
    )
    found = (getattr(holder, name, None) for holder, name in candidates)
    return next((number for number in found if isinstance(number, int)), _grid(model))


def _grid(model: Model) -> int | None:
    tokenizer: Any = getattr(model, "image_tokenizer", None)
    return None if tokenizer is None else prod(tokenizer.grid)


def _passes(model: Model, recipe: Recipe, draws: str) -> int | None:
    if not draws:
        return None
    if draws == "autoregressive":  # a pass for every code
        places = getattr(model, "places", None)
        return places if isinstance(places, int) else _grid(model)
    steps = getattr(recipe.stage_wiring(-1), "drawing_steps", None)
    return steps if isinstance(steps, int) else None


def _attention(model: Model, tokens: int | None) -> str:
    """Who reads whom: how text and image read themselves, and how they meet."""
    import torch

    with torch.device("cpu"):  # a layout is small, and its facts must be readable
        layouts = list(model.layouts().values())
    if not layouts:
        return "none"
    own: dict[str, list[str]] = {}
    for layout in layouts:
        for n, name in enumerate(layout.names):
            if not bool((layout.segment == n).any()):
                continue
            base = name.split(",")[-1].strip().rstrip("0123456789").strip()
            word = {0: "none", 1: "causal", 2: "full"}[int(layout.relation[0, n, n])]
            own.setdefault(base, []).append(word)
    kept = {name: words for name, words in own.items() if name not in HELPERS} or own
    told = {name: " or ".join(dict.fromkeys(words)) for name, words in kept.items()}
    same = set(told.values())
    said = [next(iter(same)) if len(same) == 1 else ", ".join(f"{name} {word}" for name, word in told.items())]
    if tokens is not None and any(layout.segment.shape[-1] > tokens for layout in layouts):
        said.append("one sequence")
    crossing = _crossing(model)
    if crossing:
        said.append(f"cross-attention in {' and '.join(crossing)}")
    elif len(said) == 1 and len(kept) > 1:
        said.append("apart")
    return "; ".join(said)


def _crossing(model: Model) -> list[str]:
    """Parts whose blocks read a context, connectors apart."""
    found = dict.fromkeys(path.split(".")[0] for path, _ in model.named_modules() if path.rpartition(".")[2] in CROSS)
    return [slot.replace("_", " ") for slot in found if slot != "connector"]


def _stages(model: Model, recipe: Recipe) -> tuple[StageFacts, ...]:
    from zoo.module import trained_names

    parameters = dict(model.named_parameters())
    sizes = {name: p.numel() for name, p in parameters.items()}
    owner = {id(p): path for path, part in model.parts().items() for p in part.parameters()}
    of = {name: owner.get(id(p), LOOSE) for name, p in parameters.items()}
    whole = _sums((of[name], size) for name, size in sizes.items())
    if whole.get(LOOSE, 0) < 1e-3 * sum(sizes.values()):  # temperatures and the like
        whole.pop(LOOSE, None)
    facts = []
    for stage in recipe.stages:
        learns = trained_names(parameters, stage.train, stage.freeze)
        trained = _sums((of[name], sizes[name]) for name in learns)
        facts.append(
            StageFacts(
                name=stage.name,
                trained=tuple(_share(part, trained[part], whole[part]) for part in whole if part in trained),
                frozen=tuple(part for part in whole if part not in trained),
                parameters=sum(trained.values()),
                objectives=tuple(stage.objectives or recipe.objectives),
            )
        )
    return tuple(facts)


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for key, value in pairs:
        sums[key] = sums.get(key, 0) + value
    return sums


def _share(part: str, trained: int, whole: int) -> str:
    return part if trained == whole else f"{part} ({100 * trained / whole:.2g} %)"


def of_recipes(names: Sequence[str], scale: str | None = None) -> tuple[dict[str, Characteristics], dict[str, str]]:
    """The characteristics of recipes by name, and why those of others cannot be had.

    Building a published recipe takes up to a second, so what was found is kept in the zoo's cache folder until the
    code, the recipes or an installed plugin change.
    """
    from zoo.compare import characteristics_cache as cache
    from zoo.errors import ZooError

    key = cache.digest()
    kept = cache.load(key)
    found: dict[str, Characteristics] = {}
    failed: dict[str, str] = {}
    fresh: dict[str, Any] = {}
    for name in names:
        entry = f"{name}@{scale or 'published'}"
        known = Characteristics.from_plain(kept.get(entry))
        if known is None:
            from zoo.recipe import resolve

            try:
                known = of_recipe(resolve(name, scale=scale))
            except ZooError as error:
                failed[name] = str(error)
                continue
            fresh[entry] = known.to_plain()
        found[name] = known
    if fresh:
        cache.store(key, {**kept, **fresh})
    if names and not found:
        raise ConfigError(f"no recipe could be built: {next(iter(failed.values()))}")
    return found, failed
