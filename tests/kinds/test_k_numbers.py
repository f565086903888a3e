"""Numbers: joints that are nearly Gaussian, limits of bounds, draws of zero weight."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from tests.kinds.outcomes import outcome, right_or_refused

T = torch.tensor


def normal(loc=0.0, scale=1.0):
    return dist.Normal(torch.full((), loc), scale)


def mixture(weights, locs, scales):
    return dist.MixtureSameFamily(dist.Categorical(T(weights)), dist.Normal(T(locs), T(scales)))


# --- forward_kl: what looks like a Gaussian at its mode

JOINTS = {  # log p(z, x) as prior, likelihood and an added log-density
    "a small second mode": lambda z: mixture([0.9, 0.1], [0.0, 20.0], [1.0, 1.0]).log_prob(z) - (z - 5) ** 2 / 1800,
    "a second mode as large": lambda z: mixture([0.5, 0.5], [0.0, 40.0], [1.0, 1.0]).log_prob(z) - (z - 40) ** 2 / 1800,
    "three modes": lambda z: mixture([0.8, 0.1, 0.1], [0.0, 22.0, -22.0], [1.0, 1.0, 1.0]).log_prob(z) - z**2 / 5000,
    "a wall in the tail": lambda z: normal().log_prob(z) + torch.where(z > 2.5, -1e3, 0.0),
    "a ripple": lambda z: normal().log_prob(z) + 0.5 * torch.where((z - 2.7).abs() < 0.3, 4.0, 0.0),
    "a step": lambda z: normal().log_prob(z) + torch.where(z > 2.5, 5.0, 0.0),
    "a step up far out": lambda z: normal().log_prob(z) + torch.where(z > 7.0, 27.0, 0.0),
    "a window": lambda z: normal().log_prob(z) + torch.where((z + 6.0).abs() < 0.5, 20.0, 0.0),
}


def moments(log_p):
    z = torch.linspace(-250, 250, 1_000_001)
    weights = log_p(z).softmax(0)
    mean = (weights * z).sum()
    return mean, (weights * (z - mean) ** 2).sum()


@pytest.mark.parametrize("name", JOINTS)
def test_no_joint_is_called_gaussian_that_is_not(name):
    log_p = JOINTS[name]

    def model():
        z = pyro.sample("z", normal(0.0, 15.0))
        pyro.factor("rest", log_p(z) - normal(0.0, 15.0).log_prob(z))

    found = outcome(lambda: ph.forward_kl(model), names=[r"\bz\b"])
    if found is None:
        return
    mean, variance = moments(log_p)
    q = found.distribution("z")
    close = abs(q.mean - mean) < 1e-3 * variance**0.5 and abs(q.variance / variance - 1) < 1e-3
    assert close or ("Gaussian" not in found.how and bool((found.khat > -math.inf).all()))


@pytest.mark.parametrize("plate", [0, 1])
def test_modes_of_one_of_two_latents(plate):
    def site():
        a = pyro.sample("a", normal())
        z = pyro.sample("z", mixture([0.8, 0.2], [0.0, 18.0], [1.0, 1.0]))
        pyro.sample("x", dist.Normal(a + z, 20.0), obs=T(6.0).expand((plate,) if plate else ()))

    def model():
        if plate:
            with pyro.plate("data", plate):
                site()
        else:
            site()

    found = outcome(lambda: ph.forward_kl(model), names=[r"\bz\b"])
    assert found is None or ("Gaussian" not in found.how and bool((found.khat > -math.inf).all()))


def test_a_gaussian_is_still_told_to_be_one():
    """A guard."""

    def model():
        z = pyro.sample("z", normal())
        pyro.sample("x", dist.Normal(3 * z, 2.0), obs=T(1.0))

    found = ph.forward_kl(model)
    assert found.distribution("z").mean.item() == pytest.approx(3 / 4 / (1 + 9 / 4))
    assert (found.khat == -math.inf).all()


# --- alpha near 1, temperatures that are no numbers


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x[0]), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def posterior(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


@pytest.mark.parametrize(
    ("alpha", "dtype"),
    [
        (1 - 1e-9, torch.float32),
        (1 + 1e-9, torch.float32),
        (1 + 1e-12, torch.float32),
        (1 - 1e-7, torch.float32),
        (1 - 1e-15, torch.float64),
        (1 + 1e-15, torch.float64),
        (1 - 1e-9, torch.float64),
    ],
)
def test_renyi_bound_near_the_elbo(alpha, dtype):
    """With the exact posterior all weights are p(x), and so is the bound whatever alpha."""
    x = T([0.3, -2.0, 5.0], dtype=dtype)
    right = dist.Normal(0.0, 2**0.5).log_prob(x).double()
    right_or_refused(
        lambda: ph.VRBound(alpha, 7).per_datum(local, posterior, x),
        right,
        1e-4 * right.abs().max(),
        names=["alpha", "TraceELBO"],
    )


NAN = math.nan


@pytest.mark.parametrize(
    "build",
    [
        lambda: ph.ThermodynamicBound(4, [0.0, NAN, 0.5]),
        lambda: ph.ThermodynamicBound(4, [0.0, 0.5, NAN]),
        lambda: ph.ThermodynamicBound(4, T([0.0, NAN]).tolist()),
        lambda: ph.ThermodynamicBound(4, [0.0, NAN, 1.0]),
        lambda: ph.VRBound(NAN, 4),
        lambda: ph.CUBO(NAN, 4),
    ],
    ids=["middle", "last", "of a tensor", "before one", "alpha", "order"],
)
def test_parameters_that_are_no_numbers_are_refused(build):
    with pytest.raises((ValueError, TypeError), match=r"beta|alpha|order"):
        build()


# --- draws of zero weight

COPIES = 4000


class Coin(pyro.nn.PyroModule):
    def __init__(self, logit):
        super().__init__()
        self.logit = nn.Parameter(T(logit))

    def forward(self):
        with pyro.plate("data", COPIES):
            pyro.sample("z", dist.Bernoulli(logits=self.logit))


def one_is_impossible():
    with pyro.plate("data", COPIES):
        z = pyro.sample("z", dist.Bernoulli(torch.full((), 0.4)))
        pyro.factor("rule", torch.where(z > 0, -math.inf, 0.0))


def coin_truth(num_particles, logit):
    """Gradient of minus E log mean w over the numbers of impossible draws, all of them impossible left out."""
    logit = T(logit).requires_grad_()
    p = logit.sigmoid()
    total = T(0.0)
    for j in range(num_particles):
        chance = math.comb(num_particles, j) * p**j * (1 - p) ** (num_particles - j)
        total = total + chance * (math.log((num_particles - j) / num_particles) + math.log(0.6) - torch.log1p(-p))
    return torch.autograd.grad(-total, logit)[0]


@pytest.mark.parametrize(("num_particles", "logit"), [(12, -1.4), (16, -0.4)])
def test_vimco_gradient_with_draws_of_zero_weight(num_particles, logit):
    """So many particles that at least two of them are possible at every datum."""
    guide = Coin(logit)
    bound = ph.IWELBO(num_particles, "vimco")
    right_or_refused(
        lambda: torch.autograd.grad(bound.differentiable_loss(one_is_impossible, guide), guide.logit)[0] / COPIES,
        coin_truth(num_particles, logit),
        0.006,
        names=[r"\bz\b", "zero"],
    )


class Shifted(pyro.nn.PyroModule):
    def __init__(self, loc=0.3):
        super().__init__()
        self.loc = nn.Parameter(T(loc))

    def forward(self):
        with pyro.plate("data", COPIES):
            pyro.sample("z", dist.Normal(self.loc, 1.0))


def walled():
    """Zero above .8, where an eighth to a third of the draws fall."""
    with pyro.plate("data", COPIES):
        z = pyro.sample("z", normal())
        pyro.factor("wall", torch.where(z > 0.8, -math.inf, -0.7))


def walled_log_weight(z, loc):
    return torch.where(z > 0.8, -math.inf, -0.7 - z**2 / 2 + (z - loc) ** 2 / 2)


def eubo(log_weight):
    """Sum of normalised weights times log-weights, 0 log 0 = 0; NaN where all are zero."""
    weights = log_weight.softmax(0)
    return (weights * torch.where(weights > 0, log_weight, 0.0)).sum(0)


def test_eubo_with_draws_of_zero_weight():
    guide = Shifted()
    z = guide.loc.detach() + torch.randn(40, 200_000)
    right = eubo(walled_log_weight(z, guide.loc.detach())).mean()
    right_or_refused(lambda: ph.EUBO(40).per_datum(walled, guide).mean(), right, 0.01, names=[r"\bz\b", "zero", "wall"])


def test_eubo_of_equal_and_zero_weights_is_exact():
    right_or_refused(
        lambda: ph.EUBO(40).per_datum(walled, Shifted(0.0)),
        torch.full((COPIES,), -0.7),
        1e-9,
        names=[r"\bz\b", "zero", "wall"],
    )


def test_eubo_gradient_with_draws_of_zero_weight():
    guide = Shifted()
    bound = ph.EUBO(40)
    found = outcome(
        lambda: torch.autograd.grad(bound.differentiable_loss(walled, guide), guide.loc)[0] / COPIES,
        names=[r"\bz\b", "zero", "wall"],
    )
    if found is None:
        return
    # the pathwise slope on draws of its own, which does not see draws that cross the wall
    loc = torch.tensor(0.3, requires_grad=True)
    weights = walled_log_weight(loc + torch.randn(40, 100_000), loc)
    kept = weights > -math.inf
    safe = torch.where(kept, weights, torch.zeros_like(weights))
    normalised = torch.where(kept, safe, torch.full_like(safe, -1e9)).softmax(0)
    (right,) = torch.autograd.grad((normalised * safe).sum(0).mean(), loc)
    assert torch.isfinite(found)
    assert found == pytest.approx(float(right), abs=0.06)


@pytest.mark.parametrize("num_particles", [3, 40])
def test_thermodynamic_bound_with_draws_of_zero_weight(num_particles):
    """Its first temperature is the ELBO of the draws, which is -inf where one of them is impossible."""
    found = outcome(
        lambda: ph.ThermodynamicBound(num_particles, 4).per_datum(walled, Shifted()), names=[r"\bz\b", "zero", "wall"]
    )
    if found is None:
        return
    assert not found.isnan().any()
    share = float((found == -math.inf).double().mean())
    possible = float(dist.Normal(0.3, 1.0).cdf(T(0.8)))
    assert share == pytest.approx(1 - possible**num_particles, abs=0.04)


@pytest.mark.parametrize("bound", [ph.IWELBO(40), ph.VRBound(0.5, 40), ph.CUBO(2, 40)], ids=["iwelbo", "vr", "cubo"])
def test_other_bounds_with_draws_of_zero_weight(bound):
    """Guards: these have no term that is 0 times infinity."""
    assert ph.IWELBO(40).per_datum(walled, Shifted()).isfinite().all()
    assert bound.per_datum(walled, Shifted()).isfinite().all()
