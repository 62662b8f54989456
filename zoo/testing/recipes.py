"""Contracts of whole recipes, and of objectives, which need a model to be computed on."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.api import build_module
from zoo.capabilities import capabilities_of
from zoo.errors import ConfigError
from zoo.plugin import catalogue
from zoo.recipe import Recipe, resolve
from zoo.testing.config import (
    check_config,
    check_deterministic,
    check_gradients,
    check_reload,
    close,
    expect,
    pairs,
    same_state,
    scaled,
    shake,
)

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.module import ZooModule

TEXTS = ("red apple", "a cat with wry smile", "flag: Japan")


def check_recipe(
    model: str,
    scale: str | None = "tiny",
    *,
    choices: Mapping[str, Any] | None = None,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Check a recipe as a whole, with parts exchanged where ``choices`` says so.

    It survives JSON; the same seed builds the same weights and touches no global random state; ``forward`` returns what
    the wiring promises; every stage has finite losses whose gradients reach all it trains and nothing else; each
    capability runs on images and texts, gives the same row whatever shares its batch, and restores the training mode.

    Raises:
        AssertionError: Naming the broken promise.
    """
    import torch

    recipe = resolve(model, choices=choices, values=values, scale=scale)
    what = f"recipe {recipe.name!r}"
    plain = json.loads(json.dumps(recipe.to_plain()))
    expect(Recipe.from_plain(plain) == recipe, f"{what}: from_plain(to_plain(recipe)) differs from recipe")
    expect(recipe.with_() == recipe, f"{what}: with_() without changes differs from recipe")

    before = torch.get_rng_state()
    module = build_module(recipe, 1)
    expect(torch.equal(before, torch.get_rng_state()), f"{what}: construction moves the global random state")
    torch.randn(3)
    same_state(module.state_dict(), build_module(recipe, 1).state_dict(), f"{what}: built twice from one seed")
    torch.set_rng_state(before)

    shake(module.model)
    torch.manual_seed(0)
    batch = module.model.example_batch(3)
    _check_stages(module, batch, what)

    def run(m: Any) -> Any:
        return m(batch)

    with torch.no_grad():
        module.model.eval()
        check_deterministic(module.model, run, what)
        check_reload(module.model, lambda: build_module(recipe, 2).model, run, what)
    _check_capabilities(module, what)
    torch.set_rng_state(before)


def _check_stages(module: ZooModule, batch: Mapping[str, Tensor], what: str) -> None:
    import torch

    for index, stage in enumerate(module.recipe.stages):
        module.set_stage(index)
        name = f"{what}, stage {stage.name!r}"
        outputs = module.model(batch)
        missing = module.model.provides - set(outputs)
        expect(not missing, f"{name}: forward does not return {', '.join(sorted(missing))}")
        for objective in module.active:
            loss, report = module.objectives[objective](module.model, batch, outputs)
            expect(
                loss.ndim == 0 and bool(torch.isfinite(loss)), f"{name}: the loss of {objective!r} is no finite scalar"
            )
            for key, value in report.items():
                expect(not value.requires_grad, f"{name}: the report's {objective}/{key} is not detached")
        loss, _ = module.losses(batch)
        check_gradients(module.model, loss, name)
        for key, parameter in module.model.named_parameters():
            expect(parameter.grad is None or parameter.requires_grad, f"{name}: the frozen {key} gets a gradient")
    module.set_stage(0)


def _check_capabilities(module: ZooModule, what: str) -> None:
    """Each capability on three images of different sizes and three texts, together and alone."""
    import torch
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    images: list[Any] = []
    for width, height in ((80, 64), (64, 64), (50, 90)):
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        images.append(Image.fromarray(pixels.numpy()))
    offered = capabilities_of(module.model)
    expect(bool(offered), f"{what}: it offers no capability")
    calls: dict[str, Any] = {
        "embed_images": lambda rows: module.embed_images(images[rows]),
        "embed_texts": lambda rows: module.embed_texts(TEXTS[rows]),
        "embed": lambda rows: module.embed("image", images[rows]),
        "score_text": lambda rows: module.score_text(images[rows], TEXTS[rows]),
        "score_candidates": lambda rows: module.score_candidates(images[rows], [TEXTS] * len(images[rows])),
        "score_plain_text": lambda rows: module.score_plain_text(TEXTS[rows]),
        "generate_text": lambda rows: module.generate_text(images[rows], max_new_tokens=4),
        "match": lambda rows: module.match(images[rows], TEXTS[rows]),
        "classify": lambda rows: module.classify(images[rows], TEXTS[rows]),
        "classify_samples": lambda rows: module.classify_samples(module.example_samples(3)[rows]),
        "predict_samples": lambda rows: module.predict_samples(module.example_samples(3)[rows]),
        "image_codes": lambda rows: module.image_codes(images[rows]),
        "reconstruct_images": lambda rows: module.reconstruct_images(images[rows]),
        "generate_images": lambda rows: module.generate_images(TEXTS[rows], seed=3),
        "inpaint_images": lambda rows: module.inpaint_images(images[rows], masks()[rows], TEXTS[rows], seed=3),
        "segment_images": lambda rows: module.segment_images(images[rows], TEXTS[rows]),
        "segment": lambda rows: module.segment(images[rows], TEXTS[rows], 4),
        "edit_images": lambda rows: module.edit_images(images[rows], TEXTS[rows], seed=3),
        "generate_interleaved": lambda rows: module.generate_interleaved(
            [[text, image] for text, image in zip(TEXTS[rows], images[rows], strict=True)],
            max_images=1, max_new_tokens=4, seed=3,
        ),
    }  # fmt: skip
    drawn: dict[str, Any] = {}

    def masks() -> Tensor:
        """[3, H, W] bool: the left half is drawn anew."""
        expect("generate_images" in drawn, f"{what}: it offers inpaint_images without generate_images")
        size = tuple(drawn["generate_images"].shape[-2:])
        mask = torch.zeros(3, *size, dtype=torch.bool)
        mask[:, :, : size[1] // 2] = True
        return mask

    module.train()
    for name in offered:
        before = torch.get_rng_state()
        together, alone = calls[name](slice(None)), calls[name](slice(0, 1))
        drawn[name] = together
        expect(module.training, f"{what}: {name} does not restore the training mode")
        expect(len(together) == 3, f"{what}: {name} returns {len(together)} rows for 3 inputs")
        if name in DRAWING:
            expect(torch.equal(before, torch.get_rng_state()), f"{what}: {name} moves the global random state")
            _check_drawn(together, alone, calls[name](slice(None)), f"{what}: {name}")
            continue
        if name in ("segment", "segment_images"):
            _check_masks(together, alone, images, f"{what}: {name}")
            continue
        if isinstance(together, list):
            expect(together[:1] == alone, f"{what}: {name}: row 0 depends on what shares its batch")
            continue
        expect(not together.requires_grad, f"{what}: {name} returns a tensor with a graph")
        for _, (a, b) in pairs(together[:1], alone).items():
            close(a, b, f"{what}: {name}: row 0 depends on what shares its batch")
        if name.startswith("embed"):
            norm = together.norm(dim=-1)
            close(norm, torch.ones_like(norm), f"{what}: rows of {name} are not of unit length")
    if "score_text" in offered:
        scores = module.score_text(images, TEXTS)
        expect(bool((scores < 0).all()), f"{what}: score_text returns {scores.tolist()}, no log probabilities")
        if "score_candidates" in offered:
            diagonal = module.score_candidates(images, [TEXTS] * 3).diagonal()
            close(diagonal, scores, f"{what}: score_candidates differs from score_text")
    module.eval()


def _check_masks(together: Any, alone: Any, images: Any, what: str) -> None:
    """Masks [H, W] bool of the images' own sizes, or answers with [K, H, W] of them; a row is the same alone."""
    import torch

    for answer, image in zip(together, images, strict=True):
        masks = answer if isinstance(answer, torch.Tensor) else answer.masks
        size = (image.height, image.width)
        expect(
            masks.dtype == torch.bool and tuple(masks.shape[-2:]) == size,
            f"{what} returns {masks.dtype} {tuple(masks.shape)} for an image of {size} (height, width)",
        )
        expect(masks.ndim == (2 if masks is answer else 3), f"{what} returns masks of shape {tuple(masks.shape)}")
    first, same = together[0], alone[0]
    if not isinstance(first, torch.Tensor):
        expect(first.text == same.text, f"{what}: row 0 depends on what shares its batch")
        first, same = first.masks, same.masks
    expect(first.shape == same.shape, f"{what}: row 0 depends on what shares its batch")
    share = float((first != same).float().mean()) if first.numel() else 0.0  # a pixel on the edge may turn by rounding
    expect(share < 1e-3, f"{what}: row 0 depends on what shares its batch")


DRAWING = ("generate_images", "inpaint_images", "edit_images", "generate_interleaved")
"""Capabilities that draw images from random numbers of their own."""


def _check_drawn(together: Any, alone: Any, again: Any, what: str) -> None:
    """Shapes and range of drawn images; the same seed draws the same, whatever shares the batch."""
    import torch

    if not isinstance(together, torch.Tensor):  # lists of texts and images
        _check_interleaved(together, alone, again, what)
        return
    expect(
        together.ndim == 4 and together.shape[1] == 3 and together.dtype == torch.float32,
        f"{what} returns {together.dtype} {tuple(together.shape)}, no float32 [N, 3, H, W]",
    )
    _check_range(together, what)
    expect(torch.equal(together, again), f"{what} draws something else from the same seed")
    close(together[:1], alone, f"{what}: row 0 depends on what shares its batch")


def _check_interleaved(together: Any, alone: Any, again: Any, what: str) -> None:
    import torch

    for row, pieces in enumerate(together):
        for piece in pieces:
            if isinstance(piece, torch.Tensor):
                expect(piece.ndim == 3 and len(piece) == 3, f"{what} returns an image of shape {tuple(piece.shape)}")
                _check_range(piece, what)
            else:
                expect(isinstance(piece, str), f"{what} returns a {type(piece).__name__} among texts and images")
        for other, reason in ((again, "differs from the same seed"), (alone, "depends on what shares its batch")):
            if row >= len(other):
                continue
            expect([type(p) for p in pieces] == [type(p) for p in other[row]], f"{what}: row {row} {reason}")
            for a, b in zip(pieces, other[row], strict=True):
                if isinstance(a, str):
                    expect(a == b, f"{what}: row {row} {reason}: {a!r} and {b!r}")
                else:
                    close(a, b, f"{what}: row {row} {reason}")


def _check_range(images: Tensor, what: str) -> None:
    expect(not images.requires_grad, f"{what} returns a tensor with a graph")
    inside = bool(((images >= 0) & (images <= 1)).all())  # also false for nan
    expect(inside, f"{what}: values {float(images.min()):.2g} to {float(images.max()):.2g}, not within 0 and 1")


def check_published(model: str, *, choices: Mapping[str, Any] | None = None) -> None:
    """Check that the published size builds, runs forward and backward on the meta device, which takes no memory.

    Raises:
        AssertionError: Naming the broken promise.
    """
    import torch

    recipe = resolve(model, choices=choices)
    what = f"recipe {recipe.name!r}"
    with torch.device("meta"):
        module = build_module(recipe, 0)
    for key, parameter in module.named_parameters():
        expect(parameter.device.type == "meta", f'{what}: built on "meta", {key} is on {parameter.device}')
    for index, stage in enumerate(recipe.stages):
        module.set_stage(index)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss, _ = module.losses(module.model.example_batch(2))
            loss.backward()  # type: ignore[no-untyped-call]
        for key, parameter in module.model.named_parameters():
            trains = parameter.requires_grad
            expect(
                (parameter.grad is not None) == trains,
                f"{what}, stage {stage.name!r}: gradient and freezing of {key} disagree",
            )
        module.zero_grad(set_to_none=True)


def check_objective(name: str, *, model: str | None = None, scale: str = "tiny") -> None:
    """Check an objective on the first recipe whose model provides what it needs, or on ``model``.

    Raises:
        AssertionError: Naming the broken promise, or that no recipe can train with it.
    """
    import torch

    what = f"objective {name!r}"
    check_config("objective", name)
    objective: Any = scaled("objective", name, scale).build()
    expect(isinstance(objective.needs, frozenset), f"{what}: needs must be a frozenset of output names")
    own, models = catalogue()["objective"].plugin(name), catalogue()["model"]
    known = sorted(models.names(), key=lambda candidate: models.plugin(candidate) != own)  # its plugin's recipes first
    for candidate in [model] if model else known:
        with contextlib.suppress(ConfigError):
            module = build_module(
                resolve(candidate, choices={"objective": name}, values={"stages": "joint"}, scale=scale), 0
            )
            break
    else:
        raise AssertionError(f"{what}: no recipe's model provides {', '.join(sorted(objective.needs))}")
    objective = module.objectives[name]  # joined with its model, as in training
    batch = shake(module.model).example_batch(3)  # type: ignore[operator]
    outputs = module.model(batch)
    needed = {key: outputs[key] for key in objective.needs}
    torch.manual_seed(0)
    loss, report = objective(module.model, batch, needed)
    expect(loss.ndim == 0 and bool(torch.isfinite(loss)), f"{what}: its loss is no finite scalar")
    expect(loss.requires_grad, f"{what}: its loss has no gradient")
    expect(all(not value.requires_grad for value in report.values()), f"{what}: its report is not detached")
    torch.manual_seed(0)  # what it draws comes from the global stream
    again, _ = objective(module.model, batch, needed)
    expect(torch.equal(loss, again) or not objective.training, f"{what}: the same outputs give another loss")
    loss.backward()
    learns = [p.grad for p in module.model.parameters() if p.grad is not None]
    expect(bool(learns) and any(bool(g.abs().max() > 0) for g in learns), f"{what}: its gradient reaches no weight")
    objective.after_step(module.model)
