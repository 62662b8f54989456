"""Memory of a training step, predicted on the meta device: the step is run there, and what its tensors would take is
counted as they come and go. No memory, seconds of time, any published size.

What is not seen: workspaces inside kernels, the allocator's rounding and fragments, and the libraries themselves (about
0.5 GB of CUDA context and kernels a device).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zoo.errors import ConfigError, near
from zoo.run_config import STRATEGIES

if TYPE_CHECKING:
    from zoo.module import ZooModule
    from zoo.recipe import Recipe

MOMENTS = 2
"""Tensors of AdamW a trained parameter."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parameters: Weights and buffers, frozen ones included.
        gradients: Of what is trained, and what a strategy keeps beside them.
        optimizer: AdamW's two moments.
        activations: What forward and backward hold at their largest, beside the above: what is kept for the backward
            pass, the batch, temporaries.
        step: Temporaries of the optimizer's step, when activations are gone.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    step: int = 0

    @property
    def peak(self) -> int:
        """The most at any time: activations and the optimizer's temporaries are never there together."""
        return self.parameters + self.gradients + self.optimizer + max(self.activations, self.step)


def predict(
    module: ZooModule,
    batch_size: int,
    precision: str = "fp32",
    accelerator: str = "gpu",
    ema: bool = False,
    *,
    devices: int = 1,
    strategy: str = "single",
) -> Memory:
    """Memory of a step of the module's current stage on each device.

    Args:
        module: On the meta device.
        batch_size: Samples of one forward pass on one device.
        precision: As ``trainer.precision``.
        accelerator: ``cpu``, where attention of bf16 runs in fp32 and the optimizer takes one tensor at a time, or
            ``gpu``.
        ema: A second copy of the weights is kept.
        devices, strategy: As in ``shared``, which has what they do to weights, gradients and moments.

    Raises:
        ConfigError: As ``shared``.
    """
    units = units_of(module, precision) if strategy == "fsdp" else Units()
    model = module.model
    batch = model.example_batch(batch_size)
    was = module.training
    module.train()
    trained = [p for p in module.parameters() if p.requires_grad]
    weights = _bytes([*module.parameters(), *module.buffers()])
    live = _Live(dict.fromkeys(in_blocks(module), 1 / devices) if strategy == "fsdp" else {})
    handles: list[Any] = [p.register_post_accumulate_grad_hook(live.has_grad) for p in trained]  # type: ignore[no-untyped-call]
    lower = None if precision == "fp32" else torch.bfloat16 if precision == "bf16" else torch.float16
    live.see([*module.parameters(), *module.buffers()])
    start = live.now
    try:
        with live, _attention(torch.float32 if accelerator == "cpu" else None), _autocast(lower):
            live.see(tree_leaves(batch))
            loss, _ = module.losses(batch)
            loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
        module.zero_grad(set_to_none=True)
        module.train(was)
    gradients = _bytes(trained)
    own = units.part(gradients, units.whole_trained, devices) if strategy == "fsdp" else gradients
    # Lightning drops the last step's gradients only when the forward pass is over. Under FSDP a block's gradients are
    # whole while its backward pass runs, and once more on their way
    held = max(live.before + own, live.most + 2 * units.block_trained) - start - own
    largest = max((p.numel() * p.element_size() for p in trained), default=0)
    alone = Memory(
        parameters=weights * (2 if ema else 1),
        gradients=gradients,
        optimizer=MOMENTS * gradients,
        activations=max(held, 0),
        step=gradients if accelerator == "gpu" else 2 * largest,
    )
    return shared(alone, devices, strategy, units)


def predict_recipe(
    recipe: Recipe,
    batch_size: int,
    precision: str = "fp32",
    accelerator: str = "gpu",
    ema: bool = False,
    *,
    devices: int = 1,
    strategy: str = "single",
    checkpointing: str = "none",
) -> list[Memory]:
    """Memory on each device, of every stage of a recipe.

    Args:
        batch_size: Samples of one forward pass on one device.
        precision, accelerator, ema: As in ``predict``.
        devices, strategy: As in ``shared``.
        checkpointing: As ``trainer.checkpointing``.

    Raises:
        ConfigError: As ``shared``, before anything is built.
    """
    from zoo.api import build_module
    from zoo.strategies import checkpoint_blocks

    shared(Memory(0, 0, 0, 0), devices, strategy)
    with torch.device("meta"):
        module = build_module(recipe, seed=0)
    if checkpointing == "blocks":
        checkpoint_blocks(module.model)
    found = []
    for stage in range(len(recipe.stages)):
        module.set_stage(stage)
        found.append(predict(module, batch_size, precision, accelerator, ema, devices=devices, strategy=strategy))
    return found


def measure_recipe(recipe: Recipe, batch_size: int, precision: str = "fp32") -> int:
    """Peak bytes of a training step of a recipe's first stage on this machine's CPU: what stands before the second
    step, and the largest sum of what torch's allocator hands out and takes back in it. To hold ``predict`` against.
    """
    from torch.profiler import ProfilerActivity, profile

    from zoo.api import build_module
    from zoo.nn.cpu_attention import full_precision_attention

    module = build_module(recipe, seed=0)
    module.set_stage(0)
    module.train()
    batch = module.model.example_batch(batch_size)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:  # in Lightning's order
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), full_precision_attention():
            loss, _ = module.losses(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        optimizer.step()

    step()
    standing: list[Any] = [*module.parameters(), *module.buffers(), *batch.values()]
    standing += [p.grad for p in trained if p.grad is not None]
    standing += [value for state in optimizer.state.values() for value in state.values()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = most = 0
    results: Any = profiler.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return _bytes(standing) + most


@dataclass(frozen=True)
class Units:
    """Bytes of a module's parameters as FSDP treats them (``zoo.strategies``).

    Attributes:
        whole: On every device all the time: buffers, scalars, tokenizers that never learn.
        beside: Divided, and on every device whole from the beginning of a step to the end of its backward pass.
        block: The largest block's, as it is gathered.
        whole_trained, block_trained: What is trained of them, in fp32.
    """

    whole: int = 0
    beside: int = 0
    block: int = 0
    whole_trained: int = 0
    block_trained: int = 0

    @staticmethod
    def part(size: int, whole: int, devices: int) -> int:
        """What one of ``devices`` holds of ``size`` bytes, of which ``whole`` are not divided."""
        return -(-(size - whole) // devices) + whole


def in_blocks(module: ZooModule) -> list[nn.Parameter]:
    """Parameters of the blocks that FSDP gathers and lets go one by one."""
    from zoo.strategies import units, whole_parameters

    whole = whole_parameters(module)
    stacked, _ = units(module, whole)
    return [p for block in stacked for p in block.parameters() if p not in whole]


def units_of(module: ZooModule, precision: str = "fp32") -> Units:
    """How FSDP would divide the module in its current stage."""
    from zoo.strategies import units, whole_parameters

    whole = whole_parameters(module)
    stacked, _ = units(module, whole)
    divided = [[p for p in block.parameters() if p not in whole] for block in stacked]
    inside = {p for block in divided for p in block}
    beside = [p for p in module.parameters() if p not in whole and p not in inside]

    def trained(parameters: Iterable[nn.Parameter]) -> int:
        return _bytes([p for p in parameters if p.requires_grad])

    return Units(
        whole=_bytes([*whole, *module.buffers()]),
        beside=_bytes(beside),
        block=max(map(_bytes, divided), default=0) // (2 if precision == "bf16" else 1),
        whole_trained=trained(whole),
        block_trained=max(map(trained, divided), default=0),
    )


def shared(memory: Memory, devices: int, strategy: str, units: Units | None = None) -> Memory:
    """Memory of each of several devices, of what one would hold that works on its part of the batch.

    ``ddp``: every device has all, and buckets in which gradients travel. ``fsdp`` (FSDP2): weights, gradients and
    moments are divided; what stands beside the blocks is there whole for a step, the block at work too, and the next
    one comes while it works. Gradients that are whole for a while are among ``predict``'s activations.

    Args:
        units: Of ``units_of``, for fsdp.

    Raises:
        ConfigError: An unknown strategy, or ``single`` on several devices.
    """
    known = tuple(name for name in STRATEGIES if name != "auto")
    if strategy not in known:
        raise ConfigError(f"strategy = {strategy!r}{near(strategy, known)}")
    if strategy == "single":
        if devices != 1:
            raise ConfigError(f"strategy = single is one device, not {devices}: choose ddp or fsdp")
        return memory
    if strategy == "ddp":
        return replace(memory, gradients=2 * memory.gradients)
    u = units or Units()

    return replace(
        memory,
        parameters=u.part(memory.parameters, u.whole, devices) + u.beside + 2 * u.block,
        gradients=u.part(memory.gradients, u.whole_trained, devices),
        optimizer=u.part(memory.optimizer, MOMENTS * u.whole_trained, devices),
        step=-(-memory.step // devices),
    )


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages on the meta device from their making to their end.

    Attributes:
        now: Bytes.
        most: The largest sum so far.
        before: The largest sum before the first gradient was there.
    """

    def __init__(self, kept: Mapping[nn.Parameter, float]) -> None:
        """``kept``: the share of a parameter's gradient that stays on the device; 1 of those that are not in it."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept
        self.now = self.most = self.before = 0
        self._known: dict[int, int] = {}
        self._grads = False

    def see(self, tensors: Any) -> None:
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or tensor.device.type != "meta":
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self._known[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                if not self._grads:
                    self.before = self.most
                weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)

    def has_grad(self, parameter: nn.Parameter) -> None:
        self._grads = True
        grad = parameter.grad
        if grad is None or parameter not in self.kept:
            return
        key = grad.untyped_storage()._cdata
        stays = round(self.kept[parameter] * grad.untyped_storage().nbytes())
        gone = self._known.get(key, stays) - stays
        self.now -= gone
        self._known[key] = stays

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see(tree_leaves(out))
        return out


class _Fused(torch.autograd.Function):
    """What fused attention keeps: its inputs, its output and a number a query; never the [T, S] weights, which the meta
    device's own attention would count."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        bias = None if mask is None else mask.new_empty(mask.shape, dtype=query.dtype)  # kernels add it
        ctx.save_for_backward(query, key, value, out, sums, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


@contextmanager
def _attention(dtype: torch.dtype | None) -> Iterator[None]:
    """Attention as a fused kernel has it; in ``dtype`` if there is one, as the zoo computes it on a CPU."""
    attend = F.scaled_dot_product_attention

    def fused(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        given = query.dtype
        if dtype is not None:
            query, key, value = (x.to(dtype) for x in (query, key, value))
        out: Tensor = _Fused.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]
        return out.to(given)

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attend


class _Autocast(TorchFunctionMode):
    """Autocast for the meta device, which has none: products in ``dtype``, norms and losses in fp32."""

    lower = (torch._C._nn.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum,
             torch.conv1d, torch.conv2d, torch.conv3d, Tensor.matmul, Tensor.__matmul__, Tensor.bmm,
             Tensor.mm)  # fmt: skip
    full = (torch.layer_norm, torch.group_norm, torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax,
            torch._C._nn.cross_entropy_loss, torch._C._nn.mse_loss, torch._C._nn.nll_loss_nd)  # fmt: skip

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._cast: dict[int, Tensor] = {}  # weights are cast once a forward pass

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        wanted = self.dtype if func in self.lower else torch.float32 if func in self.full else None
        if wanted is not None:
            args = tuple(self._to(x, wanted) for x in args)
            kwargs = {name: self._to(x, wanted) for name, x in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _to(self, x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(dtype)
        if id(x) not in self._cast:
            self._cast[id(x)] = x.to(dtype)
        return self._cast[id(x)]


@contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """``_Autocast``, which also sees into functions such as ``F.multi_head_attention_forward``: those would hand
    themselves over whole."""
    if dtype is None:
        yield
        return
    asked = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    with ExitStack() as stack:
        for name in asked:
            stack.enter_context(patch.object(F, name, lambda *given: False))
        stack.enter_context(_Autocast(dtype))
        yield


def _bytes(tensors: Any) -> int:
    """Of tensors, those that share memory once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
