"""The cache of reference states: filled in pieces, never read half-written, never mistaken for another's."""
from __future__ import annotations

import numpy as np
import pytest

from frpo.errors import ConfigError
from frpo.learner.state_cache import HEAD, StateCache

FACTS = {"model": "m1", "data": "d1", "dtype": "bf16", "width": 3, "softcap": None}
LENGTHS = [2, 0, 1, 4]


def rows(example):
    return np.full((LENGTHS[example], 3), 10 * example + 1, dtype=np.uint16)


def test_it_goes_on_where_it_was_interrupted_and_gives_back_the_bits(tmp_path):
    folder = tmp_path / "cache"
    first = StateCache.begin(folder, FACTS, LENGTHS)
    for example in (3, 0):
        first.write(example, rows(example))
    again = StateCache.begin(folder, FACTS, LENGTHS)  # as another process would
    assert again.missing() == [1, 2] and not again.is_complete
    with pytest.raises(ConfigError, match="is not complete; start the run that fills it again"):
        StateCache.complete(folder)
    for example in (1, 2):
        again.write(example, rows(example))
    (folder / HEAD).touch()
    again.finish()
    complete = StateCache.complete(folder)
    for example in range(4):
        np.testing.assert_array_equal(complete.read(example), rows(example))
    with pytest.raises(ValueError, match="read-only"):
        complete.write(0, rows(0))


def test_it_is_not_finished_before_every_example_and_the_head_are_there(tmp_path):
    cache = StateCache.begin(tmp_path / "cache", FACTS, LENGTHS)
    with pytest.raises(AssertionError):
        cache.finish()
    with pytest.raises(AssertionError):
        cache.write(0, rows(3))


@pytest.mark.parametrize("change, message", [
    ({"model": "m2"}, "model 'm1', needed 'm2'"), ({"data": "d2"}, "data 'd1', needed 'd2'"),
    ({"dtype": "fp32", "width": 4}, "dtype 'bf16', needed 'fp32'; width 3, needed 4")])
def test_what_is_of_another_run_is_refused_and_kept(tmp_path, change, message):
    StateCache.begin(tmp_path / "cache", FACTS, LENGTHS).write(0, rows(0))
    with pytest.raises(ConfigError, match=message):
        StateCache.begin(tmp_path / "cache", FACTS | change, LENGTHS)
    assert StateCache.begin(tmp_path / "cache", FACTS, LENGTHS).missing() == [1, 2, 3]


def test_a_cache_that_was_only_being_set_up_is_made_anew(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "offsets.npy").write_bytes(b"half")
    assert StateCache.begin(folder, FACTS, LENGTHS).missing() == [0, 1, 2, 3]


def test_no_rows_at_all(tmp_path):
    cache = StateCache.begin(tmp_path / "cache", FACTS, [0])
    cache.write(0, np.empty((0, 3), dtype=np.uint16))
    assert cache.missing() == [] and cache.read(0).shape == (0, 3)
