"""The metrics against exact vectors, against torchmetrics, and as sums over ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.evaluation.metrics import BitsPerByte, MeanOf, RankMetric, ranks_of, retrieval_ranks


def test_ranks_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.7], [0.1, 0.3, 0.2], [0.4, 0.4, 0.1]])
    assert ranks_of(scores, [[0], [2], [0]], tie=1e-6).tolist() == [1, 2, 2]  # the last row's tie counts against it


def test_any_of_several_positives_counts() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.7, 0.8]])
    assert ranks_of(scores, [[1, 3]], tie=1e-6).tolist() == [2]  # column 3 is second; column 1 is no competitor
    assert ranks_of(scores, [[0, 1, 2, 3]], tie=1e-6).tolist() == [1]


def test_a_constant_scorer_gets_the_last_rank() -> None:
    assert ranks_of(torch.ones(4, 10), [[n] for n in range(4)], tie=1e-6).tolist() == [10] * 4


def test_a_row_without_a_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1"):
        ranks_of(torch.rand(2, 3), [[0], []], tie=0.0)


def test_rank_metric_by_hand() -> None:
    metric = RankMetric(candidates=10, ks=(1, 5, 10))
    metric.update(torch.tensor([1, 2, 5]))
    metric.update(torch.tensor([6]))
    values = metric.compute()
    assert values["r1"] == 0.25
    assert values["r5"] == 0.75
    assert values["r10"] == 1.0
    assert values["median_rank"] == 2.0
    assert values["mrr"].item() == pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 6) / 4)


def test_hit_rate_equals_torchmetrics() -> None:
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR

    generator = torch.Generator().manual_seed(0)
    images, captions_each = 30, 5
    scores = torch.randn(images, images * captions_each, generator=generator)
    positives = [list(range(n * captions_each, (n + 1) * captions_each)) for n in range(images)]
    target = torch.zeros_like(scores, dtype=torch.bool)
    for n, own in enumerate(positives):
        target[n, own] = True
    indexes = torch.arange(images)[:, None].expand_as(scores)
    ranks = ranks_of(scores, positives, tie=0.0)
    metric = RankMetric(candidates=scores.shape[1])
    metric.update(ranks)
    ours = metric.compute()
    for k in (1, 5, 10):
        theirs = RetrievalHitRate(top_k=k)
        theirs.update(scores.flatten(), target.flatten(), indexes.flatten())
        assert 0 < ours[f"r{k}"] < 1
        torch.testing.assert_close(ours[f"r{k}"].float(), theirs.compute())
    mrr = RetrievalMRR()
    mrr.update(scores.flatten(), target.flatten(), indexes.flatten())
    torch.testing.assert_close(ours["mrr"].float(), mrr.compute())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 10_000))
def test_ranks_equal_a_sort(queries: int, gallery: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randperm(queries * gallery, generator=generator).view(queries, gallery).float()
    positives = [sorted(set(torch.randint(gallery, (3,), generator=generator).tolist())) for _ in range(queries)]
    for row, rank in enumerate(ranks_of(scores, positives, tie=0.5).tolist()):
        order = scores[row].argsort(descending=True).tolist()
        best = next(c for c in order if c in positives[row])
        assert rank == 1 + order.index(best)


def test_chunking_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    queries = torch.nn.functional.normalize(torch.randn(37, 24, generator=generator), dim=-1)
    gallery = queries[torch.randint(37, (90,), generator=generator)]  # many exact duplicates: ties everywhere
    positives = [[n, n + 40] for n in range(37)]
    expected = retrieval_ranks(queries, gallery, positives, chunk=1000)
    for chunk in (1, 5, 36):
        assert retrieval_ranks(queries, gallery, positives, chunk=chunk).tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 5


def test_bits_per_byte_by_hand() -> None:
    metric = BitsPerByte()
    metric.update(torch.tensor([-math.log(2) * 8, -math.log(2) * 4]), torch.tensor([4, 2]))
    metric.update(torch.tensor([-math.log(2) * 3]), torch.tensor([4]))
    assert metric.compute().item() == pytest.approx(15 / 10)


def test_states_are_sums_that_add_up_over_ranks() -> None:
    """What a reduction over ranks does (summing states) equals one metric that saw everything."""
    ranks = torch.tensor([1, 4, 4, 9, 2, 7])
    whole, parts = RankMetric(10), [RankMetric(10), RankMetric(10)]
    whole.update(ranks)
    parts[0].update(ranks[:2])
    parts[1].update(ranks[2:])
    merged = RankMetric(10)
    merged.update(ranks[:1])  # an updated metric, so that compute does not warn
    merged.counts = parts[0].counts + parts[1].counts
    assert {k: v.item() for k, v in merged.compute().items()} == {k: v.item() for k, v in whole.compute().items()}
    for metric in (RankMetric(3), BitsPerByte(), MeanOf()):
        assert all(reduction is not None for reduction in metric._reductions.values())
        assert not any(isinstance(default, list) for default in metric._defaults.values())


def test_mean_of() -> None:
    metric = MeanOf()
    metric.update(torch.tensor([True, False, True]))
    metric.update(torch.tensor([False]))
    assert metric.compute().item() == 0.5
