"""Drawing the frames of a story with any latent diffusion model of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.denoisers.base import Denoiser
from zoo.errors import ConfigError
from zoo.models.base import evaluating
from zoo.part import Features
from zoo.sampling.guidance import weights
from zoo.sampling.latents import branches, draw_latents
from zoo.sampling.text import streams
from zoo_stories.attention import Cast
from zoo_stories.consistency import Consistency
from zoo_stories.together import consistent


def model_of(model: Any) -> Any:
    """The plain model, with a denoiser, behind what ``zoo.build`` and ``zoo.from_pretrained`` return.

    Raises:
        ConfigError: It has no denoiser whose images could read each other.
    """
    plain = getattr(model, "model", model)
    if not isinstance(getattr(plain, "denoiser", None), Denoiser) or not hasattr(plain, "prompt_rows"):
        name = getattr(getattr(model, "recipe", None), "name", type(plain).__name__)
        raise ConfigError(
            f"{name} has no denoiser whose images could read each other: take a latent diffusion model, e.g. a run of"
            " latent-diffusion"
        )
    return plain


def batches(characters: Sequence[frozenset[str]], rules: Consistency) -> list[tuple[range, Cast]]:
    """Which frames are drawn at once, and who reads whom.

    One batch, but for ``long="banks"``: there each ``window`` of frames; the first frames of a character read each
    other and write its bank, later ones read the banks of their characters.
    """
    count = len(characters)
    if rules.long != "banks" or not rules.window or rules.window >= count:
        return [(range(count), Cast.of(characters))]
    found, known = [], set[str]()
    for start in range(0, count, rules.window):
        here = range(start, min(start + rules.window, count))
        new = [characters[i] - known for i in here]
        reads = tuple(tuple(j for j in range(len(here)) if j != i and new[i] & new[j]) for i in range(len(here)))
        writes = tuple(tuple(sorted(names)) for names in new)
        banks = tuple(tuple(sorted(characters[i] & known)) for i in here)
        found.append((here, Cast(tuple(here), reads, writes, banks)))
        known |= set().union(*new)
    return found


def draw_frames(
    model: Any,
    prompts: Sequence[str],
    characters: Sequence[frozenset[str]],
    rules: Consistency,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
) -> Tensor:
    """Draw one image a prompt, of which those with a common character read each other: [N, 3, H, W] in [0, 1].

    Frame n starts from the noise that image n of ``generate_images(prompts, seed=seed)`` starts from. With
    ``rules.rate = 0`` they are the same images.

    Args:
        model: See ``model_of``.
        characters: Names of who is in each frame.

    Raises:
        ConfigError: A model without a denoiser, a text that does not fit, or values out of range.
    """
    model = model_of(model)
    if len(characters) != len(prompts) or not prompts:
        raise ConfigError(f"{len(prompts)} frames and the characters of {len(characters)}: expected one each")
    rows = model.prompt_rows(prompts)

    def condition(at: list[int]) -> Features:
        found: Features = model.condition({name: value[at].to(model.device) for name, value in rows.items()})
        return found

    return denoised(model, condition, characters, rules, seed=seed, steps=steps, guidance=guidance, sampler=sampler)


def denoised(
    model: Any,
    condition: Callable[[list[int]], Features],
    characters: Sequence[frozenset[str]],
    rules: Consistency,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    streams_of: Sequence[int] = (),
) -> Tensor:
    """Draw frames from the conditions that ``condition`` gives for their numbers: [N, 3, H, W] float32 in [0, 1].

    Args:
        streams_of: For each frame the number of the stream of ``seed`` that its noise is of; by default frame n's is n.
    """
    how = model.config.denoising(sampler, steps)
    mix = weights(model.config.guidance if guidance is None else guidance, "scale")
    how.of(model.process)
    drawn = []
    with evaluating(model), consistent(model.denoiser, rules) as passes:
        for frames, cast in batches(characters, rules):
            at = list(frames)
            features = condition(at)
            if len(mix) == 2:
                features = branches([features, model.no_condition()])
            passes.begin(cast)
            latents = draw_latents(
                model.denoiser, model.process, features, how, mix,
                [streams(seed, streams_of[n] if streams_of else n, 1)[0] for n in at],
                grid=model.image_config.grid, rescale=model.config.rescale,
            )  # fmt: skip
            drawn += [decoded(model, part) for part in torch.split(latents, rules.window or len(at))]
    return torch.cat(drawn)


def decoded(model: Any, latents: Tensor) -> Tensor:
    """Latents [N, C, h, w] as images [N, 3, H, W] float32 in [0, 1]."""
    like = next(model.image_tokenizer.parameters())
    shown: Tensor = model.image_config.shown(model.image_tokenizer.decode(latents.to(like.dtype)).float())
    return shown
