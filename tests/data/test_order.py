from __future__ import annotations

import itertools
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data.order import SampleOrder, share
from zoo.errors import ConfigError, DataError

IDS = [f"id{i}" for i in range(37)]


def test_every_epoch_is_another_permutation_and_counts_draws() -> None:
    order = SampleOrder(IDS, seed=5)
    epochs = [order.slice(e * 37, (e + 1) * 37) for e in range(3)]
    for e, epoch in enumerate(epochs):
        assert sorted(d.id for d in epoch) == sorted(IDS)
        assert {d.draw for d in epoch} == {e}
    assert len({tuple(d.id for d in epoch) for epoch in epochs}) == 3
    assert SampleOrder(IDS, seed=6).slice(0, 37) != epochs[0]


def test_the_order_is_the_one_recorded() -> None:
    # a change here means that runs recorded before cannot be compared with runs recorded after
    assert [d.id for d in SampleOrder(list("abcdefgh"), seed=1).slice(0, 12)] == list("cehfagdbfgda")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 200), st.integers(0, 120), st.integers(0, 3))
def test_a_slice_is_a_piece_of_the_endless_sequence(start: int, length: int, seed: int) -> None:
    order = SampleOrder(IDS, seed)
    assert order.slice(start, start + length) == list(itertools.islice(order, start, start + length))


def test_hash_covers_the_first_places_only_and_depends_on_them() -> None:
    order = SampleOrder(IDS, seed=0)
    assert order.hash(50) == SampleOrder(IDS, seed=0).hash(50)
    assert order.hash(50) != order.hash(51)
    assert order.hash(50) != SampleOrder(IDS, seed=1).hash(50)
    assert order.hash(50) != SampleOrder(IDS[::-1], seed=0).hash(50)


def test_ranks_and_resumes_partition_the_steps() -> None:
    order = SampleOrder(IDS, seed=2)
    whole = [order.slice(*share(step, 8)) for step in range(6)]
    halves = [order.slice(*share(s, 8, 0, 2)) + order.slice(*share(s, 8, 1, 2)) for s in range(6)]
    assert halves == whole
    again = pickle.loads(pickle.dumps(order))
    assert [again.slice(*share(step, 8)) for step in range(3, 6)] == whole[3:]


def test_unshuffled_order_is_the_source_order() -> None:
    assert [d.id for d in SampleOrder(IDS, shuffle=False).slice(35, 39)] == ["id35", "id36", "id0", "id1"]


def test_wrong_orders_are_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        SampleOrder([])
    with pytest.raises(DataError, match="'a' occurs more than once"):
        SampleOrder(["a", "b", "a"])
    with pytest.raises(ConfigError, match="multiple of 3"):
        share(0, 8, 0, 3)
    with pytest.raises(ConfigError, match="world_size=2"):
        share(0, 8, 2, 2)


def test_hash_of_a_published_budget_is_quick_and_still_tells_orders_apart() -> None:
    count = 400_000_000
    first = SampleOrder(IDS, seed=0).hash(count)
    assert first == SampleOrder(IDS, seed=0).hash(count)
    others = [SampleOrder(IDS, seed=1).hash(count), SampleOrder(IDS[::-1], seed=0).hash(count)]
    assert len({first, *others, SampleOrder(IDS, seed=0).hash(count + 1)}) == 4
