"""torchmetrics' classes that the zoo's metrics derive from or use, beside a torch build that torchvision's operators
do not fit.

torchmetrics imports torchvision, which may first need its missing operators declared. Asking this module for a class
does both, on the first ask (PEP 562), so that no module of the zoo runs a statement with an effect when it is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchmetrics import Metric as Metric
    from torchmetrics import MetricCollection as MetricCollection
    from torchmetrics.classification import BinaryAccuracy as BinaryAccuracy
    from torchmetrics.classification import BinaryF1Score as BinaryF1Score
    from torchmetrics.classification import BinaryPrecision as BinaryPrecision
    from torchmetrics.classification import BinaryRecall as BinaryRecall
    from torchmetrics.image.fid import FrechetInceptionDistance as FrechetInceptionDistance
    from torchmetrics.text import BLEUScore as BLEUScore

_PLACES = {
    "Metric": "torchmetrics",
    "MetricCollection": "torchmetrics",
    "BinaryAccuracy": "torchmetrics.classification",
    "BinaryF1Score": "torchmetrics.classification",
    "BinaryPrecision": "torchmetrics.classification",
    "BinaryRecall": "torchmetrics.classification",
    "FrechetInceptionDistance": "torchmetrics.image.fid",
    "BLEUScore": "torchmetrics.text",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from zoo import torchvision_ops

    torchvision_ops.ensure()
    return getattr(import_module(_PLACES[name]), name)
