"""Known noise: which captions are exchanged, that none keeps its own, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

from zoo.data.openmoji import OpenMojiConfig
from zoo.data.sample import ArraySource
from zoo.data.shuffled import ShuffledCaptions
from zoo.errors import ConfigError


@pytest.fixture(scope="module")
def noisy() -> ShuffledCaptions:
    source = OpenMojiConfig(size=16, shuffled_captions=0.3, trusted=0.2).build()
    assert isinstance(source, ShuffledCaptions)
    return source


def test_a_stated_fraction_gets_anothers_caption(noisy: ShuffledCaptions) -> None:
    ids = noisy.ids("train")
    wrong = [id for id in ids if noisy.text_sample(id).texts != noisy.truth(id)]
    trusted = [id for id in ids if noisy.text_sample(id).meta["trusted"]]
    assert abs(len(trusted) / len(ids) - 0.2) < 0.03
    assert abs(len(wrong) / (len(ids) - len(trusted)) - 0.3) < 0.03
    assert not set(wrong) & set(trusted)
    assert sorted(noisy.text_sample(id).texts for id in ids) == sorted(noisy.truth(id) for id in ids)  # a permutation
    for split in ("val", "test"):
        assert all(noisy.text_sample(id).texts == noisy.truth(id) for id in noisy.ids(split))


def test_the_choice_depends_on_the_id_alone(noisy: ShuffledCaptions) -> None:
    more = ShuffledCaptions(noisy.source, 0.5, 0.2)
    assert more.trusted == noisy.trusted
    assert set(noisy.taken_from) < set(more.taken_from)
    assert ShuffledCaptions(noisy.source, 0.3, 0.2).taken_from == noisy.taken_from
    assert more.version != noisy.version


def test_images_stay_with_their_ids_and_blank_images_wrap_it(noisy: ShuffledCaptions) -> None:
    assert isinstance(noisy, ArraySource)
    id = next(iter(noisy.taken_from))
    assert np.array_equal(noisy.images([id]), noisy.source.images([id]))
    whole = noisy.sample(id)
    assert whole.texts == noisy.text_sample(id).texts != noisy.truth(id)
    assert whole.meta["name"] == noisy.source.sample(id).meta["name"]
    blank = OpenMojiConfig(size=16, shuffled_captions=0.3, trusted=0.2, blank_images=True).build()
    assert blank.sample(id).texts == whole.texts
    assert len(np.unique(np.asarray(blank.sample(id).image))) == 1


def test_fractions_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shuffled_captions = 1\.5"):
        OpenMojiConfig(size=16, shuffled_captions=1.5).build()
