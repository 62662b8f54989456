"""A training step of the zoo's ALBEF, VLMo and BEiT-3 beside public code of the same model at equal size: time, memory.

    pip install --no-deps torchmultimodal-nightly iopath portalocker torchscale==0.3.0 fairscale
    python benchmarks/fused_step.py --unilm PATH         # a checkout of github.com/microsoft/unilm; four minutes

One process, alternating rounds, medians; forward, losses, backward, clipping and AdamW, without data loading, as in
``blip_step.py``. Both sides read the same pixels, ids and masks; dropout and stochastic depth are off.

albef: torchmultimodal's ``ALBEFModelWithSimilarity`` and ``ImageTextContrastiveLoss`` with a matching head, contrast
and matching (it ships no masked-language head).
vlmo: unilm's ``VLMo`` with its ``compute_itc``, ``compute_itm_hardneg`` and ``compute_mlm``, from the same weights; the
first losses differ by the negatives drawn.
beit3: retrieval on torchscale's ``BEiT3``, as unilm's ``BEiT3ForRetrieval`` puts it together, from the same weights.
"""

from __future__ import annotations

import argparse
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from blip_step import line
from coca_step import Step, stepper
from torch import Tensor, nn

from zoo.api import build_module
from zoo.compare.record import git_state, hardware, versions
from zoo.recipe import resolve
from zoo.torchvision_ops import ensure
from zoo.weights.keymaps import beit3 as beit3_maps
from zoo.weights.keymaps import vlmo as vlmo_maps

ensure()

QUEUE = 8  # batches
Case = tuple[Any, nn.Module, Callable[[], Tensor], Callable[[], Tensor]]


def rows(image: Any, batch: int, length: int) -> dict[str, Tensor]:
    """Pixels, ids with [CLS] and [SEP], mask; lengths from half of ``length`` to all of it."""
    lengths = torch.randint(length // 2, length + 1, (batch,))
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    ids = torch.randint(4, 1000, (batch, length))
    ids[:, 0] = 1
    ids[torch.arange(batch), lengths - 1] = 2
    return {
        "pixel_values": torch.randn(batch, 3, image.image_size, image.image_size),
        "input_ids": ids * mask,
        "attention_mask": mask,
    }


def albef(scale: str, batch: int, length: int, unilm: Path | None) -> Case:
    from torchmultimodal.models.albef.image_encoder import ALBEFVisionEncoder
    from torchmultimodal.models.albef.model import ALBEFModel, ALBEFModelWithSimilarity
    from torchmultimodal.models.albef.multimodal_encoder import ALBEFMultimodalEncoder
    from torchmultimodal.modules.encoders.bert_text_encoder import bert_text_encoder
    from torchmultimodal.modules.losses.albef import ImageTextContrastiveLoss

    recipe = resolve(
        "albef",
        scale=scale,
        choices={"objective": ["momentum-contrastive", "matching"]},
        values={
            "objective": {"momentum-contrastive": {"queue_size": QUEUE * batch, "ramp": 0.0}},
            "text_encoder": {"dropout": 0.0, "lm_head": False},
        },
    )
    image: Any = recipe.parts["encoder"][1]
    text: Any = recipe.parts["text_encoder"][1]
    wiring: Any = recipe.wiring[1]
    data = rows(image, batch, length)
    module = build_module(recipe, 0).train()
    half = round(text.depth * text.text_share)
    sizes = {"hidden_size": text.width, "num_attention_heads": text.heads, "intermediate_size": text.ffn}
    model = ALBEFModel(
        ALBEFVisionEncoder(
            image.image_size, image.patch_size, image.depth, image.heads, image.width, image.ffn,
            layer_norm_eps=image.eps,
        ),
        bert_text_encoder(
            **sizes, num_hidden_layers=half, dropout=0.0, vocab_size=text.vocab_size,
            max_position_embeddings=text.context_length,
        ),
        ALBEFMultimodalEncoder(**sizes, num_hidden_layers=text.depth - half),
    )  # fmt: skip
    width = wiring.embed_width
    paired = ALBEFModelWithSimilarity(
        model, nn.Linear(image.width, width), nn.Linear(text.width, width), embed_size=width, queue_size=QUEUE * batch
    )
    peer = nn.ModuleDict({"model": paired, "head": nn.Linear(text.width, 2)}).train()
    criterion = ImageTextContrastiveLoss()
    index, mask = torch.arange(batch), data["attention_mask"].long()
    labels = torch.cat([torch.ones(batch), torch.zeros(2 * batch)]).long()

    def theirs() -> Tensor:
        out = paired(data["pixel_values"], data["input_ids"], mask, index)
        contrast = criterion(*out.similarity, out.sim_targets, alpha=0.4)
        states = torch.cat([out.multimodal_embeddings[:, 0], out.multimodal_embeddings_neg[:, 0]])
        total: Tensor = contrast + F.cross_entropy(peer["head"](states), labels)
        return total

    return module, peer, lambda: module.losses(data)[0], theirs


def unilm_vlmo(folder: Path) -> Any:
    """unilm's VLMo module; its imports of a logger, of metrics and of a trainer of 2021 are answered by empty ones."""

    def stub(name: str, **values: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(values)

    class Bare(nn.Module):
        device = torch.device("cpu")

        def log(self, *_: Any) -> None: ...

        def save_hyperparameters(self) -> None: ...

    def quiet(*_: Any) -> None: ...

    stub("pytorch_lightning", LightningModule=Bare)
    stub("pytorch_lightning.utilities")
    stub("pytorch_lightning.utilities.distributed", rank_zero_info=quiet)
    stub("vlmo.modules.vlmo_utils", set_metrics=quiet)
    for absent in ("scipy", "einops"):
        if absent not in sys.modules:
            stub(absent, interpolate=None, rearrange=None)
    stub("vlmo")
    stub("vlmo.modules")
    root = folder / "vlmo" / "vlmo"
    sys.modules["vlmo"].__path__ = [str(root)]
    sys.modules["vlmo.modules"].__path__ = [str(root / "modules")]
    vars(sys.modules["vlmo"])["modules"] = sys.modules["vlmo.modules"]
    vars(sys.modules["vlmo.modules"])["vlmo_utils"] = sys.modules["vlmo.modules.vlmo_utils"]
    import vlmo.modules.vlmo_module as released

    return released


def vlmo(scale: str, batch: int, length: int, unilm: Path | None) -> Case:
    if unilm is None:
        raise SystemExit("vlmo: give --unilm PATH, a checkout of github.com/microsoft/unilm, or --steps albef,beit3")
    recipe = resolve("vlmo", scale=scale, values={"trunk": {"drop_path": 0.0}})
    size: Any = recipe.parts["trunk"][1]
    data = rows(size, batch, length)
    masked = torch.rand(batch, length) < 0.15
    masked[:, 1] = True
    masked &= data["attention_mask"]
    data["masked_ids"] = data["input_ids"].masked_fill(masked, 3)
    data["masked_labels"] = data["input_ids"].masked_fill(~masked, -100)
    data["negative_images"] = data["negative_texts"] = torch.arange(batch).roll(1)
    module = build_module(recipe, 0).train()
    released = unilm_vlmo(unilm)
    names = ("itm", "itc", "mlm", "textmlm", "vqa", "nlvr2", "irtr")
    config = {
        "image_size": size.image_size, "model_arch": "", "drop_path_rate": 0.0, "load_path": "", "test_only": False,
        "vocab_size": size.vocab_size, "max_text_len": length, "max_text_len_of_initckpt": size.text_rows,
        "loss_names": {name: float(name in names[:3]) for name in names},
    }  # fmt: skip
    hparams = types.SimpleNamespace(config=config)
    released.VLMo.hparams = hparams

    def trunk(*_: Any, **__: Any) -> nn.Module:
        out: nn.Module = released.vlmo.modules.multiway_transformer.MultiWayTransformer(
            img_size=size.image_size, patch_size=size.patch_size, embed_dim=size.width, depth=size.depth,
            num_heads=size.heads, mlp_ratio=size.ffn / size.width,
            vlffn_start_layer_index=size.depth - size.pair_layers, config=config,
        )  # fmt: skip
        return out

    released.create_model = trunk
    peer = released.VLMo(config).train()
    for phase in ("itc", "itm", "mlm"):
        for name in ("loss", "accuracy", "logit_scale", "i2t_accuracy", "t2i_accuracy"):
            setattr(peer, f"train_{phase}_{name}", lambda *_: None)
            setattr(peer, f"train_{phase}_vl_{name}", lambda *_: None)
    state = vlmo_maps.keymap(layers=size.depth).save(module.model.state_dict())[0]
    report = peer.load_state_dict(state, strict=False)
    left = [name for name in report.missing_keys if "position" not in name]
    assert not left, left
    assert not report.unexpected_keys, report
    # transformers 5 adds absolute positions whatever the configuration says; the release of then had none here
    nn.init.zeros_(peer.text_embeddings.position_embeddings.weight).requires_grad_(False)
    objectives = released.objectives
    batch_of = {
        "image": [data["pixel_values"]], "text_ids": data["input_ids"], "text_masks": data["attention_mask"].long(),
        "text_labels": data["input_ids"], "text_ids_mlm": data["masked_ids"], "text_labels_mlm": data["masked_labels"],
    }  # fmt: skip
    Tensor.get_device = lambda self: "cpu" if not self.is_cuda else self.device  # type: ignore[assignment,method-assign]

    def theirs() -> Tensor:
        contrast = objectives.compute_itc(peer, batch_of)
        match = objectives.compute_itm_hardneg(
            peer, batch_of, contrast["itc_i2t_logits"].detach(), contrast["itc_t2i_logits"].detach()
        )
        words = objectives.compute_mlm(peer, batch_of)
        total: Tensor = contrast["itc_loss"] + match["itm_loss"] + words["mlm_loss"]
        return total

    return module, peer, lambda: module.losses(data)[0], theirs


class Retrieval(nn.Module):
    """unilm's ``BEiT3ForRetrieval`` on torchscale's BEiT3, with the plain symmetric loss."""

    def __init__(self, size: Any) -> None:
        super().__init__()
        from torchscale.architecture.config import EncoderConfig
        from torchscale.model.BEiT3 import BEiT3

        self.beit3 = BEiT3(
            EncoderConfig(
                img_size=size.image_size, patch_size=size.patch_size, vocab_size=size.vocab_size, multiway=True,
                layernorm_embedding=False, normalize_output=True, no_output_layer=True, drop_path_rate=0.0,
                encoder_embed_dim=size.width, encoder_attention_heads=size.heads, encoder_ffn_embed_dim=size.ffn,
                encoder_layers=size.depth,
            )
        )  # fmt: skip
        self.language_head = nn.Linear(size.width, size.width, bias=False)
        self.vision_head = nn.Linear(size.width, size.width, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        image = self.beit3(visual_tokens=data["pixel_values"])["encoder_out"][:, 0]
        pads = ~data["attention_mask"]
        text = self.beit3(textual_tokens=data["input_ids"], text_padding_position=pads)["encoder_out"][:, 0]
        image, text = F.normalize(self.vision_head(image), dim=-1), F.normalize(self.language_head(text), dim=-1)
        logits = self.logit_scale.exp() * image @ text.T
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def beit3(scale: str, batch: int, length: int, unilm: Path | None) -> Case:
    recipe = resolve("beit3-retrieval", scale=scale, values={"trunk": {"drop_path": 0.0}})
    size: Any = recipe.parts["trunk"][1]
    data = rows(size, batch, length)
    module = build_module(recipe, 0).train()
    peer = Retrieval(size).train()
    state = beit3_maps.model_keymap("masked").save(module.model.state_dict())[0]
    report = peer.load_state_dict(state, strict=False)
    assert not report.unexpected_keys, report
    assert all("embed_positions" in name or "mask_token" in name for name in report.missing_keys), report
    return module, peer, lambda: module.losses(data)[0], lambda: peer(data)


STEPS = {"albef": albef, "vlmo": vlmo, "beit3": beit3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=16, help="longest text, tokens")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--unilm", type=Path, default=None)
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    lines = []
    for name in arguments.steps.split(","):
        torch.manual_seed(0)
        module, peer, ours, theirs = STEPS[name](arguments.scale, arguments.batch, arguments.length, arguments.unilm)
        if name == "vlmo" and not torch.distributed.is_initialized():  # its objectives gather
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        losses = []
        for loss in (ours, theirs):
            torch.manual_seed(1)
            losses.append(f"{float(loss().detach()):.4f}")
        own, other = (sum(p.numel() for p in m.parameters() if p.requires_grad) / 1e6 for m in (module, peer))
        steps: dict[str, Step] = {
            "zoo": stepper([p for p in module.parameters() if p.requires_grad], ours),
            "public": stepper([p for p in peer.parameters() if p.requires_grad], theirs),
        }
        about = f"{name} ({own:.2f} and {other:.2f} M trained, first loss {' and '.join(losses)})"
        lines.append(line(about, steps, arguments.rounds, clock))
        del module, peer, ours, theirs, steps
    state, machine = git_state() or {"commit": "installed", "dirty": False}, hardware()
    commit = state["commit"][:12] + (" (dirty)" if state["dirty"] else "")
    print(f"commit {commit}; {machine['cpu']}, {machine['threads']} threads; torch {versions()['torch']}; fp32;")
    print(f"scale {arguments.scale}, batch {arguments.batch}, texts of up to {arguments.length} tokens;", end=" ")
    print(f"medians of {arguments.rounds} alternating rounds, {arguments.clock} time\n")
    print("| step | zoo, ms | public, ms | time ratio | zoo, MiB | public, MiB | memory ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
