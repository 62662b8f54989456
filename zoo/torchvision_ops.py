"""Make torchvision importable beside a torch build its compiled operators do not fit.

A CPU build of torch next to a CUDA build of torchvision cannot load torchvision's binary extension, and then
``import torchvision`` (and with it timm, open_clip and many transformers classes) dies with ``operator torchvision::nms
does not exist``: its meta kernels are registered for operators nobody defined. The zoo uses none of these operators, so
declaring their schemas is enough. Nothing happens where the real operators load.
"""

from __future__ import annotations

from functools import cache
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")


def _find_extension() -> str | None:
    from importlib.machinery import PathFinder
    from importlib.util import find_spec

    spec = find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    extension = PathFinder.find_spec("_C", list(spec.submodule_search_locations))
    return extension.origin if extension else None


@cache
def ensure() -> bool:
    """Declare the missing schemas; call it just before importing timm, open_clip or others that use torchvision.

    Returns:
        True when schemas were declared, False when torchvision is absent or brings its own operators.
    """
    import sys

    if "torchvision" in sys.modules:
        return False
    origin = _find_extension()
    if origin is None:
        return False
    import torch

    try:
        torch.ops.load_library(origin)  # type: ignore[no-untyped-call]
        return False
    except OSError:
        pass
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + _SCHEMA)
    _KEEP.append(library)  # a Library undoes its definitions when it is collected
    return True


_KEEP: list[Any] = []
