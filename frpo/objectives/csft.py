"""CSFT and its preference-alignment term (PA): supervised losses that hold on to what the aligned model does.

Of a response token y, with d = log pi(y) - log pi_ref(y), a and b the likeliest tokens of reference and policy, KL =
KL(pi || pi_ref) over the vocabulary:

    w     = max(2 sigmoid(-beta d), floor), without gradient      (Qi et al., 2024)
    CSFT  = -w log pi(y), the gradient of -(2 / beta) log sigmoid(beta d)
    PA    = -log sigmoid(mu margin),  mu = KL,  margin = log pi(a) - log pi(b) <= 0
    loss  = CSFT + delta PA

Where the models agree the margin is 0 and PA is the constant log 2 without gradient. Nothing vocabulary-sized is here:
log-probs, KL and margin come in per token, from wherever the caller computes them.

Shape suffix: N tokens.
"""
from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from frpo.objectives.base import LossOutput
from frpo.objectives.ops import keep, without_gradient
from frpo.objectives.registry import require_one_of
from frpo.objectives.supervised import Progress, SupervisedInputs, supervised
from frpo.types import Metrics

if TYPE_CHECKING:
    from torch import Tensor

EpochIndex = Literal["fractional", "epoch0", "epoch1"]
Argmax = Literal["hard", "soft"]


@dataclass(frozen=True, kw_only=True)
class CSFTInputs:
    """Flat tensors over N tokens; log-probs, KL and margin in nats. logprobs, kl and margin may require grad.

    weight_N is divided already, and 0 for a token without a loss. agree_N is True where both models' likeliest token
    is the same. The last three are for PA.
    """

    logprobs_N: Tensor
    ref_logprobs_N: Tensor
    beta_N: Tensor
    weight_N: Tensor
    kl_N: Tensor | None = None
    margin_N: Tensor | None = None
    agree_N: Tensor | None = None

    def __post_init__(self) -> None:
        tensors = [getattr(self, f.name) for f in dataclasses.fields(self)]
        shapes = {tuple(tensor.shape) for tensor in tensors if tensor is not None}
        assert len(shapes) == 1, f"CSFTInputs would broadcast: {shapes}"


@dataclass(frozen=True, kw_only=True)
class CSFTLoss:
    """Sum over tokens of weight * -w log pi(y). A token whose weight is 0 contributes exactly 0, even if it is NaN.

    Raises ValueError unless 0 <= floor < 2.
    """

    floor: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 2:
            raise ValueError(f"floor must be in [0, 2), given {self.floor}")

    def __call__(self, inputs: CSFTInputs) -> LossOutput:
        live_N = inputs.weight_N != 0
        logprobs_N = keep(live_N, inputs.logprobs_N)
        w_N = csft_weights(logprobs_N, keep(live_N, inputs.ref_logprobs_N), inputs.beta_N, self.floor)
        loss_N = -w_N * logprobs_N
        count = live_N.sum()
        metrics: Metrics = {"csft/loss": (keep(live_N, loss_N.detach()).sum(), count, "mean"),
                            "csft/weight": (keep(live_N, w_N).sum(), count, "mean")}
        return LossOutput(loss_sum=(inputs.weight_N * loss_N).sum(), metrics=metrics)


@dataclass(frozen=True, kw_only=True)
class CSFTPALoss:
    """CSFT plus delta times PA, under the same weights.

    delta: the coefficient of PA.
    mu_detach: take mu as a constant. Otherwise the loss also lowers the KL of tokens where the models disagree.
    mu_max: clip mu there, without gradient through a clipped mu. A KL of 10 to 80 nats dwarfs CSFT, which is below 2.
    Raises ValueError for delta < 0 or mu_max <= 0, and when called without KL, margin and agreement.
    """

    delta: float
    mu_detach: bool = False
    mu_max: float | None = None
    csft: CSFTLoss = CSFTLoss()

    def __post_init__(self) -> None:
        if not self.delta >= 0:
            raise ValueError(f"delta must be >= 0, given {self.delta}")
        if self.mu_max is not None and not self.mu_max > 0:
            raise ValueError(f"mu_max must be > 0 or None, given {self.mu_max}")

    def __call__(self, inputs: CSFTInputs) -> LossOutput:
        if inputs.kl_N is None or inputs.margin_N is None or inputs.agree_N is None:
            raise ValueError("PA needs kl_N, margin_N and agree_N: run the policy against a reference")
        from torch.nn.functional import logsigmoid

        live_N = inputs.weight_N != 0
        mu_N = self._mu(keep(live_N, inputs.kl_N))
        # logsigmoid is exact everywhere; softplus turns into a straight line above 20.
        pa_N = -logsigmoid(mu_N * keep(live_N, inputs.margin_N))
        csft = self.csft(inputs)
        loss_sum = csft.loss_sum + self.delta * (inputs.weight_N * pa_N).sum()
        return LossOutput(loss_sum=loss_sum, metrics=csft.metrics | _pa_metrics(live_N, inputs.agree_N, mu_N, pa_N))

    def _mu(self, kl_N: Tensor) -> Tensor:
        if self.mu_detach:
            kl_N = kl_N.detach()
        return kl_N if self.mu_max is None else kl_N.masked_fill(kl_N > self.mu_max, self.mu_max)


def csft_weights(logprobs_N: Tensor, ref_logprobs_N: Tensor, beta_N: Tensor, floor: float = 1e-3) -> Tensor:
    """w = max(2 sigmoid(-beta (log pi - log pi_ref)), floor), without gradient: in [floor, 2], 1 where both agree."""
    return (2 * (-beta_N * (logprobs_N.detach() - ref_logprobs_N)).sigmoid()).clamp(min=floor)


@supervised("csft")
@dataclass(frozen=True, kw_only=True)
class CSFT:
    """`CSFTLoss` with beta by position in the response: the first token, the next `early_tokens`, all later ones.

    The first token is held less firmly than the next: its loss is high at first, and the sigmoid would saturate.
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
        CSFTLoss(floor=self.floor)

    def betas(self, position_N: Tensor) -> Tensor:
        early_N = position_N <= self.early_tokens
        beta_N = position_N.float().masked_fill(~early_N, self.beta_base).masked_fill(early_N, self.beta_early)
        return beta_N.masked_fill(position_N == 0, self.beta_first)

    def loss(self, inputs: SupervisedInputs, progress: Progress) -> LossOutput:
        return CSFTLoss(floor=self.floor)(self._with_betas(inputs))

    def _with_betas(self, given: SupervisedInputs) -> CSFTInputs:
        assert given.ref_logprobs_N is not None  # needs_reference
        return CSFTInputs(
            logprobs_N=given.logprobs_N, ref_logprobs_N=given.ref_logprobs_N, weight_N=given.weight_N,
            beta_N=self.betas(given.position_N), kl_N=given.kl_N, margin_N=given.margin_N, agree_N=given.agree_N)


@supervised("csft_pa")
@dataclass(frozen=True, kw_only=True)
class CSFTPA(CSFT):
    """`CSFTPALoss` with delta = delta_start + (delta_end - delta_start) * progress, from 0.1 to 0.3 in the paper.

    The paper leaves the index of epochs open. delta_index: "fractional" progress of the whole training, 0 to 1;
    "epoch0" and "epoch1" step with whole epochs that count from 0 (never reaching the end) or from 1 (never at the
    start). argmax: "hard" compares the likeliest tokens, "soft" the distributions at temperature tau.
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
        self._at(self.delta_start)

    def delta(self, progress: Progress) -> float:
        """Raises ValueError outside [0, num_epochs]."""
        done, num_epochs = progress.epochs_done, progress.num_epochs
        if not 0 <= done <= num_epochs:
            raise ValueError(f"epochs_done must be in [0, {num_epochs}], given {done}")
        epoch = min(math.floor(done), math.ceil(num_epochs) - 1)  # the last one may be a part of an epoch
        count = {"fractional": done, "epoch0": epoch, "epoch1": min(epoch + 1, num_epochs)}[self.delta_index]
        return self.delta_start + (self.delta_end - self.delta_start) * count / num_epochs

    def loss(self, inputs: SupervisedInputs, progress: Progress) -> LossOutput:
        delta = self.delta(progress)
        output = self._at(delta)(self._with_betas(inputs))
        return LossOutput(loss_sum=output.loss_sum, metrics=output.metrics | {"pa/delta": (delta, 1.0, "max")})

    def _at(self, delta: float) -> CSFTPALoss:
        return CSFTPALoss(delta=delta, mu_detach=self.mu_detach, mu_max=self.mu_max, csft=CSFTLoss(floor=self.floor))


@without_gradient
def _pa_metrics(live_N: Tensor, agree_N: Tensor, mu_N: Tensor, pa_N: Tensor) -> Metrics:
    """PA's loss is above its constant log 2, over the disagreeing tokens alone: the others would hide it."""
    disagree_N = live_N & ~agree_N
    return {"pa/loss": (keep(disagree_N, pa_N - math.log(2)).sum(), disagree_N.sum(), "mean"),
            "pa/mu": (mu_N.sum(), live_N.sum(), "mean"),
            "pa/disagree": (disagree_N.sum(), live_N.sum(), "mean")}
