from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from zoo.data.openmoji import OpenMoji, OpenMojiConfig


@pytest.fixture(scope="session")
def icons(tmp_path_factory: pytest.TempPathFactory) -> OpenMoji:
    """Icons at 16 px, rendered once into a cache of their own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("ZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
    source = OpenMojiConfig(size=16).open(None)
    source.prepare()
    patch.undo()
    return source


@pytest.fixture
def picture() -> Image.Image:
    """A wide picture with detail at every scale."""
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize(
        (130, 90), Image.Resampling.BICUBIC
    )
    noise = rng.integers(-20, 20, (90, 130, 3))
    return Image.fromarray(np.clip(np.asarray(coarse, int) + noise, 0, 255).astype(np.uint8))
