"""zoo segment: a question about an image, answered with masks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, DataError, WeightsError


def main(argv: Sequence[str]) -> int:
    """Run ``zoo segment MODEL --image FILE --prompt TEXT [--out FILE]``; errors of the input are raised as ZooErrors.

    Prints the answer, its references in the colours of their masks where the output is a terminal, and one line a mask;
    writes the overlay picture to ``--out``, by default beside the image as NAME.segmented.png.
    """
    parser = argparse.ArgumentParser(
        "zoo segment",
        description="Answer a question about an image with masks, by a run, a checkpoint or an official file.",
    )
    parser.add_argument("checkpoint", metavar="MODEL", help="run directory, checkpoint, official file or hub id")
    parser.add_argument("--image", required=True, metavar="FILE")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="a question; several targets may be asked for")
    parser.add_argument("--out", metavar="FILE", help="the picture with masks over it (default: beside the image)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--model", help="recipe of an official file, as lisa-7b")
    given = parser.parse_args(list(argv))
    if not given.prompt.strip():
        raise ConfigError("--prompt is empty: ask for something, as in 'Can you segment the dog in this image?'")
    from zoo.capabilities import SegmentInText
    from zoo.data.images import load_rgb
    from zoo_grounding.overlay import COLOURS, coloured, overlay

    path = Path(given.image)
    out = Path(given.out) if given.out else path.with_name(f"{path.stem}.segmented.png")
    if not out.parent.is_dir():
        raise DataError(f"--out {str(out)!r}: there is no folder {str(out.parent)!r}; make it first")
    image = load_rgb(path)
    module = _load(given.checkpoint, given.model)
    if not isinstance(module.model, SegmentInText):
        raise ConfigError(f"{module.recipe.name} writes no answers with masks: take a segmenter, as lisa or pixellm")
    model: Any = module.model
    answer = model.segment(image, given.prompt, given.max_new_tokens)
    try:
        overlay(image, answer.masks.cpu()).save(out)
    except (OSError, ValueError) as error:
        raise DataError(f"--out {str(out)!r} cannot be written ({error}): give a name as overlay.png") from None
    print(coloured(answer, sys.stdout.isatty()))
    for number, mask in enumerate(answer.masks):
        share, colour = 100 * float(mask.float().mean()), COLOURS[number % len(COLOURS)]
        words = answer.phrases[number] if number < len(answer.phrases) else ""
        print(
            f"[{number + 1}] {words or '-'}: {share:.1f} % of the image, sure to {answer.scores[number]:.2f},"
            f" #{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"
        )
    if not len(answer.masks):
        print("the answer names no target: no mask")
    print(out)
    return 0


def _load(name: str, model: str | None) -> Any:
    """The model behind a run directory, a checkpoint, an official file or a hub id.

    Raises:
        WeightsError: A run that is not finished, or whatever ``zoo.from_pretrained`` refuses.
        ConfigError: The name of a recipe, which has no weights.
    """
    import torch

    from zoo.api import from_pretrained, list_models

    if not Path(name).exists() and name in list_models(name):
        raise ConfigError(f"{name} is a recipe without weights: train it, then give the run's directory")
    folder = Path(name)
    if (folder / "run.yaml").is_file():
        folder = folder / "weights"
        if not folder.is_dir():
            raise WeightsError(f"run {name} has no weights yet: finish it with the command that started it")
    module = from_pretrained(folder if folder.exists() else name, model=model)
    return module.to("cuda" if torch.cuda.is_available() else "cpu").eval()
