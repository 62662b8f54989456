"""torchmetrics' classes that the zoo's metrics derive from, beside a torch build that torchvision's operators
do not fit.

torchmetrics imports torchvision, which may first need its missing operators declared. Asking this module for a class
does both, on the first ask (PEP 562), so that no module of the zoo runs a statement with an effect when it is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchmetrics import Metric as Metric
    from torchmetrics.image.fid import FrechetInceptionDistance as FrechetInceptionDistance


def __getattr__(name: str) -> Any:
    if name not in ("Metric", "FrechetInceptionDistance"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from zoo import torchvision_ops

    torchvision_ops.ensure()
    if name == "Metric":
        from torchmetrics import Metric

        return Metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    return FrechetInceptionDistance
