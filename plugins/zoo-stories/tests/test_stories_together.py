"""Section 10 of the card on whole denoisers: what changes, what must not, windows, banks, memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_stories.attention import Bank, Cast, ConsistentAttention
from zoo_stories.consistency import Consistency, choose_layers, evenly, grid_of, windows
from zoo_stories.drawing import batches
from zoo_stories.memory import peak_bytes
from zoo_stories.together import consistent

from zoo.diffusion.noising import DDPM
from zoo.errors import ConfigError
from zoo.part import Features
from zoo.sampling.diffusion import Denoising
from zoo.sampling.latents import draw_latents
from zoo.sampling.text import streams

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
KINDS = ("unet", "dit")


def inputs(images: int, branches: int = 2, size: int = 8, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(images, 4, size, size, generator=generator).repeat(branches, 1, 1, 1)
    condition = torch.randn(branches * images, 5, 16, generator=generator)
    return latents, torch.full((branches * images,), 400.0), condition


def forward(denoiser: Any, rules: Consistency, cast: Cast, values: Sequence[Tensor], passes: int = 2) -> Tensor:
    """The prediction in step 1; step 0 is plain by default."""
    latents, time, condition = values
    with torch.no_grad(), consistent(denoiser, rules) as state:
        state.begin(cast)
        for step in range(passes):
            out: Tensor = denoiser(latents, time - step, condition)
    return out


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_sampled_is_the_plain_model_bit_for_bit(unet: Any, kind: str) -> None:
    denoiser = unet(kind=kind)
    latents, time, condition = inputs(3)
    plain = denoiser(latents, time - 1, condition)
    assert torch.equal(forward(denoiser, Consistency(rate=0.0), Cast.together(3), (latents, time, condition)), plain)
    changed = forward(denoiser, Consistency(), Cast.together(3), (latents, time, condition))
    assert (changed - plain).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_afterwards_everything_is_as_it_was(unet: Any, kind: str) -> None:
    denoiser = unet(kind=kind)
    values = inputs(2)
    before, names = denoiser(*values), dict(denoiser.attention_processors())
    weights = {name: p.clone() for name, p in denoiser.named_parameters()}
    with suppress(ZeroDivisionError), consistent(denoiser, Consistency(window=2)) as state:
        state.begin(Cast.together(2))
        assert any(isinstance(p, ConsistentAttention) for p in denoiser.attention_processors().values())
        assert {name for name, _ in denoiser.named_parameters()} == set(weights)  # no new parameters
        raise ZeroDivisionError
    assert denoiser.attention_processors() == names
    assert "forward" not in vars(denoiser)
    assert not denoiser._forward_pre_hooks
    assert torch.equal(denoiser(*values), before)
    assert all(torch.equal(p, weights[name]) for name, p in denoiser.named_parameters())


def test_everything_sampled_is_joint_attention(unet: Any) -> None:
    """Rate 1 in one layer equals attention over the tokens of all images as one sequence."""
    layer = unet().net.up_blocks[0].attentions[0].transformer_blocks[0].attn1
    x = torch.randn(6, 16, layer.to_q.in_features, generator=torch.Generator().manual_seed(0))  # 2 branches, 3 images
    from zoo_stories.attention import Passes

    passes = Passes(Consistency(rate=1.0, start_step=0, queries=5))
    passes.begin(Cast.together(3))
    passes.see(10.0, (4, 4))
    with torch.no_grad():
        ours = ConsistentAttention(passes, "a", layer.processor)(layer, x)
        joint = layer.processor(layer, x.view(2, 48, -1)).view_as(x)
    torch.testing.assert_close(ours, joint, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_halves_of_guidance_never_mix(unet: Any, kind: str) -> None:
    denoiser = unet(kind=kind)
    latents, time, condition = inputs(3)
    one = forward(denoiser, Consistency(), Cast.together(3), (latents, time, condition))
    changed = condition.clone()
    changed[3:] += 1  # the branch without condition
    other = forward(denoiser, Consistency(), Cast.together(3), (latents, time, changed))
    assert torch.equal(one[:3], other[:3])
    assert not torch.allclose(one[3:], other[3:])


def test_who_reads_whom(unet: Any) -> None:
    denoiser, rules = unet(), Consistency(rate=0.5)
    latents, time, condition = inputs(4)
    moved = latents.clone()
    moved[2], moved[6] = moved[2] + 1, moved[6] + 1  # image 2 in both branches

    def changed(cast: Cast) -> list[bool]:
        one = forward(denoiser, rules, cast, (latents, time, condition))
        other = forward(denoiser, rules, cast, (moved, time, condition))
        return [bool((one[i] - other[i]).abs().max() > 1e-5) for i in range(4)]

    assert changed(Cast.together(4)) == [True, True, True, True]
    assert changed(Cast.together(4, references=2)) == [False, False, True, False]  # 2 and 3 only read
    assert changed(Cast.together(4, references=3)) == [True, True, True, True]
    two = Cast.of([frozenset("a"), frozenset("b"), frozenset("ab"), frozenset()])
    assert two.reads == ((2,), (2,), (0, 1), ())
    assert changed(two) == [True, True, True, False]
    apart = Cast.of([frozenset("a"), frozenset("a"), frozenset("b"), frozenset("b")])
    assert changed(apart) == [False, False, True, True]


def test_gates_and_the_start_step(unet: Any) -> None:
    denoiser, values, cast = unet(), inputs(3), Cast.together(3)
    plain = forward(denoiser, Consistency(rate=0.0), cast, values, passes=1)
    assert torch.equal(forward(denoiser, Consistency(start_step=1), cast, values, passes=1), plain)
    assert not torch.equal(forward(denoiser, Consistency(start_step=0), cast, values, passes=1), plain)
    assert torch.equal(forward(denoiser, Consistency(start_step=0, chances=(0.0, 1.0)), cast, values, passes=1), plain)
    late = Consistency(start_step=0, chances=(0.0, 1.0), late_from=0)
    assert not torch.equal(forward(denoiser, late, cast, values, passes=1), plain)
    rules = Consistency(start_step=5, chances=(0.7, 0.9), seed=3)
    drawn = [[rules.consistent_at(f"layer {n}", step) for n in range(200)] for step in (4, 10, 30)]
    assert [sum(row) / 200 for row in drawn] == [0.0, pytest.approx(0.7, abs=0.1), pytest.approx(0.9, abs=0.06)]
    assert drawn[1] == [rules.consistent_at(f"layer {n}", 10) for n in range(200)]
    again = [forward(denoiser, rules, cast, values, passes=8) for _ in range(2)]
    assert torch.equal(*again)


def test_steps_are_counted_by_time_and_sets_redrawn(unet: Any) -> None:
    rules = Consistency(rate=0.5)
    kept = [rules.kept(2, 64, step).tolist() for step in (1, 1, 2)]
    assert kept[0] == kept[1] != kept[2]
    assert rules.kept(3, 64, 1).tolist() != kept[0]
    sizes = [len(rules.kept(n, 64, 5)) for n in range(100)]
    assert sum(sizes) / 6400 == pytest.approx(0.5, abs=0.03)
    with torch.no_grad(), consistent(unet(), rules) as state:
        state.begin(Cast.together(2))
        for time in (900.0, 900.0, 800.0):
            state.see(time, (8, 8))
        assert (state.step, state.time) == (1, 800.0)


@pytest.mark.parametrize("sampling", ["grid", "pool"])
def test_other_choices_of_tokens(unet: Any, sampling: str) -> None:
    denoiser, values, cast = unet(), inputs(3), Cast.together(3)
    drawn = forward(denoiser, Consistency(rate=0.25, sampling=sampling), cast, values)
    assert not torch.allclose(drawn, forward(denoiser, Consistency(rate=0.25), cast, values), atol=1e-4)
    whole = forward(denoiser, Consistency(rate=1.0), cast, values)
    assert torch.equal(forward(denoiser, Consistency(rate=1.0, sampling=sampling), cast, values), whole)
    assert [len(evenly(share, 8, 8)) for share in (0.25, 0.5, 0.3)] == [16, 32, pytest.approx(19.2, abs=2)]
    assert evenly(0.5, 2, 4).tolist() == [1, 3, 4, 6]  # a chequered board
    rows = torch.arange(16.0).view(1, 16, 1)
    assert Consistency(rate=0.25).pooled(rows, (4, 4)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_a_window_over_twelve_images(unet: Any) -> None:
    denoiser, values, cast = unet(), inputs(12), Cast.together(12)
    whole = forward(denoiser, Consistency(), cast, values)
    for long in ("passes", "layers"):
        assert torch.equal(forward(denoiser, Consistency(window=12, long=long), cast, values), whole)
        four = forward(denoiser, Consistency(window=4, long=long), cast, values)
        assert not torch.allclose(four, whole, atol=1e-4)
        moved = values[0].clone()
        moved[11], moved[23] = moved[11] + 1, moved[23] + 1
        other = forward(denoiser, Consistency(window=4, long=long), cast, (moved, *values[1:]))
        far = [i for i in range(12) if (four[i] - other[i]).abs().max() > 1e-5]
        assert {10, 11} <= set(far)
        assert 0 not in far
    # the mean of the predictions of the windows that an image is in, each by hand
    latents, time, condition = values
    rules, total, count = Consistency(), torch.zeros_like(latents), torch.zeros(24, 1, 1, 1)
    for window in windows(12, 4, 2):
        rows = [*window, *(12 + i for i in window)]
        part = forward(denoiser, rules, cast.select(window), (latents[rows], time[rows], condition[rows]))
        total[rows] += part
        count[rows] += 1
    expected = total / count
    torch.testing.assert_close(forward(denoiser, Consistency(window=4, stride=2), cast, values), expected, **CLOSE)


def test_windows_cover_everything() -> None:
    assert windows(12, 0, 1) == [range(12)] == windows(12, 12, 3)
    assert windows(7, 3, 2) == [range(3), range(2, 5), range(4, 7)]
    assert windows(6, 4, 4) == [range(4), range(2, 6)]


def test_what_is_there_at_once_is_counted() -> None:
    cpu = torch.device("cpu")
    given = torch.ones(100)

    def step() -> Tensor:
        a = given + 1  # 400 bytes
        b = a.view(10, 10) * 2  # 800, of which a view takes none
        del a  # 400
        c = torch.cat([b, b])  # 1200
        del b, c
        return torch.zeros(50)  # 200

    assert peak_bytes(step, cpu) == 1200
    with torch.inference_mode():
        assert peak_bytes(step, cpu) == 1200


def test_twelve_images_in_the_memory_of_four(unet: Any) -> None:
    """And all together in less than a dense mask would take."""
    denoiser, cpu = unet(), torch.device("cpu")

    def peak(images: int, rules: Consistency) -> int:
        values, cast = inputs(images, branches=1, size=16), Cast.together(images)
        return peak_bytes(lambda: forward(denoiser, rules, cast, values, passes=1), cpu)

    four = peak(4, Consistency(start_step=0))
    latents = 12 * 4 * 16 * 16 * 4  # bytes of the story's latents, of which there are a few
    assert peak(12, Consistency(start_step=0, window=4, stride=4)) < four + 8 * latents
    assert peak(12, Consistency(start_step=0)) > 2 * four
    assert four < 1.5 * peak(4, Consistency(rate=0.0))


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver"])
def test_banks_by_layer_and_time(unet: Any, sampler: str) -> None:
    """Written together, read one by one: what a frame draws from a bank is what it draws with the references."""
    denoiser, rules = unet(), Consistency(rate=0.5, start_step=0)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(4, 5, 16, generator=generator)
    noise = torch.randn(4, 4, 8, 8, generator=generator)
    how = Denoising(sampler=sampler, steps=3)

    def drawn(cast: Cast, at: list[int], state: Any) -> Tensor:
        state.begin(cast)
        both = Features(torch.cat([tokens[at], torch.zeros_like(tokens[at])]))
        return draw_latents(
            denoiser, DDPM(), both, how, (3.0, -2.0), [streams(0, n, 1)[0] for n in at], grid=(8, 8), noise=noise[at]
        )

    with consistent(denoiser, rules) as state:
        together = drawn(Cast.together(4, references=3), [0, 1, 2, 3], state)
    with consistent(denoiser, rules) as state:
        written = drawn(Cast.together(3).writing([["who"]] * 3), [0, 1, 2], state)
        chosen = choose_layers(denoiser.attention_processors(), "auto")
        assert {layer for layer, _ in state.banks["who"].rows} == set(chosen)
        assert len({time for _, time in state.banks["who"].rows}) == 3
        read = drawn(Cast((3,), ((),), banks=(("who",),)), [3], state)
        torch.testing.assert_close(written, together[:3], **CLOSE)
        torch.testing.assert_close(read, together[3:], **CLOSE)
        state.begin(Cast((3,), ((),), banks=(("who",),)))
        with pytest.raises(ConfigError, match="draw with the sampler and steps that wrote it"):
            denoiser(noise[3:].repeat(2, 1, 1, 1), torch.full((2,), 123.0), tokens[:2])
    with pytest.raises(ConfigError, match="holds nothing"):
        Bank().read("a", 1.0)


class DenseMask:
    """The reference: all images as one sequence, under a mask over all pairs of their tokens."""

    def __init__(self, state: Any, images: int, references: int) -> None:
        self.state, self.images, self.references = state, images, references

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **others: Any) -> Tensor:
        tokens = hidden_states.shape[1]
        keep = torch.zeros(self.images, tokens, dtype=torch.bool)
        for image in range(self.references):
            keep[image, self.state.places(image, tokens)] = True
        of = torch.arange(self.images).repeat_interleave(tokens)
        mask = keep.flatten()[None] | (of[:, None] == of[None])  # [m n, m n]
        joint = hidden_states.reshape(-1, self.images * tokens, hidden_states.shape[2])
        q, k, v = (f(joint).unflatten(2, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attn.to_out[0](out.transpose(1, 2).flatten(2)).view_as(hidden_states)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_of_a_whole_denoiser_under_the_dense_mask(unet: Any, kind: str) -> None:
    denoiser, rules = unet(kind=kind), Consistency(rate=0.4, start_step=0, queries=7)
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randn(4, 5, 16, generator=generator)
    both = Features(torch.cat([tokens, torch.zeros_like(tokens)]))

    def drawn(state: Any) -> Tensor:
        state.begin(Cast.together(4, references=3))
        how = Denoising(sampler="ddim", steps=3)
        return draw_latents(
            denoiser, DDPM(), both, how, (3.0, -2.0), [streams(0, n, 1)[0] for n in range(4)], grid=(8, 8)
        )

    with consistent(denoiser, rules) as state:
        gathered = drawn(state)
        chosen = set(choose_layers(denoiser.attention_processors(), "auto"))
        dense = DenseMask(state, 4, 3)
        mine = denoiser.attention_processors()
        denoiser.set_attention_processors({name: dense if name in chosen else p for name, p in mine.items()})
        masked = drawn(state)
    torch.testing.assert_close(gathered, masked, atol=1e-4, rtol=0)
    with consistent(denoiser, Consistency(rate=0.0)) as state:
        assert (drawn(state) - gathered).abs().max() > 1e-2


def test_batches_of_a_long_story() -> None:
    a, b = frozenset("a"), frozenset("b")
    story = [a, a, a | b, b, a, frozenset[str]()]
    first, second, third = batches(story, Consistency(window=2, long="banks"))
    assert [list(frames) for frames, _ in (first, second, third)] == [[0, 1], [2, 3], [4, 5]]
    assert (first[1].reads, first[1].writes, first[1].banks) == (((1,), (0,)), (("a",), ("a",)), ((), ()))
    assert (second[1].reads, second[1].writes) == (((1,), (0,)), (("b",), ("b",)))
    assert second[1].banks == (("a",), ())
    assert (third[1].reads, third[1].writes, third[1].banks) == (((), ()), ((), ()), (("a",), ()))
    assert [len(batches(story, Consistency(window=2, long=long))) for long in ("passes", "layers")] == [1, 1]


def test_layers_by_name(unet: Any) -> None:
    names = list(unet().attention_processors())
    up = choose_layers(names, "auto")
    assert up
    assert all(name.startswith("up_blocks") and "attn1" in name for name in up)
    everything = choose_layers(names, "all")
    assert len(everything) > len(up)
    assert not any("attn2" in name for name in everything)
    assert choose_layers(names, "mid_block+up_blocks") == [n for n in everything if not n.startswith("down")]
    with pytest.raises(ConfigError, match=r"no self-attention begins with 'up_block\.7'"):
        choose_layers(names, "up_block.7")
    with pytest.raises(ConfigError, match="has no self-attention"):
        choose_layers(["a.attn2.processor"], "auto")
    blocks = choose_layers(unet(kind="dit").attention_processors(), "auto")
    assert blocks == ["transformer_blocks.1.attn1.processor"]
    assert (grid_of(16, 8, 8), grid_of(6, 4, 6), grid_of(7, 8, 8)) == ((4, 4), (2, 3), None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 1.5}, "rate = 1.5: expected a share"),
        ({"chances": (0.5, 2.0)}, r"chances\[1\] = 2.0"),
        ({"sampling": "gird"}, "did you mean grid"),
        ({"window": 1}, "window = 1: expected at least 2"),
        ({"window": 4, "stride": 5}, "stride = 5"),
        ({"long": "tiles"}, "expected one of passes, layers, banks"),
    ],
)
def test_wrong_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Consistency(**fields)
