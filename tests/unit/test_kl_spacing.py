"""Which probes lie close in KL, and after which updates a fork is probed."""
from __future__ import annotations

import math

import numpy as np
import pytest

from frpo.downstream.kl_spacing import Gap, ProbeSchedule, far_apart, next_update, updates_within


@pytest.mark.parametrize("low, high, far", [
    (0.0, 0.75, False), (0.0, 0.76, True), (0.5, 1.75, False), (0.5, 1.76, True), (0.0, 68.0, True),
    (26.0, 52.75, False), (26.0, 68.0, True), (68.0, 75.0, False)])
def test_the_next_probe_is_close_up_to_twice_the_kl_and_three_quarters(low, high, far):
    assert far_apart(np.array([low, high])).tolist() == [far]


def test_on_a_curve_like_the_square_root_a_line_between_close_probes_is_nearly_right():
    """The claims of the docstring: 18 % of the loss at half a nat from 0 to .75, 1.5 % at most from k to 2 k."""
    assert 1 - np.interp(0.5, [0.0, 0.75], [0.0, 0.75 ** 0.5]) / 0.5 ** 0.5 == pytest.approx(0.18, abs=0.005)
    kl = np.linspace(1.0, 2.0, 1001)
    assert (1 - np.interp(kl, [1.0, 2.0], [1.0, 2.0 ** 0.5]) / kl ** 0.5).max() == pytest.approx(0.015, abs=5e-4)


@pytest.mark.parametrize("probed, following", [
    ({0: 0.0}, 1), ({0: 0.0, 1: 0.001}, 2), ({0: 0.0, 4: -0.1}, 8), ({0: 0.0, 4: math.nan}, 8),
    ({0: 0.0, 4: 0.25}, 6),                # aimed at .75 nats: 4 sqrt(3) = 6.9
    ({0: 0.0, 100: 1.0}, 136),             # aimed at 1.875 nats: 100 sqrt(1.875) = 136.9
    ({0: 0.0, 10: 0.1, 20: 1.6}, 21),      # sixteen times in 10, aimed at 2.775 nats: 20 + 10 ln 1.734 / ln 16 = 21.99
    ({0: 0.0, 10: 0.1, 11: 3.9}, 12),      # never the same update again
    ({0: 0.0, 10: 1.0, 20: 0.5}, 38),      # fell back: aimed at 1.875 nats, 20 sqrt(3.75) = 38.7
    ({0: 0.0, 10: 4.0}, math.inf), ({0: 0.0, 10: 5.0, 20: 0.1}, math.inf)])
def test_the_next_probe_follows_the_kl(probed, following):
    assert next_update(probed, until=4.0) == following


def run(schedule, kl, total, start=0):
    """Updates at which a fork is probed whose KL after an update is kl(update)."""
    probed = []
    for step in range(start, total + 1):
        if schedule.due(step, total):
            schedule.note(step, kl(step))
            probed.append(step)
    return probed


def nothing():
    raise AssertionError("there is nothing to read before a resume")


@pytest.mark.parametrize("at, total, updates", [
    ([3, 5, 50], 8, [0, 3, 5, 8]), ([], 20, [0, 20]), (None, 0, [0]), (None, 3, [0, 1, 2, 3])])
def test_updates_that_were_asked_for_besides_the_first_and_the_last(at, total, updates):
    assert run(ProbeSchedule(at, 4.0, dict), lambda step: 100.0 * step, total) == updates


def test_without_a_choice_at_equal_distances_and_in_between_as_the_kl_grows():
    """A fork that goes 2 nats in its first 20 of 160 updates, where the first probe lies by equal distances.

    KL .02 and .08 nats at 2 and 4: from 4, aimed at .495, 4 + 2 ln 6.19 / ln 4 = 6.6. From 6 (.18, at .645):
    6 + 2 ln 3.58 / ln 2.25 = 9.1. From 9 (.405, at .9825): 9 + 3 ln 2.43 / ln 2.25 = 12.3.
    """
    def kl(step):
        return 2.0 * (step / 20) ** 2

    probed = run(ProbeSchedule(None, 4.0, dict), kl, 160)
    assert set(range(0, 161, 20)) <= set(probed)
    assert probed[:7] == [0, 1, 2, 4, 6, 9, 12] and probed[-7:] == [*range(40, 161, 20)]
    assert not far_apart(np.array([kl(step) for step in probed if kl(step) < 4])).any() and len(probed) < 20


@pytest.mark.parametrize("kl", [lambda s: 5 * s / 1000, lambda s: 75 * (s / 1000) ** 2, lambda s: 20 * (s / 1000) ** 4,
                                lambda s: 1.2 * (1 - math.exp(-s / 125)),
                                lambda s: 0.05 * s / 1000 + 6 / (1 + math.exp((300 - s) / 40))])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_probes_lie_close_along_forks_of_many_shapes(kl, noise):
    random = np.random.default_rng(1)
    noisy = {step: kl(step) * (1 + noise * random.standard_normal()) for step in range(1, 1001)} | {0: 0.0}
    probed = run(ProbeSchedule(None, 4.0, dict), noisy.__getitem__, 1000)
    reached = np.unique(np.maximum.accumulate([noisy[step] for step in probed]))
    assert not far_apart(reached[reached <= 2.0]).any() and len(probed) <= 24


@pytest.mark.parametrize("stopped", [1, 7, 40, 41, 99])
def test_a_resumed_fork_is_probed_at_the_same_updates(stopped):
    def kl(step):
        return 3.0 * (step / 100) ** 1.5 + 0.1 * math.sin(step)

    whole = run(ProbeSchedule(None, 4.0, nothing), kl, 100)
    written = {step: kl(step) for step in whole if step <= stopped}
    assert run(ProbeSchedule(None, 4.0, lambda: written), kl, 100, stopped + 1) == [s for s in whole if s > stopped]


@pytest.mark.parametrize("updates, kl, within", [
    ((0, 8), (0.0, 68.0), [1, 2, 3, 4, 6]),  # to .75, 2.25, 5.25, 11.25, 23.25, 47.25: seven pieces of 1 to 8
    ((0, 100), (0.0, 2.0), [1, 10]), ((200, 300), (26.0, 68.0), [245]), ((5, 6), (0.0, 68.0), []),
    ((0, 1), (0.0, 68.0), [])])
def test_updates_that_fill_a_gap(updates, kl, within):
    assert updates_within(Gap(updates=updates, kl=kl)) == within
