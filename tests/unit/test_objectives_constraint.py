"""The constraint: mixed advantages by hand, the multiplier's rules, what is measured, and what is refused."""
import math
from dataclasses import replace

import numpy as np
import pytest

from frpo.config.loader import load_recipe
from frpo.data.prompts import PromptSet
from frpo.errors import ConfigError, InvariantError
from frpo.objectives.constraint import AT_MAX, FLAT_ABOVE, INTEGRAL, NU, PATIENCE, SCALE, UNJUDGED_STEPS, Constraint
from frpo.objectives.frpo import FRPO
from frpo.objectives.group import RLOO, DrGRPO
from frpo.objectives.stage import compute_advantages, reweighted
from frpo.run.build import check_watched
from frpo.run.checks import check_judged
from frpo.types import Completion, Prompt, RolloutGroup, ScoredGroup

NAN = math.nan
ROBUST = {"name": "frpo", "lam": 0.7, "scale": "exact"}


def scored(rewards, costs, kind="harmful", logprobs=None, draw=0):
    logprobs = logprobs or [(-1.0,)] * len(rewards)
    completions = tuple(Completion(text="", token_ids=tuple(range(len(row))), logprobs=tuple(row), version_spans=(),
                                   loss_mask=(True,) * len(row), seed=0, finish_reason="stop") for row in logprobs)
    prompt = Prompt(uid="p", messages=(), token_ids=(1,), columns={"kind": kind})
    return ScoredGroup(group=RolloutGroup(group_id=(0, draw), prompt=prompt, completions=completions),
                       rewards_G=np.array(rewards, dtype=np.float64), terms={"cost": np.array(costs, dtype=np.float64)})


def constraint(**keys):
    return Constraint(cost="cost", **({"normalise": "none"} | keys))


def advantages(rule, group, nu, estimator=None, reference=None, kl_in_reward=0.0):
    """The mixed advantages of one group at multiplier nu."""
    result, = compute_advantages([group], estimator or DrGRPO(), [reference], kl_in_reward, rule.mixture({NU: nu}))
    return result.advantages_G


# --- the mixture ------------------------------------------------------------------------------------------------------

def test_advantages_are_mixed_by_hand():
    """A^r = (1, 0, -1), A^c = (2, -1, -1) for the mean; nu = 1/2: (1 - 1, 0 + .5, -1 + .5) / 1.5."""
    mixed = advantages(constraint(advantage={"name": "dr_grpo"}), scored([2, 1, 0], [3, 0, 0]), nu=0.5)
    np.testing.assert_allclose(mixed, [0, 1 / 3, -1 / 3], atol=1e-15)


def test_at_nu_0_the_reward_alone_counts_and_at_a_large_nu_the_cost():
    group = scored([2, 1, 0], [3, 0, 1])
    np.testing.assert_array_equal(advantages(constraint(), group, nu=0.0), [1, 0, -1])
    np.testing.assert_allclose(advantages(constraint(), group, nu=1e12), RLOO().advantages([-3, 0, -1]).advantages_G)


def test_a_robust_cost_is_the_robust_estimator_of_the_negative_cost():
    rewards, costs = [1.0, 0.5, 0.0, 0.2], [0.0, 2.0, -1.0, 0.4]
    exact = FRPO(lam=0.7, scale="exact")
    expected = (DrGRPO().advantages(rewards).advantages_G
                + 3 * exact.advantages(-np.array(costs)).advantages_G) / 4
    np.testing.assert_allclose(advantages(constraint(advantage=ROBUST), scored(rewards, costs), nu=3.0), expected)
    assert expected.sum() == pytest.approx(0, abs=1e-12)


def test_a_prompt_that_is_not_watched_keeps_its_reward_over_1_plus_nu():
    rule = constraint(where={"kind": ["harmful"]})
    np.testing.assert_allclose(advantages(rule, scored([1, 0], [5, 9], kind="benign"), nu=1.0), [0.25, -0.25])


def test_a_completion_without_a_cost_gets_nothing_or_keeps_its_reward():
    """Rewards 2, 1, 0 without the first: A^r = (0, .5, -.5); costs 1, 0: RLOO A^c = (0, 1, -1)."""
    group = scored([2, 1, 0], [NAN, 1, 0])
    np.testing.assert_allclose(advantages(constraint(), group, nu=1.0), [0, -0.25, 0.25])
    kept = advantages(constraint(missing="keep"), group, nu=1.0)
    np.testing.assert_allclose(kept, [0.5, -0.5, 0.0])


def test_both_streams_carry_the_kl_so_the_mixture_does_for_every_nu():
    """KL penalties .4 x (2, 0): with equal rewards and costs only they remain, for every nu, watched or not."""
    reference = (np.array([-3.0]), np.array([-1.0]))
    for kind in ("harmful", "benign"):
        for nu in (0.0, 0.7, 9.0):
            group = scored([1, 1], [2, 2], kind=kind)
            rule = constraint(where={"kind": ["harmful"]}, advantage={"name": "dr_grpo"})
            np.testing.assert_allclose(advantages(rule, group, nu, reference=reference, kl_in_reward=0.4), [-0.4, 0.4])


def test_reweighted_streams_are_mixed_with_the_same_multiplier():
    rule, exact = constraint(advantage=ROBUST), FRPO(lam=0.5, scale="exact")
    rewards, costs, log_ratio = [1.0, 0.2, 0.6], [0.0, 1.0, -1.0], np.array([0.3, -1.0, 0.5])
    group, = compute_advantages([scored(rewards, costs)], exact, [None], mixture=rule.mixture({NU: 2.0}))
    found, = reweighted([group], exact, [log_ratio], mixture=rule.mixture({NU: 2.0}))
    expected = (exact.reweighted(rewards, log_ratio).advantages_G
                + 2 * rule.advantage.reweighted(-np.array(costs), log_ratio).advantages_G) / 3
    np.testing.assert_allclose(found.advantages_G, expected)
    assert found.stats["cost/ratio"] == found.stats["ratio"] and "cost/ess" in found.stats


# --- what is measured -------------------------------------------------------------------------------------------------

def test_all_watched_groups_are_measured_each_with_the_same_weight():
    """Means 1 (of 2 known) and 4 (flat, above the threshold): 2.5; the benign group's 100 does not count."""
    groups = [scored([0] * 3, [0, 2, NAN]), scored([0] * 3, [4, 4, 4]), scored([0] * 3, [100] * 3, kind="benign")]
    measured = constraint(where={"kind": ["harmful"]}, threshold=1.0).measure(groups, {})
    assert (measured.cost, measured.watched, measured.flat, measured.flat_above) == (2.5, 2, 0.5, 0.5)
    assert measured.missing == pytest.approx(1 / 6) and measured.sd == pytest.approx(np.std([0, 2, 4, 4, 4]))


def test_the_robust_cost_of_a_group_is_the_jackknife_at_most_its_largest_cost():
    costs = np.array([0.0, 0.0, 0.0, 3.0])
    rule = constraint(advantage={"name": "frpo", "lam": 2.0, "scale": "exact"})
    tilted = 2 * math.log(np.mean(np.exp(costs / 2)))
    without = [2 * math.log(np.mean(np.exp(np.delete(costs, i) / 2))) for i in range(4)]
    assert rule.values([scored(costs, costs)], {}) == [pytest.approx(4 * tilted - 3 / 4 * sum(without))]
    small = constraint(advantage={"name": "frpo", "lam": 0.05, "scale": "exact"})
    assert small.values([scored(costs, costs)], {}) == [3.0]


def test_in_a_radius_the_cost_is_the_worst_mean_within_it():
    """rho = log 2 with two of four at the worst: all weight on them."""
    rule = constraint(advantage={"name": "frpo", "rho": math.log(2), "estimator": "plugin", "scale": "exact"})
    assert rule.values([scored([0] * 4, [1, 1, 0, 0])], {}) == [1.0]


@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_a_cost_in_another_unit_gives_the_same_multiplier_and_the_same_advantages(factor):
    """With a threshold in that unit. Powers of 2, so that not even rounding differs."""
    def run(unit):
        rule = Constraint(cost="cost", threshold=0.5 * unit, advantage=ROBUST)
        record, found = {}, []
        for step in range(6):
            groups = [scored([1, 0, 0.5], np.array([1.0, 0.2 * step, -0.5]) * unit),
                      scored([1, 1, 0], np.array([0.1, 1.5, 0.4 * step]) * unit, draw=1)]
            record = rule.after(record, rule.measure(groups, record))
            mixed, _ = compute_advantages(groups, DrGRPO(), [None, None], mixture=rule.mixture(record))
            found.append((record[NU], *mixed.advantages_G))
        return found, record

    (one, record), (other, scaled) = run(1.0), run(factor)
    assert one == other and scaled[SCALE] == factor * record[SCALE]


# --- the multiplier ---------------------------------------------------------------------------------------------------

def test_pi_by_hand():
    """Gaps 1, -1, 0 with kp 1, lr .02, from 1: I = 1.02, 1.0, 1.0; nu = 2.02, 0.0, 1.0."""
    rule, record, found = constraint(), {}, []
    for cost in (1.0, -1.0, 0.0):
        record = rule.after(record, rule.measure([scored([0, 0], [cost, cost + 1e-9])], record))
        found.append((record[INTEGRAL], record[NU]))
    np.testing.assert_allclose(found, [(1.02, 2.02), (1.0, 0.0), (1.0, 1.0)], atol=1e-7)


def test_the_integral_stays_between_0_and_max_so_it_does_not_wind_up():
    rule, record = constraint(max=2.0, lr=0.5), {}
    for _ in range(50):
        record = rule.after(record, rule.measure([scored([0, 0], [3, 5])], record))
    assert (record[INTEGRAL], record[NU]) == (2.0, 2.0)
    record = rule.after(record, rule.measure([scored([0, 0], [-3, -5])], record))
    assert (record[INTEGRAL], record[NU]) == (0.0, 0.0), "one step of 4 below undoes it"


def test_the_log_rule_is_gradient_ascent_on_log_nu():
    """nu <- nu exp(.1 nu gap): 1 -> e^.2 -> e^(.2 + .1 x e^.2 x 2), at most max."""
    rule, record = constraint(rule="log", lr=0.1, max=5.0), {}
    measured = rule.measure([scored([0, 0], [1.5, 2.5])], {})
    record = rule.after(record, measured)
    assert record[NU] == pytest.approx(math.exp(0.2))
    assert rule.after(record, measured)[NU] == pytest.approx(math.exp(0.2 + 0.1 * math.exp(0.2) * 2))
    assert rule.after({**record, NU: 4.9}, measured)[NU] == 5.0


def test_the_unit_is_frozen_at_the_first_step_with_different_costs():
    rule, record = Constraint(cost="cost"), {}
    record = rule.after(record, rule.measure([scored([0, 0], [7, 7])], record))
    assert record[NU] == 1.0 and SCALE not in record, "equal costs tell no unit: the multiplier waits"
    record = rule.after(record, rule.measure([scored([0, 0], [0, 4])], record))
    assert record[SCALE] == 2.0 and record[NU] == pytest.approx(1 + 1.02)  # gap = 2 / 2
    record = rule.after(record, rule.measure([scored([0, 0], [0, 400])], record))
    assert record[SCALE] == 2.0


def test_steps_without_a_watched_prompt_change_nothing():
    rule, record = constraint(where={"kind": ["harmful"]}), {NU: 2.0, INTEGRAL: 1.5, "nu_steps": 4.0, "kl_coef": 0.1}
    after = rule.after(record, rule.measure([scored([0, 1], [5, 5], kind="benign")], record))
    assert {name: after[name] for name in record} == record
    check_judged(rule, after)


def test_a_cost_that_abstains_for_some_steps_ends_the_run():
    rule, record = constraint(), {}
    for _ in range(UNJUDGED_STEPS):
        check_judged(rule, record)
        record = rule.after(record, rule.measure([scored([0, 1], [NAN, NAN])], record))
    with pytest.raises(InvariantError, match="reward 'cost' gave no cost to any watched completion for 5 steps"):
        check_judged(rule, record)
    judged = rule.after(record, rule.measure([scored([0, 1], [1, 0])], record))
    check_judged(rule, judged)


# --- warnings ---------------------------------------------------------------------------------------------------------

def told(rule, groups, steps):
    record, lines = {}, []
    for _ in range(steps):
        measured = rule.measure(groups, record)
        record = rule.after(record, measured)
        lines += rule.warnings(record, measured)
    return record, lines


def test_a_constraint_out_of_reach_is_said_once():
    record, lines = told(constraint(max=1.5), [scored([0, 1], [3, 5])], steps=PATIENCE + 5)
    assert len(lines) == 1 and record[AT_MAX] == PATIENCE + 5
    assert "the multiplier is at max = 1.5 and the cost 4 is above threshold = 0 for 20 steps" in lines[0]
    assert "objective.kl_coef" in lines[0]


def test_groups_that_are_all_costly_alike_are_said_once():
    record, lines = told(constraint(max=1e6), [scored([0, 1], [3, 3])], steps=PATIENCE + 5)
    assert len(lines) == 1 and record[FLAT_ABOVE] == PATIENCE + 5
    assert "equal costs above threshold = 0" in lines[0] and "rollout.group_size" in lines[0]


def test_harmless_prompts_that_dilute_the_constraint_are_said_at_the_first_step():
    groups = [scored([0, 1], [-9, -9]), scored([0, 1], [-9, -8.9]), scored([0, 1], [1, 2])]
    _, lines = told(constraint(), groups, steps=3)
    assert len(lines) == 1 and lines[0].startswith("67% of the watched prompts cost less") and ".where" in lines[0]
    _, lines = told(constraint(), groups[1:], steps=3)
    assert lines == []


# --- what is refused --------------------------------------------------------------------------------------------------

def rewards(reward="{}", cost="{}"):
    """The override with a reward r and a cost, each called on the prompts of its `where`."""
    function = "function: 'frpo.rewards.verifiers:boxed_format'"
    return (f"rewards=[{{name: r, {function}, where: {reward}}}, "
            f"{{name: cost, {function}, where: {cost}, weight: 0.0}}]")


REWARD = rewards()


@pytest.mark.parametrize("keys, message", [
    ("{cost: costs}", "objective.constraint.cost: unknown reward 'costs' .did you mean 'cost'"),
    ("{cost: r}", "reward 'r' has weight 1 and is the cost of objective.constraint.*set its weight to 0"),
    ("{cost: cost, advantage: {name: frpo, scale: max1}}", "frpo needs scale: exact, given max1"),
    ("{cost: cost, advantage: {name: grpo}}", "grpo divides by the standard deviation of each group"),
    ("{cost: cost, rule: log, initial: 0.0}", "initial = 0 with rule: log stays 0 forever"),
    ("{cost: cost, lr: 0.0, kp: 0.0}", "never moves the multiplier"),
    ("{cost: cost, rule: log, lr: 0.0}", "never moves the multiplier"),
    ("{cost: cost, initial: 11.0}", "initial = 11 is above max = 10"),
    ("{cost: cost, normalise: -1.0}", "normalise must be first, none or a number above 0, given -1"),
    ("{cost: cost, wher: {}}", "unknown key 'objective.constraint.wher'; did you mean 'where'"),
])
def test_what_cannot_work_is_refused_with_a_remedy(keys, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("smoke", [REWARD, f"objective.constraint={keys}"])


def test_gains_that_oscillate_are_noted():
    recipe = load_recipe("smoke", [REWARD, "objective.constraint={cost: cost, lr: 0.5}"])
    assert recipe.objective.notes(4) == [
        "note: objective.constraint.lr = 0.5 with kp = 1 may oscillate; keep lr at or below kp / 25 = 0.04"]
    assert load_recipe("smoke", [REWARD, "objective.constraint={cost: cost}"]).objective.notes(4) == []


def test_reweighting_needs_an_estimator_that_can_for_the_cost_too():
    keys = [REWARD, "objective.reweight=current", "objective.surrogate={name: reinforce}"]
    with pytest.raises(ConfigError, match="does not work with this constraint.advantage"):
        load_recipe("smoke", [*keys, "objective.constraint={cost: cost}"])
    robust = "{cost: cost, advantage: {name: frpo, lam: 1.0, scale: exact}}"
    assert load_recipe("smoke", [*keys, f"objective.constraint={robust}"]).objective.constraint.advantage == FRPO(
        lam=1.0, scale="exact")


def test_a_group_is_worth_learning_from_if_either_stream_differs():
    from frpo.loops.collect import teaches

    mixture = constraint().mixture({NU: 1.0})
    flat_reward, flat_cost = scored([1, 1], [0, 3]), scored([1, 0], [2, 2])
    nothing = replace(flat_reward, terms={"cost": np.array([2.0, 2.0])})
    assert teaches(flat_reward, RLOO(), 1e-6, mixture) and teaches(flat_cost, RLOO(), 1e-6, mixture)
    assert not teaches(nothing, RLOO(), 1e-6, mixture) and not teaches(flat_reward, RLOO(), 1e-6)


def prompts_of(*kinds):
    prompts = tuple(Prompt(uid=str(i), messages=(), token_ids=(1,), columns={"kind": kind})
                    for i, kind in enumerate(kinds))
    return PromptSet(train=prompts, heldout=(), digest="", skipped={})


@pytest.mark.parametrize("keys, message", [
    ([REWARD, "objective.constraint={cost: cost, where: {kind: [cruel]}}"],
     r"objective.constraint.where = {'kind': \['cruel'\]} selects none of 3 training prompts, whose columns are: kind"),
    ([rewards(cost="{kind: [harmful]}"), "objective.constraint={cost: cost}"],
     "watches 2 training prompts on which its cost 'cost' abstains .*; set objective.constraint.where to the same"),
    ([rewards(reward="{kind: [cruel]}")], "of reward 'r' selects none of 3 training prompts"),
])
def test_conditions_that_fit_no_prompt_are_found_before_anything_starts(keys, message):
    with pytest.raises(ConfigError, match=message):
        check_watched(load_recipe("smoke", keys), prompts_of("harmful", "benign", "benign"))
    fits = [rewards(cost="{kind: [harmful]}"), "objective.constraint={cost: cost, where: {kind: [harmful]}}"]
    check_watched(load_recipe("smoke", fits), prompts_of("harmful", "benign", "benign"))
