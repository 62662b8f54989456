"""zoo push: a finished run's weights to the hub, with a card made from the run and its seeds."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, RunError


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("zoo push", description="Put a run's weights and a card on the Hugging Face hub.")
    parser.add_argument("run", help="a finished run's directory")
    parser.add_argument("repo", help="OWNER/NAME on the hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", metavar="FOLDER", help="write what would be sent to FOLDER, and send nothing")
    given = parser.parse_args(argv)
    folder = Path(given.dry_run) if given.dry_run else None
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: give --dry-run another folder")
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        files = write_folder(Path(given.run), given.repo, place)
        for name in files:
            print(f"{(place / name).stat().st_size:>14,}  {name}")
        if folder is not None:
            print(f"{folder} holds what would be sent to {given.repo}; nothing was sent")
            return 0
        print(upload(place, given.repo, private=given.private))
    return 0


def write_folder(run: Path, repo: str, place: Path) -> list[str]:
    """Write what goes to the hub: what ``zoo.from_pretrained`` reads, run.yaml, metrics.json and README.md.

    Returns:
        The files' names below ``place``.

    Raises:
        RunError: The run is not done, or has no weights.
        ConfigError: ``repo`` is no hub id.
    """
    from zoo.compare.card import card
    from zoo.compare.leaderboard import identity
    from zoo.compare.rundir import Run, find_runs
    from zoo.weights.files import HUB_ID

    if not HUB_ID.fullmatch(repo):
        raise ConfigError(f"{repo!r} is no hub id: give OWNER/NAME")
    found = Run.read(run)
    if found.status != "done":
        raise RunError(f"{run} is {found.status}, not done: give a finished run's directory")
    if not (run / "weights" / "model.safetensors").is_file():
        raise RunError(f"{run} has no weights/model.safetensors: its weights were removed")
    seeds = [other for other in find_runs([run.parent]) if identity(other) == identity(found)]
    shutil.copytree(run / "weights", place, dirs_exist_ok=True)
    for name in ("run.yaml", "metrics.json"):
        if (run / name).is_file():
            shutil.copyfile(run / name, place / name)
    (place / "README.md").write_text(card(found, seeds).replace("OWNER/NAME", repo), encoding="utf-8")
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


def upload(place: Path, repo: str, *, private: bool = False, api: Any = None) -> str:
    """Send a folder, in one commit; returns its address.

    Raises:
        RunError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = api or HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(folder_path=str(place), repo_id=repo, commit_message="A run of mmzoo")
    except (OSError, ValueError, RuntimeError) as error:  # the hub's and the connection's errors are kinds of these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"nothing could be sent to {repo} ({type(error).__name__}: {reason}): check the name, the network and"
            " 'hf auth login'"
        ) from error
    return str(getattr(done, "commit_url", done))
