"""Masked-token decoding: the released schedules, counts, selections and whole loops, and what must never change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AmusedScheduler
from torch import Tensor

from zoo.errors import ConfigError
from zoo.sampling.guidance import drawn, image_text_weights, mixed, raced, weights
from zoo.sampling.masked import RULES, MaskedDecoding, Recorded, Streams, decode, gumbel, least, mask_ratio
from zoo.sampling.text import streams

NAMES = {"cosine": "cosine", "linear": "linear", "pow1.0": "pow1_0", "pow2.0": "pow2_0", "pow0.5": "pow0_5"}


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("discrete_diffusion")


@pytest.mark.parametrize("name", [*NAMES, "sigmoid", "sqrt"])
def test_schedules(g: Any, name: str) -> None:
    stored = g.outputs[f"schedule_{NAMES.get(name, {'sqrt': 'pow0_5'}.get(name, name))}"]
    torch.testing.assert_close(mask_ratio(name, g.inputs["ratio"]), stored, atol=1e-6, rtol=1e-6)


def test_schedules_by_hand() -> None:
    r = torch.tensor([0.0, 0.5, 1.0])
    for name, middle in (
        ("cosine", 0.5**0.5),
        ("linear", 0.5),
        ("pow3", 0.875),
        ("sqrt", 1 - 0.5**0.5),
        ("sigmoid", 0.5),
    ):
        torch.testing.assert_close(mask_ratio(name, r), torch.tensor([1.0, middle, 0.0]), atol=2e-6, rtol=0)


def test_mask_counts_of_show_o(g: Any) -> None:
    for i, slots in enumerate((16, 256, 1024)):
        for j, steps in enumerate((1, 2, 8, 18, 50)):
            decoding, unknown, counts = MaskedDecoding(steps=steps), torch.tensor([slots]), []
            for step in range(steps):
                unknown = decoding.kept(step, unknown, slots)
                counts.append(int(unknown))
            assert counts == g.outputs["showo_mask_counts"][i, j, :steps].tolist()


@pytest.mark.parametrize(("number", "temperature"), [(0, 0.0), (1, 1.0), (2, 4.0)])
def test_selection(g: Any, number: int, temperature: float) -> None:
    p, uniform = g.inputs["topk_probs"], g.inputs["topk_uniform"]
    known = p > 1
    confidence = (p.log() + temperature * gumbel(uniform)).masked_fill(known, torch.inf)
    count = g.inputs["topk_mask_len"][:, 0].long()
    for selection in ("cutoff", "exact"):
        assert torch.equal(least(confidence, count, selection), g.outputs["topk_masking"][number])


def test_selections_differ_in_a_tie_only() -> None:
    confidence = torch.tensor([[0.5, 0.1, 0.5, 0.5, torch.inf]])
    two = torch.tensor([2])
    assert least(confidence, two).tolist() == [[False, True, False, False, False]]
    assert least(confidence, two, "exact").tolist() == [[True, True, False, False, False]]
    known = torch.full((1, 3), torch.inf)
    assert not least(known, torch.tensor([1])).any()
    assert not least(known, torch.tensor([1]), "exact").any()
    assert least(torch.zeros(1, 1), torch.tensor([1])).all()


@pytest.mark.parametrize("name", ["cosine", "linear2d", "inpaint"])
def test_loops_of_amused_scheduler(g: Any, name: str) -> None:
    c, steps = g.config["loops"][name], g.config["loops"][name]["steps"]
    first = c["temperature"]
    t0, t1 = first if isinstance(first, list) else (first, 0.01)
    decoding = MaskedDecoding(
        steps=steps, schedule=c["masking_schedule"], temperature=t0, last_temperature=t1, annealing="linspace",
        starting_ratio=c["starting_mask_ratio"],
    )  # fmt: skip
    torch.testing.assert_close(
        torch.tensor(decoding.temperatures()), g.outputs[f"{name}_temperatures"], atol=1e-6, rtol=1e-6
    )
    codes = g.inputs[f"{name}_start"].flatten(1)
    mask, logits = g.config["mask_token_id"], g.inputs[f"{name}_logits"]
    seen: list[tuple[Tensor, Tensor]] = []
    result = decode(
        codes, codes == mask,
        lambda ids, unknown: logits[len(seen)][unknown],
        decoding,
        Recorded(g.inputs[f"{name}_exp_noise"], g.inputs[f"{name}_uniform"]),
        lambda step, ids, again: seen.append((ids, again)),
    )  # fmt: skip
    for step, (ids, again) in enumerate(seen):
        assert torch.equal(ids, g.outputs[f"{name}_x0"][step].flatten(1))
        assert torch.equal(ids.masked_fill(again, mask), g.outputs[f"{name}_samples"][step].flatten(1))
    assert torch.equal(result, g.outputs[f"{name}_samples"][-1].flatten(1))


class FromOneGenerator:
    """Draws as diffusers makes them: whole batches from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def codes(self, step: int, p: Tensor, unknown: Tensor) -> Tensor:
        every = torch.full((*unknown.shape, p.shape[-1]), 1 / p.shape[-1])
        every[unknown] = p
        ids = torch.multinomial(every.flatten(0, 1), 1, generator=self.generator)[:, 0]
        return ids.view(unknown.shape)[unknown]

    def uniform(self, step: int, unknown: Tensor) -> Tensor:
        return torch.zeros(unknown.shape).uniform_(0, 1, generator=self.generator)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_amused_scheduler_with_a_fixed_generator(steps: int, schedule: str) -> None:
    batch, slots, vocabulary, mask = 3, 24, 11, 12
    logits = torch.randn(steps, batch, slots, vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    scheduler = AmusedScheduler(mask_token_id=mask, masking_schedule=schedule)
    scheduler.set_timesteps(steps, temperature=(2, 0))
    sample = torch.full((batch, slots), mask)
    generator = torch.Generator().manual_seed(7)
    for step, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.step(logits[step], timestep, sample, generator=generator).prev_sample
    number = iter(range(steps))
    decoding = MaskedDecoding(steps=steps, schedule=schedule, temperature=2.0, annealing="linspace")
    ours = decode(
        torch.zeros(batch, slots, dtype=torch.long), torch.ones(batch, slots, dtype=torch.bool),
        lambda ids, unknown: logits[next(number)][unknown],
        decoding,
        FromOneGenerator(torch.Generator().manual_seed(7)),
    )  # fmt: skip
    assert torch.equal(ours, sample)


def toy(codes: Tensor, unknown: Tensor) -> Tensor:
    """A model whose logits depend on every code of the row."""
    table = torch.randn(10, 9, generator=torch.Generator().manual_seed(3))
    seen = torch.where(unknown, 9, codes)
    place = torch.arange(codes.shape[1], dtype=torch.float)[:, None].sin()
    return (3 * table[seen].mean(1, keepdim=True) + 2 * table[(seen + 1) % 10] * place)[unknown]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [1, 2, 8, 18, 50])
def test_revealed_codes_never_change_and_all_are_revealed(rule: str, steps: int) -> None:
    codes = torch.randint(0, 9, (4, 20), generator=torch.Generator().manual_seed(0))
    unknown = torch.ones(4, 20, dtype=torch.bool)
    unknown[1, 3:9] = False
    unknown[2] = False
    unknown[3, 1:] = False  # one slot only
    decoding = MaskedDecoding(**{**vars(RULES[rule]), "steps": steps, "guidance": RULES[rule].guidance})
    states: list[tuple[Tensor, Tensor]] = []
    result = decode(
        codes, unknown, toy, decoding, Streams(streams(0, 0, 4)), lambda step, ids, again: states.append((ids, again))
    )
    assert len(states) == steps
    assert torch.equal(result[~unknown], codes[~unknown])
    before = unknown
    for step, (ids, again) in enumerate(states):
        assert torch.equal(ids[~before], (codes if step == 0 else states[step - 1][0])[~before])
        assert not (again & ~before).any()
        expected = torch.where(before.sum(1) > 0, decoding.kept(step, before.sum(1), 20, start(decoding, unknown)), 0)
        if step + 1 < steps:
            assert torch.equal(again.sum(1), expected)
        before = again
    assert not before.any()


def start(decoding: MaskedDecoding, unknown: Tensor) -> Tensor | float:
    return unknown.float().mean(1) if decoding.starting_ratio is None else decoding.starting_ratio


def test_few_unknown_slots_with_and_without_a_starting_ratio() -> None:
    unknown = torch.tensor([26])
    whole, own = MaskedDecoding(steps=10), MaskedDecoding(steps=10, starting_ratio=None)
    counts: dict[str, list[int]] = {"whole": [], "own": []}
    for name, decoding in (("whole", whole), ("own", own)):
        left = unknown
        for step in range(9):
            left = decoding.kept(step, left, 256, torch.tensor([26 / 256]) if name == "own" else 1.0)
            counts[name].append(int(left))
    assert counts["whole"][:5] == [25, 24, 23, 22, 21]  # Show-o reveals one a step at first
    assert counts["own"] == [25, 24, 23, 21, 18, 15, 11, 8, 4]


def test_rows_do_not_depend_on_their_batch() -> None:
    codes, unknown = torch.zeros(5, 20, dtype=torch.long), torch.ones(5, 20, dtype=torch.bool)
    decoding = MaskedDecoding(steps=6)
    together = decode(codes, unknown, toy, decoding, Streams(streams(4, 0, 5)))
    alone = [decode(codes[:1], unknown[:1], toy, decoding, Streams(streams(4, row, 1))) for row in range(5)]
    assert torch.equal(together, torch.cat(alone))
    assert len({tuple(row.tolist()) for row in together}) == 5
    other = decode(codes, unknown, toy, decoding, Streams(streams(5, 0, 5)))
    assert not torch.equal(together, other)


def test_drawing_by_one_number_follows_the_probabilities() -> None:
    p = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    numbers = torch.linspace(0, 1, 1001)[:-1]
    ids = drawn(p.expand(1000, -1), numbers)
    shares = torch.bincount(ids, minlength=5) / 1000
    torch.testing.assert_close(shares, p, atol=2e-3, rtol=0)
    assert int(drawn(p[None], torch.tensor([1.0]))) == 3  # a number rounded up to 1
    exponential = torch.empty(20000, 5).exponential_(generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(raced(p.expand(20000, -1), exponential), minlength=5) / 20000
    torch.testing.assert_close(shares, p, atol=0.02, rtol=0)


def test_guidance_forms() -> None:
    c, u, i = torch.randn(3, 4, 6).unbind()
    torch.testing.assert_close(mixed(torch.cat([c, u]), weights(1.75)), (1 + 1.75) * c - 1.75 * u)
    torch.testing.assert_close(mixed(torch.cat([c, u]), weights(2.5, "scale")), u + 2.5 * (c - u))
    assert weights(1.75) == weights(2.75, "scale")
    assert weights(0.0) == weights(1.0, "scale") == (1.0,)
    assert mixed(c, weights(0.0)) is c
    torch.testing.assert_close(
        mixed(torch.cat([c, i, u]), image_text_weights(3.0, 1.2)), u + 1.2 * (i - u) + 3 * (c - i)
    )
    torch.testing.assert_close(mixed(torch.cat([c, i, u]), image_text_weights(1.0, 1.0)), c)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"steps": 0}, "steps = 0 must be 1 or more"),
        ({"schedule": "cosin"}, "schedule = 'cosin': expected one of .* did you mean cosine"),
        ({"schedule": "pow-1"}, "expected one of"),
        ({"annealing": "lin"}, "annealing = 'lin': expected one of"),
        ({"selection": "all"}, "selection = 'all'"),
        ({"starting_ratio": 0.0}, "starting_ratio = 0.0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"guidance": -1.0}, "guidance = -1.0 must be 0 or more"),
        ({"guidance_form": "cfg"}, "guidance_form = 'cfg'"),
    ],
)
def test_bad_rules_are_one_line(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        MaskedDecoding(**fields)
    assert "\n" not in str(error.value)
