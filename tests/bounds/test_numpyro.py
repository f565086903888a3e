"""Agreement with NumPyro's estimators on one model, data and guide, whole and in minibatches.

The constants are means and standard errors over 20,000 repeats, printed by ``benchmarks/numpyro_values.py`` with
NumPyro 0.22.0 and jax 0.10.2.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hvae as ph

DATA = torch.linspace(-2.0, 2.0, 40, dtype=torch.float64)
REPEATS = 4000

NUMPYRO = {
    ("elbo", 40): (101.9319, 0.0326),
    ("elbo", 4): (101.7823, 0.1326),
    ("renyi 0", 40): (65.9787, 0.0120),
    ("renyi 0", 4): (65.9851, 0.0581),
    ("renyi 0.5", 40): (76.1116, 0.0163),
    ("renyi 0.5", 4): (76.1227, 0.0743),
}
OURS = {"elbo": ph.TraceELBO(10), "renyi 0": ph.IWELBO(10), "renyi 0.5": ph.VRBound(0.5, 10)}


def model(x):
    """Repeats stand in a plate of their own, so that one run gives all of them."""
    with (
        pyro.plate("repeats", x.shape[0], dim=-2),
        pyro.plate("data", 40, subsample=torch.arange(x.shape[1]), dim=-1),
    ):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with (
        pyro.plate("repeats", x.shape[0], dim=-2),
        pyro.plate("data", 40, subsample=torch.arange(x.shape[1]), dim=-1),
    ):
        pyro.sample("z", dist.Normal(x.new_zeros(()), 1.3))


@pytest.mark.parametrize(("name", "batch"), NUMPYRO)
def test_same_expectation_as_numpyro(name, batch):
    x = torch.stack([DATA[torch.randperm(40)[:batch]] for _ in range(REPEATS)])
    losses = -OURS[name].per_datum(model, guide, x).sum(-1) * 40 / batch
    theirs, their_error = NUMPYRO[name, batch]
    error = float(losses.std()) / REPEATS**0.5
    assert abs(float(losses.mean()) - theirs) < 4 * (error**2 + their_error**2) ** 0.5
