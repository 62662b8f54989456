"""Meta-Transformer's wiring: a tokenizer of one modality, the shared transformer, a norm and a head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from zoo.data.sample import Sample
from zoo.data_tokenizers.base import DataTokenizer, DataTokenizerConfig, DataTokens
from zoo.encoders.vit import ViTConfig
from zoo.errors import ConfigError, near
from zoo.layout import Layout, Segment, lay_out
from zoo.models.base import Model, evaluating
from zoo.nn import Trunk, TrunkConfig
from zoo.nn.norm import Linear
from zoo.part import PartConfig, seeded
from zoo.plugin import catalogue
from zoo.recipe import WiringConfig
from zoo_modalities.meta_transformer.processor import ModalityProcessor

PREDICTS = ("labels", "values", "elements")
POOLS = ("auto", "cls", "mean", "max", "cls-max", "cls-max-mean")
CHUNK = 64
"""Samples a forward pass of ``classify_samples``."""


@dataclass(frozen=True, kw_only=True)
class MetaTransformerConfig(WiringConfig):
    """A head over the shared encoder.

    Attributes:
        predicts: ``labels``, one of several an item (classification); ``values``, numbers of an item (regression,
            forecasting); ``elements``, a label for each token that stands for an element of the item (segmentation).
        labels: The labels' names.
        labels_of: A data source whose labels these are, in place of ``labels``.
        classes: How many labels or values there are, where no names are given.
        label_key: Key of what is predicted in a sample's ``meta``: a name, numbers, or a list of names.
        pool: What the head reads: the class token (``cls``), the mean or the maximum of the other tokens, or several
            side by side (point clouds: ``cls-max``); ``auto`` is the class token where there is one, else the mean.
        norm_eps: Of the norm behind the encoder (point clouds: 1e-6; hyper-spectral: 1e-5).
        hidden: Widths of the head's hidden layers, each with batch norm, ReLU and dropout (point clouds: 256, 256).
        dropout: Of hidden layers, in training.
    """

    slots: ClassVar[tuple[str, ...]] = ("data_tokenizer", "encoder")

    predicts: str = "labels"
    labels: list[str] = field(default_factory=list)
    labels_of: str = ""
    classes: int = 1000
    label_key: str = "label"
    pool: str = "auto"
    norm_eps: float = 1e-6
    hidden: list[int] = field(default_factory=list)
    dropout: float = 0.5

    def __post_init__(self) -> None:
        for name, value, options in (("predicts", self.predicts, PREDICTS), ("pool", self.pool, POOLS)):
            if value not in options:
                raise ValueError(f"{name} = {value!r}{near(value, options)}")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) == 1:
            raise ValueError("labels must be at least two, and differ from each other")
        if self.labels and self.labels_of:
            raise ValueError("labels and labels_of are both set: give one of them")
        if (self.labels or self.labels_of) and self.predicts == "values":
            raise ValueError("values have no labels: set classes to their number")
        if self.classes < 1:
            raise ValueError(f"classes = {self.classes} must be 1 or more")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the labels; none where only their number is known.

        Raises:
            ConfigError: ``labels_of`` names no source, or one whose labels are not fixed.
        """
        if not self.labels_of:
            return tuple(self.labels)
        config = catalogue()["data"].parse(self.labels_of)
        found = getattr(config, "labels", ())
        if not found:
            raise ConfigError(f"wiring.labels_of: the labels of data={self.labels_of} are not fixed: set wiring.labels")
        return tuple(found)

    @property
    def outputs(self) -> int:
        """Number of labels or values."""
        return len(self.names) or self.classes

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> MetaTransformer:
        """Build the model; tokenizer, encoder and head are drawn from streams of their own.

        Raises:
            ConfigError: An encoder that is no vision transformer of the zoo's own, whose blocks could be shared.
        """
        name, encoder = parts["encoder"]
        if not isinstance(encoder, ViTConfig):
            raise ConfigError(
                f"encoder {name!r} is not made of the zoo's own blocks: choose meta-transformer-b16,"
                " meta-transformer-l14 or another vision transformer (vit-...)"
            )
        return MODELS[self.predicts](self, cast("DataTokenizerConfig", parts["data_tokenizer"][1]), encoder, seed)


def shared_trunk(encoder: ViTConfig) -> TrunkConfig:
    """The blocks that modalities share: those of a vision transformer without its final norm, which is each task's."""
    return dataclasses.replace(encoder.trunk(), final_norm=False)


class SharedEncoder(nn.Module):
    """``trunk``: the blocks alone (the release's ``nn.Sequential`` of timm blocks, with LayerNorm's eps of 1e-5)."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.trunk = Trunk(config)
        self.width = config.width

    def forward(self, made: DataTokens) -> Tensor:
        """Rows [B, N, D] of tokens, every one reading every real one. Positions that are given apart are added before
        every block (openpoints, metatransformer.py, ``forward_features``)."""
        layout = None
        if made.mask is not None:
            layout = lay_out([Segment("data", made.tokens.shape[1], "image", "full")], real=made.mask)
        if made.positions is None:
            return cast(Tensor, self.trunk(made.tokens, layout))
        x = made.tokens
        for i in range(self.trunk.config.depth):
            x = cast(Tensor, self.trunk(x + made.positions, layout, layers=slice(i, i + 1)))
        return x


class Head(nn.Module):
    """``norm``, what is pooled, hidden layers, ``out``."""

    def __init__(self, width: int, config: MetaTransformerConfig, cls: bool) -> None:
        super().__init__()
        pool = ("cls" if cls else "mean") if config.pool == "auto" else config.pool
        self.pool = pool if config.predicts != "elements" else ""
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        inputs = width * (1 + self.pool.count("-"))
        layers: list[nn.Module] = []
        for hidden in config.hidden:
            layers += [
                Linear(inputs, hidden, std=inputs**-0.5),
                nn.BatchNorm1d(hidden),
                nn.ReLU(),
                nn.Dropout(config.dropout),
            ]
            inputs = hidden
        self.hidden = nn.Sequential(*layers)
        self.out = Linear(inputs, config.outputs, std=inputs**-0.5)

    def forward(self, rows: Tensor, mask: Tensor | None, cls: bool) -> Tensor:
        """Rows [B, N, D] -> outputs [B, C], or of elements [B, N, C]."""
        rows = self.norm(rows)
        if not self.pool:
            elements: Tensor = self.out(self.hidden(rows))
            return elements
        others = rows[:, int(cls) :]
        real = torch.ones_like(others[..., :1]) if mask is None else mask[:, int(cls) :, None].to(rows.dtype)
        pooled = {
            "cls": lambda: rows[:, 0],
            "mean": lambda: (others * real).sum(1) / real.sum(1).clamp(min=1),
            "max": lambda: others.masked_fill(real == 0, -torch.inf).amax(1),
        }
        out: Tensor = self.out(self.hidden(torch.cat([pooled[name]() for name in self.pool.split("-")], -1)))
        return out


class MetaTransformer(Model):
    """``data_tokenizer``, ``encoder`` (a `SharedEncoder`) and ``head``."""

    def __init__(
        self, config: MetaTransformerConfig, tokenizer: DataTokenizerConfig, encoder: ViTConfig, seed: int
    ) -> None:
        super().__init__()
        self.config, self.tokenizer_config, self.encoder_config, self.seed = config, tokenizer, encoder, seed
        self.labels = config.names
        with seeded(seed, "data_tokenizer"):
            self.data_tokenizer: DataTokenizer = tokenizer.build(encoder.width)
        with seeded(seed, "encoder"):
            self.encoder = SharedEncoder(shared_trunk(encoder))
        if config.pool.startswith("cls") and not self.data_tokenizer.cls and config.predicts != "elements":
            raise ConfigError(
                f"wiring.pool = {config.pool!r} reads a class token, and the tokenizer has none: set"
                " data_tokenizer.cls=true or wiring.pool=mean"
            )
        with seeded(seed, "head"):
            self.head = Head(encoder.width, config, self.data_tokenizer.cls)
        self._processor: ModalityProcessor | None = None

    # -- tensors ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read what the processor made.

        Returns:
            ``label_logits`` and ``label_targets`` [B, C]; or ``values`` and ``value_targets`` [B, C]; or
            ``element_logits`` [B, N, C] and ``element_targets`` [B, N] int64, -100 where a token stands for none.
        """
        made = self.data_tokenizer(batch)
        out = self.head(self.encoder(made), made.mask, self.data_tokenizer.cls)
        if self.config.predicts == "labels":
            return {"label_logits": out, "label_targets": batch["label_targets"]}
        if self.config.predicts == "values":
            return {"values": out, "value_targets": batch["value_targets"]}
        return {"element_logits": out, "element_targets": self._of_elements(made, batch["element_labels"])}

    def _of_elements(self, made: DataTokens, labels: Tensor) -> Tensor:
        """The labels [B, E] of an item's elements as those of tokens [B, N]."""
        if made.place is None:
            raise ConfigError(
                f"wiring.predicts = 'elements': tokens of {self.tokenizer_config.modality} stand for no element"
            )
        targets = labels.gather(1, made.place.clamp(min=0))
        hidden = made.place < 0 if made.mask is None else (made.place < 0) | ~made.mask.bool()
        return targets.masked_fill(hidden, -100)

    def rows(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the shared encoder makes [B, N, D] of an item's tokens."""
        encoded: Tensor = self.encoder(self.data_tokenizer(inputs))
        return encoded

    # -- capabilities ----------------------------------------------------------------------------------------------

    def read(self, samples: Sequence[Sample]) -> Tensor:
        """The head's outputs [N, ...] float32 of samples; all are collated before the first is worked on."""
        config, device = self.tokenizer_config, self.device
        batches = [config.collate(samples[i : i + CHUNK]) for i in range(0, len(samples), CHUNK)]
        with evaluating(self):
            rows = []
            for batch in batches:
                made = self.data_tokenizer({key: value.to(device) for key, value in batch.items()})
                out = self.head(self.encoder(made), made.mask, self.data_tokenizer.cls).float()
                rows.append(out if out.ndim == 2 else out[:, int(self.data_tokenizer.cls) :])
            return torch.cat(rows) if rows else torch.empty(0, self.config.outputs, device=device)

    def example_samples(self, count: int) -> list[Sample]:
        """Samples that the model can be asked about."""
        return self.tokenizer_config.examples(count)

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def processor(self) -> ModalityProcessor:
        """Turns samples into the tokenizer's inputs and what is predicted of them.

        Raises:
            ConfigError: No labels' names.
        """
        if self._processor is None:
            c = self.config
            if c.predicts != "values" and not self.labels:
                raise ConfigError("a sample's label needs the labels' names: set wiring.labels or wiring.labels_of")
            self._processor = ModalityProcessor(
                self.tokenizer_config, c.predicts, self.labels, c.label_key, c.outputs, self.seed
            )
        return self._processor

    def positions_of(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[2] int64: positions of text, and of any other modality."""
        if "attention_mask" in batch:
            text = batch["attention_mask"].sum().long()
            return torch.stack([text, torch.zeros_like(text)])
        count = next(iter(batch.values()))
        other = torch.tensor(len(count) * self.data_tokenizer.tokens, device=count.device)
        return torch.stack([torch.zeros_like(other), other])

    def layouts(self) -> dict[str, Layout]:
        """The sequence of one item, everything reading everything."""
        name = self.tokenizer_config.modality
        return {name: lay_out([Segment(name, self.data_tokenizer.tokens, "image", "full")])}

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """What the tokenizer calls an example, with label 0."""
        like = next(self.encoder.parameters())
        batch = {
            key: value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)
            for key, value in self.tokenizer_config.example(batch_size).items()
        }
        c = self.config
        if c.predicts == "labels":
            batch["label_targets"] = torch.zeros(batch_size, c.outputs, device=like.device)
            batch["label_targets"][:, 0] = 1.0
        elif c.predicts == "values":
            batch["value_targets"] = torch.ones(batch_size, c.outputs, device=like.device)
        else:
            batch["element_labels"] = torch.zeros(batch_size, ELEMENTS, dtype=torch.long, device=like.device)
        return batch


class MetaTransformerLabels(MetaTransformer):
    """It names one of several labels."""

    provides: ClassVar[frozenset[str]] = frozenset({"label_logits", "label_targets"})

    def classify_samples(self, samples: Sequence[Sample]) -> Tensor:
        """Logits [N, C] float32 of every label.

        Raises:
            DataError: A sample that cannot be read; nothing was computed by then.
        """
        return self.read(samples)


class MetaTransformerValues(MetaTransformer):
    """It predicts numbers."""

    provides: ClassVar[frozenset[str]] = frozenset({"values", "value_targets"})

    def predict_samples(self, samples: Sequence[Sample]) -> Tensor:
        """Values [N, C] float32.

        Raises:
            DataError: A sample that cannot be read; nothing was computed by then.
        """
        return self.read(samples)


class MetaTransformerElements(MetaTransformer):
    """It labels the elements of an item."""

    provides: ClassVar[frozenset[str]] = frozenset({"element_logits", "element_targets"})

    def predict_samples(self, samples: Sequence[Sample]) -> Tensor:
        """Logits [N, T, C] float32 of the tokens behind the class token.

        Raises:
            DataError: A sample that cannot be read; nothing was computed by then.
        """
        return self.read(samples)


MODELS: dict[str, type[MetaTransformer]] = {
    "labels": MetaTransformerLabels,
    "values": MetaTransformerValues,
    "elements": MetaTransformerElements,
}
"""What is predicted -> the model."""

ELEMENTS = 8192
"""Elements of an item that an example has labels for: more than any tokenizer's items have."""


def together(encoder: SharedEncoder, sequences: Sequence[DataTokens]) -> Tensor:
    """One pass over several modalities: their tokens one behind the other [B, sum of N, D] (the card's section 3).

    Positions that are given apart are zero for those that have none; pads are read by nobody.
    """
    tokens = torch.cat([made.tokens for made in sequences], 1)
    mask = positions = None
    if any(made.mask is not None for made in sequences):
        masks = [m.mask.bool() if m.mask is not None else torch.ones_like(m.tokens[..., 0]).bool() for m in sequences]
        mask = torch.cat(masks, 1)
    if any(made.positions is not None for made in sequences):
        positions = torch.cat([m.positions if m.positions is not None else 0 * m.tokens for m in sequences], 1)
    rows: Tensor = encoder(DataTokens(tokens, mask, positions=positions))
    return rows


@torch.no_grad()
def share_encoder(models: Sequence[MetaTransformer]) -> SharedEncoder:
    """Let models of several modalities use one encoder: one module in all of them, the first one's.

    Raises:
        ConfigError: Their encoders differ in shape or weights: one of them was tuned, or they began from others.
    """
    first = models[0].encoder
    weights = first.state_dict()
    for model in models[1:]:
        own = model.encoder.state_dict()
        same = own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in own)
        if not same:
            raise ConfigError(
                f"the encoder before {model.tokenizer_config.modality} is not that before"
                f" {models[0].tokenizer_config.modality}: models share one encoder that was frozen in all of them"
            )
        model.encoder = first
    return first
