"""Contracts of encoders, connectors and decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.part import Features, seeded
from zoo.testing.config import (
    check_config,
    check_construction,
    check_deterministic,
    check_gradients,
    check_reload,
    close,
    expect,
    pairs,
    scaled,
    shake,
    tensors,
    try_build,
)

if TYPE_CHECKING:
    from torch import Tensor, nn


def _random(*shape: int, seed: int = 0) -> Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _weighted(outputs: Any) -> Tensor:
    """A scalar that depends on every number of every floating output, with fixed random weights."""
    import torch

    total = torch.zeros(())
    for index, value in enumerate(tensors(outputs).values()):
        if value.is_floating_point():
            total = total + (value * _random(*value.shape, seed=index)).mean()
    return total


def _common(module: nn.Module, build: Callable[[], nn.Module], run: Callable[[nn.Module], Any], what: str) -> None:
    """What holds for every part: gradients reach all parameters, eval is deterministic, the state is all there is."""
    import torch

    check_gradients(module, _weighted(run(module)), what)
    with torch.no_grad():
        check_deterministic(module, run, what)
        check_reload(module, build, run, what)


def _alone(run: Callable[[slice], Any], what: str) -> None:
    """Check that the first row of three comes out as it does alone."""
    for key, (together, alone) in pairs(run(slice(None)), run(slice(0, 1))).items():
        if together.is_floating_point():
            close(together[:1], alone, f"{what}: row 0 of {key} depends on what shares its batch", 1e-5)


def check_encoder(name: str, *, scale: str | None = "tiny") -> None:
    """Check an image encoder: pixel values [B, 3, S, S] in, ``Features`` of the promised shapes out.

    Raises:
        AssertionError: Naming the broken promise.
    """
    import torch

    what = f"encoder {name!r}"
    check_config("encoder", name)
    config = scaled("encoder", name, scale)
    check_construction(config.build, what)
    with seeded(0, what):
        module: Any = shake(config.build())
    pixels = _random(3, 3, config.image_size, config.image_size)

    def run(m: Any, rows: slice = slice(None)) -> Features:
        features: Features = m(pixels[rows])
        return features

    with torch.no_grad():
        features = run(module)
    expect(features.tokens.dtype == torch.float32, f"{what}: tokens are {features.tokens.dtype}, weights float32")
    _shape(features.tokens, (3, module.tokens, module.width), f"{what}: tokens")
    _check_pooled(features, module, 3, what)
    if features.grid is not None:
        expect(
            features.grid[0] * features.grid[1] <= features.tokens.shape[1],
            f"{what}: a grid of {features.grid} does not fit {features.tokens.shape[1]} tokens",
        )
    rows = features.tokens.flatten(1)
    expect(float((rows[0] - rows[1]).abs().max()) > 1e-3, f"{what}: two different images give the same tokens")
    _common(module, config.build, run, what)
    with torch.no_grad():
        _alone(lambda rows: run(module, rows), what)


def check_modality_encoder(name: str, *, scale: str | None = "tiny") -> None:
    """Check the encoder of a further modality: [B, *input_shape] in, ``Features`` of the promised shapes out.

    Raises:
        AssertionError: Naming the broken promise.
    """
    import torch

    what = f"modality_encoder {name!r}"
    check_config("modality_encoder", name)
    config = scaled("modality_encoder", name, scale)
    expect(bool(config.modality), f"{what} does not say which modality it reads")
    check_construction(config.build, what)
    with seeded(0, what):
        module: Any = shake(config.build())
    x = _random(3, *config.input_shape)

    def run(m: Any, rows: slice = slice(None)) -> Features:
        features: Features = m(x[rows])
        return features

    with torch.no_grad():
        features = run(module)
        _shape(features.tokens, (3, module.tokens, module.width), f"{what}: tokens")
        _check_pooled(features, module, 3, what)
        rows = features.tokens.flatten(1)
        expect(float((rows[0] - rows[1]).abs().max()) > 1e-3, f"{what}: two different items give the same tokens")
    _common(module, config.build, run, what)
    with torch.no_grad():
        _alone(lambda rows: run(module, rows), what)


def check_text_encoder(name: str, *, scale: str | None = "tiny") -> None:
    """Check a text encoder: token ids [B, T] and their mask in, ``Features`` out; what stands in a pad does not matter.

    Raises:
        AssertionError: Naming the broken promise.
    """
    import torch

    what = f"text_encoder {name!r}"
    check_config("text_encoder", name)
    config = scaled("text_encoder", name, scale)
    check_construction(config.build, what)
    with seeded(0, what):
        module: Any = shake(config.build())
    length = min(12, config.context_length)
    ids = torch.randint(3, config.vocab_size - 1, (3, length), generator=torch.Generator().manual_seed(0))
    end = getattr(config, "eos_id", config.vocab_size - 1)
    end = end if end < config.vocab_size else config.vocab_size - 1
    lengths = torch.tensor([length, length - 3, length - 5])
    mask = torch.arange(length) < lengths[:, None]  # [B, T]
    ids[torch.arange(3), lengths - 1] = end
    ids = torch.where(mask, ids, 0)

    def run(m: Any, rows: slice = slice(None)) -> Features:
        features: Features = m(ids[rows], mask[rows])
        return features

    with torch.no_grad():
        features = run(module)
        _shape(features.tokens, (3, length, module.width), f"{what}: tokens")
        _check_pooled(features, module, 3, what)
        padded = module(torch.where(mask, ids, 1), mask)
        real = mask[..., None]
        close(
            features.tokens * real, padded.tokens * real, f"{what}: what stands in a pad reaches the real tokens", 1e-5
        )
        if features.pooled is not None:
            close(features.pooled, padded.pooled, f"{what}: a pad's id reaches the pooled vector", 1e-5)
        cut = int(lengths[2])
        short = module(ids[2:, :cut], mask[2:, :cut])
        close(features.tokens[2:, :cut], short.tokens, f"{what}: the amount of padding reaches the real tokens")
        if features.pooled is not None:
            close(features.pooled[2:], short.pooled, f"{what}: the amount of padding reaches the pooled vector")
            swapped = ids.clone()
            swapped[:, 1] = (swapped[:, 1] + 7) % (config.vocab_size - 4) + 3
            moved = (module(swapped, mask).pooled - features.pooled).abs().max()
            expect(float(moved) > 1e-4, f"{what}: the pooled vector does not read the second token")
    _common(module, config.build, run, what)
    with torch.no_grad():
        _alone(lambda rows: run(module, rows), what)


def check_connector(name: str, *, scale: str | None = "tiny", in_width: int = 48, out_width: int = 64) -> None:
    """Check a connector: ``Features`` [B, N, in_width] in, [B, tokens, out_width] out, for a 4 x 4 grid.

    A connector that cannot join the two widths, read a class token, or leave masked tokens out must refuse with a
    ZooError; widths are then tried equal.

    Raises:
        AssertionError: Naming the broken promise.
    """
    import torch

    what = f"connector {name!r}"
    check_config("connector", name)
    config = scaled("connector", name, scale)

    def build(in_tokens: int = 16) -> nn.Module:
        module: nn.Module = config.build(in_width=in_width, in_tokens=in_tokens, out_width=out_width)
        return module

    if isinstance(try_build(build), ZooError):
        in_width = out_width
    check_construction(build, what)
    with seeded(0, what):
        module: Any = shake(build())
    x = _random(3, 16, in_width)

    asked = torch.arange(1, 13).view(3, 4)

    def run(m: Any, rows: slice = slice(None)) -> Features:
        text = m.embed_text(asked[rows]) if m.reads_text else None
        features: Features = m(Features(x[rows], grid=(4, 4)), text)
        return features

    with torch.no_grad():
        features = run(module)
        _shape(features.tokens, (3, module.tokens, out_width), f"{what}: tokens")
        expect(module.width == out_width, f"{what}: width = {module.width}, expected {out_width}")
        if features.grid is not None:
            expect(
                features.grid[0] * features.grid[1] <= module.tokens,
                f"{what}: grid {features.grid} holds more than its tokens",
            )
        rows = features.tokens.flatten(1)
        expect(float((rows[0] - rows[1]).abs().max()) > 1e-3, f"{what}: two different inputs give the same tokens")
        expect(torch.equal(x, _random(3, 16, in_width)), f"{what}: it changes its input in place")
    if list(module.parameters()):
        _common(module, build, run, what)
    with torch.no_grad():
        _alone(lambda rows: run(module, rows), what)
        _check_connector_mask(module, x, what)
        with_class = try_build(lambda: build(17))
        if not isinstance(with_class, ZooError):
            both = shake(with_class)(Features(_random(3, 17, in_width), grid=(4, 4)))
            _shape(both.tokens, (3, with_class.tokens, out_width), f"{what}: tokens of a grid with a class token")  # type: ignore[arg-type]


def _check_connector_mask(module: Any, x: Tensor, what: str) -> None:
    """Masked tokens reach no token that is returned as real."""
    import torch

    mask = torch.ones(3, 16, dtype=torch.bool)
    mask[1, 12:] = False
    mask[2, 5:] = False
    noise = torch.where(mask[..., None], x, _random(3, 16, x.shape[2], seed=1))
    try:
        one = module(Features(x, mask=mask, grid=(4, 4)))
        two = module(Features(noise, mask=mask, grid=(4, 4)))
    except ZooError:
        return
    real = torch.ones(one.tokens.shape[:2], dtype=torch.bool) if one.mask is None else one.mask
    expect(bool(real.any(1).all()), f"{what}: masks every token of a row")
    close(one.tokens * real[..., None], two.tokens * real[..., None], f"{what}: masked tokens reach the output", 1e-5)


def check_decoder(name: str, *, scale: str | None = "tiny") -> None:
    """Check a text decoder: causal reading, pads that nobody reads, and a cache that changes nothing.

    Raises:
        AssertionError: Naming the broken promise.
    """
    import torch

    from zoo.layout import Segment, TokenBatch, lay_out

    what = f"decoder {name!r}"
    check_config("decoder", name)
    config = scaled("decoder", name, scale)
    check_construction(config.build, what)
    with seeded(0, what):
        module: Any = shake(config.build())
    image, text = 5, 7
    ids = torch.randint(0, config.vocab_size, (3, text), generator=torch.Generator().manual_seed(0))
    visual = 0.5 * _random(3, image, module.width)
    segments = [Segment("image", image, "image"), Segment("text", text)]
    context = _random(3, 4, module.context_width, seed=2) if module.context_width else None

    def run(m: Any, rows: slice = slice(None), ids: Tensor = ids, real: Tensor | None = None) -> dict[str, Tensor]:
        embeds = torch.cat([visual[rows], m.embed(ids[rows])], 1)  # [B, T, D]
        layout = lay_out(segments, embeds.shape[0], real=None if real is None else real[rows])
        hidden = m(TokenBatch(embeds, layout), **({} if context is None else {"context": context[rows]}))
        return {"hidden": hidden, "logits": m.logits(hidden)}

    with torch.no_grad():
        out = run(module)
        _shape(out["hidden"], (3, image + text, module.width), f"{what}: hidden states")
        _shape(out["logits"], (3, image + text, config.vocab_size), f"{what}: logits")
        _shape(module.embed(ids), (3, text, module.width), f"{what}: embeddings")
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % config.vocab_size
        after = run(module, ids=changed)["hidden"]
        close(out["hidden"][:, :-1], after[:, :-1], f"{what}: a row reads a later token", 1e-5)
        moved = (out["hidden"][:, -1] - after[:, -1]).abs().max()
        expect(float(moved) > 1e-3, f"{what}: the last row does not read its own token")
        real = torch.ones(3, image + text, dtype=torch.bool)
        real[1, -2:] = False
        one, two = run(module, real=real)["hidden"], run(module, ids=changed, real=real)["hidden"]
        close(one[1] * real[1][:, None], two[1] * real[1][:, None], f"{what}: a pad is read", 1e-5)
        close(out["hidden"][1, :-2], one[1, :-2], f"{what}: pads change the rows before them")
        whole = torch.cat([visual, module.embed(ids)], 1)
        _check_cache(module, whole, lay_out(segments, 3), out["hidden"], context, what)
        if context is not None:
            bare = module(TokenBatch(whole, lay_out(segments, 3)))
            expect(float((bare - out["hidden"]).abs().max()) > 1e-3, f"{what}: it does not read its context")
    _common(module, config.build, run, what)
    with torch.no_grad():
        _alone(lambda rows: run(module, rows), what)


def _check_cache(module: Any, embeds: Tensor, layout: Any, whole: Tensor, context: Tensor | None, what: str) -> None:
    """A prefill and single steps give what one pass gives; a context is read in the prefill and remembered."""
    import torch

    from zoo.layout import TokenBatch

    cache = module.new_cache()
    start, length = 6, embeds.shape[1]
    first = TokenBatch(embeds[:, :start], layout.truncate(start))
    rows = [module(first, cache, **({} if context is None else {"context": context}))]
    for at in range(start, length):
        rows.append(module(TokenBatch(embeds[:, at : at + 1], layout.truncate(at + 1)), cache))
    close(torch.cat(rows, 1), whole, f"{what}: decoding with a cache differs from one pass")


def _shape(value: Tensor, shape: tuple[int, ...], what: str) -> None:
    import torch

    expect(tuple(value.shape) == shape, f"{what} have shape {tuple(value.shape)}, expected {shape}")
    expect(bool(torch.isfinite(value).all()), f"{what} are not finite")


def _check_pooled(features: Features, module: Any, batch: int, what: str) -> None:
    if module.pooled_width:
        expect(features.pooled is not None, f"{what}: pooled_width = {module.pooled_width}, but pooled is None")
        assert features.pooled is not None
        _shape(features.pooled, (batch, module.pooled_width), f"{what}: pooled vectors")
    else:
        expect(features.pooled is None, f"{what}: pooled_width = 0, but it pools")
