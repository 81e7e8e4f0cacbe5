"""Learning-rate schedules by hand."""
import pytest

from frpo.config.learner import LearnerSection
from frpo.learner.zero import learning_rate


def rates(total, updates, **fields):
    section = LearnerSection(**{"lr": 0.8, **fields})
    return [learning_rate(update, total, section) for update in updates]


def test_constant_after_a_linear_warm_up():
    assert rates(10, range(6), warmup_steps=3) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert rates(10, [0, 9, 99]) == [0.8, 0.8, 0.8]


def test_linear_falls_from_the_peak_to_the_minimum():
    """8 updates after 2 of warm-up, 0.8 to 0.2: 0.075 an update."""
    expected = [0.8 / 3, 1.6 / 3, 0.8, 0.725, 0.5, 0.275, 0.2, 0.2]
    assert rates(10, [0, 1, 2, 3, 6, 9, 10, 50], schedule="linear", warmup_steps=2,
                 min_lr_ratio=0.25) == pytest.approx(expected)


def test_cosine_passes_its_middle_half_way():
    """(1 + cos x)/2 of 0.6 above 0.2 at x = 0, 60, 90, 120, 180 degrees: 1, 3/4, 1/2, 1/4, 0."""
    assert rates(6, [0, 2, 3, 4, 6, 60], schedule="cosine", min_lr_ratio=0.25) == pytest.approx(
        [0.8, 0.65, 0.5, 0.35, 0.2, 0.2])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_that_is_all_warm_up_never_exceeds_the_peak(schedule):
    found = rates(3, range(5), schedule=schedule, warmup_steps=4)
    assert found == pytest.approx([0.16, 0.32, 0.48, 0.64, 0.8])
