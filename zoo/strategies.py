"""How a run is spread over devices: one, several with a copy each (DDP), or several that share one copy (FSDP2).

The Trainer, its processes and the loop are Lightning's; here is what it cannot know of the zoo's models: which modules
are units of FSDP, which parameters stay whole, and how gradients of both are clipped together.

A *block* is a member of a stack of equal modules: a layer of the trunk, of a language model, of a vision transformer, a
residual block of a U-Net. Blocks are what FSDP gathers one at a time, and what ``trainer.checkpointing`` computes again
in the backward pass. That is sound because nobody reads a block's parameters but its own ``forward``, which every rank
calls at every step; of what stands beside the blocks (embeddings, heads, norms) neither is known, so that it is
gathered when a step begins and let go of when its backward pass is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from zoo.connectors.base import Connector
from zoo.errors import ConfigError, RunError
from zoo.quantized import is_quantized
from zoo.tokenizers.base import BaseTokenizer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from zoo.module import ZooModule
    from zoo.recipe import Recipe
    from zoo.run_config import TrainerConfig


# -- before a run begins ---------------------------------------------------------------------------------------------


def check_devices(trainer: TrainerConfig) -> None:
    """Refuse devices that this machine does not have. Not for runs that another machine will take.

    Raises:
        ConfigError: Names what there is.
    """
    kind = trainer.accelerator
    if kind == "auto":
        kind = "gpu" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cpu":  # processes, as many as one likes
        return
    if kind == "mps":
        found = int(torch.backends.mps.is_available())
    else:
        kind, found = "CUDA", torch.cuda.device_count()
    if trainer.devices > found:
        has = f"this machine has {found or 'no'} {kind} device{'' if found == 1 else 's'}"
        way = f"set trainer.devices={found}" if found else "set trainer.accelerator=cpu, or start the run elsewhere"
        raise ConfigError(
            f"trainer.accelerator = {trainer.accelerator} with trainer.devices = {trainer.devices}, but {has}: {way}"
        )


def check_shardable(trainer: TrainerConfig, recipe: Recipe) -> None:
    """Refuse what FSDP cannot train.

    Raises:
        ConfigError: An objective has an optimizer of its own, which learns in the middle of a step.
    """
    if trainer.resolved_strategy != "fsdp":
        return
    for name, config in recipe.objectives.items():
        objective = config.build()
        if objective.own_optimizer() is not None:
            raise ConfigError(
                f"objective {name!r} has an optimizer of its own, which trainer.strategy=fsdp does not shard: choose"
                " trainer.strategy=ddp"
            )


def lightning_strategy(trainer: TrainerConfig) -> Any:
    """What Lightning's Trainer takes as its strategy."""
    name = trainer.resolved_strategy
    if name == "fsdp":
        from lightning.pytorch.strategies import ModelParallelStrategy

        return ModelParallelStrategy(
            data_parallel_size=trainer.devices * trainer.nodes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
    return "auto" if name == "single" else name


def assert_world_size(trainer: Any, ranks: int) -> None:
    """Every process must be one of ``ranks`` that average their gradients, whatever the Trainer believes.

    Raises:
        RunError: Fewer or more take part.
    """
    several = dist.is_available() and dist.is_initialized()
    present = dist.get_world_size() if several else 1
    if not present == trainer.world_size == ranks:
        raise RunError(
            f"the run is for {ranks} devices, the Trainer has {trainer.world_size} and {present} processes take part:"
            " start it with zoo train"
        )


# -- blocks ----------------------------------------------------------------------------------------------------------


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks inside a module: members of its outermost stacks of equal modules, none inside another."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and _is_stack(child):
            yield from child
        else:
            yield from blocks(child)


def _is_stack(holder: nn.Module) -> bool:
    """Whether all members are modules of one class that are made of modules and have parameters; a list of norms or
    projections is none."""
    members = list(holder.children())
    return (
        bool(members)
        and len({type(member) for member in members}) == 1
        and not isinstance(members[0], nn.ModuleList | nn.ModuleDict)
        and all(any(True for _ in m.children()) and any(True for _ in m.parameters()) for m in members)
    )


def checkpoint_blocks(model: nn.Module) -> int:
    """Let every block compute its forward pass again in the backward pass, in place of keeping its activations.

    Names of modules and parameters stay as they are. Equal draws: the random state of the first time is restored.

    Returns:
        How many blocks there are.
    """
    count = 0
    for block in blocks(model):
        count += 1
        if not isinstance(block.forward, partial):
            block.forward = partial(_recomputed, block, block.forward)
    return count


def _recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not block.training and not any(p.requires_grad for p in block.parameters()):
        # frozen: its inputs may still need their gradients
        wanted = any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values()))
    else:
        wanted = block.training
    if not wanted or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def compile_model(model: nn.Module, strategy: str) -> None:
    """Compile the inner model; under FSDP its blocks, since a graph breaks where parameters are gathered."""
    for module in blocks(model) if strategy == "fsdp" else [model]:
        module.compile()


# -- FSDP2 -----------------------------------------------------------------------------------------------------------


def shard(module: ZooModule, mesh: DeviceMesh, precision: str) -> None:
    """Divide the parameters of a module among the ranks of ``mesh``, in place (``torch.distributed.fsdp.fully_shard``).

    Units are the blocks, frozen or trained, then every connector that is called by ``forward`` alone, and what is left.
    Blocks are gathered in bf16 under ``precision`` bf16, where gradients are still summed in fp32; what stands beside
    them is gathered in fp32, since objectives read temperatures and the like as they are. ``whole_parameters`` stay
    whole on every rank; ``reduce_whole`` averages their gradients.

    ``module.losses`` becomes what FSDP takes for the forward pass.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if isinstance(module, FSDPModule):
        return
    lower = torch.bfloat16 if precision == "bf16" else None
    reduced = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = whole_parameters(module)
    stacked, connectors = units(module, whole)
    for block in stacked:
        unit: Any = fully_shard(block, mesh=mesh, mp_policy=reduced, ignored_params=whole)
        unit.set_reduce_scatter_unused_params(True)  # every rank takes part, whatever its batch showed
    for connector in connectors:
        fully_shard(connector, mesh=mesh, ignored_params=whole, reshard_after_forward=False)
    root: Any = fully_shard(module, mesh=mesh, ignored_params=whole, reshard_after_forward=False)
    root.set_reduce_scatter_unused_params(True, recurse=False)
    register_fsdp_forward_method(module, "losses")


def units(module: ZooModule, whole: set[nn.Parameter]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The units of FSDP: blocks, and connectors; what is in neither is gathered for a whole step.

    Args:
        whole: What is not divided at all.
    """
    held: dict[int, set[int]] = {}
    for owner in module.modules():
        for one in (*owner.parameters(recurse=False), *owner.children()):
            held.setdefault(id(one), set()).add(id(owner))

    def alone(unit: nn.Module) -> bool:  # what is tied is read from elsewhere too: it stays beside the blocks
        inside = {id(m) for m in unit.modules()}
        return all(held[id(one)] <= inside for one in (*unit.parameters(), *list(unit.modules())[1:]))

    copies = [] if module.momentum is None else [module.momentum]
    stacked = dict.fromkeys(block for root in (module.model, *copies) for block in blocks(root))
    connectors = [part for part in module.model.modules() if isinstance(part, Connector) and part.forward_only]

    def kept(found: Iterable[nn.Module]) -> list[nn.Module]:
        return [unit for unit in found if alone(unit) and any(p not in whole for p in unit.parameters())]

    return kept(stacked), kept(connectors)


def whole_parameters(module: ZooModule) -> set[nn.Parameter]:
    """What FSDP leaves whole on every rank: the objectives' own, scalars, quantised weights, and image tokenizers that
    no stage trains, which a rank whose batch shows no image does not run."""
    learn = module.ever_trained()
    whole = {p for objective in module.objectives.values() for p in objective.parameters()}
    for part in module.model.modules():
        if isinstance(part, BaseTokenizer) and not any(p in learn for p in part.parameters()):
            whole.update(part.parameters())
    return whole | {p for p in module.parameters() if p.ndim == 0 or is_quantized(p)}


def reduce_whole(module: ZooModule) -> None:
    """Average over the ranks the gradients of what FSDP leaves whole; a parameter without one gives zeros."""
    for parameter in whole_parameters(module):
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def clip_gradients(parameters: list[nn.Parameter], most: float) -> Tensor:
    """Scale gradients so that their norm, over divided and whole ones and over all ranks, is at most ``most``.

    Returns:
        The norm [] that they had.
    """
    given = [p for p in parameters if p.grad is not None]
    kinds = [[p for p in given if isinstance(p.grad, DTensor) == divided] for divided in (True, False)]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
    total: Tensor = torch.linalg.vector_norm(torch.stack([full(norm) for norm in norms]))
    for kind in kinds:
        for parameter in kind:
            assert parameter.grad is not None
            parameter.grad.mul_((most / (total + 1e-6)).clamp(max=1.0))
    return total


def gathered(module: ZooModule, build: Callable[[], ZooModule]) -> ZooModule:
    """A plain module with the weights of a divided one, on rank 0; the others get theirs back as it is.

    Every rank must call this. A module that is not divided is returned as it is.
    """
    if not is_divided(module):
        return module
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: Mapping[str, Any] = get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank():
        return module
    plain = build()
    plain.load_state_dict(state)
    plain.set_stage(module.stage)
    return plain


def is_divided(module: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in module.parameters())


def full(tensor: Tensor) -> Tensor:
    """A tensor whole, on every rank; all must ask."""
    if isinstance(tensor, DTensor):
        whole: Tensor = tensor.full_tensor()
        return whole
    return tensor
