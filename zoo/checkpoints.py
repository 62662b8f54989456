"""What a resumable checkpoint holds, of a Trainer and back into one, and which of a run's checkpoints is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from zoo.errors import WeightsError
from zoo.run_config import RunConfig, digest
from zoo.survival import Processes

MODELS = ("state_dict", "current_model_state")
"""Where a checkpoint has the module's tensors; with a moving average the first are the average's."""


def identity_of(config: RunConfig) -> str:
    """Hash of what a checkpoint's tensors and steps belong to: recipe, learning rates, data's order and seed."""
    recipe = config.trained_recipe.to_plain()
    recipe.pop("changed")
    return digest([recipe, config.data, config.batch_size, config.seed])[:16]


def parameter_names(module: torch.nn.Module) -> dict[int, str]:
    """Name of each parameter, by its ``id``; what wrappers put into names is left out."""
    return {id(p): plain_name(name) for name, p in module.named_parameters()}


def plain_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def optimizer_state(optimizer: Any, names: Mapping[int, str]) -> dict[str, Any]:
    """An optimizer's state by the parameters' names, so that any strategy and number of processes reads it.

    DCP's own ``get_optimizer_state_dict`` expects a state of every parameter that learns; one that no loss has reached
    yet has none, and must have none after a resume.
    """
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"names": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    state = {names[id(parameter)]: dict(values) for parameter, values in optimizer.state.items()}
    return {"state": state, "groups": groups}


def load_optimizer(optimizer: Any, saved: Mapping[str, Any], names: Mapping[int, str]) -> None:
    """Give an optimizer the state that ``optimizer_state`` took."""
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    number = {name: i for i, name in enumerate(order)}
    groups = [
        {key: value for key, value in group.items() if key != "names"} | {"params": [number[n] for n in group["names"]]}
        for group in saved["groups"]
    ]
    state = {number[name]: values for name, values in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def state_of(trainer: Any) -> dict[str, Any]:
    """All that a stage needs to go on; tensors are the live ones, sharded where the strategy shards."""
    module = trainer.lightning_module
    names = parameter_names(module)
    state = {
        "state_dict": {plain_name(name): value for name, value in module.state_dict().items()},
        "optimizers": [optimizer_state(optimizer, names) for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "loops": trainer.fit_loop.state_dict(),
        "precision": trainer.precision_plugin.state_dict(),
        "callbacks": {type(callback).__name__: callback.state_dict() for callback in trainer.callbacks},
    }
    for callback in trainer.callbacks:
        callback.on_save_checkpoint(trainer, module, state)
    module.on_save_checkpoint(state)
    return state


class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        stage: Index of the recipe's stage it was written in.
        step: Optimizer steps of all stages.
        stage_step: Of this stage.
        plain: What it holds beside tensors, by the names of the callbacks and ``state_of``.
    """

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self.folder, self.index = folder, index
        self.identity = str(index["identity"])
        self.stage, self.step, self.stage_step = int(index["stage"]), int(index["step"]), int(index["stage_step"])
        self.plain: dict[str, Any] = index["state"]

    def read(self, *keys: str) -> dict[str, Any]:
        """The state, or these entries of it, with tensors on the CPU, shards put together."""
        from zoo import checkpoint_storage as storage

        plain = {key: self.plain[key] for key in keys or self.plain}
        tensors = storage.empty(self.index, storage.names_in(plain))
        self._fill(tensors, Processes())
        state: dict[str, Any] = storage.join(plain, tensors)
        return state

    def _fill(self, targets: dict[str, Any], processes: Processes) -> None:
        from torch.distributed.checkpoint.api import CheckpointException

        from zoo import checkpoint_storage as storage

        try:
            storage.load_into(self.folder, targets, processes.saving, processes.several)
        except CheckpointException as error:  # which is no Exception
            cause = next(iter(error.failures.values()))[0]
            line = " ".join(str(cause).split())[:200]
            raise processes.missing(cause) or WeightsError(f"{self.folder} cannot be read: {line}") from error

    def restore(self, trainer: Any, processes: Processes) -> None:
        """Give a Trainer that is about to step the state of ``state_of``, in place, each rank its shards.

        Raises:
            WeightsError: The module has other tensors.
        """
        from zoo import checkpoint_storage as storage

        module = trainer.lightning_module
        _, live = storage.split(state_of(trainer))
        parameters = {plain_name(name): p for name, p in module.named_parameters()}
        wanted = set(storage.names_in(self.plain))
        targets: dict[str, Any] = {}
        for name in sorted(wanted):
            shape, kind = self.index["tensors"][name]
            if name in live and list(live[name].shape) == shape:
                targets[name] = live[name].detach()
                continue
            of = parameters.get(name.split("/")[3]) if name.startswith("optimizers/") else None
            if of is not None and hasattr(of, "placements") and list(of.shape) == shape:
                targets[name] = torch.empty_like(of.detach(), dtype=storage.dtype(kind))
            else:
                targets[name] = storage.empty(self.index, [name])[name]
        self._fill(targets, processes)
        state = storage.join(self.plain, targets)
        module.on_load_checkpoint(state)
        try:  # a module whose state dict is a translation (quantized weights) was not filled in place
            module.load_state_dict(state[MODELS[1] if MODELS[1] in state else MODELS[0]])
        except RuntimeError as error:
            raise WeightsError(f"{self.folder} is of another model: {str(error).splitlines()[-1].strip()}") from error
        names = parameter_names(module)
        for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved, names)
        for config, saved in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(saved)
        trainer.fit_loop.load_state_dict(state["loops"])
        if state["precision"]:
            trainer.precision_plugin.load_state_dict(state["precision"])
        for callback in trainer.callbacks:
            callback.on_load_checkpoint(trainer, module, state)
            saved = state["callbacks"].get(type(callback).__name__)
            if saved:
                callback.load_state_dict(saved)


def latest(
    folder: Path, identity: str | None = None, processes: Processes | None = None, say: Callable[[str], None] = print
) -> Checkpoint | None:
    """The last whole checkpoint of a run, all ranks the same one; None where there is none.

    Args:
        identity: What it must belong to (``identity_of``).
        say: Is told of each that is passed over.

    Raises:
        WeightsError: There are checkpoints and none is whole, or the last is of another recipe.
    """
    from zoo import checkpoint_storage as storage

    several = processes or Processes()
    reasons: list[str] = []
    for path in storage.found(folder):
        problem = ""
        index: dict[str, Any] = {}
        try:
            index = storage.read_index(path)
            storage.check_files(path, index, several.rank, several.world)
        except storage.Damaged as damage:
            problem = str(damage)
        problems = [text for text in several.gathered(problem) if text]
        if problems:
            reasons.append(f"{path} cannot be used ({problems[0]})")
            continue
        checkpoint = Checkpoint(path, index)
        if identity is not None and checkpoint.identity != identity:
            raise WeightsError(
                f"{path} belongs to another run "
                f"(recipe, data, batch size or seed {checkpoint.identity}, here {identity}):"
                f" delete {folder} to start anew, or give the command it belongs to"
            )
        if several.rank == 0:
            for reason in reasons:
                say(f"{reason}: going on from {path.name}")
        return checkpoint
    if reasons:
        raise WeightsError(f"{'; '.join(reasons)}: delete {folder} to start the run again")
    if several.rank == 0 and (folder / "last.ckpt").is_file():
        say(f"{folder / 'last.ckpt'} was written by an earlier version and cannot be resumed: the run starts anew")
    return None


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The state in the last checkpoint below ``folder``, tensors on the CPU; no code it might hold is run.

    Raises:
        WeightsError: There is none that is whole.
    """
    checkpoint = latest(folder)
    if checkpoint is None:
        raise WeightsError(f"{folder} holds no checkpoint")
    return checkpoint.read()
