"""The contract of a part's configuration, and small tools the other contracts share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from zoo.errors import ConfigError, ZooError
from zoo.part import SIZE_FIELDS, PartConfig, seeded
from zoo.plugin import catalogue
from zoo.recipe import ObjectiveConfig, WiringConfig, read_scale
from zoo.registry import parse, to_plain

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WRONG: tuple[tuple[type, Any], ...] = ((bool, "yes"), (int, "64"), (float, "0.1"), (str, 7), (str, [7]))
"""Type of a field's default -> a value of another type that a lenient reader would convert."""


def expect(holds: bool, message: str) -> None:
    """Raise ``AssertionError(message)`` unless ``holds``; unlike ``assert`` also under ``python -O``."""
    if not holds:
        raise AssertionError(message)


def base_of(kind: str) -> type[Any]:
    """The class every Config of ``kind`` derives from."""
    if kind in ("encoder", "text_encoder", "modality_encoder"):
        from zoo.encoders import base as encoders

        return {
            "encoder": encoders.ImageEncoderConfig,
            "text_encoder": encoders.TextEncoderConfig,
            "modality_encoder": encoders.ModalityEncoderConfig,
        }[kind]
    if kind == "connector":
        from zoo.connectors.base import ConnectorConfig

        return ConnectorConfig
    if kind == "decoder":
        from zoo.decoders.base import DecoderConfig

        return DecoderConfig
    if kind == "trunk":
        from zoo.trunks.base import SharedTrunkConfig

        return SharedTrunkConfig
    if kind == "output_connector":
        from zoo.output_connectors.base import OutputConnectorConfig

        return OutputConnectorConfig
    if kind == "patch_codec":
        from zoo.patch_codecs.base import PatchCodecConfig

        return PatchCodecConfig
    if kind == "mask_decoder":
        from zoo.mask_decoders.base import MaskDecoderConfig

        return MaskDecoderConfig
    if kind == "denoiser":
        from zoo.denoisers.base import DenoiserConfig

        return DenoiserConfig
    if kind == "data_tokenizer":
        from zoo.data_tokenizers.base import DataTokenizerConfig

        return DataTokenizerConfig
    if kind == "image_tokenizer":
        from zoo.tokenizers.base import BaseTokenizerConfig

        return BaseTokenizerConfig
    return {"objective": ObjectiveConfig, "wiring": WiringConfig}.get(kind, object)


def scaled(kind: str, name: str, scale: str | None) -> Any:
    """The Config of ``name`` at a scale; None = as its preset has it."""
    config = catalogue()[kind].parse(name)
    return config if scale is None else config.scaled(read_scale(scale).sizes)


def check_config(kind: str, name: str) -> None:
    """Check the typed configuration behind a registry name.

    It is a frozen dataclass of the kind's base class; the preset parses; plain values round-trip through JSON; an
    unknown field and a value of another type are refused in one line that names them; a scale sets exactly the size
    fields it has, and those that a class with a ``scaled`` of its own names in ``scale_settles``.

    Raises:
        AssertionError: Naming the broken promise.
    """
    what = f"{kind} {name!r}"
    registry = catalogue()[kind]
    cls = registry.config_class(name)
    expect(issubclass(cls, base_of(kind)), f"{what}: {cls.__name__} must derive from {base_of(kind).__name__}")
    expect(cls.__dataclass_params__.frozen, f"{what}: {cls.__name__} must be a frozen dataclass")
    config = registry.parse(name)
    for key, value in registry.get(name).preset.items():
        read = to_plain(config)[key]
        expect(read == json.loads(json.dumps(value)), f"{what}: the preset's {key} = {value!r} arrives as {read!r}")
    plain = json.loads(json.dumps(to_plain(config)))
    expect(parse(cls, plain, kind) == config, f"{what}: parse(to_plain(config)) differs from config")

    names = [f.name for f in dataclasses.fields(cls) if f.init]
    typo = (max(names, key=len) if names else "unknown") + "x"
    message = refused(lambda: registry.parse(name, {typo: 1}), f"{what}: an unknown field {typo!r}")
    expect(typo in message, f"{what}: the message for an unknown field does not name it: {message}")
    expect(not names or typo[:-1] in message, f"{what}: the message for {typo!r} suggests no near name: {message}")
    hints = get_type_hints(cls)
    for key in names:
        value = getattr(config, key)
        taken = get_args(hints[key]) or (hints[key],)  # several types where the field says so
        wrong = next((w for kind_of, w in WRONG if type(value) is kind_of and type(w) not in taken), None)
        if wrong is None:
            continue
        message = refused(lambda key=key, wrong=wrong: registry.parse(name, {key: wrong}), f"{what}: {key} = {wrong!r}")  # type: ignore[misc]
        expect(key in message, f"{what}: the message for {key} = {wrong!r} does not name the field: {message}")

    if isinstance(config, PartConfig):
        sizes = read_scale("tiny").sizes
        small = config.scaled(sizes)
        expect(type(small) is cls, f"{what}: scaled() returns a {type(small).__name__}")
        expect(small.scaled(sizes) == small, f"{what}: scaling twice differs from scaling once")
        for key in names:
            new, old = getattr(small, key), getattr(config, key)
            if key in cls.scale_settles:
                continue
            if key not in SIZE_FIELDS or key not in sizes:
                expect(new == old, f"{what}: scale changes {key}, which is no size it sets")
            elif cls.scaled is PartConfig.scaled:
                expect(new == sizes[key], f"{what}: scale leaves {key} at {new!r}, expected {sizes[key]!r}")


def refused(call: Callable[[], Any], what: str) -> str:
    """The message of the ConfigError that ``call`` raises; anything else breaks the contract."""
    try:
        call()
    except ConfigError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{what} raises {type(error).__name__}, expected a ConfigError") from error
    else:
        raise AssertionError(f"{what} is accepted, expected a ConfigError")
    expect("\n" not in message, f"{what}: the message has several lines: {message!r}")
    return message


def try_build(call: Callable[[], nn.Module]) -> nn.Module | ZooError:
    """What ``call`` builds, or the ZooError with which it refuses."""
    try:
        return call()
    except ZooError as error:
        return error


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to every parameter, so that gains are not 1 and biases not 0, and switch dropout off."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.2 if parameter.ndim < 2 else 0.05) * noise)
    return module.eval()


def check_construction(build: Callable[[], nn.Module], what: str) -> None:
    """Check that construction is a function of the seed alone, touches no global random state, and works on "meta"."""
    import torch

    before = torch.get_rng_state()
    with seeded(1, what):
        first = build()
    expect(torch.equal(before, torch.get_rng_state()), f"{what}: construction moves the global random state")
    torch.randn(3)  # another global state must make no difference
    with seeded(1, what):
        second = build()
    torch.set_rng_state(before)
    same_state(first.state_dict(), second.state_dict(), f"{what}: built twice from one seed")
    with torch.device("meta"), seeded(1, what):
        shapes = build()
    for key, value in shapes.named_parameters():
        expect(value.device.type == "meta", f'{what}: built on "meta", {key} is on {value.device}')
    expect(
        {k: v.shape for k, v in shapes.named_parameters()} == {k: v.shape for k, v in first.named_parameters()},
        f'{what}: built on "meta" it has other parameters',
    )


def same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str) -> None:
    """Check that two state dicts are bit-equal."""
    import torch

    expect(list(a) == list(b), f"{what}: the state has other keys")
    for key in a:
        expect(torch.equal(a[key], b[key]), f"{what}: {key} differs")


def check_reload(
    module: nn.Module, build: Callable[[], nn.Module], outputs: Callable[[nn.Module], Any], what: str
) -> None:
    """Check that a second module with the first one's state_dict gives bit-equal outputs: no state hides elsewhere."""
    with seeded(2, what):
        other = build().eval()
    other.load_state_dict(module.state_dict(), strict=True)
    for key, (a, b) in pairs(outputs(module), outputs(other)).items():
        import torch

        expect(torch.equal(a, b), f"{what}: after a state_dict round trip the output {key} differs")


def check_deterministic(module: nn.Module, outputs: Callable[[nn.Module], Any], what: str) -> None:
    """Check that two passes in eval mode give bit-equal outputs and leave the global random state alone."""
    import torch

    before = torch.get_rng_state()
    for key, (a, b) in pairs(outputs(module), outputs(module)).items():
        expect(torch.equal(a, b), f"{what}: two passes in eval mode give different {key}")
    expect(torch.equal(before, torch.get_rng_state()), f"{what}: a pass in eval mode draws random numbers")


def close(a: Tensor, b: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Check two tensors up to ``tolerance`` of the larger one's largest value."""
    expect(a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if a.numel():
        size = max(1.0, float(a.detach().abs().max()))
        worst = float((a.detach() - b.detach()).abs().max())
        expect(worst <= tolerance * size, f"{what}: differs by {worst:.2g}")  # also false for nan


def pairs(a: Any, b: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> the two tensors of that name in two outputs (a mapping, a dataclass or a tensor)."""
    first, second = tensors(a), tensors(b)
    expect(list(first) == list(second), f"outputs have different parts: {list(first)} and {list(second)}")
    return {key: (first[key], second[key]) for key in first}


def tensors(output: Any) -> dict[str, Tensor]:
    """The tensors in an output, by name."""
    import torch

    if isinstance(output, torch.Tensor):
        return {"output": output}
    values = output if isinstance(output, Mapping) else vars(output)
    return {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}


def check_gradients(module: nn.Module, loss: torch.Tensor, what: str) -> None:
    """Check that the loss is finite and its gradient reaches every parameter that is to learn."""
    import torch

    expect(bool(torch.isfinite(loss)), f"{what}: the loss is {loss.item()}")
    module.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            expect(parameter.grad is not None, f"{what}: no gradient reaches {key}")
            assert parameter.grad is not None
            expect(bool(torch.isfinite(parameter.grad).all()), f"{what}: the gradient of {key} is not finite")
    module.zero_grad(set_to_none=True)
