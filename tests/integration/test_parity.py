"""The vLLM engine and the learner stay the same function through training: a covering part of `parity_matrix`."""
from __future__ import annotations

import pytest

from parity_matrix import COVERING, LIMIT, measure

STEPS = 3


@pytest.fixture(scope="module")
def running(ray_cluster):
    """Holds the loop of the combination before, whose processes the next one takes over."""
    holder = {}
    yield holder
    if holder.get("loop"):
        holder["loop"].close()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("combination", COVERING, ids=lambda c: "-".join(str(c).split()))
def test_engine_and_learner_agree_after_synced_steps(combination, running, tmp_path):
    row, running["loop"] = measure(combination, STEPS, tmp_path, running.pop("loop", None))
    limit = LIMIT[combination.dtype]
    assert row.before <= limit and row.after <= limit, row
    # One push left out shows, so the agreement above is the work of the pushes.
    assert row.stale > 3 * limit, row
