"""What `zoo eval` and `zoo generate` accept as a model: a run directory, a checkpoint folder, an official file or a
hub id.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import WeightsError

if TYPE_CHECKING:
    from zoo.module import ZooModule


def load(path: str, model: str | None = None) -> ZooModule:
    """Load the model behind ``path``.

    Raises:
        WeightsError: A run without weights, or whatever ``zoo.from_pretrained`` refuses.
    """
    import torch

    from zoo.api import from_pretrained

    folder = Path(path)
    if (folder / "run.yaml").is_file():
        if not (folder / "weights").is_dir():
            raise WeightsError(f"run {folder} has no weights yet: finish it with the command that started it")
        folder = folder / "weights"
        path = str(folder)
    module = from_pretrained(path, model=model)
    return module.to("cuda" if torch.cuda.is_available() else "cpu").eval()
