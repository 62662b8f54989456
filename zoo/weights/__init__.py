"""Loading and saving weights: zoo checkpoints, transformers folders, official files.

A zoo checkpoint is a folder with ``recipe.json``, ``model.safetensors`` and ``tokenizer/``. Nothing that is loaded
is run: tensors come from safetensors or from torch files that hold nothing else.
"""

from __future__ import annotations

from zoo.weights.load import load, load_model
from zoo.weights.report import LoadReport
from zoo.weights.save import save, save_merged

__all__ = ["LoadReport", "load", "load_model", "save", "save_merged"]
