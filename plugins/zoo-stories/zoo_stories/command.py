"""zoo story: a character and a script become a comic page and an animated clip."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Tell a story; returns 0, or raises a ZooError, which the command line prints in one line."""
    parser = argparse.ArgumentParser(
        "zoo story",
        description="A character and a script become a comic page (PNG) and an animated clip (GIF).",
        epilog="a script is a line a frame: [Fox] sits in a boat # The fox sets out.  [Fox][Owl] who is in it, [NC]"
        " nobody, {Fox} where the description goes, after # the caption",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="run, checkpoint or diffusers folder of a latent diffusion model"
    )
    parser.add_argument(
        "--character", action="append", default=[], metavar="NAME:TEXT", help="may be given several times"
    )
    parser.add_argument("--script", metavar="FILE", help="the script, a line a frame")
    parser.add_argument("--frame", action="append", default=[], metavar="LINE", help="a line of it; several times")
    parser.add_argument("--theme", default="", help="what the story is about, for --writer")
    parser.add_argument("--writer", metavar="MODEL", help="a language model of the zoo that writes the script")
    parser.add_argument("--frames", type=int, default=4, help="how many it writes")
    parser.add_argument("--title", default="")
    parser.add_argument("--out", metavar="FILE.png", help="the comic page")
    parser.add_argument("--clip", metavar="FILE.gif", help="the animated clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--sampler")
    reading = parser.add_argument_group("how frames read each other (StoryDiffusion)")
    reading.add_argument("--rate", type=float, help="share of the other frames' tokens; 0 = independent frames")
    reading.add_argument("--layers", help="auto (up blocks), all, or beginnings of names joined by +")
    reading.add_argument("--start-step", type=int, help="plain steps at the beginning")
    reading.add_argument("--window", type=int, help="frames that read each other at a time; bounds memory")
    reading.add_argument("--long", choices=("passes", "layers", "banks"), help="what a window does; see the README")
    between = parser.add_argument_group("between frames of the clip")
    between.add_argument("--transitions", default="latents", help="none, latents or motion")
    between.add_argument("--motion", metavar="MODEL", help="a motion predictor, for motion")
    between.add_argument("--between", type=int, default=6, help="pictures between two frames")
    parser.add_argument("--memory-gb", type=float, help="that drawing may take; default: most of what is free")
    given = parser.parse_args(list(arguments))
    from zoo.errors import ConfigError, DataError

    if not given.character:
        raise ConfigError("a story needs a character: --character 'Fox: a red fox with a scarf'")
    if given.out is None and given.clip is None:
        raise ConfigError("a story needs a place: --out FILE.png for the page, --clip FILE.gif for the clip, or both")
    for option, value, ending in (("--out", given.out, ".png"), ("--clip", given.clip, ".gif")):
        if value is not None and (Path(value).suffix.lower() != ending or not Path(value).parent.is_dir()):
            raise ConfigError(f"{option} {value}: expected a file ending in {ending} in a folder that exists")
    lines = list(given.frame)
    if given.script is not None:
        try:
            lines = [*Path(given.script).read_text(encoding="utf-8").splitlines(), *lines]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"--script {given.script} cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from None
        if not any(line.strip() for line in lines):
            raise ConfigError(f"the script {given.script} has no frames: write a line a frame")

    from zoo_stories.consistency import Consistency
    from zoo_stories.drawing import model_of
    from zoo_stories.script import read_characters, read_script
    from zoo_stories.telling import loaded, tell

    fields = ("rate", "layers", "start_step", "window", "long")
    changed = {field: value for field in fields if (value := getattr(given, field)) is not None}
    Consistency(**changed)  # what is wrong with it is said before a model is read
    characters = read_characters(given.character)
    if lines:
        read_script(lines, characters)
    model = loaded(given.model)
    own = getattr(model_of(model), "consistency", None) or Consistency()
    story = tell(
        model,
        characters,
        lines,
        theme=given.theme,
        writer=given.writer,
        frames=given.frames,
        title=given.title,
        consistency=dataclasses.replace(own, **changed),
        seed=given.seed,
        steps=given.steps,
        guidance=given.guidance,
        sampler=given.sampler,
        transitions=given.transitions if given.clip is not None else "none",
        motion=given.motion,
        pictures_between=given.between,
        memory=None if given.memory_gb is None else int(given.memory_gb * 2**30),
    )
    story.save(given.out, given.clip)
    for frame in story.script:
        print(f"{frame.prompt}\t{frame.caption}")
    made = [str(path) for path in (given.out, given.clip) if path is not None]
    print(f"{', '.join(made)}: {len(story.script)} frames, between them: {story.how}")
    return 0
