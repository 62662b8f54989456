"""``torchmetrics.Metric``, importable beside a torch build that torchvision's operators do not fit.

torchmetrics imports torchvision, which may first need its missing operators declared. Asking this module for
``Metric`` does both, on the first ask (PEP 562), so that no module of the zoo runs a statement with an effect when it
is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchmetrics import Metric as Metric


def __getattr__(name: str) -> Any:
    if name != "Metric":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from zoo import torchvision_ops

    torchvision_ops.ensure()
    from torchmetrics import Metric

    return Metric
