"""Conjugate hierarchies: means and standard deviations of groups that the guide has not seen, against exact ones."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

import pyro_hvae as ph
from pyro_hvae.amortized import amortize


def train(model, guide, data, bound, steps):
    ph.fit(
        model, guide, data, bound=bound, steps=steps, batch_size=None, progress=False, check_every=None,
        terms_every=10**6, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: max(0.02, 1 - step / steps)),
    )  # fmt: skip


def moments(model, guide, data, site, batches=5):
    """Mean and standard deviation of each group, from the guide's draws."""
    problem = ph.Problem(model, guide)(*data)
    with torch.no_grad():
        draws = [problem.run(4000).guide_trace.nodes[site]["value"] for _ in range(batches)]
    draws = torch.cat(draws).reshape(4000 * batches, -1)
    return draws.mean(0), draws.std(0)


def assert_close(found, mean, sd, tolerance=0.05):
    """The average error over groups, of means in units of the mean or the standard deviation, and of sds."""
    assert ((found[0] - mean).abs() / torch.maximum(mean.abs(), sd)).mean() < tolerance
    assert (found[1] / sd - 1).abs().mean() < tolerance
    assert (found[1] / sd - 1).mean().abs() < tolerance


def assert_each_close(found, mean, sd, tolerance=0.05):
    """Mean and standard deviation of every single group."""
    assert ((found[0] - mean).abs() / torch.maximum(mean.abs(), sd)).max() < tolerance
    assert (found[1] / sd - 1).abs().max() < tolerance


def coins(y, mask):
    with pyro.plate("groups", y.shape[0], dim=-2):
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        with pyro.plate("items", y.shape[1], dim=-1), poutine.mask(mask=mask):
            pyro.sample("y", dist.Bernoulli(p), obs=y)


def some_coins(groups, width):
    p, n = dist.Beta(2.0, 3.0).sample((groups, 1)), torch.randint(1, width + 1, (groups, 1))
    return torch.bernoulli(p.expand(groups, width)), torch.arange(width) < n


def test_beta_binomial_with_groups_of_ragged_sizes():
    torch.manual_seed(0)
    data = some_coins(200, 12)
    guide = amortize(coins, *data, hidden=(32, 32))
    train(coins, guide, data, ph.TraceELBO(num_particles=4, gradient="stl"), 400)
    y, mask = some_coins(60, 12)
    ones, zeros = (y * mask).sum(-1), ((1 - y) * mask).sum(-1)
    exact = dist.Beta(2 + ones, 3 + zeros)
    assert_close(moments(coins, guide, (y, mask), "p"), exact.mean, exact.variance.sqrt())
    hidden = torch.where(mask, y, 1 - y)  # what is masked has no effect
    torch.manual_seed(1)
    first = guide(y, mask)["p"]
    torch.manual_seed(1)
    torch.testing.assert_close(first, guide(hidden, mask)["p"])


def events(y, exposure):
    with pyro.plate("groups", y.shape[0], dim=-2):
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        with pyro.plate("items", y.shape[1], dim=-1):
            pyro.sample("y", dist.Poisson(rate * exposure), obs=y)


def some_events(groups):
    rate, exposure = dist.Gamma(3.0, 2.0).sample((groups, 1)), 0.3 + 2 * torch.rand(groups, 5)
    return torch.poisson(rate * exposure), exposure


def test_gamma_poisson_with_exposure():
    torch.manual_seed(0)
    data = some_events(200)
    guide = amortize(events, *data, hidden=(32, 32))
    assert guide.inverse.inputs["rate"] == ("exposure (argument)", "y")
    train(events, guide, data, ph.TraceELBO(num_particles=4, gradient="stl"), 400)
    y, exposure = some_events(60)
    exact = dist.Gamma(3 + y.sum(-1), 2 + exposure.sum(-1))
    assert_close(moments(events, guide, (y, exposure), "rate"), exact.mean, exact.variance.sqrt())


def heights(x):
    with pyro.plate("groups", x.shape[0], dim=-2):
        variance = pyro.sample("variance", dist.InverseGamma(4.0, 3.0))
        mean = pyro.sample("mean", dist.Normal(1.0, (variance / 0.5).sqrt()))
        with pyro.plate("items", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(mean, variance.sqrt()), obs=x)


def some_heights(groups, items=8):
    variance = dist.InverseGamma(4.0, 3.0).sample((groups, 1))
    mean = 1 + (variance / 0.5).sqrt() * torch.randn(groups, 1)
    return (mean + variance.sqrt() * torch.randn(groups, items),)


def of_heights(x):
    """Exact mean and standard deviation of each latent, by group."""
    count, average = x.shape[1], x.mean(-1)
    kappa, alpha = 0.5 + count, 4 + count / 2
    beta = 3 + 0.5 * (x - average[:, None]).square().sum(-1) + 0.25 * count / kappa * (average - 1).square()
    variance, mean = beta / (alpha - 1), (0.5 + count * average) / kappa
    return {"variance": (variance, variance / (alpha - 2) ** 0.5), "mean": (mean, (variance / kappa).sqrt())}


def of_coins(y, mask):
    exact = dist.Beta(2 + (y * mask).sum(-1), 3 + ((1 - y) * mask).sum(-1))
    return {"p": (exact.mean, exact.stddev)}


def of_events(y, exposure):
    exact = dist.Gamma(3 + y.sum(-1), 2 + exposure.sum(-1))
    return {"rate": (exact.mean, exact.stddev)}


CASES = {
    "beta-binomial": (coins, lambda groups: some_coins(groups, 12), of_coins, (32, 32), 1500),
    "gamma-Poisson": (events, some_events, of_events, (32, 32), 1500),
    "normal-inverse-gamma": (heights, some_heights, of_heights, (64, 64), 3000),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_new_group_is_within_a_twentieth(case):
    """Of 100 new groups, by 40,000 draws (error of a standard deviation: .5 %); ranks of 2000 groups are uniform."""
    model, simulate, exact, hidden, steps = CASES[case]
    torch.manual_seed(0)
    data = simulate(1000)
    guide = amortize(model, *data, hidden=hidden)
    train(model, guide, data, ph.TraceELBO(num_particles=4, gradient="stl"), steps)
    new = simulate(100)
    for site, (mean, sd) in exact(*new).items():
        assert_each_close(moments(model, guide, new, site, batches=10), mean, sd)
    calibration = ph.diagnostics.calibrate(model, guide, *simulate(2000), num_draws=199)
    assert not calibration.failures(), calibration


@pytest.mark.slow
def test_normal_inverse_gamma_with_flows_on_simulated_data():
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    data = some_heights(300)

    def flow(width, size):
        return ph.Flow(zuko.flows.NSF(size, context=width, hidden_features=(32,), transforms=1))

    guide = amortize(heights, *data, hidden=(32, 32), families={"mean": flow, "variance": flow})
    train(heights, guide, data, ph.SleepPhase(), 2000)
    (x,) = some_heights(60)
    count, average = x.shape[1], x.mean(-1)
    kappa, alpha = 0.5 + count, 4 + count / 2
    beta = 3 + 0.5 * (x - average[:, None]).square().sum(-1) + 0.25 * count / kappa * (average - 1).square()
    variance = beta / (alpha - 1)
    assert_close(moments(heights, guide, (x,), "variance"), variance, variance / (alpha - 2) ** 0.5)
    mean = (0.5 + count * average) / kappa
    assert_close(moments(heights, guide, (x,), "mean"), mean, (variance / kappa).sqrt())
