"""Annealing against closed forms: the width J/N, the evidence between the sides, and what is refused (oracle 5)."""

import contextlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_hvae.evidence import anneal, annealing, evidence_sandwich, log_evidence, sigmoid_temperatures, temperatures
from pyro_hvae.problem import Problem

Y, NOISE = 2.0, 0.25
LOG_P = -2.630510
J = 9.28


def log_likelihood(u):
    return dist.Normal(u, NOISE**0.5).log_prob(torch.tensor(Y))


def exact_draw(beta, shape):
    """The tempered posterior of N(0, 1) and likelihood N(y | u, .25)^beta, in closed form."""
    precision = 1 + beta / NOISE
    return beta * Y / NOISE / precision + precision**-0.5 * torch.randn(shape)


@pytest.mark.parametrize("steps", [4, 16, 64])
def test_width_is_j_over_n_with_perfect_transitions(steps):
    betas = temperatures(steps)
    chains = 400_000

    def move(state, t):
        return exact_draw(float(betas[t]), state.shape)

    _, below = annealing(exact_draw(0.0, (chains,)), log_likelihood, move, betas)
    _, above = annealing(exact_draw(1.0, (chains,)), log_likelihood, move, betas, reverse=True)
    error = ((below.var() + above.var()) / chains).sqrt()
    assert abs((above.mean() - below.mean()) - J / steps) < 4 * error
    assert below.mean() < LOG_P < above.mean()
    assert (
        abs(below.logsumexp(0) - math.log(chains) - LOG_P) < 4 * (below.exp().std() / below.exp().mean()) / chains**0.5
    )


def test_resampling_keeps_the_estimate():
    betas = temperatures(8)
    chains = 20_000

    def move(state, t):
        return exact_draw(float(betas[t]), state.shape)

    def pick(state, index):
        return state.gather(0, index)

    _, weights = annealing(exact_draw(0.0, (chains, 3)), log_likelihood, move, betas, resample=pick)
    torch.testing.assert_close(weights.logsumexp(0) - math.log(chains), torch.full((3,), LOG_P), atol=0.06, rtol=0.0)


def two_layers(x):
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(x.new_zeros(()), 1.0))
        z1 = pyro.sample("z1", dist.Normal(0.9 * z2, 0.5))
        pyro.sample("x", dist.Normal(1.2 * z1, 0.7), obs=x)


def exact_two_layers(x):
    return dist.Normal(0.0, (1.44 * (0.81 + 0.25) + 0.49) ** 0.5).log_prob(x)


def guide_two_layers(x):
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(0.6 * x, 0.45))
        pyro.sample("z2", dist.Normal(0.7 * z1, 0.6))


@pytest.mark.parametrize("base", ["prior", "guide"])
def test_sandwich_closes_and_contains_the_evidence(base):
    """100 data, each a repeat of its own: exact joint draws, a bracket each."""
    latents, simulated = Problem(two_layers)(torch.zeros(100)).simulate()
    (x,) = simulated.args
    bracket = evidence_sandwich(
        two_layers,
        guide_two_layers,
        x,
        posterior_samples=latents,
        base=base,
        num_chains=32,
        betas=200,
        num_leapfrog=3,
    )
    exact = exact_two_layers(x)
    inside = (bracket.lower <= exact) & (exact <= bracket.upper)
    assert bracket.upper_is_bound
    assert int(inside.sum()) >= 90
    if base == "guide":  # 32 chains x 200 temperatures x 3 leapfrog steps each way; from the prior the width is .15
        assert bracket.width.mean() < 0.05
    assert bracket.forward.acceptance[1:].mean() > 0.6


def test_without_posterior_draws_the_upper_side_is_an_estimate():
    x = torch.tensor([0.5, -1.0])
    bracket = evidence_sandwich(two_layers, None, x, num_chains=8, betas=10, num_leapfrog=2)
    assert not bracket.upper_is_bound
    assert "an estimate" in str(bracket)


def test_constrained_and_global_latents():
    """A positive scale and no plate common to all: one weight for all the data, against quadrature."""

    def model(x):
        scale = pyro.sample("scale", dist.Gamma(x.new_tensor(3.0), x.new_tensor(2.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(()), scale), obs=x)

    x = torch.tensor([0.3, -1.2, 0.8])
    grid = torch.linspace(1e-4, 20, 200_001)
    log_f = dist.Gamma(3.0, 2.0).log_prob(grid) + dist.Normal(0.0, grid[:, None]).log_prob(x).sum(-1)
    exact = torch.logsumexp(log_f, 0) + math.log(float(grid[1] - grid[0]))
    found = anneal(model, None, x, base="prior", num_chains=400, betas=40)
    estimate = log_evidence(model, None, x, method="prior", num_samples=20_000, chunk_size=20_000)
    weights = found.log_weights
    error = (weights - weights.max()).exp().std() / (weights - weights.max()).exp().mean() / 20
    assert abs(weights.logsumexp(0) - math.log(400) - exact) < 4 * error
    assert abs(estimate.value - exact) < 4 * estimate.stderr
    assert (found.values["scale"] > 0).all()


def test_adaptive_temperatures_serve_as_well():
    x = torch.tensor([0.5, -1.0, 2.0])
    chains = anneal(two_layers, None, x, base="prior", num_chains=200, betas="adaptive")
    assert chains.betas[0] == 0
    assert chains.betas[-1] == 1
    error = chains.log_weights.std(0) / 200**0.5
    estimate = chains.log_weights.logsumexp(0) - math.log(200)
    assert ((estimate - exact_two_layers(x)).abs() < 4 * error + 0.02).all()


def test_smc_on_a_program():
    x = torch.tensor([0.5, -1.0, 2.0])
    chains = anneal(two_layers, None, x, base="prior", num_chains=500, betas=6, resample=True)
    estimate = chains.log_weights.logsumexp(0) - math.log(500)
    torch.testing.assert_close(estimate, exact_two_layers(x), atol=0.25, rtol=0.0)


def test_sigmoid_temperatures_are_dense_at_the_ends():
    betas = sigmoid_temperatures(50)
    steps = betas.diff()
    assert steps[0] < steps[25] > steps[-1]
    assert betas[0] == 0
    assert betas[-1] == 1


@pytest.mark.parametrize(
    "betas",
    [[0.0, 0.5, 0.4, 1.0], [0.1, 1.0], [0.0, 0.9], [0.0, 0.5, 0.5, 1.0], [0.0, math.nan, 1.0], 0, 2.5, None, "other"],
)
def test_temperatures_must_increase_from_0_to_1(betas):
    with pytest.raises(ValueError, match="temperature"):
        anneal(two_layers, None, torch.zeros(2), base="prior", betas=betas)


def test_what_cannot_be_annealed():
    def without(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)

    def discrete(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(x.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def impossible(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x.new_zeros(()), 1.0))
            pyro.factor("wall", torch.where(z > 2, 0.0, -math.inf))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.zeros(2)
    with pytest.raises(ValueError, match="no latent site"):
        anneal(without, None, x, base="prior")
    with pytest.raises(ValueError, match="'z' is discrete"):
        anneal(discrete, None, x, base="prior")
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"2 of 2 data have no chain .* finite"):
        anneal(impossible, None, x, base="prior")
    with pytest.raises(ValueError, match="num_chains"):
        anneal(two_layers, None, x, base="prior", num_chains=0)
    with pytest.raises(ValueError, match="needs a guide"):
        anneal(two_layers, None, x)
    with pytest.raises(ValueError, match="resampled chains are not independent"):
        evidence_sandwich(two_layers, None, x, resample=True)


def wall(x):
    """Half of the prior's draws make the datum impossible."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.factor("wall", torch.where(z > 0, 0.0, -math.inf))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def exact_wall(x):
    """N(x; 0, 2) times the share of N(x/2, 1/2) that lies right of the wall."""
    return dist.Normal(0.0, 2**0.5).log_prob(x) + torch.log(dist.Normal(0.0, 1.0).cdf(x / 2 * 2**0.5))


@pytest.mark.parametrize("options", [{"betas": 30}, {"betas": "adaptive"}, {"betas": 10, "resample": True}])
def test_chains_that_start_at_the_impossible_have_no_weight_and_hinder_no_other(options):
    x = torch.tensor([0.3, -1.0, 2.0])
    chains = anneal(wall, None, x, base="prior", num_chains=400, **options)
    weights = chains.log_weights
    estimate = weights.logsumexp(0) - math.log(400)
    share = weights.log_softmax(0).exp()
    error = (share**2).sum(0).sub(1 / 400).sqrt() + 0.02
    assert ((estimate - exact_wall(x)).abs() < 4 * error).all()
    assert chains.step_sizes.min() > 0.05


def test_a_bracket_says_minus_infinity_where_a_chain_has_no_weight():
    x = torch.tensor([0.3, -1.0, 2.0])
    bracket = evidence_sandwich(wall, None, x, num_chains=32, betas=40, num_leapfrog=3)
    assert (bracket.forward.log_weights == -math.inf).any(0).all()
    assert (bracket.lower == -math.inf).all()
    assert torch.isfinite(bracket.reverse.log_weights).all()
    # Half of the base has no way up, so 1/w of the way down averages to half of 1/p(x).
    assert (bracket.upper - exact_wall(x) - math.log(2.0)).abs().max() < 0.3
    assert "from -inf" in str(bracket)


@pytest.mark.parametrize("plates", [0, 1])
def test_supports_with_fewer_numbers_than_entries(plates):
    """A Cholesky factor of 3 numbers in 9 entries, against importance weights."""

    def model(x):
        data = pyro.plate("data", len(x))
        with data if plates else contextlib.nullcontext():
            factor = pyro.sample("factor", dist.LKJCholesky(3, x.new_tensor(2.0)))
        with data:
            pyro.sample("x", dist.MultivariateNormal(x.new_zeros(3), scale_tril=factor), obs=x)

    x = torch.tensor([[0.3, 0.9, -1.2], [1.0, 0.8, -0.4]])
    weights = anneal(model, None, x, base="prior", num_chains=100, betas=20, num_leapfrog=3).log_weights
    error = ((2 * weights.log_softmax(0)).logsumexp(0).exp() - 1 / 100).sqrt()
    other = log_evidence(model, None, x, method="prior", num_samples=20_000)
    estimate = weights.logsumexp(0) - math.log(100)
    assert ((estimate - other.value).abs() < 4 * (error**2 + other.stderr**2).sqrt()).all()
    assert (error < 0.1).all()


def test_posterior_draws_must_be_possible_and_fit():
    x = torch.tensor([0.3, -1.0, 2.0])

    def narrow(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x.new_zeros(()), 1.0))

    good = {"z": torch.tensor([0.5, 0.1, 1.5])}
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"16 values .* outside of Interval"):
        evidence_sandwich(wall, narrow, x, posterior_samples=good, betas=4)
    with pytest.raises(ValueError, match=r"16 of 48 draws are impossible .* index \(1,\)"):
        evidence_sandwich(wall, None, x, posterior_samples={"z": torch.tensor([0.5, -0.1, 1.5])}, betas=4)
    with pytest.raises(ValueError, match=r"shape \(5, 3\); .* set num_chains"):
        evidence_sandwich(wall, None, x, posterior_samples={"z": torch.rand(5, 3)}, betas=4)


def test_a_log_joint_that_is_nan_is_refused():
    def broken(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("hole", torch.where(z > 0, 0.0, math.nan))

    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"2 of 2 data have a log joint that is NaN"):
        anneal(broken, None, torch.zeros(2), base="prior")


@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal])
def test_auto_guides_are_moved_through_their_own_coordinates(auto):
    """A scale that is mapped to the real line by the guide: the evidence by quadrature."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(x.new_ones(())))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, scale), obs=x)

    x = torch.tensor([0.3, -1.2, 0.8, 1.1])
    mean, scale = torch.linspace(-4, 4, 401)[:, None], torch.linspace(0.01, 6, 600)
    log_f = dist.Normal(0.0, 1.0).log_prob(mean) + dist.HalfNormal(1.0).log_prob(scale)
    log_f = log_f + dist.Normal(mean, scale).log_prob(x[:, None, None]).sum(0)
    exact = log_f.flatten().logsumexp(0) + math.log(0.02 * 0.01)
    guide = auto(model, init_scale=0.5)
    guide(x)
    bracket = evidence_sandwich(model, guide, x, num_chains=32, betas=40, num_leapfrog=3)
    assert bracket.lower < exact < bracket.upper
    assert bracket.width < 0.5
    assert bracket.forward.values["scale"].shape[0] == 32
    assert (bracket.forward.values["scale"] > 0).all()
    with pytest.raises(ValueError, match=r"no site .* anneal from the prior"):
        evidence_sandwich(model, guide, x, posterior_samples={"mean": torch.zeros(()), "scale": torch.ones(())})


def test_auxiliary_variables_can_not_be_moved_through():
    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0), infer={"is_auxiliary": True})
            pyro.sample("z2", dist.Normal(u, 1.0))
            pyro.sample("z1", dist.Normal(u, 1.0))

    with pytest.raises(ValueError, match=r"\['u'\] that are not the latents in other coordinates"):
        anneal(two_layers, guide, torch.zeros(2))
