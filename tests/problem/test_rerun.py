"""Other draws under the guide's distributions of a run, without running the guide again."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_hvae as ph
from pyro_hvae import Problem
from pyro_hvae.evidence import anneal


class Pair:
    """A global and a local latent; the guide's draws do not depend on each other, unless ``chained``."""

    def __init__(self, chained=False, size=None):
        self.chained, self.size, self.calls = chained, size, 0
        self.loc = torch.tensor(0.3, requires_grad=True)

    def model(self, x):
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 0.5))
        with pyro.plate("data", len(x), subsample_size=self.size) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale[..., None]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[index])

    def guide(self, x):
        self.calls += 1
        scale = pyro.sample("scale", dist.LogNormal(self.loc, 0.4))
        shift = scale.log()[..., None] if self.chained else 0.0
        with pyro.plate("data", len(x), subsample_size=self.size) as index:
            mean = (self.loc * x[index])[..., None].expand(len(index), 2)
            pyro.sample("z", dist.Normal(mean + shift, 0.8).to_event(1))


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("size", [None, 3])
def test_the_same_as_a_run(count, size):
    pair = Pair(size=size)
    problem = Problem(pair.model, pair.guide)(torch.randn(4))
    first = problem.run(count)
    values = {name: (value + 0.1).detach() for name, value in problem.run(count).values.items()}
    again, expected = problem.rerun(first, values), problem.run(count, values)
    for name in ("scale", "z"):
        torch.testing.assert_close(again.log_q[name], expected.log_q[name])
        torch.testing.assert_close(again.log_p[name], expected.log_p[name])
    torch.testing.assert_close(again.log_weights, expected.log_weights)
    slopes = [torch.autograd.grad(run.log_weights.sum(), pair.loc)[0] for run in (again, expected)]
    torch.testing.assert_close(*slopes)
    assert not torch.equal(again.log_weights, first.log_weights)


def test_separable():
    x = torch.randn(4)

    def separable(pair, guide=None):
        return Problem(pair.model, guide or pair.guide)(x).separable

    assert separable(Pair())
    assert not separable(Pair(chained=True))
    for auto in (AutoNormal, AutoDelta):
        pair = Pair()
        assert not separable(pair, auto(pair.model))
    model, guide = ph.vae(3, 2)
    assert Problem(model, guide)(torch.rand(5, 3).round()).separable
    model, guide = ph.hvae(3, [2, 1])
    assert not Problem(model, guide)(torch.rand(5, 3).round()).separable


@pytest.mark.parametrize("chained", [False, True])
def test_annealing_runs_such_a_guide_no_more_than_it_must(chained):
    x = torch.randn(4)
    pair = Pair(chained=chained)
    anneal(pair.model, pair.guide, x, num_chains=2, betas=3)
    few, pair.calls = pair.calls, 0
    anneal(pair.model, pair.guide, x, num_chains=2, betas=30)
    assert (pair.calls > few) == chained
