"""Until policy and reference first disagree on a likeliest token, training with CSFT+PA is training with CSFT, to the
bit: the preference acts where they disagree and nowhere else."""
from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from frpo.data.batcher import pack_examples
from frpo.data.layout import Layout
from frpo.kernels import LogitScale
from frpo.lab.data import downstream_rows
from frpo.lab.network import build_tokenizer, new_network
from frpo.lab.world import world_of
from frpo.learner.collate import collate, loss_positions
from frpo.learner.losses import SupervisedMicroBatch, response_positions
from frpo.learner.network import TokenModel
from frpo.learner.reference import ReferenceStates
from frpo.objectives.supervised import Progress, build_supervised
from frpo.telemetry.sums import MetricSums
from frpo.types import Example

CPU, UPDATES, BATCH = torch.device("cpu"), 40, 8
LR = 1e-5
"""So small that a random model's likeliest tokens, which are hardly likelier than others, do not change at once."""


def examples() -> list[Example]:
    tokenizer, found = build_tokenizer(), []
    for row in downstream_rows(world_of(0), UPDATES * BATCH):
        prompt, response = (tokenizer(text)["input_ids"] for text in (row["prompt"], f"{row['response']} END"))
        found.append(Example(uid=row["prompt"], origin="", token_ids=(*prompt, *response),
                             loss_mask=(False,) * len(prompt) + (True,) * len(response)))
    return found


def trained(objective: str) -> list[tuple[float, list[torch.Tensor]]]:
    """Share of disagreeing tokens before each update, and the weights after it, from one model that is its own
    reference."""
    network = new_network(seed=1)
    model, reference = TokenModel(network), TokenModel(copy.deepcopy(network))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    layout = Layout(num_ranks=1, micro_batch_tokens=16 * BATCH, packed=False)
    rows, found = list(enumerate(examples())), []
    for update in range(UPDATES):
        ((samples,),) = pack_examples(rows[update * BATCH:][:BATCH], layout, reduction="token-mean")
        batch = collate(samples, 0, CPU, packed=False)
        with torch.no_grad():
            hidden_NE = reference(batch, lambda hidden_ND, head_VD: hidden_ND)
        states = ReferenceStates(hidden_NE=hidden_NE, head_VE=reference.head.weight.detach(), scale=LogitScale())
        loss = SupervisedMicroBatch(
            loss=build_supervised({"name": objective}), progress=Progress(epochs_done=update / UPDATES, num_epochs=1),
            coefficient=1.0, reference=states, metrics=[], weight_N=loss_positions(samples, "weight", CPU),
            position_N=response_positions(samples, CPU))
        model(batch, partial(loss.of_head, target_N=batch.target_N, scale=LogitScale())).backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = MetricSums()
        for part in loss.metrics:
            metrics.update(part)
        found.append((metrics.result().get("pa/disagree", 0.0), [p.detach().clone() for p in model.parameters()]))
    return found


@pytest.mark.timeout(120)
def test_csft_pa_is_csft_until_a_token_flips():
    csft, pa = trained("csft"), trained("csft_pa")
    first = next(update for update, (disagree, _) in enumerate(pa) if disagree > 0)
    same = [all(map(torch.equal, ours, others)) for (_, ours), (_, others) in zip(csft, pa, strict=True)]
    print(f"\nfirst disagreement at update {first + 1} of {UPDATES}")
    assert first > 2  # or nothing would be shown
    assert same == [True] * first + [False] * (UPDATES - first)
