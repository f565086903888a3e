"""A gamma for each entry, against Gaussians: what depends on the path between the ends, and what does not."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from pyro_hvae.bounds import DiffusionELBO, SimpleDiffusionLoss
from pyro_hvae.diffusion import (
    Diffusion,
    LinearSchedule,
    MeanLevel,
    MonotoneSchedule,
    Noising,
    PolynomialSchedule,
    ReverseVariance,
)
from pyro_hvae.models import latent_diffusion, vdm
from pyro_hvae.nn import DenoisingMLP
from tests.diffusion.entrywise import (
    COVARIANCE,
    HIGH,
    LOW,
    PATHS,
    WRONG,
    Bent,
    Contextual,
    Gaussian,
    Levelled,
    Path,
    Separate,
    contextual,
    errors,
    expected,
    integrated,
    mean_and_error,
    pair,
)

# The process


def test_every_entry_composes_and_reverses_with_its_own_levels():
    guide = Diffusion(Path("first early"), 5)
    s, t = torch.tensor(0.25), torch.tensor([0.5, 0.6, 0.9])
    x, z_s, z_t = torch.randn(3, 2), torch.randn(3, 2), torch.randn(3, 2)
    forward = guide.step(s, t, z_s).log_prob(z_t) + guide.marginal(s, x).log_prob(z_s)
    backward = guide.posterior(s, t, z_t, x).log_prob(z_s) + guide.marginal(t, x).log_prob(z_t)
    torch.testing.assert_close(forward, backward, atol=1e-11, rtol=1e-12)
    for entry in (0, 1):  # each is a diffusion of one entry
        alone = Diffusion(MonotoneSchedule(lambda t, entry=entry: Path("first early")(t)[..., entry]), 5)
        column = slice(entry, entry + 1)
        found = guide.posterior(s, t, z_t, x).base_dist
        expected = alone.posterior(s, t, z_t[:, column], x[:, column]).base_dist
        torch.testing.assert_close(found.loc[:, column], expected.loc, atol=1e-12, rtol=0)
        torch.testing.assert_close(found.scale.expand(3, 2)[:, column], expected.scale.expand(3, 1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("num_layers", [6, None])
def test_one_gamma_for_all_is_the_scalar_schedule(num_layers):
    one = LinearSchedule(-5.0, 3.0)
    both = MonotoneSchedule(lambda t: one(t).unsqueeze(-1).expand(*t.shape, 2), event_shape=(2,))
    net, x = MeanLevel(DenoisingMLP(2, hidden=8)), torch.randn(6, 2)
    values = []
    for schedule, denoiser in ((one, net.denoiser), (both, net)):
        model, guide = vdm(denoiser, event_shape=2, num_layers=num_layers, schedule=schedule)
        model.reverse_variance = ReverseVariance(-5.0, 3.0)
        torch.manual_seed(0)
        values.append(torch.stack(list(DiffusionELBO(3).terms(model, guide, x).values())))
        if num_layers:
            values[-1] = torch.cat([values[-1], ph.TraceELBO().per_datum(model, guide, x)[None]])
        model.reverse_variance.requires_grad_(False)
        surrogates = []
        for weighting in ("simple", "min-snr", "p2"):
            loss = SimpleDiffusionLoss(weighting)
            torch.manual_seed(1)
            surrogates.append(loss.differentiable_loss(model, guide, x).detach())
        values[-1] = torch.cat([values[-1].flatten(), torch.stack(surrogates)])
    torch.testing.assert_close(values[0], values[1], atol=1e-10, rtol=1e-10)


# The path


@pytest.mark.parametrize("covariance", [COVARIANCE, WRONG])
def test_a_denoiser_that_is_exact_for_some_data_has_one_bound_on_every_path(covariance):
    """For every datum KL(q(z_0|x) || p(z_0)) - KL(q(z_1|x) || p(z_1)), of the right data or others."""
    x = torch.tensor([0.7, -1.2])

    def cost(gamma):
        level = Noising(gamma)
        whole = level.alpha * covariance * level.alpha[:, None] + torch.diag(level.sigma**2)
        q = torch.distributions.MultivariateNormal(level.alpha * x, torch.diag(level.sigma**2))
        return torch.distributions.kl_divergence(q, torch.distributions.MultivariateNormal(torch.zeros(2), whole))

    for name in PATHS:
        assert abs(integrated(*pair(Gaussian(covariance), Path(name)), x) - (cost(LOW) - cost(HIGH))) < 1e-9


def test_the_mean_bound_of_the_exact_denoiser_is_the_loss_of_information():
    def information(gamma):
        return 0.5 * torch.logdet(torch.eye(2) + COVARIANCE * torch.exp(-gamma))

    for name in PATHS:
        found = integrated(*pair(Gaussian(COVARIANCE), Path(name)))
        assert abs(found - (information(LOW) - information(HIGH))) < 1e-9


def test_a_denoiser_of_each_entry_alone_has_one_bound_on_every_path():
    def information(gamma):
        return 0.5 * torch.log1p(COVARIANCE.diagonal() * torch.exp(-gamma)).sum()

    for name in PATHS:
        found = integrated(*pair(Separate(), Path(name)))
        assert abs(found - (information(LOW) - information(HIGH))) < 1e-9


@pytest.mark.parametrize("name", ["straight", "first early", "second early"])
def test_another_denoiser_has_the_line_integral_of_its_errors(name):
    share, slope = PATHS[name]
    nodes, weights = np.polynomial.legendre.leggauss(120)
    total = 0.0
    for t, width in zip(torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2), strict=True):
        gamma = LOW + (HIGH - LOW) * torch.stack(share(t))
        slopes = (HIGH - LOW) * torch.stack(slope(t))
        total = total + width * 0.5 * (slopes * errors(gamma)).sum()
    assert abs(integrated(*pair(Levelled(COVARIANCE), Path(name))) - total) < 1e-9


def test_the_path_of_another_denoiser_matters_and_the_speed_along_it_does_not():
    found = {name: integrated(*pair(Levelled(COVARIANCE), Path(name)), points=160) for name in PATHS}
    assert abs(found["straight"] - found["straight, later"]) < 1e-9
    assert abs(found["second early"] - found["second early, later"]) < 1e-8
    assert abs(found["straight"] - found["first early"]) > 0.05
    assert abs(found["straight"] - found["second early"]) > 0.05


def test_the_gradient_in_the_path_is_that_of_the_line_integral():
    schedule = Bent()
    (found,) = torch.autograd.grad(integrated(*pair(Levelled(COVARIANCE), schedule)), schedule.bend)
    nodes, weights = np.polynomial.legendre.leggauss(120)
    bend = schedule.bend.detach().clone().requires_grad_()
    total = 0.0
    for t, width in zip(torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2), strict=True):
        gamma = LOW + (HIGH - LOW) * (t + bend * (t**2 - t))
        slope = (HIGH - LOW) * (1 + bend * (2 * t - 1))
        total = total + width * 0.5 * (slope * errors(gamma)).sum()
    (exact,) = torch.autograd.grad(total, bend)
    torch.testing.assert_close(found, exact, atol=1e-9, rtol=0)
    assert (exact.abs() > 0.01).all()
    for denoiser in (Gaussian(COVARIANCE), Gaussian(WRONG), Separate()):
        (found,) = torch.autograd.grad(integrated(*pair(denoiser, schedule)), schedule.bend)
        torch.testing.assert_close(found, torch.zeros(2), atol=1e-9, rtol=0)


def test_finitely_many_layers_have_the_sum_over_entries():
    model, guide = pair(Levelled(COVARIANCE), Path("first early"), 7)
    times = model.time(torch.arange(1.0, 8.0))
    gammas = guide.schedule(times)
    for i in range(1, 7):
        weight = torch.expm1(gammas[i] - gammas[i - 1])
        exact = 0.5 * (weight * errors(gammas[i])).sum()
        assert abs(expected(model, guide, times[i - 1], times[i]) - exact) < 1e-10
    x, z = torch.randn(5, 2), torch.randn(5, 2)
    model.reverse_variance = ReverseVariance(-5.0, 4.0)
    q, p = guide.posterior(times[2], times[4], z, x), model.transition(times[2], times[4], z)
    divergence = torch.distributions.kl_divergence(q.expand((5,)), p.expand((5,)))
    torch.testing.assert_close(model.matching(times[2], times[4], z, x), divergence, atol=1e-9, rtol=1e-9)


# Estimates


@pytest.mark.parametrize(("sampling", "layers"), [("uniform", 1), ("antithetic", 4), ("importance", 2)])
def test_sampled_layers_the_exact_sum_and_the_full_chain_have_one_expectation(sampling, layers):
    model, guide = contextual(6)
    x, context = torch.tensor([0.4, -1.1]).expand(4000, 2), torch.tensor([1.0, -0.5, 0.2]).expand(4000, 3)
    bounds = {"exact": DiffusionELBO(1, "exact"), "sampled": DiffusionELBO(layers, sampling), "chain": ph.TraceELBO()}
    found = {name: mean_and_error(bound.per_datum(model, guide, x, context=context)) for name, bound in bounds.items()}
    for name in ("sampled", "chain"):
        error = (found["exact"][1] ** 2 + found[name][1] ** 2).sqrt()
        assert abs(found["exact"][0] - found[name][0]) < 4 * error
    other = DiffusionELBO(sampling="exact").per_datum(model, guide, x, context=-context)
    assert abs(other.mean() - found["exact"][0]) > 8 * found["exact"][1]


def test_layerwise_bound_with_contexts_of_their_own():
    model, guide = contextual(4)
    x, context = torch.randn(8, 2).repeat(2000, 1), torch.randn(8, 3).repeat(2000, 1)
    means = []
    for bound in (ph.LayerwiseELBO(), DiffusionELBO(2, "uniform")):
        means.append(mean_and_error(bound.per_datum(model, guide, x, context=context).reshape(2000, 8)))
    error = (means[0][1] ** 2 + means[1][1] ** 2).sqrt()
    assert ((means[0][0] - means[1][0]).abs() < 4.5 * error).all()
    few = {"x": x[:8], "context": context[:8]}
    assert (ph.IWELBO(200).per_datum(model, guide, **few) > ph.TraceELBO(200).per_datum(model, guide, **few)).all()


def test_sampled_times_have_the_line_integral():
    model, guide = pair(Levelled(COVARIANCE), Path("second early"))
    x = torch.tensor([0.7, -1.2])
    terms = DiffusionELBO(4).terms(model, guide, x.expand(5000, 2))
    found, error = mean_and_error(terms["denoising_matching"])
    assert abs(found - integrated(model, guide, x)) < 4 * error
    assert error < 0.05 * found


def test_the_ends_cost_what_each_entry_says():
    """Prior matching and reconstruction are sums over entries with ends of their own, in value and gradient."""
    schedule = PolynomialSchedule((2,), -4.0, 2.0)
    with torch.no_grad():
        schedule.ends += torch.tensor([[0.5, -0.3], [-1.0, 0.7]])
    model, guide = pair(Separate(), schedule)
    x = torch.tensor([[0.7, -1.2]])
    gamma = schedule(torch.tensor([0.0, 1.0])).detach().requires_grad_()
    assert (gamma[0, 0] != gamma[0, 1]) & (gamma[1, 0] != gamma[1, 1])
    level = Noising(gamma)
    alpha, variance = level.alpha[1], level.sigma[1] ** 2
    prior = 0.5 * (alpha**2 * x**2 + variance - 1 - variance.log()).sum()
    reconstruction = -0.5 * (1 + math.log(2 * math.pi) + gamma[0]).sum()
    terms = DiffusionELBO().terms(model, guide, x.expand(20_000, 2))
    torch.testing.assert_close(terms["prior_matching"][0], prior.detach(), atol=1e-12, rtol=0)
    found, error = mean_and_error(terms["reconstruction"])
    assert abs(found - reconstruction) < 4 * error
    (slope,) = torch.autograd.grad(prior, gamma)
    (ends,) = torch.autograd.grad(
        torch.distributions.kl_divergence(guide.marginal(torch.tensor(1.0), x), model.prior(x).expand((1,))).sum(),
        schedule.ends,
    )
    torch.testing.assert_close(ends[0], slope[1], atol=1e-12, rtol=0)
    torch.testing.assert_close(ends[1], slope[1] * torch.sigmoid(schedule.ends[1]), atol=1e-12, rtol=0)


def test_a_context_reaches_a_diffusion_that_is_nested():
    """The prior of a VAE's latent, whose path depends on the context: one expectation under both bounds."""
    schedule = PolynomialSchedule((2,), -4.0, 3.0, context_features=3, hidden=8)
    with torch.no_grad():
        schedule.net[-1].weight.mul_(60.0)
    parts = {"encoder": ph.Gaussian(nn.Linear(7, 4)), "decoder": ph.Gaussian(nn.Linear(5, 8))}
    model, guide = latent_diffusion(Contextual(), latent_shape=2, num_layers=4, schedule=schedule, **parts)
    x, context = torch.randn(4).expand(8000, 4), torch.tensor([1.0, -0.5, 0.2]).expand(8000, 3)
    chain, few = (bound.per_datum(model, guide, x, context=context) for bound in (ph.TraceELBO(), DiffusionELBO(2)))
    error = ((chain.var() + few.var()) / 8000).sqrt()
    assert abs(chain.mean() - few.mean()) < 4 * error
    other = DiffusionELBO(2).per_datum(model, guide, x, context=-context)
    assert abs(other.mean() - few.mean()) > 8 * error
