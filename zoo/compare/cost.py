"""What a run cost, in every unit a budget may have: the mapping ``cost`` of its manifest.

    steps                   optimizer steps
    samples                 samples seen, repeats counted
    tokens                  {text, image, total}: positions that are no pads, as ``zoo.positions`` counts them
    flops                   {frozen_forward, trainable_forward, backward, features, total} of the whole training;
                            ``features`` is one forward pass of a frozen part for every image of the run in its cache
    seconds                 {training, features, evaluation, wall}: ``training`` from the first batch's reading to the
                            last step's end, ``features`` of filling the cache, ``wall`` everything, over all attempts
    samples_per_second      of training
    peak_memory_bytes       of the accelerator where there is one, else resident memory

What a kill threw away counts neither as steps nor as seconds of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.compare.flops import Flops

FLOPS = ("frozen_forward", "trainable_forward", "backward")


def cost(
    *,
    steps: Sequence[int],
    batch_size: int,
    positions: Sequence[int],
    flops: Sequence[Flops],
    training: float,
    features: Mapping[str, Any] | None = None,
    feature_seconds: float = 0.0,
    peak_memory_bytes: int | None = None,
) -> dict[str, Any]:
    """The mapping of a run whose training is over, but for what is only known at its end (``seconds.evaluation`` and
    ``seconds.wall``).

    Args:
        steps: Taken in each stage.
        positions: Of text and of images.
        flops: Of one sample in each stage.
        training: Seconds.
        features: ``{images, forward, total}`` of cached features, FLOPs.
    """
    samples = [count * batch_size for count in steps]
    parts = {key: sum(getattr(f, key) * n for f, n in zip(flops, samples, strict=True)) for key in FLOPS}
    parts["features"] = int(features["total"]) if features else 0
    text, image = positions
    return {
        "steps": sum(steps),
        "samples": sum(samples),
        "tokens": {"text": text, "image": image, "total": text + image},
        "flops": {**parts, "total": sum(parts.values())},
        "seconds": {"training": round(training, 3), "features": round(feature_seconds, 3)},
        "samples_per_second": round(sum(samples) / training, 2) if training else None,
        "peak_memory_bytes": peak_memory_bytes,
    }


def with_cost(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """A manifest that has the mapping: itself, or, of a run from before there was one, with what it says of it."""
    if "cost" in manifest or not any(key in manifest for key in ("steps", "seconds", "flops")):
        return manifest
    flops = manifest.get("flops")
    seconds = {"training": manifest.get("seconds"), "evaluation": manifest.get("evaluation_seconds")}
    found = {
        "steps": manifest.get("steps"),
        "samples": manifest.get("samples"),
        "tokens": {"total": manifest.get("tokens")},
        "flops": {"total": flops.get("total") if isinstance(flops, Mapping) else None},
        "seconds": seconds,
        "samples_per_second": manifest.get("samples_per_second"),
        "peak_memory_bytes": manifest.get("peak_memory_bytes"),
    }
    return {**manifest, "cost": found}
