"""Sums over discrete variables at their corners: zero probabilities, scales, plates, marks of either kind."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_hvae as ph
from tests.kinds.checks import close, refused

PARALLEL: dict[str, Any] = {"enumerate": "parallel"}


def nothing(*args: Any) -> None:
    pass


def normal(x: Any, loc: Any) -> Tensor:
    return dist.Normal(torch.as_tensor(loc, dtype=torch.double), 1.0).log_prob(torch.as_tensor(x))


def test_states_that_are_never_drawn_cost_nothing() -> None:
    """Where q is zero, log p of minus infinity does not enter the expectation, nor its gradient."""
    loc = torch.zeros((), requires_grad=True)

    def model(x: Tensor) -> None:
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.factor("never", torch.where(y == 1, -math.inf, 0.0))
        pyro.sample("x", dist.Normal(loc + 1.0 * y, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("y", dist.Categorical(logits=torch.tensor([0.0, -math.inf])), infer=PARALLEL)

    x = torch.tensor(0.3)
    close(ph.TraceELBO().per_datum(model, guide, x), normal(x, 0.0) + math.log(0.4))
    (slope,) = torch.autograd.grad(ph.problem.Problem(model, guide)(x).run().log_ratios.sum(), loc)
    close(slope, x)


def test_a_state_that_joins_factors_through_another_one() -> None:
    """a - b - x and a - y: the last factor joins by ``a`` alone what ``b`` has joined."""
    p, t = torch.tensor([0.3, 0.7]), torch.tensor([[0.9, 0.1], [0.2, 0.8]])

    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Categorical(p), infer=PARALLEL)
        b = pyro.sample("b", dist.Categorical(t[a]), infer=PARALLEL)
        pyro.sample("x", dist.Normal(2.0 * b, 1.0), obs=x)
        pyro.sample("y", dist.Normal(-1.0 * a, 1.0), obs=y)

    x, y = torch.tensor(0.8), torch.tensor(-0.4)
    joint = p.log()[:, None] + t.log() + normal(x, [0.0, 2.0]) + normal(y, [0.0, -1.0])[:, None]
    close(ph.TraceELBO().per_datum(model, nothing, x, y), joint.flatten().logsumexp(0))


@pytest.mark.parametrize("mark", ["parallel", "sequential"])
@pytest.mark.parametrize("where", ["model", "guide"])
def test_marks_of_either_kind(mark: str, where: str) -> None:
    infer = {"enumerate": mark}

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer=infer if where == "model" else {})
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        if where == "guide":
            with pyro.plate("rows", len(x)):
                pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])), infer=infer)

    x = torch.tensor([0.3, 1.9, -1.0])
    truth = torch.logaddexp(math.log(0.3) + normal(x, 0.0), math.log(0.7) + normal(x, 2.0))
    close(ph.IWELBO(2).per_datum(model, guide, x), truth)


def test_a_scale_of_a_part_of_what_is_summed_is_refused() -> None:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer=PARALLEL)
        with pyro.plate("rows", 40, subsample=torch.arange(4)):
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    refused(lambda: ph.TraceELBO().per_datum(model, nothing, torch.zeros(4)), "different scales", "k", "x")


def test_a_sum_of_the_model_around_one_of_the_guide_is_refused() -> None:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer=PARALLEL)
        with pyro.plate("rows", len(x)):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor([0.2, 0.6])[k]))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(torch.sigmoid(x)), infer=PARALLEL)

    refused(lambda: ph.TraceELBO().per_datum(model, guide, torch.zeros(3)), "do not factorise", "k", "y")


def test_an_expectation_over_rows_of_what_depends_on_all_is_refused() -> None:
    def model(x: Tensor, total: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.4)))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)
        pyro.sample("total", dist.Normal(y.sum(-1, keepdim=True), 1.0), obs=total)

    def guide(x: Tensor, total: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(torch.sigmoid(x)), infer=PARALLEL)

    call = lambda: ph.TraceELBO().per_datum(model, guide, torch.zeros(3), torch.tensor([1.0]))  # noqa: E731
    refused(call, "in a plate around that site alone", "total", "y")
