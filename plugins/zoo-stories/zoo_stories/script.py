"""Scripts: what happens in each frame, to whom, and what stands below it.

A line a frame, in the notation of StoryDiffusion's demo::

    [Fox] sits in a boat # The fox sets out.
    [Fox][Owl] {Owl} left of {Fox} # She meets an owl.
    [NC] the sea at night

``[Name]`` says who is in it (one of the characters, ``NC`` for nobody), what follows ``#`` is the caption. The
description of a character takes the place of ``{Name}``, or else stands before the line. A line without a name is about
the first character.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.errors import ConfigError, RunError, near

NOBODY = "NC"
MOST = 256
"""Frames of one story."""
_TAGS = re.compile(r"\s*\[([^\]]*)\]")
_NUMBER = re.compile(r"^\s*(?:frame\s*)?\d+\s*[.):-]\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Frame:
    """One picture of a story: what it is drawn from, what stands below it, and the characters in it."""

    prompt: str
    caption: str
    characters: frozenset[str]


def read_characters(given: str | Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Name -> description of one description, of ``"Name: description"`` texts, or of a mapping.

    Raises:
        ConfigError: There is none, or a name without description.
    """
    if isinstance(given, Mapping):
        found = {str(name).strip(): str(text).strip() for name, text in given.items()}
    else:
        found = {}
        for text in [given] if isinstance(given, str) else list(given):
            name, colon, description = text.partition(":")
            if colon:
                found[name.strip()] = description.strip()
            elif text.strip():
                found["hero" if not found else f"hero {len(found) + 1}"] = text.strip()
    wrong = next((name for name, text in found.items() if not name or not text or name == NOBODY), None)
    if not found or wrong is not None:
        what = "no character" if not found else f"the character {wrong!r} without a name or a description"
        raise ConfigError(f"a story with {what}: give one as 'Fox: a red fox with a scarf', or as a description alone")
    return found


def read_script(script: str | Sequence[str], characters: Mapping[str, str]) -> tuple[Frame, ...]:
    """The frames of a script, a line each; empty lines are left out.

    Raises:
        ConfigError: No frame, too many, or a frame that names nobody's name.
    """
    lines = script.splitlines() if isinstance(script, str) else list(script)
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise ConfigError("the script has no frames: write a line a frame, such as '[Fox] sits in a boat # A fox.'")
    if len(lines) > MOST:
        raise ConfigError(f"the script has {len(lines)} frames, at most {MOST} are drawn: tell several stories")
    return tuple(_frame(line, characters) for line in lines)


def _frame(line: str, characters: Mapping[str, str]) -> Frame:
    text, _, caption = line.partition("#")
    named: list[str] = []
    while found := _TAGS.match(text):
        named.append(found[1].strip())
        text = text[found.end() :]
    text = text.strip()
    for name in named:
        if name != NOBODY and name not in characters:
            raise ConfigError(f"the frame {line!r} names {name!r}, which is no character{near(name, characters)}")
    who = [name for name in named if name != NOBODY] if named else [next(iter(characters))]
    before = []
    for name in who:
        if f"{{{name}}}" in text:
            text = text.replace(f"{{{name}}}", characters[name])
        else:
            before.append(characters[name])
    prompt = ", ".join(part for part in (*before, text) if part)
    if not prompt:
        raise ConfigError(f"the frame {line!r} says nothing to draw")
    return Frame(prompt, caption.strip() or text or prompt, frozenset(who))


def write_script(
    writer: Any, theme: str, characters: Mapping[str, str], frames: int, *, seed: int = 0, max_new_tokens: int = 32
) -> list[str]:
    """Lines of a script that a language model of the zoo writes, one at a time, each knowing those before it.

    Args:
        writer: What offers ``generate_text``; models that write about an image are shown a white one.

    Raises:
        ConfigError: It writes no text, or there is no theme.
        RunError: It wrote nothing for a frame.
    """
    from PIL import Image

    if not theme.strip():
        raise ConfigError("a story that a model writes needs a theme, such as 'a journey across the sea'")
    if not 1 <= frames <= MOST:
        raise ConfigError(f"frames = {frames}: expected 1 to {MOST}")
    if not hasattr(writer, "generate_text"):
        raise ConfigError("the writer writes no text: take a model that offers generate_text, e.g. a run of llava")
    who = "; ".join(f"{name}, {text}" for name, text in characters.items())
    first = next(iter(characters))
    blank = Image.new("RGB", (64, 64), "white")
    lines: list[str] = []
    for number in range(frames):
        told = f" So far: {' '.join(lines)}" if lines else ""
        prompt = (
            f"A picture story about {theme}. Characters: {who}.{told} In one short sentence, what does picture"
            f" {number + 1} of {frames} show {first} doing?"
        )
        (text,) = writer.generate_text([blank], [prompt], max_new_tokens=max_new_tokens)
        sentence = _sentence(text)
        if not sentence:
            raise RunError(f"the writer wrote nothing for frame {number + 1}: give a script, or another writer")
        lines.append(sentence)
    return [f"[{first}] {line} # {line}" for line in lines]


def _sentence(text: str) -> str:
    """The first sentence of what a model wrote, without numbers in front and without the script's own signs."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    line = _NUMBER.sub("", line).strip().strip('"')
    line = re.split(r"(?<=[.!?])\s", line)[0]
    return " ".join(re.sub(r"[\[\]{}#]", " ", line).split())
