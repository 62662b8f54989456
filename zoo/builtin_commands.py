"""The words of the command line, as components: a plugin adds its own in the same way."""

from __future__ import annotations

from zoo.registry import Component


def _command(name: str, summary: str) -> Component:
    return Component(kind="command", name=name, ref=f"zoo.cli.commands.{name}:main", summary=summary)


COMMANDS = (
    _command("list", "names of models, parts, datasets and tasks"),
    _command("show", "what a model is made of: parts, parameters, FLOPs, attention layout"),
    _command("train", "train and evaluate: zoo train model=clip scale=tiny (-m sweeps)"),
    _command("sweep", "a sweep here or, with --slurm, as one job array; --status, --wait"),
    _command("compare", "a sweep, its evaluation and one page about it; resumes, repeats nothing"),
    _command("eval", "evaluate a finished run or a checkpoint"),
    _command("generate", "text for images, or images from texts (--text, --edit, --mask)"),
    _command("chat", "talk with a model about images in the terminal"),
    _command("report", "leaderboard and one HTML page over runs"),
    _command("push", "a run's weights to the Hugging Face hub, with a card made from the run"),
    _command("claims", "claims of papers: run their comparisons and say what they show here"),
    _command("demo", "CLIP and three connectors compared on real images, in minutes on a CPU"),
    _command("data", "make datasets: zoo data capfilt cleans captions with a trained BLIP"),
    _command("doctor", "versions, devices, plugins, and what is wrong with them"),
    _command("plugin", "write the skeleton of a plugin: zoo plugin new NAME"),
)
