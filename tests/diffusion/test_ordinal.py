"""Ordinal noise against matrix exponentials and enumeration: exact reversal, one expectation, the continuous limit."""

import math

import pyro
import pytest
import torch
from scipy.linalg import expm
from scipy.special import ive

import pyro_hvae as ph
from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.diffusion import CosineReplacement, DiscreteDiffusion, Ordinal, PowerReplacement, Uniform, ancestral
from pyro_hvae.models import discrete_diffusion
from pyro_hvae.nn import TokenMLP
from tests.diffusion.categories import (
    Linear,
    assert_rate_is_the_limit_of_short_steps,
    expected_bound,
    integrated,
    model_evidence,
    states,
)

X = states(3, 2)
PROBS = torch.tensor([0.30, 0.02, 0.03, 0.10, 0.20, 0.05, 0.01, 0.04, 0.25], dtype=torch.float64)


def pair(denoiser, num_layers, **options):
    return discrete_diffusion(
        denoiser, event_shape=2, num_categories=3, num_layers=num_layers, corruption="ordinal", **options
    )


def generator(count):
    """Rates of a walk to neighbours with reflecting ends."""
    rates = torch.zeros(count, count)
    for i in range(count - 1):
        rates[i, i + 1] = rates[i + 1, i] = 1.0
    return rates - torch.diag(rates.sum(1))


def exponential(matrix):
    """Matrix exponential; torch's has errors of 1e-11."""
    return torch.tensor(expm(matrix.numpy()))


def passed(noise, b):
    """Time tau of the walk, from the second eigenvalue of the generator."""
    return -math.log1p(-b) / -torch.linalg.eigvalsh(generator(noise.num_categories))[-2].item()


def table(guide, s, t):
    """q(z_t | z_s), or for s = None q(z_t | x), as a matrix."""
    every = torch.arange(guide.corruption.num_states)
    rows, columns = every[:, None, None].expand(-1, len(every), 1), every[None, :, None].expand(len(every), -1, 1)
    step = guide.marginal(t, rows) if s is None else guide.step(s, t, rows)
    return step.log_prob(columns).exp()


class Exact(torch.nn.Module):
    """p(x_j | the other entry of z_t) under p(x) = PROBS, of which gamma is the logit of b."""

    def forward(self, z, gamma):
        logits = torch.empty(*z.shape, 3)
        joint = PROBS.reshape(3, 3)
        # e^(tau R) for each noise level, by the eigenvectors of the generator
        values, vectors = torch.linalg.eigh(generator(3))
        kept = torch.sigmoid(-gamma)[..., None] ** (values / values[-2])
        moves = (vectors * kept.unsqueeze(-2)) @ vectors.T
        for j in (0, 1):
            seen = torch.gather(moves, -1, z[..., 1 - j, None, None].expand(*z.shape[:-1], 3, 1)).squeeze(-1)
            logits[..., j, :] = (seen @ (joint.T if j == 0 else joint)).log()
        return logits


def mean_and_error(draws):
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5


@pytest.mark.parametrize("count", [2, 3, 7, 32])
@pytest.mark.parametrize("t", [0.0, 0.01, 0.3, 0.8, 0.999, 1.0])
def test_marginals_are_matrix_exponentials(count, t):
    guide = DiscreteDiffusion(Ordinal(count), 5)
    found = table(guide, None, torch.tensor(t))
    expected = torch.full((count, count), 1 / count)
    if t < 1:
        expected = exponential(passed(guide.corruption, t**2) * generator(count))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(count), atol=1e-12, rtol=0)


def test_steps_compose_and_reverse_by_bayes_rule():
    for schedule in (PowerReplacement(2.0), PowerReplacement(1.0), CosineReplacement()):
        guide = DiscreteDiffusion(Ordinal(5, schedule), 5)
        every = torch.arange(5)[:, None]
        for s, t in ((0.0, 0.3), (0.2, 0.4), (0.35, 1.0), (0.999, 1.0)):
            s, t = torch.tensor(s), torch.tensor(t)
            below, up = table(guide, None, s), table(guide, s, t)
            torch.testing.assert_close(below @ up, table(guide, None, t), atol=1e-12, rtol=0)
            for x in range(5):
                joint = below[x][:, None] * up
                for z in range(5):
                    found = guide.posterior(s, t, torch.full((5, 1), z), torch.full((5, 1), x)).log_prob(every).exp()
                    torch.testing.assert_close(found, joint[:, z] / joint[:, z].sum(), atol=1e-12, rtol=0)


def test_probabilities_below_rounding_have_their_logarithms():
    """The marginal of 40 levels after a short time, by Bessel functions: exp(-2 tau) I_d(2 tau)."""
    guide = DiscreteDiffusion(Ordinal(40), 5, event_dim=1)
    x, z = torch.full((30, 1), 5), torch.arange(5, 35)[:, None]
    for t in (0.01, 0.05, 0.1):
        found = guide.marginal(torch.tensor(t), x).log_prob(z)
        tau = passed(guide.corruption, t**2)
        exact = torch.tensor(ive(range(30), 2 * tau) + ive(range(11, 41), 2 * tau)).log()
        assert exact[-1] < -40  # a sum of cosines ends near -37
        torch.testing.assert_close(found, exact, atol=2e-3, rtol=0)


def test_probabilities_below_the_least_double_have_their_logarithms():
    """A move by d = 200 in a time tau = 1e-3: exp(-2 tau) tau^d / d! (1 + tau^2 / (d + 1))."""
    noise, tau = Ordinal(256, PowerReplacement(1.0)), 1e-3
    t = torch.tensor(-math.expm1(-tau * 4 * math.sin(math.pi / 512) ** 2))
    expected = -2 * tau + 200 * math.log(tau) - math.lgamma(201)
    assert expected < -2000
    known = noise.marginal(t, torch.tensor([3]), 1).base_dist.log_prob(torch.tensor([203]))
    broad = torch.full((1, 256), -2000.0)
    broad[0, 3] = 0.0
    for found in (known, noise.log_step(torch.tensor(0.0), t, torch.tensor([3]))[..., 203]):
        torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-4, rtol=0)
    torch.testing.assert_close(noise.log_marginal(t, broad)[..., 203], torch.tensor([-2000.0]), atol=3e-3, rtol=0)


def test_two_categories_are_uniform_noise():
    schedule, t, s = PowerReplacement(1.5), torch.tensor([0.2, 0.7]), torch.tensor([0.1, 0.4])
    ordinal, uniform = Ordinal(2, schedule), Uniform(2, schedule)
    z, x, logp = states(2, 3)[:2], states(2, 3)[4:6], torch.randn(2, 3, 2).log_softmax(-1)
    for lower in (s, None):
        found, expected = (noise.divergence(lower, t, z, x, logp) for noise in (ordinal, uniform))
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("beta", "steps", "error"), [(0.018, 4000, 1e-4), (0.05, 40, 0.03)])
def test_short_steps_of_the_discretised_gaussian_tend_to_it(beta, steps, error):
    """D3PM's matrix, many times."""
    count = 6
    distance = (torch.arange(count)[:, None] - torch.arange(count)).double()
    weights = torch.exp(-4 * torch.arange(-count + 1, count).double() ** 2 / ((count - 1) ** 2 * beta))
    step = torch.exp(-4 * distance**2 / ((count - 1) ** 2 * beta)) / weights.sum()
    step = step - torch.diag(step.diagonal()) + torch.diag(1 - (step.sum(1) - step.diagonal()))
    product = torch.linalg.matrix_power(step, steps)
    lost = 1 - math.exp(-steps * step[0, 1].item() * 4 * math.sin(math.pi / (2 * count)) ** 2)
    assert 0.1 < lost < 0.9
    found = table(DiscreteDiffusion(Ordinal(count, PowerReplacement(1.0)), 5), None, torch.tensor(lost))
    assert (found - product).abs().max() < error
    assert (found - 1 / count).abs().max() > 0.1


def test_noise_far_from_the_ends_is_near_a_gaussian():
    noise = Ordinal(256)
    t = torch.tensor(0.05)
    probs = noise.marginal(t, torch.tensor([128]), 1).base_dist.probs[0]
    levels = torch.arange(256.0)
    mean = (probs * levels).sum()
    variance = (probs * (levels - mean) ** 2).sum()
    assert abs(mean - 128) < 1e-9
    assert abs(variance - 2 * passed(noise, 0.0025)) < 1e-8
    assert abs(variance.sqrt() / (256 * 0.05 * 2**0.5 / math.pi) - 1) < 2e-3
    gaussian = torch.exp(-0.5 * (levels - 128) ** 2 / variance) / (2 * math.pi * variance) ** 0.5
    assert (probs - gaussian).abs().max() < 1e-3


# The bound


def test_exact_denoiser_gives_the_reversal_of_the_data_entry_by_entry():
    model, guide = pair(Exact(), 4)
    s, t = torch.tensor(0.25), torch.tensor(0.75)
    data = X[:, None].expand(9, 9, 2)
    of_s = guide.marginal(s, data).log_prob(X.expand(9, 9, 2)).exp()
    up = guide.step(s, t, X[:, None].expand(9, 9, 2)).log_prob(X.expand(9, 9, 2)).exp()
    joint = (PROBS @ of_s)[:, None] * up
    found = model.transition(s, t, X).base_dist.probs
    for j in (0, 1):
        for value in range(3):
            share = joint[X[:, j] == value].sum(0) / joint.sum(0)
            torch.testing.assert_close(found[:, j, value], share, atol=1e-12, rtol=0)


def test_continuous_time_is_the_limit_and_the_mean_bound_the_entropy():
    model, guide = pair(Exact(), None)
    assert abs((PROBS * (integrated(model, guide, X, 200) - PROBS.log())).sum()) < 1e-7
    wrong, _ = pair(Linear(2, 3), None)
    assert_rate_is_the_limit_of_short_steps(wrong, X)


def test_more_layers_tend_to_continuous_time():
    net = Linear(2, 3)
    limit = integrated(*pair(net, None), X, 200).detach()
    off = [(expected_bound(*pair(net, count), X).detach() - limit).abs().max() for count in (20, 40, 80)]
    assert off[1] < 0.6 * off[0]
    assert off[2] < 0.6 * off[1]
    assert off[2] < 0.05


ESTIMATORS = [("uniform", 1), ("antithetic", 1), ("antithetic", 4), ("importance", 2), ("exact", 1)]


@pytest.mark.parametrize(("sampling", "layers"), ESTIMATORS)
def test_sampled_layers_have_the_expectation_of_the_exact_sum(sampling, layers):
    model, guide = pair(Linear(2, 3), 6)
    bound = DiffusionELBO(layers, sampling)
    found, error = mean_and_error(bound.per_datum(model, guide, X[5].expand(4000, 2)))
    assert abs(found - expected_bound(model, guide, X[5:6]).item()) < 4 * error
    assert error < 0.1


@pytest.mark.parametrize("bound", [ph.TraceELBO(), ph.LayerwiseELBO()])
def test_the_full_chain_has_that_expectation_too(bound):
    model, guide = pair(Linear(2, 3), 6)
    found, error = mean_and_error(bound.per_datum(model, guide, X[5].expand(4000, 2)))
    assert abs(found - expected_bound(model, guide, X[5:6]).item()) < 4 * error


def test_continuous_time_by_sampling():
    model, guide = pair(Linear(2, 3), None)
    found, error = mean_and_error(DiffusionELBO(4).per_datum(model, guide, X[5].expand(6000, 2)))
    assert abs(found - integrated(model, guide, X[5:6], 200).item()) < 4 * error
    assert error < 0.1


class Half(PowerReplacement):
    def forward(self, t):
        return 0.8 * t

    def kept(self, t):
        return 1 - 0.8 * t


def test_prior_matching_of_noise_that_leaves_something():
    model, guide = pair(Linear(2, 3), 4, schedule=Half())
    assert DiffusionELBO().terms(model, guide, X)["prior_matching"].max() > 0.01
    found, error = mean_and_error(DiffusionELBO(4).per_datum(model, guide, X[5].expand(4000, 2)))
    assert abs(found - expected_bound(model, guide, X[5:6])) < 4 * error


# Programs


def test_draws_have_the_probabilities_of_the_chain():
    model, _ = pair(Linear(2, 3), 5)
    exact = model_evidence(model, X).exp()
    assert abs(exact.sum() - 1) < 1e-12
    with torch.no_grad():
        for draws in (model(size=20_000), ancestral(model, 20_000, num_steps=5)):
            share = torch.bincount((draws * torch.tensor([3, 1])).sum(-1), minlength=9) / 20_000
            assert ((share - exact).abs() < 4.5 * (exact * (1 - exact) / 20_000).sqrt()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
@pytest.mark.parametrize("num_layers", [1000, None])
def test_many_levels_stay_finite(dtype, shape, num_layers):
    net = TokenMLP(shape, 256, hidden=8, num_layers=1).to(dtype)
    model, guide = discrete_diffusion(
        net, event_shape=shape, num_categories=256, num_layers=num_layers, corruption="ordinal"
    )
    x = torch.randint(256, (2, *shape))
    t = torch.tensor([0.0, 1e-6], dtype=dtype)
    for times in (t, 1 - t):
        z = guide.marginal(times, x).sample()
        terms = model.matching(None, times, z, x)
        assert terms.dtype == dtype
        assert terms.isfinite().all()
    loss = DiffusionELBO().differentiable_loss(model, guide, x)
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_confident_denoiser_that_is_wrong_pays_and_stays_finite():
    """Sums of probabilities underflow in single precision; the divergence of a step is that of double precision."""
    noise = Ordinal(256)
    x, z = torch.tensor([[200]]), torch.tensor([[199]])
    logits = torch.full((1, 1, 256), -200.0)
    logits[..., 3] = 0.0
    t = torch.tensor([0.01])
    for s in (torch.tensor([0.009]), None):
        single, double = (
            noise.divergence(None if s is None else s.to(dtype), t.to(dtype), z, x, logits.to(dtype))
            for dtype in (torch.float32, torch.float64)
        )
        assert 0.01 < double < 1e6
        torch.testing.assert_close(single.double(), double, atol=0, rtol=1e-3)


@pytest.mark.parametrize("route", ["svi", "module"])
@pytest.mark.parametrize("num_layers", [10, None])
def test_every_parameter_trains(route, num_layers):
    net = TokenMLP(2, 3, hidden=8, num_layers=1)
    model, guide = pair(net, num_layers)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if route == "svi":
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), DiffusionELBO())
        for _ in range(3):
            svi.step(X)
    else:
        objective = DiffusionELBO()(model, guide)
        optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            objective(X).backward()
            optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_neighbours_are_likelier_than_others_and_uniform_noise_does_not_tell_them_apart():
    t, x = torch.tensor(0.2), torch.tensor([2])
    near, far = Ordinal(5).marginal(t, x, 1).base_dist.probs[0, [1, 0]]
    assert near > 10 * far
    uniform = Uniform(5).marginal(t, x, 1).base_dist.probs[0]
    assert uniform[0] == uniform[1]
    with pytest.raises(ValueError, match="integer >= 2; got 1"):
        Ordinal(1)
    assert repr(Ordinal(4)) == "Ordinal(4, PowerReplacement(power=2))"


def test_diagnose_reads_the_pair():
    model, guide = pair(Linear(2, 3), 3)
    report = ph.diagnose(model, guide, X)
    assert "z3" in str(report)
    evidence = ph.log_evidence(model, guide, X, num_samples=4000)
    assert ((evidence.value - model_evidence(model, X)).abs() < 4 * evidence.stderr + 1e-9).all()
