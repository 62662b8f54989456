"""Simulated motion of an icon: where it is and how it is turned at every time, what a sensor on it measures, a clip.

An icon of a role moves in the way of its role (`GAITS`), so that the motion says something about what moves; where it
starts and how it leans is the item's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zoo.data.images import uniforms
from zoo.data.scenes_layout import Stream
from zoo_modalities.data.signal import Signal

GAITS = ("glide", "hop", "roll", "shake", "sway")
GRAVITY = 9.81
IMU_RATE = 400.0
SECONDS = 5.0
FRAMES = 10
"""Frames of a clip of ``SECONDS``."""
SIDE = 0.625
"""Side of the moving icon over that of the canvas."""
METRES = 2.0
"""Width of the canvas, for accelerations."""


@dataclass(frozen=True, slots=True)
class Motion:
    """Coefficients of one motion; all times in seconds, lengths in canvas widths, angles in radians, x to the right and
    y up, from the canvas' middle."""

    gait: str
    frequency: float
    size: float
    lean: float
    start: tuple[float, float]
    phase: float

    def at(self, time: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """x, y and the angle (counterclockwise) at ``time`` [T]."""
        turn = 2 * math.pi * self.frequency * time + self.phase
        x = np.full_like(time, self.start[0])
        y = np.full_like(time, self.start[1])
        angle = np.full_like(time, self.lean)
        if self.gait == "glide":
            x = x + self.size * np.sin(turn / 2)
        elif self.gait == "hop":
            y = y + self.size * (np.sin(turn / 2) ** 2 - 0.5)
        elif self.gait == "roll":
            x = x + self.size * np.sin(turn / 2)
            angle = angle - (x - self.start[0]) / (SIDE / 2)
        elif self.gait == "shake":
            x = x + self.size / 20 * np.sin(3 * turn)
        else:  # sway
            angle = angle + 0.5 * np.sin(turn)
        return x, y, angle


def motion_of(role: str, id: str, seed: int) -> Motion:
    """The motion of an item: gait and pace are its role's, lean, place and phase its own."""
    way, own = Stream("gait", role), Stream("motion", seed, id)
    room = (1 - SIDE) / 2 - 0.1
    return Motion(
        gait=way.choice(GAITS),
        frequency=0.5 + 1.5 * way.uniform(),
        size=0.1 + 0.08 * way.uniform(),
        lean=math.radians(50) * (2 * own.uniform() - 1),
        start=(room * (2 * own.uniform() - 1), room * (2 * own.uniform() - 1)),
        phase=2 * math.pi * own.uniform(),
    )


def imu(motion: Motion, *key: object, rate: float = IMU_RATE, seconds: float = SECONDS) -> Signal:
    """What an ideal sensor on the icon measures, with noise: [6, rate * seconds], acceleration and rotation rate.

    The picture stands upright: gravity points down in it. The accelerometer gives the specific force in the icon's own
    axes, R(-angle) (a - g), the gyroscope the rotation about the axis out of the picture; differences are central.

    Args:
        key: Decides the noise, uniform within 0.1 m/s² and 0.02 rad/s.
    """
    count, step = round(rate * seconds), 1 / rate
    time = np.arange(-1, count + 1, dtype=np.float64) * step
    x, y, angle = motion.at(time)
    ax, ay = (METRES * np.diff(v, 2) / step**2 for v in (x, y))
    spin = (angle[2:] - angle[:-2]) / (2 * step)
    angle = angle[1:-1]
    up = ay + GRAVITY
    out = np.zeros((6, count))
    out[0] = np.cos(angle) * ax + np.sin(angle) * up
    out[1] = -np.sin(angle) * ax + np.cos(angle) * up
    out[5] = spin
    noise = 2 * uniforms(6 * count, "imu", *key).reshape(6, count) - 1
    out += noise * np.array([0.1, 0.1, 0.1, 0.02, 0.02, 0.02])[:, None]
    return Signal(out.astype(np.float32), rate)


def frame(sprite: NDArray[np.uint8], motion: Motion, time: float, size: int) -> NDArray[np.uint8]:
    """The picture [size, size, 3] at one time: the RGBA icon [S, S, 4] on white, moved and turned."""
    from PIL import Image

    x, y, angle = (float(v[0]) for v in motion.at(np.array([time])))
    side = round(SIDE * size)
    icon = Image.fromarray(sprite).resize((side, side), Image.Resampling.BILINEAR)
    icon = icon.rotate(math.degrees(angle), Image.Resampling.BILINEAR, expand=True)
    canvas = Image.new("RGBA", (size, size), "white")
    left = round((0.5 + x) * size - icon.width / 2)
    top = round((0.5 - y) * size - icon.height / 2)
    canvas.alpha_composite(icon, (max(left, 0), max(top, 0)), (max(-left, 0), max(-top, 0)))
    return np.asarray(canvas.convert("RGB"), np.uint8)


def clip(sprite: NDArray[np.uint8], motion: Motion, size: int) -> Signal:
    """The clip [FRAMES, size, size, 3] of the motion, frames in the middle of equal stretches of it."""
    times = (np.arange(FRAMES) + 0.5) * SECONDS / FRAMES
    return Signal(np.stack([frame(sprite, motion, float(t), size) for t in times]), FRAMES / SECONDS)
