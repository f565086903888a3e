"""Kind D: latents that are summed out in the guide, as a semi-supervised model needs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn

import pyro_hvae as ph
from tests.kinds.checks import close

PARALLEL = {"enumerate": "parallel"}

PRIOR = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
CLASSES = torch.tensor([-2.0, 0.0, 2.5], dtype=torch.float64)


class M2Guide(nn.Module):
    """q(y|x) q(z|x, y), the first by a table of logits and the second exact."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-0.5, 0.8, 3 * rows).reshape(rows, 3))

    def forward(self, x: Tensor, y: Tensor | None = None, size: int | None = None) -> None:
        with pyro.plate("rows", size or len(x), subsample=torch.arange(len(x))):
            if y is None:
                y = pyro.sample("y", dist.Categorical(logits=self.logits), infer=PARALLEL)
            pyro.sample("z", dist.Normal((x - CLASSES[y]) / 2, 0.5**0.5))


def m2(x: Tensor, y: Tensor | None = None, size: int | None = None) -> None:
    with pyro.plate("rows", size or len(x), subsample=torch.arange(len(x))):
        y = pyro.sample("y", dist.Categorical(PRIOR), obs=y)
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(CLASSES[y] + z, 1.0), obs=x)


def m2_joint(x: Tensor) -> Tensor:
    """log p(x, y) of each datum and class."""
    return PRIOR.log() + dist.Normal(CLASSES, 2**0.5).log_prob(x[:, None])


def m2_elbo(x: Tensor, logits: Tensor) -> Tensor:
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * (m2_joint(x) - log_q)).sum(-1)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("particles", [1, 3])
def test_unlabelled_data(rows: int, particles: int) -> None:
    x, guide = torch.tensor([0.3, 2.0, -3.0])[:rows], M2Guide(rows)
    truth = m2_elbo(x, guide.logits).detach()
    close(TraceEnum_ELBO(max_plate_nesting=1).loss(m2, guide, x), -truth.sum())
    close(ph.TraceELBO(particles).per_datum(m2, guide, x), truth)
    close(ph.TraceELBO(particles).loss(m2, guide, x), -truth.sum())


def test_gradient_of_unlabelled_data() -> None:
    x, guide = torch.tensor([0.3, 2.0]), M2Guide(2)
    (found,) = torch.autograd.grad(ph.TraceELBO().differentiable_loss(m2, guide, x), guide.logits)
    (right,) = torch.autograd.grad(-m2_elbo(x, guide.logits).sum(), guide.logits)
    close(found, right)


def test_a_minibatch_of_unlabelled_data() -> None:
    x, guide = torch.tensor([0.3, 2.0]), M2Guide(2)
    close(ph.TraceELBO().loss(m2, guide, x, size=20), -10 * m2_elbo(x, guide.logits).sum())


def test_labelled_and_unlabelled_data_in_turn() -> None:
    x, y, guide = torch.tensor([0.3, 2.0]), torch.tensor([1, 2]), M2Guide(2)
    for _ in range(2):
        close(ph.TraceELBO().per_datum(m2, guide, x, y), m2_joint(x).gather(1, y[:, None]).squeeze(1))
        close(ph.TraceELBO().per_datum(m2, guide, x), m2_elbo(x, guide.logits))


@pytest.mark.parametrize("rows", [1, 3])
def test_evidence_with_a_class_summed_in_the_guide(rows: int) -> None:
    x, guide = torch.tensor([0.3, 2.0, -3.0])[:rows], M2Guide(rows)
    found = ph.log_evidence(m2, guide, x, num_samples=4000)
    assert found.value.shape == (rows,)
    close(found.value, m2_joint(x).logsumexp(-1), 0.12)


def test_draws_of_a_class_summed_in_the_guide() -> None:
    x, guide = torch.tensor([0.3, 2.0]), M2Guide(2)
    tree = ph.to_datatree(m2, guide, x, num_draws=4000)
    draws = tree["posterior"]["y"].values[0]
    assert draws.shape == (4000, 2)
    close(np.stack([(draws == k).mean(0) for k in range(3)], -1), guide.logits.softmax(-1), 0.035)
    centre = (x - CLASSES[torch.as_tensor(draws).long()]) / 2
    close((torch.as_tensor(tree["posterior"]["z"].values[0]) - centre).std(0), torch.full((2,), 0.5**0.5), 0.04)


def test_two_classes_one_after_the_other_in_the_guide() -> None:
    x = torch.tensor([1.0, 4.0, 0.0])
    table = torch.tensor([[0.6, 0.4], [0.2, 0.8]])

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 3):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.3)))
            b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
            pyro.sample("x", dist.Poisson(1.0 + a + 2.0 * b), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", 3):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.55)), infer=PARALLEL)
            pyro.sample("b", dist.Bernoulli(table[a.long(), 1]), infer=PARALLEL)

    truth = torch.zeros(3)
    for a, b in itertools.product((0, 1), repeat=2):
        log_q = math.log((0.45, 0.55)[a]) + table[a, b].log()
        p_b = 0.2 + 0.5 * a
        log_p = math.log((0.7, 0.3)[a]) + math.log(p_b if b else 1 - p_b) + dist.Poisson(1.0 + a + 2.0 * b).log_prob(x)
        truth = truth + log_q.exp() * (log_p - log_q)
    close(TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x), -truth.sum())
    close(ph.TraceELBO().per_datum(model, guide, x), truth)


def test_masked_data_with_a_class_summed_in_the_guide() -> None:
    x, mask, guide = torch.tensor([0.3, 2.0, -3.0]), torch.tensor([True, False, True]), M2Guide(3)
    masked = [poutine.mask(program, mask=mask) for program in (m2, guide)]
    close(ph.TraceELBO().per_datum(*masked, x), torch.where(mask, m2_elbo(x, guide.logits), 0.0))
