"""Kind E: guides that are points, or that move draws by a Delta."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

import pyro_hvae as ph
from tests.kinds.checks import close, refused, right_or_refused


def standard() -> dist.Normal:
    return dist.Normal(torch.zeros(()), 1.0)


VERBS = {
    "evidence": lambda *pair: ph.log_evidence(*pair, num_samples=20),
    "iwelbo": lambda *pair: ph.IWELBO(4).per_datum(*pair),
    "khats": lambda *pair: ph.diagnostics.khats(*pair, num_draws=40),
    "sandwich": lambda *pair: ph.evidence_sandwich(*pair, num_chains=2, betas=3),
}


def gamma_model(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def located(x: Tensor) -> None:
    loc = pyro.sample("loc", standard())
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 0.5))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def delta() -> Any:
    return AutoDelta(located)


def partly() -> Any:
    guide = AutoGuideList(located)
    guide.append(AutoDelta(poutine.block(located, expose=["loc"])))
    guide.append(AutoNormal(poutine.block(located, expose=["scale"])))
    return guide


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> None:
        pyro.sample("loc", dist.Delta(self.loc))
        pyro.sample("scale", dist.LogNormal(torch.zeros(()), 0.3))


@pytest.mark.parametrize(
    ("make", "verb"),
    [
        *itertools.product([delta, partly, ByHand], ["evidence", "iwelbo"]),
        *itertools.product([delta, ByHand], ["sandwich"]),
        *itertools.product([partly, ByHand], ["khats"]),
    ],
)
def test_point_guides_are_refused_where_weights_are_taken(make: Callable[[], Any], verb: str) -> None:
    x, guide = torch.tensor([0.5, 1.0, -0.4]), make()
    guide(x)
    refused(lambda: VERBS[verb](located, guide, x), "Delta|point", "loc")


def test_point_guides_in_a_plate_are_refused() -> None:
    x = torch.tensor([0.5, 1.0])

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", 2):
            pyro.sample("rate", dist.Delta(1.0 + x))

    for verb in ("evidence", "iwelbo"):
        refused(partial(VERBS[verb], gamma_model, guide, x.round()), "Delta|point", "rate")


@pytest.mark.parametrize("make", [delta, ByHand])
def test_the_elbo_of_a_point_guide_trains_it(make: Callable[[], Any]) -> None:
    x, guide = torch.tensor([0.5, 1.0, -0.4]), make()
    guide(x)
    loss = ph.TraceELBO().differentiable_loss(located, guide, x)
    loss.backward()
    assert all(parameter.grad is not None for parameter in guide.parameters())
    if isinstance(guide, AutoDelta):
        trace = poutine.trace(poutine.condition(located, guide.median())).get_trace(x)
        close(loss, -trace.log_prob_sum())


def test_an_autoguide_with_deltas_that_are_changes_of_variables() -> None:
    def model() -> None:
        a = pyro.sample("a", standard())
        pyro.sample("x", dist.Normal(a, 1.0), obs=torch.tensor(1.0))

    guide = AutoMultivariateNormal(model, init_scale=0.5**0.5)
    guide()
    with torch.no_grad():
        guide.loc.fill_(0.5)
    truth = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0))
    close(ph.log_evidence(model, guide, num_samples=20).value, truth, 1e-6)


class Moved(nn.Module):
    """An auxiliary draw, stretched to the latent by a parameter through a Delta that has its log-density."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-0.2))

    def forward(self) -> None:
        noise = pyro.sample("noise", standard(), infer={"is_auxiliary": True})
        pyro.sample("a", dist.Delta(self.log_scale.exp() * noise, log_density=-self.log_scale))


@pytest.mark.parametrize("bound", [ph.WakePhase(20_000), ph.ReweightedWakeSleep(20_000)], ids=["wake", "reweighted"])
def test_the_wake_phase_of_a_stretched_delta(bound: Any) -> None:
    def model() -> None:
        a = pyro.sample("a", standard())
        pyro.sample("x", dist.Normal(a, 1.0), obs=torch.tensor(1.5))

    guide = Moved()

    def gradient() -> Tensor:
        return torch.autograd.grad(bound.differentiable_loss(model, guide), guide.log_scale)[0]

    # -log q(a) = a^2 exp(-2 s) / 2 + s, and E a^2 = 1/2 + (3/4)^2 under the posterior
    right_or_refused(gradient, 1 - (0.5 + 0.75**2) * math.exp(0.4), 0.1, "a")
