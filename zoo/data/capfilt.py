"""CapFilt: a captioner and a filter, both fine-tuned from one BLIP, clean a set of image-text pairs (arXiv 2201.12086,
section 3.3).

The captioner writes one text an image, the filter drops every text, found or written, that it judges not to match its
image; what is left and the trusted pairs make a new dataset, on which a new model is trained.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ConfigError, DataError, RunError

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.data.sample import Sample, Source
    from zoo.module import ZooModule

Say = Callable[[str], None]

CAPTIONS, IMAGES, SUMMARY = "captions.jsonl", "images", "capfilt.json"
HUMAN, WEB, SYNTHETIC = "human", "web", "synthetic"
"""Where a text of the new dataset comes from: a trusted pair, the pairs that were given, the captioner."""


@dataclass(frozen=True, kw_only=True)
class CapFilt:
    """How the dataset is cleaned.

    Attributes:
        steps: Optimizer steps of the captioner and of the filter each.
        batch_size: Pairs a step.
        lr: Peak learning rate; 0 = a fifth of the run's.
        top_p: Nucleus the captioner samples from (section 4.3).
        repetition_penalty: As in the released captioner's nucleus sampling.
        max_new_tokens: Longest caption.
        seed: Of order, dropout and samples.
    """

    steps: int = 200
    batch_size: int = 64
    lr: float = 0.0
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    max_new_tokens: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2 or self.max_new_tokens < 1 or self.lr < 0:
            raise ConfigError(
                f"steps = {self.steps}, batch_size = {self.batch_size}, max_new_tokens = {self.max_new_tokens}, lr ="
                f" {self.lr}: expected at least 1, 2, 1 and 0"
            )


def captioner_of(module: ZooModule) -> ZooModule:
    """The image encoder and the decoder of a BLIP as a model of their own, with copies of their weights."""
    from zoo.models.writer import WriterConfig
    from zoo.objectives.next_token import NextTokenConfig

    recipe = module.recipe
    wiring: Any = recipe.wiring[1]
    smoothing = getattr(recipe.objectives.get("next-token"), "label_smoothing", 0.1)
    config = WriterConfig(text_length=wiring.text_length, augment=wiring.augment, beam_length=wiring.beam_length)
    return _part(module, "blip-caption", "writer", config, {"next-token": NextTokenConfig(label_smoothing=smoothing)})


def filter_of(module: ZooModule) -> ZooModule:
    """The encoders and heads of a BLIP as a model of their own, with copies of their weights: aligned and matched."""
    from zoo.models.fusion import FusionConfig
    from zoo.objectives.matching import MatchingConfig
    from zoo.objectives.momentum import MomentumContrastiveConfig

    wiring: Any = module.recipe.wiring[1]
    names = {f.name for f in dataclasses.fields(FusionConfig)}
    config = FusionConfig(**{name: getattr(wiring, name) for name in names})
    objectives = {
        "momentum-contrastive": MomentumContrastiveConfig(queue_size=0, ramp=0.0),
        "matching": MatchingConfig(similarity="online"),
    }
    return _part(module, "blip-retrieval", "fusion", config, objectives)


def _part(module: ZooModule, model: str, wiring: str, config: Any, objectives: dict[str, Any]) -> ZooModule:
    from zoo.api import build_module
    from zoo.recipe import JOINT, Recipe

    recipe = module.recipe
    own = Recipe(
        model=model,
        scale=recipe.scale,
        wiring=(wiring, config),
        parts={slot: recipe.parts[slot] for slot in config.slots},
        objectives=objectives,
        stages=(JOINT,),
        optimizer=recipe.optimizer,
    )
    part = build_module(own, 0)
    state = module.model.state_dict()
    part.model.load_state_dict({name: state[name] for name in part.model.state_dict()})
    part.model.tokenizer = module.model.tokenizer
    if part.momentum is not None:
        part.momentum.teacher.load_state_dict({name: state[name] for name in part.momentum.teacher.state_dict()})
    return part.to(module.device)


def fine_tune(
    module: ZooModule, source: Source, ids: Sequence[str], config: CapFilt, lr: float, what: str, say: Say
) -> None:
    """Train all of ``module`` on the samples ``ids``, with the recipe's optimizer at another peak ``lr``.

    Raises:
        DataError: There are fewer samples than one batch holds.
    """
    import torch

    from zoo.data.loader import loader, to_device
    from zoo.data.order import SampleOrder
    from zoo.part import derived_seed

    if len(ids) < config.batch_size:
        raise DataError(
            f"{len(ids)} trusted pairs are fewer than one batch of {config.batch_size}: raise data.trusted in the run,"
            " or lower --batch-size"
        )
    optimizer_config = dataclasses.replace(module.recipe.optimizer, lr=lr, min_lr=0.0, warmup=0.1)
    module.recipe = dataclasses.replace(module.recipe, optimizer=optimizer_config)
    module.steps = config.steps
    setup = module.configure_optimizers()
    optimizer, rate = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
    order = SampleOrder(ids, config.seed)
    module.train()
    batches = loader(source, module.model.processor, order, config.batch_size, stop_step=config.steps)
    for step, batch in enumerate(batches):
        torch.manual_seed(derived_seed(config.seed, f"capfilt/{what}/{step}"))
        loss, _ = module.losses(to_device(batch, module.device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(module.model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        for objective in module.objectives.values():
            objective.after_step(module.model)  # type: ignore[operator]
        if step in (0, config.steps - 1) or (step + 1) % 100 == 0:
            say(f"{what}: step {step + 1} of {config.steps}, loss {float(loss.detach()):.3f}")
    module.eval()


def judged(module: ZooModule, images: Sequence[Any], texts: Sequence[str]) -> list[bool]:
    """Whether the filter says "match" (its logit is not below that of "no match") of image n and text n."""
    import torch

    model: Any = module.model
    kept: list[bool] = []
    with torch.inference_mode():
        for start in range(0, len(texts), 64):
            part = slice(start, start + 64)
            pixels = model.processor.encode_images(images[part]).to(module.device)
            rows = model.processor.encode_texts(texts[part])
            logits: Tensor = model.match_logits(
                pixels, rows["input_ids"].to(module.device), rows["attention_mask"].to(module.device)
            )
            kept += (logits[:, 1] >= logits[:, 0]).tolist()
    return kept


def clean(module: ZooModule, source: Source, out: Path, config: CapFilt, say: Say = print) -> dict[str, Any]:
    """Fine-tune captioner and filter on the trusted pairs of ``source``, and write the cleaned dataset to ``out``.

    ``out`` gets ``images/*.png``, ``captions.jsonl`` (``image``, ``caption``, ``split``, ``source``: human, web or
    synthetic) for the folder source, ``capfilt.json`` with counts, and the licence of the images. Val and test are
    written as they are. A training image that keeps no text is left out.

    Returns:
        What ``capfilt.json`` holds; with a source whose noise is known (``shuffled_captions``) also the share of right
        captions before and after.

    Raises:
        ConfigError: A model that is no BLIP, or a source without trusted pairs.
        RunError: ``out`` exists already and holds something, or cannot be written.
    """
    recipe = module.recipe
    if recipe.wiring[0] != "med":
        raise ConfigError(
            f"{recipe.name} has no captioner and filter in one: CapFilt takes a run of the wiring 'med' (blip)"
        )
    trusted = [id for id in source.ids("train") if _trusted(source, id)]
    if not trusted:
        raise ConfigError(
            "the run's data has no trusted pairs to fine-tune captioner and filter on: train with data.trusted=0.2"
        )
    _new_folder(out)
    lr = config.lr or recipe.optimizer.lr / 5
    captioner, judge = captioner_of(module), filter_of(module)
    fine_tune(captioner, source, trusted, config, lr, "captioner", say)
    fine_tune(judge, source, trusted, config, lr, "filter", say)

    rows: list[dict[str, Any]] = []
    web = [id for id in source.ids("train") if id not in set(trusted)]
    tally = Tally(source)
    for start in range(0, len(web), 64):
        samples = [source.sample(id) for id in web[start : start + 64]]
        images = [s.image for s in samples]
        written = captioner.generate_text(
            images, max_new_tokens=config.max_new_tokens, temperature=1.0, top_p=config.top_p,
            repetition_penalty=config.repetition_penalty, seed=config.seed * 100_003 + start,
        )  # fmt: skip
        for kind, texts in ((WEB, [s.texts[0] for s in samples]), (SYNTHETIC, written)):
            matches = judged(judge, images, texts)
            for sample, text, match in zip(samples, texts, matches, strict=True):
                tally.add(kind, sample.id, text, match and bool(text))
                if match and text:
                    rows.append(_row(sample, text, "train", kind))
        for sample in samples:
            _write_image(out, sample)
    for split, ids in (("train", trusted), ("val", source.ids("val")), ("test", source.ids("test"))):
        for id in ids:
            sample = source.sample(id)
            _write_image(out, sample)
            rows += [_row(sample, text, split, HUMAN) for text in sample.texts]
            if split == "train":
                tally.add(HUMAN, id, sample.texts[0], True)
    summary = {
        "format": 1,
        "model": recipe.name,
        "data": {"name": source.name, "version": source.version},
        "config": dataclasses.asdict(config),
        "trusted": len(trusted),
        **tally.summary(),
    }
    try:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / CAPTIONS).write_text(lines, encoding="utf-8")
        (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        (out / "LICENCE.txt").write_text(source.licence + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror}") from error
    return summary


class Tally:
    """Counts what was judged and kept, and, where the source knows the truth, how much of it was right."""

    def __init__(self, source: Source) -> None:
        self.truth: Callable[[str], Iterable[str]] | None = getattr(source, "truth", None)
        self.counts = {kind: {"judged": 0, "kept": 0, "right": 0, "right_kept": 0} for kind in (HUMAN, WEB, SYNTHETIC)}

    def add(self, kind: str, id: str, text: str, kept: bool) -> None:
        counts = self.counts[kind]
        right = self.truth is not None and _plain(text) in {_plain(t) for t in self.truth(id)}
        counts["judged"] += 1
        counts["kept"] += kept
        counts["right"] += right
        counts["right_kept"] += right and kept

    def summary(self) -> dict[str, Any]:
        """Counts by source and, with a known truth, the shares of right captions before and after."""
        out: dict[str, Any] = {"captions": self.counts}
        if self.truth is not None:
            given = [self.counts[HUMAN], self.counts[WEB]]
            every = [*given, self.counts[SYNTHETIC]]
            out["right_before"] = sum(c["right"] for c in given) / max(1, sum(c["judged"] for c in given))
            out["right_after"] = sum(c["right_kept"] for c in every) / max(1, sum(c["kept"] for c in every))
        else:
            for counts in self.counts.values():
                del counts["right"], counts["right_kept"]
        return out


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _trusted(source: Source, id: str) -> bool:
    alone: Any = getattr(source, "text_sample", source.sample)
    return bool(alone(id).meta.get("trusted"))


def _row(sample: Sample, text: str, split: str, kind: str) -> dict[str, Any]:
    return {"image": f"{IMAGES}/{_file(sample.id)}", "caption": text, "split": split, "source": kind, "id": sample.id}


def _file(id: str) -> str:
    """A file name for an id, which may hold anything."""
    import hashlib

    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in id)[:80]
    return f"{safe}-{hashlib.sha256(id.encode()).hexdigest()[:8]}.png"


def _write_image(out: Path, sample: Sample) -> None:
    if sample.image is None:
        raise DataError(f"sample {sample.id!r} has no image; CapFilt cleans pairs")
    try:
        sample.image.save(out / IMAGES / _file(sample.id))
    except OSError as error:
        raise RunError(f"cannot write to {out / IMAGES}: {error.strerror or error}") from error


def _new_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and is not empty: choose another folder with --out")
    try:
        (out / IMAGES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {out}: {error.strerror}; choose another folder with --out") from error
