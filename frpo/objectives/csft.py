"""Define CSFT and its preference-alignment term (PA): supervised losses that keep the aligned model's behaviour.

For a response token y let d = log pi(y) - log pi_ref(y), a and b the likeliest tokens of reference and policy, and
KL = KL(pi || pi_ref) over the vocabulary:

    w     = max(2 sigmoid(-beta d), floor), without gradient      (Qi et al., 2024)
    CSFT  = -w log pi(y), the gradient of -(2 / beta) log sigmoid(beta d)
    PA    = -log sigmoid(mu margin),  mu = KL,  margin = log pi(a) - log pi(b) <= 0
    loss  = CSFT + delta PA

If the models agree, the margin is 0 and PA is the constant log 2 without gradient. No tensor here has the size of the
vocabulary: the caller computes log-probs, KL and margin per token.

Shape suffix: N tokens.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from frpo.objectives.base import LossOutput
from frpo.objectives.ops import keep, without_gradient
from frpo.objectives.registry import require_one_of
from frpo.objectives.supervised import Argmax, Margin, Progress, SupervisedInputs, supervised
from frpo.types import Metrics

if TYPE_CHECKING:
    from torch import Tensor

EpochIndex = Literal["fractional", "epoch0", "epoch1"]


def csft_loss(inputs: SupervisedInputs, beta_N: Tensor, floor: float = 1e-3) -> LossOutput:
    """Sum weight * -w log pi(y) over tokens. A token of weight 0 contributes exactly 0, even if its log-prob is NaN."""
    assert inputs.ref_logprobs_N is not None  # needs_reference
    live_N = inputs.live_N
    logprobs_N = keep(live_N, inputs.logprobs_N)
    w_N = csft_weights(logprobs_N, keep(live_N, inputs.ref_logprobs_N), beta_N, floor)
    loss_N = -w_N * logprobs_N
    count = live_N.sum()
    metrics: Metrics = {"csft/loss": (keep(live_N, loss_N.detach()).sum(), count, "mean"),
                        "csft/weight": (keep(live_N, w_N).sum(), count, "mean")}
    return LossOutput(loss_sum=(inputs.weight_N * loss_N).sum(), metrics=metrics)


def pa_loss(inputs: SupervisedInputs, mu_detach: bool = False, mu_max: float | None = None) -> LossOutput:
    """Sum weight * PA over tokens, with the weights of `csft_loss`.

    mu_detach: take mu as a constant. Otherwise PA also lowers the KL of tokens on which the models disagree.
    mu_max: upper limit of mu, without gradient through a clipped mu. A KL of 10 to 80 nats is far larger than CSFT,
    which is below 2. Raises ValueError without KL, margin and agreement.
    """
    if inputs.kl_N is None or inputs.margin_N is None or inputs.agree_N is None:
        raise ValueError("PA needs kl_N, margin_N and agree_N: run the policy against a reference")
    from torch.nn.functional import logsigmoid

    live_N = inputs.live_N
    mu_N = keep(live_N, inputs.kl_N)
    if mu_detach:
        mu_N = mu_N.detach()
    if mu_max is not None:
        mu_N = mu_N.masked_fill(mu_N > mu_max, mu_max)
    # logsigmoid is exact everywhere; softplus turns into a straight line above 20.
    pa_N = -logsigmoid(mu_N * keep(live_N, inputs.margin_N))
    return LossOutput(loss_sum=(inputs.weight_N * pa_N).sum(), metrics=_pa_metrics(live_N, inputs.agree_N, mu_N, pa_N))


def csft_weights(logprobs_N: Tensor, ref_logprobs_N: Tensor, beta_N: Tensor, floor: float = 1e-3) -> Tensor:
    """Return w = max(2 sigmoid(-beta (log pi - log pi_ref)), floor), without gradient, in [floor, 2].

    w is 1 if both log-probs are equal.
    """
    return (2 * (-beta_N * (logprobs_N.detach() - ref_logprobs_N)).sigmoid()).clamp(min=floor)


@supervised("csft")
@dataclass(frozen=True, kw_only=True)
class CSFT:
    """Loss `csft_loss` with a beta by position: for the first token, the next `early_tokens`, and all later tokens.

    The first token has a smaller beta than the next ones: its loss is high at first, and the sigmoid would saturate.
    Raises ValueError unless every beta is > 0, early_tokens >= 0 and 0 <= floor < 2. (Defaults: Qi et al.)
    """

    needs_reference: ClassVar[bool] = True
    beta_first: float = 0.5
    beta_early: float = 2.0
    early_tokens: int = 4
    beta_base: float = 0.1
    floor: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("beta_first", "beta_early", "beta_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, given {getattr(self, name)}")
        if self.early_tokens < 0:
            raise ValueError(f"early_tokens must be >= 0, given {self.early_tokens}")
        if not 0 <= self.floor < 2:
            raise ValueError(f"floor must be in [0, 2), given {self.floor}")

    def betas(self, position_N: Tensor) -> Tensor:
        early_N = position_N <= self.early_tokens
        beta_N = position_N.float().masked_fill(~early_N, self.beta_base).masked_fill(early_N, self.beta_early)
        return beta_N.masked_fill(position_N == 0, self.beta_first)

    def loss(self, inputs: SupervisedInputs, progress: Progress) -> LossOutput:
        return csft_loss(inputs, self.betas(inputs.position_N), self.floor)


@supervised("csft_pa")
@dataclass(frozen=True, kw_only=True)
class CSFTPA(CSFT):
    """Loss CSFT plus delta times `pa_loss`. delta moves from delta_start to delta_end, in the paper from 0.1 to 0.3.

    delta_index: the paper does not define how epochs count. "fractional" is the progress of the whole training, 0 to 1.
    "epoch0" and "epoch1" step with whole epochs, counted from 0 (delta never reaches delta_end) or from 1 (delta is
    never delta_start). argmax: "hard" compares the likeliest tokens, "soft" the distributions at temperature tau.
    Raises ValueError for an unknown index or argmax, a negative delta, mu_max <= 0 or tau <= 0.
    """

    delta_start: float = 0.1
    delta_end: float = 0.3
    delta_index: EpochIndex = "fractional"
    mu_detach: bool = False
    mu_max: float | None = None
    argmax: Argmax = "hard"
    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("delta_index", self.delta_index, get_args(EpochIndex))
        require_one_of("argmax", self.argmax, get_args(Argmax))
        for name in ("delta_start", "delta_end"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, given {getattr(self, name)}")
        if not self.tau > 0:
            raise ValueError(f"tau must be > 0, given {self.tau}")
        if self.mu_max is not None and not self.mu_max > 0:
            raise ValueError(f"mu_max must be > 0 or None, given {self.mu_max}")

    @property
    def margin(self) -> Margin:
        return Margin(argmax=self.argmax, tau=self.tau)

    def delta(self, progress: Progress) -> float:
        """Compute delta at this progress. Raises ValueError if epochs_done is outside [0, num_epochs]."""
        done, num_epochs = progress.epochs_done, progress.num_epochs
        if not 0 <= done <= num_epochs:
            raise ValueError(f"epochs_done must be in [0, {num_epochs}], given {done}")
        epoch = min(math.floor(done), math.ceil(num_epochs) - 1)  # the last one may be a part of an epoch
        count = {"fractional": done, "epoch0": epoch, "epoch1": min(epoch + 1, num_epochs)}[self.delta_index]
        return self.delta_start + (self.delta_end - self.delta_start) * count / num_epochs

    def loss(self, inputs: SupervisedInputs, progress: Progress) -> LossOutput:
        delta, csft = self.delta(progress), super().loss(inputs, progress)
        pa = pa_loss(inputs, self.mu_detach, self.mu_max)
        return LossOutput(loss_sum=csft.loss_sum + delta * pa.loss_sum,
                          metrics=csft.metrics | pa.metrics | {"pa/delta": (delta, 1.0, "max")})


@without_gradient
def _pa_metrics(live_N: Tensor, agree_N: Tensor, mu_N: Tensor, pa_N: Tensor) -> Metrics:
    """Compute PA's metrics. "pa/loss" is PA - log 2 over disagreeing tokens only: the others would hide the value."""
    disagree_N = live_N & ~agree_N
    return {"pa/loss": (keep(disagree_N, pa_N - math.log(2)).sum(), disagree_N.sum(), "mean"),
            "pa/mu": (mu_N.sum(), live_N.sum(), "mean"),
            "pa/disagree": (disagree_N.sum(), live_N.sum(), "mean")}
