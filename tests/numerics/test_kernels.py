"""The chunked head and loss against autograd of the full logits in float64, closed forms, and numbers by hand."""
from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from frpo.kernels import (
    ReferenceHead,
    TokenStats,
    chunks,
    linear_cross_entropy,
    linear_logprobs,
    linear_token_loss,
    projection,
    rows,
    token_loss,
)
from frpo.kernels.reference import naive_logits, naive_stats, naive_token_loss
from frpo.objectives.csft import CSFT, CSFTPA
from frpo.objectives.supervised import Progress, SupervisedInputs

N, V, D, E = 11, 37, 6, 5
SCALES = [{}, {"temperature": 0.7}, {"temperature": 1.3, "softcap": 2.5}]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several blocks of everything, none of which divides its whole."""
    monkeypatch.setattr(chunks, "_MIN_COLUMNS", 5)
    monkeypatch.setattr(projection, "_CONVERTED_ELEMENTS", 7 * D)
    monkeypatch.setitem(rows.BLOCK_ELEMENTS, "cpu", 2 * V)


def problem(dtype=torch.float64, seed=0, trained=(True, True), margin="hard"):
    """Hidden states, head, targets and a reference that is near the policy, so that some tokens agree."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden_ND, head_VD = normal(N, D), normal(V, D)
    reference = ReferenceHead(hidden_NE=torch.cat([hidden_ND, 0.3 * normal(N, E)], 1), tau=0.6, softcap=3.0,
                              head_VE=torch.cat([head_VD, normal(V, E)], 1), margin=margin)
    target_N = torch.randint(V, (N,), generator=generator)
    return (hidden_ND.requires_grad_(trained[0]), head_VD.requires_grad_(trained[1]), target_N), reference


def per_token(low, high):
    return torch.linspace(low, high, N, dtype=torch.float64)


WEIGHT_N = per_token(0.2, 1.1) * torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1])
NOISE_N = per_token(-0.5, 0.6)


def anything(stats, where):
    """Depends on every statistic, none of them linearly."""
    value_n = stats.logprobs_N.sin() * stats.entropy_N + stats.entropy_N.square()
    if stats.kl_N is not None:
        value_n = value_n + stats.kl_N * stats.margin_N.cos() - stats.ref_logprobs_N * stats.margin_N
    return (WEIGHT_N[where] * value_n).sum()


def policy(stats, where):
    """Clipped surrogate with the k3 estimate of the KL."""
    anchor_n = -3 + NOISE_N[where]
    ratio_n, d_n = torch.exp(stats.logprobs_N - anchor_n), -4 - stats.logprobs_N
    surrogate_n = torch.minimum(ratio_n * NOISE_N[where], ratio_n.clamp(0.8, 1.2) * NOISE_N[where])
    return (WEIGHT_N[where] * (0.1 * (torch.expm1(d_n) - d_n) - surrogate_n)).sum()


def csft(loss):
    def of_stats(stats, where):
        cached_n = stats.logprobs_N.detach() + NOISE_N[where] if stats.kl_N is None else stats.ref_logprobs_N
        given = SupervisedInputs(
            logprobs_N=stats.logprobs_N, ref_logprobs_N=cached_n, weight_N=WEIGHT_N[where], kl_N=stats.kl_N,
            margin_N=stats.margin_N, agree_N=stats.agree_N, position_N=torch.zeros_like(stats.logprobs_N))
        return loss.loss(given, Progress(epochs_done=0, num_epochs=1)).loss_sum
    return of_stats


def with_pa(delta, **options):
    return csft(CSFTPA(beta_first=0.5, delta_start=delta, delta_end=delta, **options))


LOSSES = {
    "anything": (anything, None),
    "policy": (policy, None),
    "cross-entropy": (lambda stats, where: -(WEIGHT_N[where] * stats.logprobs_N).sum(), None),
    "csft": (csft(CSFT(beta_first=0.5)), None),
    "anything, reference": (anything, "hard"),
    "anything, soft": (anything, "soft"),
    "csft+pa": (with_pa(0.3), "hard"),
    "csft+pa soft": (with_pa(0.3), "soft"),
    "csft+pa detached": (with_pa(0.3, mu_detach=True), "hard"),
    "csft+pa clipped": (with_pa(0.3, mu_max=0.5), "hard"),
    "csft+pa soft detached": (with_pa(0.3, mu_detach=True), "soft"),
}


def gradients(value, *tensors):
    for tensor in tensors:
        tensor.grad = None
    value.backward()
    return [value.detach(), *(tensor.grad for tensor in tensors)]


def assert_near(given, expected, rtol=1e-12, atol=1e-12):
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("made", ["once", "twice"])
@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_token_loss_is_autograds_of_the_full_logits(name, scale, made, monkeypatch):
    loss, margin = LOSSES[name]
    if made == "twice":
        monkeypatch.setattr(token_loss, "_accumulated", token_loss._swept)
    operands, reference = problem(margin=margin or "hard")
    options = {**scale, "reference": reference if margin else None}
    expected = gradients(naive_token_loss(*operands, loss, **options), *operands[:2])
    assert expected[1].abs().max() > 1e-3
    for chunk_rows in (1, 4, 512):
        assert_near(gradients(linear_token_loss(*operands, loss, chunk_rows=chunk_rows, **options), *operands[:2]),
                    expected)


def test_the_reference_gives_tokens_of_both_kinds():
    """Otherwise the tests above would not see the margin's gradient, or only that."""
    operands, reference = problem()
    agree_N = naive_stats(*operands, reference=reference).agree_N
    assert 2 <= agree_N.sum() <= N - 2


@pytest.mark.parametrize("used", ["log-probs", "entropies", "both"])
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_logprobs_and_entropies_are_differentiable(used, scale):
    def value(logprobs_N, entropy_N):
        parts = {"log-probs": logprobs_N.sin(), "entropies": entropy_N.square()}
        chosen = parts.values() if used == "both" else [parts[used]]
        return (WEIGHT_N * math.prod(chosen)).sum()

    operands, _ = problem()
    stats = naive_stats(*operands, **scale)
    expected = gradients(value(stats.logprobs_N, stats.entropy_N), *operands[:2])
    for chunk_rows in (3, 512):
        outputs = linear_logprobs(*operands, chunk_rows=chunk_rows, **scale)
        assert_near(outputs, [stats.logprobs_N, stats.entropy_N])
        assert_near(gradients(value(*outputs), *operands[:2]), expected)


def test_statistics_by_hand():
    """p = (1, 2, 1)/4 against the uniform q; head = identity, so hidden states are logits and their gradient is dz."""
    logits_1V = torch.tensor([[0.0, math.log(2), 0.0]], dtype=torch.float64, requires_grad=True)
    identity, target = torch.eye(3, dtype=torch.float64), torch.tensor([1])
    seen: list[TokenStats] = []

    def loss(stats, where):
        seen.append(stats)
        return (stats.logprobs_N + 10 * stats.entropy_N + 100 * stats.kl_N + 1000 * stats.margin_N).sum()

    reference = ReferenceHead(hidden_NE=torch.zeros(1, 3, dtype=torch.float64), head_VE=identity)
    log2, log3 = math.log(2), math.log(3)
    value = linear_token_loss(logits_1V, identity, target, loss, reference=reference)
    value.backward()
    (stats,) = seen
    assert stats.logprobs_N.item() == pytest.approx(-log2, abs=1e-15)
    assert stats.entropy_N.item() == pytest.approx(1.5 * log2, abs=1e-15)
    assert stats.kl_N.item() == pytest.approx(log3 - 1.5 * log2, abs=1e-15)
    assert stats.ref_logprobs_N.item() == pytest.approx(-log3, abs=1e-15)
    assert stats.margin_N.item() == pytest.approx(-log2, abs=1e-15)   # a = 0, the lowest of three equal ones
    assert not stats.agree_N.item()
    # -p (log p + H): log p = -2, -1, -2 log 2; the KL to a constant q is the negative entropy and a constant.
    entropy_slope = [log2 / 8, -log2 / 4, log2 / 8]
    expected = [-1 / 4 - 90 * entropy_slope[0] + 1000, 1 / 2 - 90 * entropy_slope[1] - 1000, -1 / 4 - 90 * log2 / 8]
    assert logits_1V.grad[0].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("margin, mu_detach", [("hard", False), ("hard", True), ("soft", False), ("soft", True)])
def test_the_gradient_of_logits_is_the_closed_form(margin, mu_detach):
    """w (p - e_y) - delta sigma(-zeta) (mu d + margin g_KL), written down for whole rows of logits."""
    generator = torch.Generator().manual_seed(3)
    z, u = (torch.randn(N, V, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    u[:3] = z[:3] + 0.1 * u[:3]
    target_N, identity, tau, delta = torch.randint(V, (N,), generator=generator), torch.eye(V).double(), 0.6, 0.3
    log_p, log_q = z.log_softmax(1), u.log_softmax(1)
    p, e = log_p.exp(), torch.eye(V, dtype=torch.float64)
    mu = (p * (log_p - log_q)).sum(1, keepdim=True)
    if margin == "hard":
        d = e[u.argmax(1)] - e[z.argmax(1)]
        gap = (d * log_p).sum(1, keepdim=True)
    else:
        alpha, gamma = (u / tau).softmax(1), (z / tau).softmax(1)
        gap = ((alpha - gamma) * log_p).sum(1, keepdim=True)
        d = alpha - gamma - gamma * (z - (gamma * z).sum(1, keepdim=True)) / tau
    gap_logprobs = (log_p - log_q)[torch.arange(N), target_N, None]
    w = (2 * torch.sigmoid(-0.5 * gap_logprobs)).clamp(min=1e-3)
    g_kl = p * (log_p - log_q - mu)
    expected = WEIGHT_N[:, None] * (
        w * (p - e[target_N]) - delta * torch.sigmoid(-mu * gap) * (mu * d + (0 if mu_detach else 1) * gap * g_kl))
    z.requires_grad_()
    reference = ReferenceHead(hidden_NE=u, head_VE=identity, margin=margin, tau=tau)
    linear_token_loss(z, identity, target_N, with_pa(delta, mu_detach=mu_detach), reference=reference,
                      chunk_rows=4).backward()
    assert_near([z.grad], [expected])


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_row_of_logits_sums_to_zero(name):
    """Every statistic is the same for logits shifted by a constant."""
    loss, margin = LOSSES[name]
    generator = torch.Generator().manual_seed(4)
    z, u = (torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in range(2))
    identity = torch.eye(V, dtype=torch.float64)
    reference = ReferenceHead(hidden_NE=u, head_VE=identity, margin=margin or "hard") if margin else None
    z.requires_grad_()
    linear_token_loss(z, identity, torch.arange(N), loss, reference=reference, temperature=0.8, chunk_rows=4).backward()
    assert z.grad.abs().max() > 1e-3
    assert z.grad.sum(1).abs().max() < 1e-13


def test_cross_entropy_is_the_weighted_sum():
    operands, _ = problem()
    expected = -(WEIGHT_N * naive_stats(*operands, temperature=0.7).logprobs_N).sum()
    value = linear_cross_entropy(*operands, WEIGHT_N, temperature=0.7, chunk_rows=4)
    assert_near(gradients(value, *operands[:2]), gradients(expected, *operands[:2]))


def test_an_upstream_factor_multiplies_once():
    operands, _ = problem()
    expected = gradients(-3 * naive_token_loss(*operands, anything), *operands[:2])
    assert_near(gradients(-3 * linear_token_loss(*operands, anything), *operands[:2]), expected)


def test_backward_runs_once():
    operands, _ = problem()
    value = linear_token_loss(*operands, anything)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        value.backward()


@pytest.mark.parametrize("trained", [(True, False), (False, True)], ids=["frozen head", "frozen hidden"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_frozen_gets_no_gradient_and_costs_none(trained, dtype, monkeypatch):
    def no_work(*args, **kwargs):
        raise AssertionError("gradient of what is frozen")

    (hidden_ND, head_VD, target_N), reference = problem(dtype, trained=trained)
    (full_hidden_ND, full_head_VD, _), _ = problem(dtype)

    def both(hidden_ND, head_VD):
        logprobs_N, entropy_N = linear_logprobs(hidden_ND, head_VD, target_N, chunk_rows=4)
        loss = linear_token_loss(hidden_ND, head_VD, target_N, LOSSES["csft+pa"][0], reference=reference, chunk_rows=4)
        return loss + anything(TokenStats(logprobs_N=logprobs_N, entropy_N=entropy_N), slice(None))

    both(full_hidden_ND, full_head_VD).backward()
    for module in (chunks, token_loss):
        monkeypatch.setattr(module, "weight_gradient_" if trained[0] else "hidden_gradient_", no_work)
    both(hidden_ND, head_VD).backward()
    for tensor, full, wanted in zip((hidden_ND, head_VD), (full_hidden_ND, full_head_VD), trained, strict=True):
        if wanted:
            torch.testing.assert_close(tensor.grad, full.grad)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("frozen", [False, True], ids=["no_grad", "nothing trained"])
def test_without_gradients_there_is_no_gradient_work(frozen, monkeypatch):
    def no_work(*args, **kwargs):
        raise AssertionError("gradient work")

    operands, reference = problem(trained=(not frozen, not frozen))
    monkeypatch.setattr(rows, "gradient_", no_work)
    expected = naive_token_loss(*operands, anything, reference=reference).detach()
    with torch.set_grad_enabled(frozen):
        value = linear_token_loss(*operands, anything, reference=reference, chunk_rows=4)
        logprobs_N, _ = linear_logprobs(*operands, chunk_rows=4)
    assert not value.requires_grad and not logprobs_N.requires_grad
    assert_near([value], [expected])


@pytest.mark.parametrize("dtype, wide", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_no_token_is_a_zero_that_is_connected(dtype, wide):
    (hidden_ND, head_VD, target_N), _ = problem(dtype)
    hidden_0D = hidden_ND[:0].detach().requires_grad_()
    logprobs_0, entropy_0 = linear_logprobs(hidden_0D, head_VD, target_N[:0])
    assert logprobs_0.shape == entropy_0.shape == (0,)
    for value in (linear_token_loss(hidden_0D, head_VD, target_N[:0], anything), (logprobs_0 * entropy_0).sum()):
        assert value.item() == 0 and value.dtype == wide
        _, hidden_grad, head_grad = gradients(value, hidden_0D, head_VD)
        assert hidden_grad.shape == (0, D) and head_grad.shape == (V, D) and not head_grad.any()


@pytest.mark.parametrize("chunk_rows", [1, 4, 512])
@pytest.mark.parametrize("margin", ["hard", "soft"])
def test_bfloat16_rounds_nothing_but_the_gradients_and_those_once(margin, chunk_rows):
    operands, reference = problem(torch.bfloat16, margin=margin)
    exact = [operands[0].detach().double().requires_grad_(), operands[1].detach().double().requires_grad_()]
    exact_reference = ReferenceHead(hidden_NE=reference.hidden_NE.double(), head_VE=reference.head_VE.double(),
                                    margin=margin, tau=reference.tau, softcap=reference.softcap)
    loss = LOSSES["anything, reference"][0]
    expected = gradients(naive_token_loss(*exact, operands[2], loss, reference=exact_reference), *exact)
    given = gradients(linear_token_loss(*operands, loss, reference=reference, chunk_rows=chunk_rows), *operands[:2])
    assert_near(given[:1], expected[:1], rtol=2e-6)
    assert_rounded_once(given[1:], expected[1:])
    logprobs_N, entropy_N = linear_logprobs(*operands, chunk_rows=chunk_rows)
    stats = naive_stats(*exact, operands[2])
    assert_near([logprobs_N, entropy_N], [stats.logprobs_N, stats.entropy_N], rtol=2e-6, atol=2e-6)
    expected = gradients((WEIGHT_N * stats.logprobs_N).sum(), *exact)
    assert_rounded_once(gradients((WEIGHT_N * logprobs_N).sum(), *operands[:2])[1:], expected[1:])


def assert_rounded_once(given, expected):
    """Equal to the float64 values in bfloat16, but for the few that float32 arithmetic moves over a rounding edge."""
    for one, other in zip(given, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one == other.bfloat16()).double().mean() > 0.98
        torch.testing.assert_close(one.double(), other, rtol=2.0**-8 * 1.01, atol=3e-6)


@pytest.mark.parametrize("name", ["anything", "policy", "csft", "csft+pa", "csft+pa soft", "csft+pa clipped"])
def test_extreme_logits_stay_finite_and_exact(name):
    """Logits of +-1e4 in float32: log p of -2e4 and KL of 1e4 are as good as float32 can write them down."""
    loss, margin = LOSSES[name]
    if name == "policy":  # its exponential would rightly overflow
        loss = lambda stats, where: -(WEIGHT_N[where] * stats.logprobs_N.clamp(min=-5e3)).sum()  # noqa: E731
    generator = torch.Generator().manual_seed(5)
    z64 = torch.randn(N, V, generator=generator, dtype=torch.float64)
    z64[:, 3], z64[:, 4], z64[5:, 3] = 1e4, -1e4, 9999.5
    u64 = torch.randn(N, V, generator=generator, dtype=torch.float64)
    u64[:6, 7], u64[6:, 3] = 1e4, 1e4
    results = []
    for dtype, compute in ((torch.float64, naive_token_loss), (torch.float32, linear_token_loss)):
        z, u, identity = z64.float().to(dtype).requires_grad_(), u64.float().to(dtype), torch.eye(V, dtype=dtype)
        reference = ReferenceHead(hidden_NE=u, head_VE=identity, margin=margin or "hard", tau=0.5) if margin else None
        results.append(gradients(compute(z, identity, torch.arange(N) % 5, loss, reference=reference), z))
    assert all(part.isfinite().all() for part in results[1])
    # Between two models 1e4 cancels, from log p - log q in w and from log p - log q - KL, which a margin of 1e4 scales.
    rtol, relative = (1e-4, 1e-3) if name.startswith("csft+pa") else (1e-5, 1e-6)
    assert_near(results[1], results[0], rtol=rtol, atol=relative * max(results[0][1].abs().max().item(), 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["cross-entropy", "csft", "csft+pa", "csft+pa soft"])
def test_a_token_without_weight_adds_exactly_nothing(name, dtype, bad):
    """Its own statistics are NaN; selection keeps them out, where a product with 0 would not."""
    loss, margin = LOSSES[name]
    if name == "cross-entropy":
        loss = lambda stats, where: -(  # noqa: E731
            WEIGHT_N[where] * torch.where(WEIGHT_N[where] != 0, stats.logprobs_N, 0)).sum()
    results = []
    for filling in (1.0, bad):
        (hidden_ND, head_VD, target_N), reference = problem(dtype, margin=margin or "hard")
        with torch.no_grad():
            hidden_ND[WEIGHT_N == 0] = filling
        value = linear_token_loss(hidden_ND, head_VD, target_N, loss, reference=reference if margin else None,
                                  chunk_rows=4)
        results.append(gradients(value, hidden_ND, head_VD))
        logprobs_N, _ = linear_logprobs(hidden_ND, head_VD, target_N, chunk_rows=4)
        results[-1] += gradients((WEIGHT_N * torch.where(WEIGHT_N != 0, logprobs_N, 0)).sum(), hidden_ND, head_VD)
    for clean, spoilt in zip(*results, strict=True):
        assert spoilt.isfinite().all() and torch.equal(clean, spoilt)
    assert not results[1][1][WEIGHT_N == 0].any()


def test_a_live_token_hides_no_nan():
    (hidden_ND, head_VD, target_N), _ = problem()
    with torch.no_grad():
        hidden_ND[1] = math.nan
    _, hidden_grad, head_grad = gradients(linear_token_loss(hidden_ND, head_VD, target_N, anything), hidden_ND, head_VD)
    assert hidden_grad[1].isnan().all() and hidden_grad[0].isfinite().all() and head_grad.isnan().all()


def test_a_head_tied_to_the_embedding_gets_both_gradients():
    (_, table_VD, target_N), reference = problem()
    results = []
    for compute in (naive_token_loss, linear_token_loss):
        hidden_ND = torch.tanh(table_VD[target_N.flip(0)] * 1.5)
        results.append(gradients(compute(hidden_ND, table_VD, target_N, anything, reference=reference), table_VD))
    assert_near(*results)


@pytest.mark.parametrize("distance", [0.0, 1e-5])
def test_the_kl_of_nearly_equal_models_is_not_negative(distance):
    """It is below 1e-8, and float32 rounds sums of 1 to 1e-7 either way."""
    (hidden_ND, head_VD, target_N), _ = problem(torch.float32)
    reference = ReferenceHead(hidden_NE=hidden_ND.detach() * (1 + distance), head_VE=head_VD.detach())
    seen: list[TokenStats] = []
    with torch.no_grad():
        linear_token_loss(hidden_ND, head_VD, target_N, lambda stats, where: seen.append(stats) or stats.kl_N.sum(),
                          reference=reference)
    (stats,) = seen
    assert stats.agree_N.all() and not stats.margin_N.any()
    assert (stats.kl_N >= 0).all() and stats.kl_N.max() < 1e-6


def test_ties_agree_on_the_lowest_token():
    tied = torch.tensor([[1.0, 5.0, 5.0, 0.0]]), torch.eye(4), torch.tensor([0])
    for reference_logits, agree in (([0.0, 2.0, 0.0, 2.0], True), ([0.0, 0.0, 2.0, 2.0], False)):
        reference = ReferenceHead(hidden_NE=torch.tensor([reference_logits]), head_VE=torch.eye(4))
        value = linear_token_loss(*tied, lambda stats, where: stats.agree_N.sum(), reference=reference)
        assert bool(value) is agree


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_logits_never_exist_at_once(dtype):
    tokens, vocabulary, width, chunk_rows = 96, 200, 8, 12
    hidden_ND = torch.randn(tokens, width).to(dtype).requires_grad_()
    head_VD = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    target_N = torch.arange(tokens)
    reference = ReferenceHead(hidden_NE=hidden_ND.detach(), head_VE=head_VD.detach())
    with Largest() as largest:
        (linear_logprobs(hidden_ND, head_VD, target_N, chunk_rows=chunk_rows)[0].sum() + linear_token_loss(
            hidden_ND, head_VD, target_N, lambda stats, where: (stats.kl_N + stats.margin_N).sum(),
            reference=reference, chunk_rows=chunk_rows)).backward()
    assert hidden_ND.grad.any() and head_VD.grad.any()
    assert vocabulary * width <= largest.elements <= chunk_rows * vocabulary
    with Largest() as largest:
        naive_logits(hidden_ND, head_VD)
    assert largest.elements == tokens * vocabulary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_nothing(dtype):
    operands, _ = problem(dtype)
    expected = gradients(linear_token_loss(*operands, anything), *operands[:2])
    expected += gradients(linear_logprobs(*operands)[0].sum(), *operands[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = gradients(linear_token_loss(*operands, anything), *operands[:2])
        given += gradients(linear_logprobs(*operands)[0].sum(), *operands[:2])
    assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))


@pytest.mark.parametrize("change, message", [
    ({"head_VD": torch.zeros(V, D, dtype=torch.float32)}, "must be of one type"),
    ({"head_VD": torch.zeros(V, D + 1, dtype=torch.float64)}, "must be matrices of one width"),
    ({"hidden_ND": torch.zeros(N, D, dtype=torch.float16), "head_VD": torch.zeros(V, D, dtype=torch.float16)},
     "of one type among torch.bfloat16, torch.float32, torch.float64, given torch.float16"),
    ({"target_N": torch.zeros(N - 1, dtype=torch.int64)}, r"target_N must be int64 of shape \(11,\)"),
    ({"target_N": torch.zeros(N)}, "target_N must be int64"),
    ({"chunk_rows": 0}, "chunk_rows must be >= 1, given 0"),
    ({"temperature": 0.0}, "temperature must be > 0, given 0.0"),
    ({"softcap": -1.0}, "softcap must be > 0 or None, given -1.0"),
    ({"reference": ReferenceHead(hidden_NE=torch.zeros(N, D).double(), head_VE=torch.zeros(V + 1, D).double())},
     r"must have the policy's tokens and vocabulary \(11, 37\), given \(11, 38\)"),
    ({"reference": ReferenceHead(hidden_NE=torch.zeros(N, D), head_VE=torch.zeros(V, D))},
     "both be float64 or neither"),
])
def test_what_cannot_be_computed_is_refused(change, message):
    (hidden_ND, head_VD, target_N), _ = problem()
    given = {"hidden_ND": hidden_ND, "head_VD": head_VD, "target_N": target_N, "loss": anything, **change}
    with pytest.raises(ValueError, match=message):
        linear_token_loss(**given)


@pytest.mark.parametrize("change, message", [
    ({"margin": "firm"}, "margin must be one of"), ({"tau": 0.0}, "tau must be > 0, given 0.0")])
def test_a_reference_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ReferenceHead(hidden_NE=torch.zeros(1, 1), head_VE=torch.zeros(1, 1), **change)
