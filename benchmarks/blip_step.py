"""A training step of the zoo's BLIP beside transformers' BLIP at equal size: time and peak memory.

    python benchmarks/blip_step.py                       # scale=tiny, batch 64; about three minutes on two cores
    python benchmarks/blip_step.py --scale published --batch 4 --rounds 2 --steps caption

``--clock cpu`` counts the time of this process alone, for a machine with other work on it (one thread).

One process, alternating rounds, medians; forward, losses, backward, clipping and AdamW, without data loading. Both read
the same pixels and padded ids and start from the same weights, so that their first losses can be compared as well.

caption: ``BlipForConditionalGeneration``. matching: ``BlipForImageTextRetrieval`` with its matching head, half of the
pairs matching. pretraining: there is no such class in transformers; its modules are put together as the released
``models/blip_pretrain.py`` does (momentum copies, queue, 1 + 1 unimodal, B + 2B multimodal and B decoder passes).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from coca_step import Step, peak_bytes, stepper, timed
from torch import Tensor, nn

from zoo.api import build_module
from zoo.compare.record import git_state, hardware, versions
from zoo.recipe import Recipe, resolve
from zoo.weights.formats.blip import MAPS
from zoo.weights.keymaps import blip as maps

QUEUE = 8  # batches
START, READ = -2, -1  # [DEC] and [ENC], counted from the end of the vocabulary


def config_of(recipe: Recipe) -> Any:
    """transformers' configuration of the same sizes."""
    import transformers

    image: Any = recipe.parts["encoder"][1]
    text: Any = recipe.parts.get("decoder", recipe.parts.get("text_encoder", ("", None)))[1]
    vision = {
        "hidden_size": image.width, "intermediate_size": image.ffn, "num_hidden_layers": image.depth,
        "num_attention_heads": image.heads, "image_size": image.image_size, "patch_size": image.patch_size,
        "layer_norm_eps": image.eps,
    }  # fmt: skip
    words = {
        "vocab_size": text.vocab_size, "hidden_size": text.width, "encoder_hidden_size": image.width,
        "intermediate_size": text.ffn, "num_hidden_layers": text.depth, "num_attention_heads": text.heads,
        "max_position_embeddings": text.context_length, "label_smoothing": 0.1,
        "hidden_dropout_prob": text.dropout, "attention_probs_dropout_prob": text.dropout,
    }  # fmt: skip
    width = getattr(recipe.wiring[1], "embed_width", 256)
    return transformers.BlipConfig(vision_config=vision, text_config=words, image_text_hidden_size=width)


def rows(recipe: Recipe, batch: int, length: int) -> dict[str, Tensor]:
    """Pixels, ids with [CLS] and [SEP], mask; lengths from half of ``length`` to all of it."""
    image: Any = recipe.parts["encoder"][1]
    lengths = torch.randint(length // 2, length + 1, (batch,))
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    ids = torch.randint(4, 1000, (batch, length))
    ids[:, 0] = 1
    ids[torch.arange(batch), lengths - 1] = 2
    side = image.image_size
    return {"pixel_values": torch.randn(batch, 3, side, side), "input_ids": ids * mask, "attention_mask": mask}


def same_weights(module: Any, peer: nn.Module, wiring: str) -> None:
    keymap = maps.transformers(MAPS[wiring]())
    state = {n: t for n, t in keymap.save(module.model.state_dict())[0].items() if n in peer.state_dict()}
    missing = peer.load_state_dict(state, strict=False).missing_keys
    assert all("predictions.decoder" in name or "position_ids" in name for name in missing), missing


def started(ids: Tensor, vocab: int, first: int) -> Tensor:
    return torch.cat([torch.full_like(ids[:, :1], vocab + first), ids[:, 1:]], 1)


def caption(scale: str, batch: int, length: int) -> tuple[Any, nn.Module, Callable[[], Tensor], Callable[[], Tensor]]:
    import transformers

    recipe = resolve("blip-caption", scale=scale)
    data = rows(recipe, batch, length)
    module = build_module(recipe, 0).train()
    peer = transformers.BlipForConditionalGeneration(config_of(recipe)).train()
    same_weights(module, peer, "writer")
    labels = data["input_ids"].masked_fill(~data["attention_mask"], -100)
    own_labels = labels.clone()
    own_labels[:, 0] = -100
    ids = started(data["input_ids"], module.model.decoder.vocab_size, START)
    ours = {**data, "labels": own_labels}

    def theirs() -> Tensor:
        mask = data["attention_mask"].long()
        out: Tensor = peer(
            pixel_values=data["pixel_values"], input_ids=ids, attention_mask=mask, labels=labels
        ).loss  # the first label is not looked at
        return out

    return module, peer, lambda: module.losses(ours)[0], theirs


def matching(scale: str, batch: int, length: int) -> tuple[Any, nn.Module, Callable[[], Tensor], Callable[[], Tensor]]:
    import transformers

    recipe = resolve("blip-retrieval", scale=scale)
    data = rows(recipe, batch, length)
    module = build_module(recipe, 0).train()
    peer = transformers.BlipForImageTextRetrieval(config_of(recipe)).train()
    same_weights(module, peer, "fusion")
    labels = torch.arange(batch) % 2
    ids = started(data["input_ids"], recipe.parts["text_encoder"][1].vocab_size, READ)  # type: ignore[attr-defined]
    pixels, mask = data["pixel_values"], data["attention_mask"]

    def ours() -> Tensor:
        return F.cross_entropy(module.model.match_logits(pixels, data["input_ids"], mask), labels)

    def theirs() -> Tensor:
        return F.cross_entropy(peer(input_ids=ids, pixel_values=pixels, attention_mask=mask.long()).itm_score, labels)

    for model in (module.model, peer):  # what a matching step does not train
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("projection", "vision_proj", "text_proj", "temperature")):
                parameter.requires_grad_("self_attn" in name)
    return module, peer, ours, theirs


class Pretraining(nn.Module):
    """The released pre-training step on transformers' modules."""

    def __init__(self, config: Any, queue: int) -> None:
        super().__init__()
        import transformers

        retrieval = transformers.BlipForImageTextRetrieval(config)
        captioner = transformers.BlipForConditionalGeneration(config)
        self.vision_model, self.text_encoder = retrieval.vision_model, retrieval.text_encoder
        self.vision_proj, self.text_proj, self.itm_head = retrieval.vision_proj, retrieval.text_proj, retrieval.itm_head
        self.text_decoder = captioner.text_decoder
        bert = self.text_decoder.bert
        bert.embeddings = self.text_encoder.embeddings
        self.text_decoder.cls.predictions.decoder.weight = bert.embeddings.word_embeddings.weight
        for mine, other in zip(bert.encoder.layer, self.text_encoder.encoder.layer, strict=True):
            mine.crossattention, mine.intermediate, mine.output = other.crossattention, other.intermediate, other.output
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.slow = nn.ModuleDict(
            {n: copy.deepcopy(getattr(self, n)) for n in ("vision_model", "text_encoder", "vision_proj", "text_proj")}
        ).requires_grad_(False)
        width = config.image_text_hidden_size
        self.register_buffer("queues", F.normalize(torch.randn(2, queue, width), dim=-1))
        self.vocab = config.text_config.vocab_size

    def features(self, parts: Any, data: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        image = parts["vision_model"](data["pixel_values"]).last_hidden_state
        mask = data["attention_mask"].long()
        text = parts["text_encoder"](input_ids=data["input_ids"], attention_mask=mask).last_hidden_state
        project = [parts["vision_proj"](image[:, 0]), parts["text_proj"](text[:, 0])]
        return image, F.normalize(project[0], dim=-1), F.normalize(project[1], dim=-1)

    def match(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        out = self.text_encoder(input_ids=ids, attention_mask=mask.long(), encoder_hidden_states=image)
        return out.last_hidden_state[:, 0]

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            for name, part in self.slow.items():
                for m, p in zip(part.parameters(), getattr(self, name).parameters(), strict=True):
                    m.mul_(0.995).add_(p, alpha=0.005)
            _, slow_image, slow_text = self.features(self.slow, data)
        image, image_feat, text_feat = self.features(dict(self.named_children()), data)
        loss = torch.zeros(())
        count = len(image)
        similarities = []
        for mine, own, others, queue in (
            (image_feat, slow_image, slow_text, self.queues[1]), (text_feat, slow_text, slow_image, self.queues[0]),
        ):  # fmt: skip
            keys = torch.cat([others, queue])
            similarity = mine @ keys.T / self.temp
            with torch.no_grad():
                target = 0.4 * (own @ keys.T / self.temp).softmax(-1) + 0.6 * torch.eye(count, len(keys))
            loss = loss - (similarity.log_softmax(-1) * target).sum(-1).mean() / 2
            similarities.append(similarity[:, :count].detach())
        ids, mask = started(data["input_ids"], self.vocab, READ), data["attention_mask"]
        weights = [(s.softmax(-1) + 1e-4).fill_diagonal_(0) for s in similarities]
        other_text, other_image = (torch.multinomial(w, 1)[:, 0] for w in weights)
        own = self.match(ids, mask, image)
        texts, masks = torch.cat([ids, ids[other_text]]), torch.cat([mask, mask[other_text]])
        others = self.match(texts, masks, torch.cat([image[other_image], image]))
        labels = torch.cat([torch.ones(count), torch.zeros(2 * count)]).long()
        loss = loss + F.cross_entropy(self.itm_head(torch.cat([own, others])), labels)
        written = started(data["input_ids"], self.vocab, START)
        targets = data["input_ids"].masked_fill(~mask, -100)
        out = self.text_decoder(
            input_ids=written, attention_mask=mask.long(), encoder_hidden_states=image, labels=targets, reduction="mean"
        )
        with torch.no_grad():
            self.queues.copy_(self.queues.roll(count, 1))
            self.queues[:, :count] = torch.stack([slow_image, slow_text])
        total: Tensor = loss + out.loss
        return total


def pretraining(
    scale: str, batch: int, length: int
) -> tuple[Any, nn.Module, Callable[[], Tensor], Callable[[], Tensor]]:
    objective = {"momentum-contrastive": {"queue_size": QUEUE * batch, "ramp": 0.0}}
    recipe = resolve("blip", scale=scale, values={"objective": objective})
    data = rows(recipe, batch, length)
    module = build_module(recipe, 0).train()
    peer = Pretraining(config_of(recipe), QUEUE * batch).train()
    keymap = maps.transformers(maps.med_keymap())
    peer.load_state_dict(keymap.save(module.model.state_dict())[0], strict=False)
    peer.slow.load_state_dict({n: t for n, t in peer.state_dict().items() if n in peer.slow.state_dict()})
    return module, peer, lambda: module.losses(data)[0], lambda: peer(data)


def line(name: str, steps: dict[str, Step], rounds: int, clock: Callable[[], float]) -> str:
    """A row of the table."""
    seconds = timed(steps, rounds, torch.device("cpu"), clock)
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    own, peer = (statistics.median(values) for values in seconds.values())
    mine, theirs = (peak_bytes(step, torch.device("cpu")) / 2**20 for step in steps.values())
    return (
        f"| {name} | {own * 1e3:.0f} | {peer * 1e3:.0f} | {ratio:.2f} | {mine:.0f} | {theirs:.0f} |"
        f" {mine / theirs:.2f} |"
    )


STEPS = {"caption": caption, "matching": matching, "pretraining": pretraining}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=16, help="longest text, tokens")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--steps", default=",".join(STEPS))
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    lines = []
    for name in arguments.steps.split(","):
        torch.manual_seed(0)
        module, peer, ours, theirs = STEPS[name](arguments.scale, arguments.batch, arguments.length)
        losses = []
        for loss in (ours, theirs):
            torch.manual_seed(1)
            losses.append(f"{float(loss().detach()):.4f}")
        steps: dict[str, Step] = {
            "zoo": stepper([p for p in module.parameters() if p.requires_grad], ours),
            "transformers": stepper([p for p in peer.parameters() if p.requires_grad], theirs),
        }
        lines.append(line(f"{name} (first loss {' and '.join(losses)})", steps, arguments.rounds, clock))
        del module, peer, ours, theirs, steps
    state, machine = git_state() or {"commit": "installed", "dirty": False}, hardware()
    commit = state["commit"][:12] + (" (dirty)" if state["dirty"] else "")
    print(f"commit {commit}; {machine['cpu']}, {machine['threads']} threads; torch {versions()['torch']}; fp32;")
    print(f"scale {arguments.scale}, batch {arguments.batch}, texts of up to {arguments.length} tokens;", end=" ")
    print(f"medians of {arguments.rounds} alternating rounds, {arguments.clock} time\n")
    print("| step | zoo, ms | transformers, ms | time ratio | zoo, MiB | transformers, MiB | memory ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
