"""ZooModule: a model and its objectives as a LightningModule. Thin: what a step computes is in the model and the
objectives.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from zoo import draws
from zoo.adapters import is_adapter
from zoo.capabilities import capabilities_of
from zoo.errors import ConfigError, near
from zoo.models.base import Model
from zoo.nn.cpu_attention import full_precision_attention
from zoo.objectives.base import Objective
from zoo.objectives.momentum import Momentum, shared_momentum
from zoo.own_optimizers import OwnOptimizers
from zoo.part import derived_seed
from zoo.quantized import is_quantized
from zoo.recipe import OptimizerConfig, Recipe
from zoo.strategies import assert_world_size, checkpoint_blocks, clip_gradients, compile_model, reduce_whole, shard
from zoo.torchvision_ops import ensure

ensure()  # lightning imports torchmetrics, which imports torchvision

from lightning.pytorch import LightningModule  # noqa: E402

if TYPE_CHECKING:
    from zoo.run_config import TrainerConfig

NO_DECAY = ("bias", "position", "pos_embed", "class_embedding", "cls_token", "embed.cls", "query_tokens", "latents")
"""Parameter name parts without weight decay, beside everything of fewer than two dimensions (clip.md section 5)."""


def build_objectives(recipe: Recipe, model: Model) -> dict[str, Objective]:
    """The recipe's objectives, checked against what the model provides.

    Raises:
        ConfigError: An objective needs an output the wiring does not provide.
    """
    objectives: dict[str, Objective] = {}
    for name, config in recipe.objectives.items():
        objective: Objective = config.build()
        missing = objective.needs - model.provides
        if missing:
            raise ConfigError(
                f"objective {name!r} needs {', '.join(sorted(missing))}, but wiring {recipe.wiring[0]!r} provides only "
                f"{', '.join(sorted(model.provides))}"
            )
        objectives[name] = objective
    return objectives


def schedule(step: int, steps: float, config: OptimizerConfig) -> float:
    """Factor of the peak learning rate: linear warm-up from 1/warmup, then cosine to ``min_lr`` at ``steps``.

    Where the clock ends a stage, ``steps`` is what it comes to at the pace so far, so that the factor follows the share
    of the time that is used: share / warmup in the warm-up, behind it the cosine of (share - warmup) / (1 - warmup).
    Before anything is known of the pace ``steps`` is infinite.
    """
    warmup = config.warmup if config.warmup >= 1 or not config.warmup else config.warmup * steps
    if step < warmup:
        return (step + 1) / max(1.0, warmup)
    progress = min(1.0, (step - warmup) / max(1.0, steps - warmup))
    floor = config.min_lr / config.lr
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def _inside(name: str, path: str) -> bool:
    """Whether ``name`` is at or below ``path``, in which ``*`` stands for any one component."""
    steps, places = name.split("."), path.split(".")
    return len(steps) >= len(places) and all(p in ("*", s) for s, p in zip(steps, places, strict=False))


def trained_names(parameters: Mapping[str, Any], train: list[str], freeze: list[str]) -> set[str]:
    """Names of the parameters that learn when the paths ``train`` do and ``freeze`` do not.

    Of a part with adapters (LoRA) its adapters learn alone, also under ``"*"``; what is beside them, an embedding
    table say, learns where a path names it that has no adapter inside.
    """
    adapters = {name for name in parameters if is_adapter(name)}
    adapted = {name.split(".")[0] for name in adapters}

    def whole(path: str) -> bool:
        return path != "*" and not any(_inside(name, path) for name in adapters)

    def learns(name: str) -> bool:
        paths = [path for path in train if path == "*" or _inside(name, path)]
        if any(path == "*" or _inside(name, path) for path in freeze):
            return False
        if name in adapters or name.split(".")[0] not in adapted:
            return bool(paths)
        return any(whole(path) for path in paths)

    return {name for name in parameters if learns(name)}


class ZooModule(LightningModule):
    """What ``zoo.build`` returns: trains in ``Trainer.fit``, offers its model's capabilities, and shows its wiring.

    Attributes:
        model: The plain ``nn.Module``.
        objectives: Registry name -> objective.
        momentum: The moving average of the model that objectives learn from, or None.
        recipe: What it was built from.
        stage: Index of the recipe's stage that is being trained.
        steps: Optimizer steps of this stage; None = what the Trainer estimates. Set by ``expect``.
        divided: FSDP keeps a part of each parameter on each rank.
        seed: Of the run, from which the draws of a step follow that all ranks share; set by ``spread``.
    """

    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        objectives = build_objectives(recipe, model)
        self.objectives = nn.ModuleDict(objectives)
        self.momentum: Momentum | None = shared_momentum(objectives.values(), model)
        self.steps: float | None = None
        self.report: dict[str, Tensor] = {}
        self.own: OwnOptimizers | None = None
        self.seed = 0
        self.precision = "fp32"
        self.divided = False
        self.ranks: int | None = None
        self._own_state: Mapping[str, Any] = {}
        self.set_stage(0)

    def set_stage(self, index: int) -> None:
        """Make stage ``index`` current: its parts learn, all others are frozen and stay in eval mode.

        Raises:
            ConfigError: A path of the stage names no module, or nothing would learn.
        """
        self.stage = index
        stage = self.recipe.stages[index]
        known = {name for name, _ in self.model.named_modules() if name} | {n for n, _ in self.model.named_parameters()}
        for path in (*stage.train, *stage.freeze, *stage.lr):
            if path != "*" and not any(_inside(name, path) for name in known):
                top = {name for name in known if "." not in name}
                raise ConfigError(
                    f"stage {stage.name!r} names {path!r}, which {self.recipe.name} does not have{near(path, top)}"
                )

        parameters = dict(self.model.named_parameters())
        learns = trained_names(parameters, stage.train, stage.freeze)
        held = next((name for name in learns if is_quantized(parameters[name])), None)
        if held is not None:
            slot = held.split(".")[0]
            raise ConfigError(
                f"stage {stage.name!r} trains {held}, which {slot}.quantize holds in fewer bits: set {slot}.lora_rank,"
                f" or leave {slot} out of what the stage trains"
            )
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in learns)
        for path in stage.lr:
            if not any(path == "*" or _inside(name, path) for name in learns):
                raise ConfigError(
                    f"stage {stage.name!r} gives {path!r} a learning rate, but nothing in it learns there"
                )
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ConfigError(
                f"stage {stage.name!r} trains {', '.join(stage.train)}: nothing in {self.recipe.name} would learn"
            )
        self.model.reconfigure(self.recipe.stage_wiring(index))
        self.active = [name for name in self.recipe.objectives if not stage.objectives or name in stage.objectives]
        self.train(self.training)

    def expect(self, steps: float) -> None:
        """Say how many optimizer steps this stage will take; schedules and ramps follow from the next step on."""
        self.steps = steps
        if self.momentum is not None:
            self.momentum.steps = steps

    def ever_trained(self) -> set[nn.Parameter]:
        """The model's parameters that learn in any stage."""
        named = dict(self.model.named_parameters())
        return {named[n] for stage in self.recipe.stages for n in trained_names(named, stage.train, stage.freeze)}

    def spread(self, seed: int, trainer: TrainerConfig) -> None:
        """Get ready to train as ``trainer`` says: compiled, with checkpoints of activations, over several devices."""
        self.seed, self.precision, self.ranks = seed, trainer.precision, trainer.devices * trainer.nodes
        if trainer.checkpointing == "blocks":
            checkpoint_blocks(self.model)
        if trainer.compile:
            compile_model(self.model, trainer.resolved_strategy)

    def configure_model(self) -> None:
        """Called by the Trainer when the processes know each other; under FSDP every rank then keeps its part."""
        if self.device_mesh is not None:
            shard(self, self.device_mesh["data_parallel"], self.precision)
            self.divided = True

    def on_fit_start(self) -> None:
        if self.ranks is not None:
            assert_world_size(self.trainer, self.ranks)

    def train(self, mode: bool = True) -> ZooModule:
        """Set training mode, except for modules whose parameters are all frozen: their dropout and statistics stay
        off.
        """
        super().train(mode)
        if mode:
            for module in self.model.modules():
                parameters = list(module.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()
        return self

    def losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One forward pass and the active objectives' weighted sum.

        Returns:
            The scalar to minimise, and what to log: each objective's own report, prefixed by its name when there are
            several.
        """
        active: list[Any] = [self.objectives[name] for name in self.active]
        momentum = self.momentum if self._reads_momentum() else None
        if momentum is not None and self.training and not self.divided:
            momentum.update(self.model)
        outputs = self.model(batch)
        total: Tensor | None = None
        report: dict[str, Tensor] = {}
        for name in sorted(self.active, key=lambda name: bool(self.objectives[name].reads_losses)):
            given = outputs
            if self.objectives[name].reads_losses and total is not None:
                given = cast("Any", ChainMap({"loss": total}, cast("Any", outputs)))
            loss, values = self.objectives[name](self.model, batch, given)
            loss = loss * self.recipe.objectives[name].weight
            total = loss if total is None else total + loss
            report[name] = loss.detach()
            report.update({f"{name}/{key}": value for key, value in values.items()})
        if self.training:
            for objective in active:
                objective.after_forward()
            if momentum is not None:
                momentum.finish()
        assert total is not None  # a recipe has at least one objective
        return total, {"loss": total.detach(), **report}

    def _reads_momentum(self) -> bool:
        objectives: list[Any] = [self.objectives[name] for name in self.active]
        return any(objective.momentum_rate is not None for objective in objectives)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        if self.divided and self.momentum is not None and self._reads_momentum():
            self.momentum.update(self.model)  # part by part, before FSDP gathers them
        first = derived_seed(self.seed, f"step/{self.stage}/{batch_idx}/0")
        with full_precision_attention(), draws.shared(first):
            loss, self.report = self.losses(batch)
        return loss

    def on_after_backward(self) -> None:
        if self.own is not None:
            self.report |= self.own.backward(self.active, 1 / self.trainer.accumulate_grad_batches)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """The model's step, then those of the objectives that learn themselves."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.own is not None:
            self.own.step(self.active)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.own is not None and self.own.optimizers:
            checkpoint["zoo_own_optimizers"] = self.own.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._own_state = checkpoint.get("zoo_own_optimizers", {})
        if self.own is not None:  # they are made already, as the model's optimizer is
            self.own.load_state_dict(self._own_state)
            self._own_state = {}

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        _, report = self.losses(batch)
        size = len(next(iter(batch.values())))
        self.log_dict({f"val/{k}": v for k, v in report.items()}, batch_size=size, sync_dist=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name in self.active:
            self.objectives[name].after_step(self.model)  # type: ignore[operator]

    def configure_optimizers(self) -> Any:
        """AdamW with the stage's settings; gains, biases, scalars, positions and embeddings of queries are not
        decayed.
        """
        config = self.recipe.stage_optimizer(self.stage)
        planned = float("inf") if self.steps is not None else int(self.trainer.estimated_stepping_batches)
        if self.momentum is not None:
            self.momentum.steps = self.steps if self.steps is not None else planned
        self.own = OwnOptimizers(dict(self.objectives.items()))
        self.own.load_state_dict(self._own_state)
        self._own_state = {}
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                exempt = parameter.ndim < 2 or any(part in name for part in NO_DECAY)
                groups.setdefault((self.rate_of(name, config.lr), exempt), []).append(parameter)
        order = sorted(groups, key=lambda group: (group[0] != config.lr, group))  # the curve shows the first one's rate
        optimizer = torch.optim.AdamW(
            [
                {"params": groups[rate, exempt], "lr": rate, "weight_decay": 0.0 if exempt else config.weight_decay}
                for rate, exempt in order
            ],
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
        )

        def factor(step: int) -> float:  # asked at every step: what is expected may change
            return schedule(step, planned if self.steps is None else self.steps, config)

        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def rate_of(self, name: str, default: float) -> float:
        """Peak learning rate of a parameter in this stage: that of the longest path in ``Stage.lr``, or ``default``."""
        rates = self.recipe.stages[self.stage].lr
        paths = [p for p in rates if p == "*" or _inside(name.removeprefix("model."), p)]
        return rates[max(paths, key=lambda p: (p.count("."), len(p)))] if paths else default

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip to the stage's norm, unless the Trainer was given one of its own."""
        own = self.recipe.stage_optimizer(self.stage).clip or None
        if self.divided:
            reduce_whole(self)
            if most := gradient_clip_val or own:
                clip_gradients([p for group in optimizer.param_groups for p in group["params"]], most)
            return
        self.clip_gradients(optimizer, gradient_clip_val or own, gradient_clip_algorithm or "norm")

    def __getattr__(self, name: str) -> Any:
        """The model's capabilities and tensor-level doors, directly: ``module.embed_images(...)``."""
        if name in FORWARDED:
            model = super().__getattr__("model")
            if hasattr(model, name):
                return getattr(model, name)
            offers = ", ".join(capabilities_of(model)) or "nothing"
            raise AttributeError(f"{self.recipe.name} does not offer {name}; it offers {offers}")
        return super().__getattr__(name)

    def _repr_html_(self) -> str:
        from zoo.compare.wiring import wiring_html

        return wiring_html(self)


FORWARDED = frozenset(
    {
        "embed_images", "embed_texts", "embed", "modalities", "match", "match_pairs", "match_logits", "grounding",
        "generate_text", "score_text", "score_candidates", "score_plain_text",
        "generate_images", "inpaint_images", "edit_images", "generate_interleaved",
        "segment_images", "segment", "image_features", "text_features", "text_logits", "token_logits",
        "classify", "classify_samples", "predict_samples", "example_samples", "labels",
        "image_codes", "reconstruct_images", "prepared_images", "codebook_size", "processor", "layouts",
    }
)  # fmt: skip
