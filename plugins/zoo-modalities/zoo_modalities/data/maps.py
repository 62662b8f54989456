"""Maps of an icon that follow from its silhouette and what it is called: depth, and a simulated thermal picture."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from zoo.data.images import uniforms
from zoo_modalities.data.signal import Signal

Map = NDArray[np.float32]

FLOOR = (0.02, 0.22)
"""Disparity of the plane behind an icon, at the top and at the bottom of the picture."""
LIVING = frozenset({
    "man", "woman", "men", "women", "person", "people", "boy", "girl", "child", "baby", "adult", "face", "head", "hand",
    "hands", "finger", "ear", "eye", "eyes", "nose", "mouth", "family", "couple", "student", "teacher", "judge",
    "farmer", "cook", "mechanic", "worker", "scientist", "technologist", "singer", "artist", "pilot", "astronaut",
    "firefighter", "officer", "detective", "guard", "prince", "princess", "santa", "claus", "mage", "fairy", "vampire",
    "merperson", "elf", "superhero", "supervillain", "cat", "dog", "lion", "tiger", "horse", "cow", "pig", "mouse",
    "rabbit", "bear", "panda", "monkey", "gorilla", "bird", "chicken", "duck", "owl", "wolf", "fox", "elephant",
    "camel", "goat", "sheep", "ox", "deer", "bat", "koala", "kangaroo", "hamster", "hedgehog", "squirrel",
})  # fmt: skip
HOT = frozenset({
    "fire", "flame", "sun", "hot", "volcano", "candle", "stove", "lamp", "bulb", "coffee", "tea", "pot", "steaming",
    "firecracker", "rocket",
})  # fmt: skip
COLD = frozenset({"ice", "snow", "snowman", "snowflake", "cold", "freezing", "cream", "shaved", "mountain", "penguin"})
TEMPERATURES = {"living": 0.8, "hot": 1.0, "cold": 0.05, "other": 0.4}
AMBIENT = 0.2


def cut_out(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An icon [S, S, 3] on white as RGBA [S, S, 4]: opaque but where white reaches it from the border."""
    from scipy.ndimage import label  # type: ignore[import-untyped]

    white = (picture >= 248).all(-1)
    regions, _ = label(np.pad(white, 1, constant_values=True))  # one around the picture joins all that is outside
    outside = regions[1:-1, 1:-1] == regions[0, 0]
    alpha = np.where(outside, 0, 255).astype(np.uint8)
    return np.concatenate([picture, alpha[..., None]], -1)


def luminance(sprite: NDArray[np.uint8]) -> Map:
    """Luminance [S, S] in 0..1 of an RGBA icon [S, S, 4] on white."""
    alpha = sprite[..., 3:].astype(np.float32) / 255
    rgb = sprite[..., :3].astype(np.float32) / 255 * alpha + (1 - alpha)
    return cast("Map", rgb @ np.array([0.299, 0.587, 0.114], np.float32))


def depth(sprite: NDArray[np.uint8]) -> Signal:
    """A disparity map [S, S] of an RGBA icon [S, S, 4].

    The icon is a cushion in front of a tilted plane: its height over the plane grows with the root of the distance to
    its outline, and drawn lines are grooves. It follows from the picture alone.
    """
    from scipy.ndimage import distance_transform_edt

    inside = sprite[..., 3] >= 128
    side = sprite.shape[0]
    plane = np.linspace(*FLOOR, side, dtype=np.float32)[:, None] * np.ones((1, side), np.float32)
    if not inside.any():
        return Signal(plane)
    distance = distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    cushion = np.sqrt(distance / distance.max())
    grooves = 0.15 * (1 - luminance(sprite))
    near = 0.45 + 0.5 * cushion - grooves
    return Signal(np.where(inside, near, plane).astype(np.float32).clip(0, 1))


def warmth(name: str) -> str:
    """Which of ``TEMPERATURES`` an icon of this name has: a rule on words, no measurement."""
    words = set(name.lower().replace(":", " ").replace("-", " ").split())
    for kind, known in (("hot", HOT), ("cold", COLD), ("living", LIVING)):
        if words & known:
            return kind
    return "other"


def thermal(sprite: NDArray[np.uint8], name: str, *key: object) -> Signal:
    """A simulated thermal picture [S, S] of an RGBA icon [S, S, 4].

    Its temperature is that of what it is called (`warmth`), falling towards the outline, blurred, with sensor noise.
    Colours do not show; of drawn lines only a trace does.

    Args:
        key: Decides the noise.
    """
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    inside = sprite[..., 3] >= 128
    side = sprite.shape[0]
    picture = np.full((side, side), AMBIENT, np.float32)
    if inside.any():
        distance = distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
        core = 0.6 + 0.4 * distance / distance.max()
        excess = (TEMPERATURES[warmth(name)] - AMBIENT) * core - 0.05 * (1 - luminance(sprite))
        picture = np.where(inside, AMBIENT + excess, picture)
    picture = gaussian_filter(picture, side / 64)
    noise = uniforms(side * side, "thermal", *key).reshape(side, side) - 0.5
    return Signal((picture + 0.04 * noise).astype(np.float32).clip(0, 1))
