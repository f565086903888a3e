"""A gamma for each entry, against Gaussians: what depends on the path between the ends, and what does not."""

import math

import numpy as np
import pyro
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
    Schedule,
    ddim,
    dpm_solver,
    flow_log_likelihood,
    inpaint,
    probability_flow,
)
from pyro_hvae.models import latent_diffusion, vdm
from pyro_hvae.nn import DenoisingMLP
from pyro_hvae.training.compile import trace
from pyro_hvae.training.compile.graph import split_batch
from pyro_hvae.training.objective import PairObjective

LOW, HIGH = (torch.tensor(ends, dtype=torch.float64) for ends in ((-5.0, -3.0), (3.0, 4.0)))
COVARIANCE = torch.tensor([[1.5, 0.9], [0.9, 0.8]], dtype=torch.float64)
WRONG = torch.tensor([[1.5, -0.6], [-0.6, 0.8]], dtype=torch.float64)
PATHS = {  # shares of the way of both entries, with their slopes
    "straight": (lambda t: (t, t), lambda t: (t**0, t**0)),
    "first early": (lambda t: (2 * t - t**2, t**3), lambda t: (2 - 2 * t, 3 * t**2)),
    "second early": (lambda t: (t**2, 1 - (1 - t) ** 4), lambda t: (2 * t, 4 * (1 - t) ** 3)),
    "straight, later": (lambda t: (t**3, t**3), lambda t: (3 * t**2, 3 * t**2)),
    "second early, later": (lambda t: (t**6, 1 - (1 - t**3) ** 4), None),
}


class Path(Schedule):
    """One of PATHS."""

    event_shape = (2,)

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, t):
        low, high = LOW.to(t), HIGH.to(t)
        return low + (high - low) * torch.stack(PATHS[self.name][0](t), -1)


class Gaussian(nn.Module):
    """E[x | z] for x ~ N(0, covariance) and a gamma for each entry."""

    def __init__(self, covariance):
        super().__init__()
        self.covariance = covariance

    def forward(self, z, gamma):
        snr, y = torch.exp(-gamma), z / Noising(gamma).alpha
        precision = torch.linalg.inv(self.covariance) + torch.diag_embed(snr)
        return torch.linalg.solve(precision, (snr * y)[..., None])[..., 0]


class Levelled(Gaussian):
    """The same, which takes the mean of the gammas for that of both entries: no E[x | z] of any data."""

    def forward(self, z, gamma):
        y = z / Noising(gamma).alpha
        mean = gamma.mean(-1, keepdim=True).expand(gamma.shape)
        return super().forward(Noising(mean).alpha * y, mean)


class Separate(nn.Module):
    """E[x_i | z_i] for entries of variance 1.5 and 0.8, which says nothing of the others."""

    def forward(self, z, gamma):
        snr, variance = torch.exp(-gamma), torch.tensor([1.5, 0.8])
        return variance * snr / (1 + variance * snr) * z / Noising(gamma).alpha


def pair(denoiser, schedule, num_layers=None):
    return vdm(denoiser, event_shape=2, num_layers=num_layers, schedule=schedule, parameterisation="x0")


def cubature(dim):
    """Points of equal weight with which quadratic functions of N(0, I) have their mean."""
    return torch.cat([torch.eye(dim), -torch.eye(dim)]) * dim**0.5


def expected(model, guide, s, t, x=None):
    """Mean of a layer's divergence (or for s = None its rate), over the noise and x ~ N(0, COVARIANCE) or given x."""
    points = cubature(4 if x is None else 2)
    data = points[:, 2:] @ torch.linalg.cholesky(COVARIANCE).T if x is None else x.expand(len(points), 2)
    marginal = guide.marginal(t, data)
    z = marginal.mean + marginal.stddev * points[:, :2]
    return model.matching(s, t, z, data).mean()


def integrated(model, guide, x=None, points=80):
    """The denoising matching in continuous time, by quadrature over times."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    times = zip(torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2), strict=True)
    return sum(width * expected(model, guide, None, t, x) for t, width in times)


def errors(gamma):
    """Mean square of eps - epshat by entry, of Levelled(COVARIANCE), from moments."""
    believed, snr = torch.exp(-gamma.mean()), torch.exp(-gamma)
    gain = believed * torch.linalg.inv(torch.linalg.inv(COVARIANCE) + believed * torch.eye(2))
    rest = gain - torch.eye(2)
    return snr * (rest @ COVARIANCE @ rest.T + gain @ torch.diag(1 / snr) @ gain.T).diagonal()


def mean_and_error(draws):
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5


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


class Bent(Schedule):
    """LOW + (HIGH - LOW) (t + w (t^2 - t)), with a learned w for each entry, and the slope by differentiation."""

    event_shape = (2,)

    def __init__(self):
        super().__init__()
        self.bend = nn.Parameter(torch.tensor([0.3, -0.4]))

    def forward(self, t):
        t = t.unsqueeze(-1)
        return LOW + (HIGH - LOW) * (t + self.bend * (t**2 - t))


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


class Contextual(nn.Module):
    """A wrong denoiser that looks at z, gamma and the context."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 2)

    def forward(self, z, gamma, context):
        context = context.expand(*z.shape[:-1], context.shape[-1])
        return 0.5 * self.layer(torch.cat([z, gamma / 5, context], -1))


def contextual(num_layers):
    torch.manual_seed(1)
    schedule = PolynomialSchedule((2,), -4.0, 3.0, context_features=3, hidden=8)
    with torch.no_grad():
        schedule.net[-1].weight.mul_(60.0)
        schedule.ends += 0.3 * torch.randn(2, 2)
    model, guide = vdm(Contextual(), event_shape=2, num_layers=num_layers, schedule=schedule)
    return model, guide


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


# Training


@pytest.mark.parametrize("route", ["svi", "module"])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("num_layers", [5, None])
@pytest.mark.parametrize("features", [0, 3])
def test_every_parameter_of_the_schedule_trains(route, local, num_layers, features):
    schedule = PolynomialSchedule((2,), -5.0, 3.0, context_features=features, hidden=4)
    net = MeanLevel(DenoisingMLP(2, hidden=8, context_features=features))
    x = torch.randn(16, 2)
    keywords = {"context": torch.randn(16, 3)} if features else {}
    with pyro.settings.context(module_local_params=local):
        model, guide = vdm(net, event_shape=2, num_layers=num_layers, schedule=schedule)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        bounds = [DiffusionELBO()] if num_layers is None else [DiffusionELBO(), ph.TraceELBO()]
        for bound in bounds:
            if route == "svi":
                svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), bound)
                for _ in range(2):
                    svi.step(x, **keywords)
            else:
                objective = bound(model, guide)
                optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
                for _ in range(2):
                    optimizer.zero_grad()
                    objective(x, **keywords).backward()
                    optimizer.step()
    assert sum(name.startswith("schedule.") for name in before) == (5 if features else 2)
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_training_finds_the_best_path():
    """Between fixed ends the inside has the bound's own gradient; no path beats that on which the denoiser is exact."""
    schedule = PolynomialSchedule((2,), -4.0, 3.0, learn_ends=False)
    with torch.no_grad():
        schedule.start += torch.tensor([[1.0, -1.0], [0.5, -1.0], [-0.5, 1.0]])
    model, guide = pair(Levelled(COVARIANCE), schedule)
    first, last = (0.5 * torch.logdet(torch.eye(2) + COVARIANCE * math.exp(-gamma)) for gamma in (-4.0, 3.0))
    best = first - last
    before = integrated(model, guide).item()
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        integrated(model, guide, points=20).backward()
        optimizer.step()
    after = integrated(model, guide).item()
    assert before > best + 0.1
    assert best - 1e-9 < after < best + 0.2 * (before - best)
    x = torch.randn(64, 2) @ torch.linalg.cholesky(COVARIANCE).T
    ph.fit(model, guide, x, bound=DiffusionELBO(), steps=3, batch_size=16, progress=False)


@pytest.mark.parametrize("num_layers", [5, None])
def test_a_step_is_one_graph(num_layers):
    model, guide = contextual(num_layers)
    inputs = {"context": torch.randn(4, 3)}
    x = torch.randn(4, 2)
    objective = PairObjective(DiffusionELBO(), model, guide, (x,), inputs, None)
    flat = trace(objective, list(objective.parameters()), (x,), inputs)
    torch.manual_seed(3)
    found = flat(*split_batch((x,), inputs)[0])
    torch.manual_seed(3)
    loss = objective(x, **inputs)
    torch.testing.assert_close(found[0], loss.detach())
    for one, other in zip(found[1:], torch.autograd.grad(loss, flat.trained), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


# Schedules


def test_a_polynomial_increases_between_its_ends_and_has_its_slope():
    schedule = PolynomialSchedule((2, 3), -6.0, 4.0, context_features=2, hidden=8)
    context, t = torch.randn(5, 2), torch.linspace(0.0, 1.0, 41)
    with torch.no_grad():
        schedule.net[-1].weight.mul_(200.0)
    bound = schedule.given(context)
    gamma = torch.stack(bound.layers(t))
    assert gamma.shape == (41, 5, 2, 3)
    assert (gamma.diff(dim=0) > 0).all()
    assert gamma[20].std() > 0.3
    torch.testing.assert_close(gamma[0], torch.full((5, 2, 3), -6.0))
    torch.testing.assert_close(gamma[-1], torch.full((5, 2, 3), 4.0))
    times = torch.rand(7, 5)
    assert bound(times).shape == bound.derivative(times).shape == (7, 5, 2, 3)
    torch.testing.assert_close(bound.derivative(times), Schedule.derivative(bound, times), atol=1e-10, rtol=1e-10)
    assert schedule.given(torch.randn(6, 5, 2))(times[0]).shape == (6, 5, 2, 3)


def test_slopes_by_differentiation_are_those_of_the_entries():
    t, step = torch.tensor([0.2, 0.5, 0.9]), 1e-6
    for schedule in (Path("first early"), Bent()):
        numeric = (schedule(t + step) - schedule(t - step)) / (2 * step)
        torch.testing.assert_close(schedule.derivative(t), numeric, atol=1e-7, rtol=0)
        with torch.no_grad():
            torch.testing.assert_close(schedule.derivative(t), numeric, atol=1e-7, rtol=0)


class Misshapen(Path):
    def forward(self, t):
        return super().forward(t)[..., :1]


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \(1001, 2\); got \(1001, 3\)"):
        MonotoneSchedule(lambda t: torch.stack([t, t, t], -1), event_shape=(2,))
    with pytest.raises(ValueError, match=r"t = 0\.0010 entry \(1,\) it is -0\.001 after -?0"):
        MonotoneSchedule(lambda t: torch.stack([t, -t], -1), event_shape=(2,))
    with pytest.raises(ValueError, match=r"data of shape \(2,\), and the diffusion has event_shape=\(3,\)"):
        vdm(nn.Identity(), event_shape=3, num_layers=4, schedule=Path("straight"))
    with pytest.raises(ValueError, match=r"data of shape \(2,\), and the diffusion has event_dim=2"):
        Diffusion(Path("straight"), 4, event_dim=2)
    with pytest.raises(ValueError, match=r"must return gamma of shape .* got gamma of shape \(1,\)"):
        Diffusion(Misshapen("straight"), 4)(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"data of shape \(5, 3\)"):
        Diffusion(Path("straight"), 4)(torch.zeros(5, 3))
    for shape in ((), (0,)):
        with pytest.raises(ValueError, match="event_shape must have sizes"):
            PolynomialSchedule(shape)
    model, guide = contextual(4)
    x = torch.zeros(5, 2)
    for bound in (DiffusionELBO(), ph.TraceELBO()):
        with pytest.raises(ValueError, match="depends on a context of 3 features: call the programs with context="):
            bound.per_datum(model, guide, x)
        with pytest.raises(ValueError, match=r"a context \(\.\.\., 3\), got \(5, 2\)"):
            bound.per_datum(model, guide, x, context=torch.zeros(5, 2))
    other = Diffusion(PolynomialSchedule((2,), -4.0, 2.0, context_features=3), 4)
    with pytest.raises(ValueError, match=r"for the first of entries of shape .*one process for both"):
        DiffusionELBO().per_datum(model, other, x, context=torch.zeros(5, 3))
    with pytest.raises(ValueError, match="one process for both"):
        DiffusionELBO().per_datum(model, Diffusion(LinearSchedule(-4.0, 3.0), 4), x, context=torch.zeros(5, 3))
    one, _ = pair(Gaussian(COVARIANCE), Path("straight"))
    for call in (
        lambda: flow_log_likelihood(one, x),
        lambda: probability_flow(one, 2, rtol=1e-3),
        lambda: ReverseVariance().calibrate(one, x),
    ):
        with pytest.raises(ValueError, match="follows one noise level, and the schedule Path"):
            call()


# Draws


@pytest.mark.parametrize("name", ["straight", "first early"])
def test_samplers_draw_the_data_of_the_exact_denoiser(name):
    low, high = torch.tensor([-9.0, -8.0]), torch.tensor([9.0, 8.0])
    schedule = MonotoneSchedule(lambda t: low + (high - low) * torch.stack(PATHS[name][0](t), -1), event_shape=(2,))
    model, _ = pair(Gaussian(COVARIANCE), schedule)
    for sample in (
        lambda: ddim(model, 8000, num_steps=400, eta=0.5),
        lambda: probability_flow(model, 8000, num_steps=60),
        lambda: dpm_solver(model, 8000, num_steps=60),
    ):
        torch.manual_seed(0)
        draws = sample()
        error = ((COVARIANCE**2 + COVARIANCE.diagonal()[:, None] * COVARIANCE.diagonal()) / 8000).sqrt()
        assert ((draws.T.cov() - COVARIANCE).abs() < 4.5 * error + 0.02).all()


def test_missing_entries_and_draws_with_a_context():
    model, guide = contextual(6)
    x, context = torch.randn(5, 2), torch.randn(5, 3)
    mask = torch.tensor([[True, False]]).expand(5, 2)
    drawn = inpaint(model, guide, x, mask, num_particles=4, context=context)
    assert torch.equal(drawn[:, 0], x[:, 0])
    assert model(size=5, context=context).shape == (5, 2)
    for sample in (ddim, probability_flow, dpm_solver):
        assert sample(model, 5, num_steps=4, context=context).shape == (5, 2)
    tree = ph.to_datatree(model, guide, x, context=context, num_draws=10)
    assert tree["posterior"]["z6"].shape[1:] == (10, 5, 2)
    assert ph.SMCBound(8).per_datum(model, guide, x, context=context).shape == (5,)
