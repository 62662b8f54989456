"""Loading: from a zoo checkpoint, another library's folder, a bare file, or a hub id, to a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.adapters import fit_names, is_adapter
from zoo.errors import ConfigError, WeightsError
from zoo.models.base import Model
from zoo.plugin import catalogue
from zoo.recipe import SLOTS, Recipe, resolve, split_changes
from zoo.registry import to_plain
from zoo.weights.files import State, locate, read_file, read_folder, read_json, stem_of
from zoo.weights.formats import PICKLED_KINDS, TRANSFORMERS, Official, file_format, folder_kind, transformers_format
from zoo.weights.keymaps import KeyMap, _pattern
from zoo.weights.report import LoadReport, some
from zoo.weights.save import INSTRUCTION, RECIPE, TOKENIZER


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint read and mapped to our names; no model exists yet."""

    official: Official
    state: State
    report: LoadReport
    folder: Path


def load(source: str | Path, model: str | None = None, *, strict: bool = True) -> tuple[Recipe, State, LoadReport]:
    """Read a checkpoint without building its model.

    Args:
        source: A zoo checkpoint folder, a transformers or open_clip folder, a weight file with ``model``, or a hub id.
        model: The recipe a bare file belongs to.
        strict: Raise on names in the checkpoint that no rule of its key map knows.

    Returns:
        The recipe it describes, its tensors under the zoo's names, and what was left.

    Raises:
        WeightsError: Unsafe, damaged, or of an unknown layout.
    """
    checkpoint = _read(source, model, strict)
    return checkpoint.official.recipe, checkpoint.state, checkpoint.report


def load_model(
    source: str | Path,
    *,
    model: str | None = None,
    changes: Mapping[str, Any] | None = None,
    seed: int = 0,
    strict: bool = True,
) -> tuple[Model, Recipe, LoadReport]:
    """Build a checkpoint's model and fill it, completely or not at all.

    Args:
        source, model: As ``load``.
        changes: Parts and fields to change, as in ``zoo.build``. An exchanged part keeps its new weights, and so
            does a part whose changed fields give its tensors other shapes; what such a change touches in the wiring
            is new as well.
        seed: Seed of the weights that are new.
        strict: Raise on missing and unexpected names that neither the key map nor a change explains; shapes always
            must fit.

    Returns:
        The model in training mode, its recipe with the changes, and what was loaded, is new, or was left.

    Raises:
        WeightsError: As ``load``, or names or shapes that do not fit.
        ConfigError: Wrong changes.
    """
    checkpoint = _read(source, model, strict)
    stored = checkpoint.official.recipe
    _refuse_unknown(checkpoint, changes or {})
    recipe = stored.with_(**dict(changes)) if changes else stored
    network: Model = recipe.wiring[1].build(recipe.parts, seed)
    network.reconfigure(recipe.stage_wiring(-1))
    report = _fill(network, checkpoint, _touched(stored, recipe), strict)
    saved = checkpoint.folder / TOKENIZER
    own = (checkpoint.folder / RECIPE).is_file()  # pipelines of diffusers have a folder of that name as well
    if own and saved.is_dir() and hasattr(type(network), "tokenizer") and _same_tokenizer(stored, recipe):
        from zoo.data.text import load_tokenizer

        setattr(network, "tokenizer", load_tokenizer(saved))  # noqa: B010  what has a tokenizer takes one
        if (saved / INSTRUCTION).is_dir() and stored.parts["connector"] == recipe.parts["connector"]:
            setattr(network, "instruction_tokenizer", load_tokenizer(saved / INSTRUCTION))  # noqa: B010
    return network, recipe, report


def _read(source: str | Path, model: str | None, strict: bool) -> _Checkpoint:
    path = locate(source)
    if path.is_file():
        official, state = _bare_file(path, model)
    elif (path / RECIPE).is_file():
        official, state = _zoo_folder(path), read_folder(path)
    elif (path / "open_clip_config.json").is_file():
        from zoo.weights.formats.clip import from_open_clip

        official, state = from_open_clip(path), read_folder(path, stem_of(path))
    elif (path / "model_index.json").is_file():
        from zoo.weights.formats.diffusers_pipeline import read_pipeline

        official, state = read_pipeline(path)
    elif (path / "config.json").is_file():
        config = read_json(path / "config.json")
        # a plugin's own released layout is read by the recipe's name, whatever its config.json calls itself
        if model is None or (folder_kind(config) in TRANSFORMERS and model not in catalogue()["checkpoint"]):
            official = transformers_format(config, path)
            state = read_folder(path, stem_of(path), pickled=folder_kind(config) in PICKLED_KINDS)
        else:
            state = read_folder(path, stem_of(path), pickled=model in catalogue()["checkpoint"])
            official = _of_recipe(model, state)
    elif (path / "params.json").is_file():
        from zoo.weights.formats.chameleon import from_release

        official, state = from_release(path)
    else:
        raise WeightsError(
            f"{str(path)!r} is no checkpoint: expected {RECIPE}, config.json, model_index.json or"
            " open_clip_config.json in it"
        )
    mapped, unknown = state, list[str]()
    if official.keymap.rules:  # else already under our names
        mapped, unknown = official.keymap.load(state)
    strange = [name for name in unknown if not _fits(name, official.ignored)]
    if strange and strict:
        raise WeightsError(
            f"{str(path)!r} has {len(strange)} tensors that {official.form} does not name: {some(strange)}; "
            "is it of another model? (strict=False leaves them)"
        )
    report = LoadReport(
        source=str(source),
        form=official.form,
        loaded=sorted(mapped),
        renamed=sum(name not in state for name in mapped),
        ignored=unknown,
    )
    return _Checkpoint(official, mapped, report, path if path.is_dir() else path.parent)


def _refuse_unknown(checkpoint: _Checkpoint, changes: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a size nobody published, unless the caller says what its tensors cannot."""
    said = split_changes(changes)[1]
    for path in checkpoint.official.unknown:
        slot, field = path.split(".")
        if field not in (said.get(slot) or {}):
            config: Any = checkpoint.official.recipe.parts[slot][1]
            raise WeightsError(
                f"{checkpoint.report.source!r} is of no published size ({slot}.width = {config.width}), and tensors do"
                f" not tell {path}: say it with {slot}={{{field!r}: ...}}, or load a checkpoint of a published size"
            )


def _zoo_folder(folder: Path) -> Official:
    try:
        recipe = Recipe.from_plain(read_json(folder / RECIPE))
    except ConfigError as error:
        raise WeightsError(f"{RECIPE} of {str(folder)!r} does not fit this version: {error}") from error
    return Official(recipe=recipe, keymap=KeyMap(), form="zoo")


def _bare_file(path: Path, model: str | None) -> tuple[Official, State]:
    if model is None:
        raise WeightsError(f"{path.name} is a bare weight file: say which recipe it belongs to with model='clip', ...")
    state = read_file(path)
    return _of_recipe(model, state), state


def _of_recipe(model: str, state: State) -> Official:
    recipe = resolve(model)
    return file_format(recipe, state) or Official(recipe=recipe, keymap=KeyMap(), form="zoo")


# -- filling -----------------------------------------------------------------------------------------------------------


def _touched(stored: Recipe, recipe: Recipe) -> dict[str, bool]:
    """Slots that a change touched -> whether the part was exchanged for another."""
    out: dict[str, bool] = {}
    for slot in SLOTS:
        was, now = stored.parts.get(slot), recipe.parts.get(slot)
        if now is None or was == now:
            continue
        out[slot] = was is None or was[0] != now[0]
    if stored.wiring[0] != recipe.wiring[0] or to_plain(stored.wiring[1]) != to_plain(recipe.wiring[1]):
        out["wiring"] = False
    return out


def _same_tokenizer(stored: Recipe, recipe: Recipe) -> bool:
    def names(r: Recipe) -> list[Any]:
        slots: list[str] = [s for s in ("text_encoder", "decoder", "trunk") if s in r.parts] or ["connector"]
        return [getattr(r.parts[s][1], "tokenizer", None) for s in slots if s in r.parts]

    return names(stored) == names(recipe)


def _fill(network: Model, checkpoint: _Checkpoint, touched: dict[str, bool], strict: bool) -> LoadReport:
    """Load what fits; everything that does not must be explained by a change, the key map, or ``strict=False``."""
    own = network.state_dict()
    state = fit_names(checkpoint.state, own)
    if any(map(is_adapter, state)) and not any(map(is_adapter, own)):
        raise WeightsError(
            f"{checkpoint.report.source!r} holds LoRA adapters and the model has none: keep lora_rank, or write their"
            " sum with the weights first (zoo.weights.save_merged)"
        )
    resized = _resized(network, own, state)
    exchanged = [slot for slot, other in touched.items() if other]
    for slot, other in touched.items():
        if not other and slot != "wiring" and _reshaped(slot, own, state):
            exchanged.append(slot)
    for name in [n for n in state if n.split(".")[0] in exchanged]:
        del state[name]
    slots = {name.split(".")[0] for name in own} & set(SLOTS)
    new, left = [], []
    for name in [n for n in state if n not in own]:
        if not touched or not _explained(name, touched, slots):
            left.append(name)
        del state[name]
    reshaped = [n for n, t in state.items() if t.shape != own[n].shape]
    for name in reshaped:
        if not touched or name.split(".")[0] in slots:
            raise WeightsError(
                f"{name} is {tuple(state[name].shape)} in {checkpoint.report.source!r} and {tuple(own[name].shape)} in "
                f"the model ({len(reshaped)} such tensors): use the sizes of the checkpoint"
            )
        del state[name]
    filled = {own[n].data_ptr() for n in state if own[n].numel()}
    lost = []
    for name, tensor in own.items():
        if name in state or (tensor.numel() and tensor.data_ptr() in filled):  # a tied tensor is filled with its twin
            continue
        if name.split(".")[0] in exchanged:
            continue
        if _fits(name, checkpoint.official.new) or (touched and _explained(name, touched, slots)):
            new.append(name)
        else:
            lost.append(name)
    if strict and (lost or left):
        parts = [f"lacks {len(lost)} tensors of the model: {some(lost)}"] if lost else []
        parts += [f"has {len(left)} tensors the model does not: {some(left)}"] if left else []
        raise WeightsError(f"{checkpoint.report.source!r} {' and '.join(parts)} (strict=False loads the rest)")
    network.load_state_dict(state, strict=False)
    return dataclasses.replace(
        checkpoint.report,
        loaded=sorted(state),
        new_parts=tuple(exchanged),
        new=sorted([*new, *lost]),
        resized=resized,
        ignored=sorted({*checkpoint.report.ignored, *left}),
    )


def _resized(network: Model, own: Mapping[str, Any], state: State) -> list[str]:
    """Let modules bring what was stored for another image size to their own (``fit_stored``); the names changed."""
    names: list[str] = []
    for path, module in network.named_modules():
        fit = getattr(module, "fit_stored", None)
        if fit is None:
            continue
        prefix = f"{path}." if path else ""
        stored = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix) and n in own}
        differ = {n: t for n, t in stored.items() if t.shape != own[prefix + n].shape}
        fitted: dict[str, Any] = fit(differ) if differ else {}
        state.update({prefix + n: t for n, t in fitted.items()})
        names += [prefix + n for n in fitted]
    return names


def _reshaped(slot: str, own: Mapping[str, Any], state: State) -> bool:
    return any(n.startswith(slot + ".") and n in own and own[n].shape != t.shape for n, t in state.items())


def _explained(name: str, touched: dict[str, bool], slots: set[str]) -> bool:
    """A change explains names inside the parts it touched, and, in the wiring, those that join them."""
    top = name.split(".")[0]
    return top in touched or top not in slots


def _fits(name: str, templates: Iterable[str]) -> bool:
    return any(_pattern(t).fullmatch(name) for t in templates)
