"""Images in a folder of the user's, named by rows that may come from someone else, and splits by a hash."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from zoo.data.sample import stable_hash
from zoo.errors import ConfigError, DataError, near

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})


class ImageFolder:
    """The folder that paths of images are relative to.

    Raises:
        DataError: ``root`` is no folder.
    """

    def __init__(self, root: str) -> None:
        path = Path(root).expanduser()
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise DataError(f"the image folder {str(path)!r} {what}{near_path(path)}; set data.root")
        self.root = path.resolve()

    def below(self, path: str) -> Path:
        """Return the absolute path of what a row names, links as they are.

        Raises:
            DataError: an absolute path, or one with "..".
        """
        pure = PurePosixPath(path.replace("\\", "/"))
        if not pure.parts or pure.is_absolute() or ".." in pure.parts or ":" in pure.parts[0]:
            raise DataError(f"the path {path!r} is refused: paths must be relative to {str(self.root)!r}, without '..'")
        return self.root / pure

    def inside(self, path: str) -> Path:
        """Return :meth:`below`, refusing links that lead out of the folder: the rows may come from someone else.

        Raises:
            DataError: as :meth:`below`, or for such a link.
        """
        whole = self.below(path)
        if not whole.resolve().is_relative_to(self.root):
            raise DataError(f"the path {path!r} is refused: it is a link that leads out of {str(self.root)!r}")
        return whole

    def stamp(self, paths: Iterable[str]) -> str:
        """Return the state of files, which changes when they do: sizes and times of change."""
        states = [self.inside(path).stat() for path in paths]
        return ",".join(f"{state.st_size}/{state.st_mtime_ns}" for state in states)


def check_fractions(val: float, test: float) -> None:
    """Raise a ConfigError unless the fractions that are held out leave a train split."""
    if min(val, test) < 0 or val + test >= 1:
        raise ConfigError(
            f"val_fraction={val} and test_fraction={test} must not be negative and must leave something to train on"
        )


def split_of(key: Sequence[object], val: float, test: float) -> str:
    """Return the split of what has this key, by a hash: adding other things moves nothing."""
    place = stable_hash(*key) / 2**64
    if place < test:
        return "test"
    return "val" if place < test + val else "train"


def near_path(path: Path) -> str:
    """Return a hint at names beside a path that does not exist, or nothing."""
    try:
        return near(path.name, [p.name for p in path.parent.iterdir()][:1000])
    except OSError:
        return ""
