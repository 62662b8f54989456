"""The moving average of the weights, under every strategy: whole tensors, or each rank's part of divided ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.errors import WeightsError
from zoo.torchvision_ops import ensure

ensure()  # lightning imports torchmetrics, which imports torchvision

from lightning.pytorch.callbacks import Callback  # noqa: E402


class WeightAverage(Callback):
    """average = decay average + (1 - decay) weight after every optimizer step, from the weights after the first one on;
    when a stage ends the model takes the averages over.

    Lightning's ``EMAWeightAveraging`` copies the whole module, which FSDP forbids; this keeps what learns alone.

    Attributes:
        averages: Parameter name -> average, of the kind the parameter is: a tensor, or a DTensor under FSDP.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.averages: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}
        self._step = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._step = trainer.global_step
        for name, parameter in learning(module).items():
            if name in self._loaded:
                self.averages[name] = parameter.detach().clone()
                put(self.averages[name], self._loaded[name])
        self._loaded = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:  # a micro-batch of an accumulated step
            return
        self._step = trainer.global_step
        for name, parameter in learning(module).items():
            if name in self.averages:
                self.averages[name].lerp_(parameter.detach(), 1 - self.decay)
            else:
                self.averages[name] = parameter.detach().clone()

    @torch.no_grad()
    def on_train_end(self, trainer: Any, module: Any) -> None:
        for name, parameter in learning(module).items():
            if name in self.averages:
                parameter.copy_(self.averages[name])

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        if "current_model_state" in checkpoint:  # Lightning's callback, which puts the averages in the weights' place
            raise WeightsError(
                "the checkpoint is of an earlier version, which kept averages otherwise: delete it to start the run"
                " again, or finish the run with that version"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"averages": dict(self.averages)}  # under FSDP each rank's part, which its shard of a checkpoint holds

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict["averages"])


def learning(module: Any) -> dict[str, Tensor]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def put(target: Tensor, whole: Tensor) -> None:
    """Write a whole tensor, or one divided alike, into one that may be divided."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor) and not isinstance(whole, DTensor):
        whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
    target.copy_(whole)
