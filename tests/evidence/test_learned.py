"""Annealing that learns: unbiased weights at any parameters, zero width between Gaussians, log Z = 0 (oracle 12)."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints

from pyro_hvae import conjugate, evidence_sandwich, fit
from pyro_hvae.evidence import AnnealedBound, anneal
from pyro_hvae.evidence.kernels import share_of_others
from pyro_hvae.weights import log_mean_exp, log_mean_exp_stderr


def exact(x):
    return dist.Normal(0.0, 2**0.5).log_prob(x)


def disturb(bound, size=0.2):
    """Give a bound's parameters random values: weights are unbiased at all of them."""
    with torch.no_grad():
        for parameter in bound.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return bound


def log_weights(bound, *pair, num_chains=4000):
    from pyro_hvae import Problem

    with torch.no_grad():
        return bound._forward(Problem(pair[0], pair[1])(*pair[2:]), num_chains)[0]


OPTIONS = [{"correction": False}, {"correction": True}, {"hidden": (8,)}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("steps", [1, 3])
def test_weights_are_unbiased_at_any_parameters(options, steps):
    x = torch.tensor([0.0, 2.0])
    pair = conjugate.model, conjugate.guide(slope=0.3, scale=0.9), x
    bound = disturb(AnnealedBound(steps, **options).prepare(*pair))
    weights = log_weights(bound, *pair)
    assert ((log_mean_exp(weights) - exact(x)).abs() < 4 * log_mean_exp_stderr(weights)).all()
    assert (weights.mean(0) < exact(x)).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_reverse_weights_are_unbiased_for_the_inverse(options):
    from pyro_hvae import Problem

    x = torch.tensor([0.0, 2.0])
    pair = conjugate.model, conjugate.guide(slope=0.3, scale=0.9), x
    bound = disturb(AnnealedBound(3, **options).prepare(*pair))
    draws = {"z": x / 2 + 0.5**0.5 * torch.randn(4000, 2)}
    with torch.no_grad():
        inverse = bound._reverse(Problem(*pair[:2])(x), 4000, draws)
    assert ((log_mean_exp(inverse) + exact(x)).abs() < 4 * log_mean_exp_stderr(inverse)).all()


def hierarchy(x):
    """A positive global scale, and local latents in a plate beside it: no plate common to all."""
    scale = pyro.sample("scale", dist.Gamma(x.new_tensor(3.0), x.new_tensor(2.0)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), scale))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def hierarchy_evidence(x):
    grid = torch.linspace(1e-3, 15, 20_001)
    log_f = dist.Gamma(3.0, 2.0).log_prob(grid)
    log_f = log_f + dist.Normal(0.0, (grid**2 + 0.49).sqrt()[:, None]).log_prob(x).sum(-1)
    return log_f.logsumexp(0) + math.log(float(grid[1] - grid[0]))


@pytest.mark.parametrize("hidden", [(), (6,)])
@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal, None])
def test_constrained_and_global_latents(auto, hidden):
    x = torch.tensor([0.3, -1.2, 0.8])

    def by_hand(x):
        pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 0.6))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.8))

    guide = by_hand if auto is None else auto(hierarchy, init_scale=0.8)
    if auto is not None:
        guide(x)
    bound = disturb(AnnealedBound(2, hidden=hidden).prepare(hierarchy, guide, x), 0.1)
    weights = log_weights(bound, hierarchy, guide, x, num_chains=6000)
    assert weights.shape == (6000,)
    assert abs(log_mean_exp(weights) - hierarchy_evidence(x)) < 4 * log_mean_exp_stderr(weights)


def exact_join(x):
    """One step whose corrections are those of the exact chains: every weight is Z, forwards and backwards."""
    slope, scale, k = 0.2, 1.0, 0.5  # guide N(slope x, scale), leapfrog step k, beta 1/2
    variance = 0.5  # of the posterior, whose mean is x / 2
    pair = conjugate.model, conjugate.guide(slope=slope, scale=scale), x
    bound = AnnealedBound(1).prepare(*pair)
    site = bound.kernels.site("z")
    rho = math.sqrt(variance - k**2) / scale  # u_1 = mean + rho (u_0 - slope x) + k eps
    # Scores at u: q: -(u - slope x)/scale^2, p: -(u - mean)/variance; both are needed, since the mean moves with x.
    # k r' = mean + rho (u - slope x) - u - k^2/2 f'(u), with u - slope x = -scale^2 s_q and u - mean = -variance s_p.
    with torch.no_grad():
        site["log_scale"].fill_(0.0)
        bound.kernels.log_step.fill_(math.log(k))
        site["forward_q"].fill_((-rho * scale**2 - k**2 / 4) / k)
        site["forward_p"].fill_((variance - k**2 / 4) / k)
        # (u_0, u_1) are jointly Gaussian, and r_1 = (u_1 - u_0)/k + k/2 f'(u_1) given u_1 has mean and variance
        # from u_0 | u_1: gain rho scale^2 / variance.
        gain = rho * scale**2 / variance
        site["backward_log_sd"].fill_(0.5 * math.log(scale**2 - gain**2 * variance) - math.log(k))
        # E u_0 = slope x + gain (u_1 - mean); u_1 - slope x = -scale^2 s_q(u_1)
        site["backward_q"].fill_(-(scale**2) / k + k / 4)
        site["backward_p"].fill_(gain * variance / k + k / 4)
    return bound, pair


def test_width_between_gaussians_is_zero():
    x = torch.tensor([0.4, 2.0])
    bound, pair = exact_join(x)
    weights = log_weights(bound, *pair, num_chains=100)
    torch.testing.assert_close(weights, exact(x).expand(100, 2), atol=1e-12, rtol=0.0)
    draws = {"z": x / 2 + 0.5**0.5 * torch.randn(50, 2)}
    interval = bound.interval(*pair, num_chains=50, posterior_samples=draws)
    assert (interval.width < 2 * 2 * math.log(2 / 0.025) / 50).all()  # the price of the probability alone


CORRECTIONS = ("forward_q", "forward_p", "forward_shift", "backward_q", "backward_p", "backward_shift",
               "backward_momentum", "backward_log_sd")  # fmt: skip


def gradients(bound, pair, num_chains):
    """Gradient of the mean log-weight in each correction."""
    from pyro_hvae import Problem

    site = bound.kernels.site("z")
    weights = bound._forward(Problem(*pair[:2])(*pair[2:]), num_chains)[0]
    parameters = [site[name] for name in CORRECTIONS]
    found = torch.autograd.grad(weights.mean(0).sum(), parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(CORRECTIONS, found, strict=True))


def test_gradients_of_exact_chains_have_no_noise():
    bound, pair = exact_join(torch.tensor([0.4, 2.0]))
    for name, gradient in gradients(bound, pair, 16).items():
        assert gradient.abs().max() < 1e-10, name


def test_gradients_of_corrections_are_those_of_the_mean():
    """The terms of zero mean change no gradient: against differences of the mean over the same draws."""
    x = torch.tensor([0.0, 2.0])
    pair = conjugate.model, conjugate.guide(slope=0.4, scale=0.9), x
    bound = disturb(AnnealedBound(3).prepare(*pair), 0.1)
    site, chains, h = bound.kernels.site("z"), 50_000, 1e-4
    torch.manual_seed(0)
    found = gradients(bound, pair, chains)

    def mean(seed):
        torch.manual_seed(seed)
        return float(log_weights(bound, *pair, num_chains=chains).mean(0).sum())

    for name in CORRECTIONS:
        for t in range(3):
            entry = site[name].data[t]
            entry.add_(h)
            above = mean(0)
            entry.sub_(2 * h)
            below = mean(0)
            entry.add_(h)
            difference = (above - below) / (2 * h)  # noise: sd of the plain gradient, at most 2, over sqrt(chains)
            assert abs(float(found[name][t].sum()) - difference) < 4 * 2.5 / chains**0.5, (name, t)


def test_gradients_of_networks_are_those_of_the_mean():
    """Against differences along one direction of all their parameters."""
    from pyro_hvae import Problem

    x = torch.tensor([0.0, 2.0])
    pair = conjugate.model, conjugate.guide(slope=0.4, scale=0.9), x
    bound = disturb(AnnealedBound(2, hidden=(5,)).prepare(*pair), 0.1)
    chains, h = 50_000, 1e-3
    for way in ("forward", "backward"):
        parameters = list(bound.kernels.networks[f"{way}_chain"].parameters())
        direction = [torch.randn_like(p) / p.numel() ** 0.5 for p in parameters]
        torch.manual_seed(0)
        weights = bound._forward(Problem(*pair[:2])(x), chains)[0]
        found = torch.autograd.grad(weights.mean(0).sum(), parameters)
        slope = sum((g * d).sum() for g, d in zip(found, direction, strict=True))

        def mean(step, parameters=parameters, direction=direction):
            with torch.no_grad():
                torch._foreach_add_(parameters, [step * d for d in direction])
            torch.manual_seed(0)
            return float(log_weights(bound, *pair, num_chains=chains).mean(0).sum())

        above = mean(h)
        below = mean(-2 * h)
        mean(h)
        assert slope.abs() > 0.02, way  # else the comparison says nothing
        assert abs(float(slope) - (above - below) / (2 * h)) < 0.02, way


def test_network_of_the_momenta():
    """It starts at zero, differs from step to step, sees the state, and can be held."""
    from pyro_hvae import Problem
    from pyro_hvae.evidence.networks import MomentumNetwork
    from pyro_hvae.evidence.path import Path

    x = torch.tensor([0.0, 2.0])
    path = Path(Problem(conjugate.model, conjugate.guide())(x), 6)
    network = MomentumNetwork(path, 3, 2, (8,))
    state = {"z": path.start()["z"].requires_grad_()}
    scores = [{"z": torch.randn(6, 2)} for _ in range(2)]
    assert all(not found["z"].any() for found in network(path, state, scores, {}, 0))
    disturb(network)
    shift, change = (found["z"] for found in network(path, state, scores, {}, 0))
    assert shift.shape == change.shape == (6, 2)
    assert change.abs().max() < 3
    assert not torch.allclose(network(path, state, scores, {}, 2)[0]["z"], shift)
    assert not torch.allclose(network(path, state, scores, {"z": torch.ones(6, 2)}, 0)[0]["z"], shift)
    held = network(path, state, scores, {}, 0, held=True)[0]["z"]
    torch.testing.assert_close(held, shift)
    found = torch.autograd.grad(held.sum(), [state["z"], *network.parameters()], allow_unused=True)
    assert found[0].abs().max() > 0
    assert all(gradient is None for gradient in found[1:])


def test_networks_change_the_spread_of_the_backward_chain():
    from pyro_hvae import Problem
    from pyro_hvae.evidence.path import Path

    x = torch.tensor([0.0, 2.0])
    pair = conjugate.model, conjugate.guide()
    bound = disturb(AnnealedBound(2, hidden=(8,)).prepare(*pair, x))
    path = Path(Problem(*pair)(x), 6)
    here = bound.kernels.point(path, path.start())
    _, log_sd = bound.kernels._backward_mean(path, here, 2, None)
    assert log_sd["z"].std() > 0


def test_networks_join_gaussians_of_other_axes():
    """Two steps of coordinates' own corrections can't turn the axes; with networks little is left."""

    def correlated():  # log Z = 0
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]])))

    gaps = []
    for hidden in ((), (16,)):
        guide = Diagonal(0.6, z=(2,))
        bound = AnnealedBound(2, 32, hidden=hidden).prepare(correlated, guide)
        train(bound, correlated, guide, steps=250, rate=0.01)
        gaps.append(-float(log_weights(bound, correlated, guide, num_chains=5000).mean()))
    assert gaps[1] < 0.1 * gaps[0], gaps


def test_share_of_others():
    log_w = torch.tensor([0.0, 1.0, -1.0, 0.5]).reshape(4, 1)
    w = log_w.exp()
    expected = torch.stack([w[k] / ((w.sum() - w[k]) / 3) for k in range(4)])
    torch.testing.assert_close(share_of_others(log_w), expected)
    assert not share_of_others(torch.zeros(1, 2)).any()  # there are no others
    one_rules = torch.tensor([[0.0], [-30.0], [-30.0], [-90.0]])
    assert share_of_others(one_rules)[1:].eq(0).all()
    assert share_of_others(torch.tensor([[0.0], [-torch.inf], [0.0]])).isfinite().all()


def train(bound, model, guide, *args, steps=100, rate=0.03):
    bound.prepare(model, guide, *args)
    parameters = [*bound.parameters(), *(guide.parameters() if isinstance(guide, torch.nn.Module) else [])]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        bound.differentiable_loss(model, guide, *args).backward()
        optimizer.step()
        schedule.step()
    return bound


def test_training_closes_the_gap_between_gaussians():
    x = torch.tensor([0.0, 2.0, -1.0])
    pair = conjugate.model, conjugate.guide(slope=0.3, scale=1.2), x
    elbo = log_weights(AnnealedBound(2).prepare(*pair), *pair, num_chains=10).mean()
    bound = train(AnnealedBound(2, num_particles=32), *pair, steps=500, rate=0.02)
    weights = log_weights(bound, *pair, num_chains=2000)
    gap = (exact(x) - weights.mean(0)).max()
    assert gap < 0.005 < exact(x).mean() - elbo
    assert (bound.kernels.betas.diff() > 0).all()


class Diagonal(PyroModule):
    """A Gaussian guide of independent coordinates for a site each."""

    def __init__(self, scale, **sizes):
        super().__init__()
        self.sizes = sizes
        for name, size in sizes.items():
            setattr(self, f"loc_{name}", torch.nn.Parameter(torch.zeros(size)))
            setattr(self, f"scale_{name}", PyroParam(scale * torch.ones(size), constraints.positive))

    def forward(self):
        for name, size in self.sizes.items():
            fn = dist.Normal(getattr(self, f"loc_{name}"), getattr(self, f"scale_{name}"))
            pyro.sample(name, fn.to_event(len(size)))


def funnel():
    """Neal's funnel in 10 dims: log Z = 0."""
    v = pyro.sample("v", dist.Normal(torch.zeros(()), 3.0))
    pyro.sample("z", dist.Normal(torch.zeros(9), (v / 2).exp()[..., None]).to_event(1))


def modes():
    """A mixture of 40 Gaussians in the plane: log Z = 0."""
    generator = torch.Generator().manual_seed(0)
    loc = 80 * torch.rand(40, 2, generator=generator) - 40
    component = dist.Normal(loc, 1.3).to_event(1)
    pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(40) / 40), component))


def draws_of(model, count):
    with pyro.plate("draws", count), torch.no_grad():
        trace = pyro.poutine.trace(model).get_trace()
    return {name: node["value"] for name, node in trace.nodes.items() if name in ("v", "z")}


def assert_brackets(model, guide, bound, num_chains):
    draws = draws_of(model, num_chains)
    untrained = bound.interval(model, guide, num_chains=num_chains, posterior_samples=draws)
    assert untrained.lower <= 0 <= untrained.upper
    before = log_weights(bound, model, guide, num_chains=num_chains).mean()
    train(bound, model, guide, steps=60)
    interval = bound.interval(model, guide, num_chains=num_chains, posterior_samples=draws)
    assert interval.lower <= 0 <= interval.upper
    assert log_weights(bound, model, guide, num_chains=num_chains).mean() > before


def test_funnel_is_bracketed():
    guide = Diagonal(1.0, v=(), z=(9,))
    bound = AnnealedBound(4, num_particles=16).prepare(funnel, guide)
    assert_brackets(funnel, guide, bound, 500)


def test_forty_modes_are_bracketed():
    guide = Diagonal(25.0, z=(2,))
    bound = AnnealedBound(8, num_particles=32, correction=False).prepare(modes, guide)
    assert_brackets(modes, guide, bound, 500)


def test_fit_trains_the_bound_with_model_and_guide():
    x = torch.randn(64, 1) * 2**0.5

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.log_sd = torch.nn.Parameter(torch.tensor(0.7))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, self.log_sd.exp()).to_event(1), obs=x)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.tensor(0.1))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.slope * x, 0.9).to_event(1))

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.02)

    model, guide, bound = Model(), Guide(), AnnealedBound(2)
    result = fit(model, guide, x, bound=bound, epochs=40, batch_size=32, optimizer=adam, progress=False)
    assert bound.kernels is not None
    assert bound.kernels.log_step.std() > 0
    assert guide.slope > 0.2
    assert model.log_sd < 0.6
    assert result is not None


def test_moves_of_a_trained_bound_serve_annealing_and_the_sandwich():
    x = torch.tensor([0.0, 2.0])
    pair = conjugate.model, conjugate.guide(slope=0.3, scale=1.2), x
    bound = train(AnnealedBound(4, num_particles=16, correction=False), *pair, steps=60, rate=0.05)
    moves = bound.moves(*pair, num_leapfrog=3)
    chains = anneal(*pair, num_chains=400, moves=moves)
    torch.testing.assert_close(chains.betas[1:-1], bound.kernels.betas.detach())
    assert ((log_mean_exp(chains.log_weights) - exact(x)).abs() < 4 * log_mean_exp_stderr(chains.log_weights)).all()
    bracket = evidence_sandwich(*pair, num_chains=100, moves=moves)
    torch.testing.assert_close(bracket.forward.betas, moves.betas)
    assert ((bracket.lower < exact(x) + 0.02) & (bracket.upper > exact(x) - 0.02)).all()


def test_terms_and_module():
    x = torch.tensor([0.0, 2.0])
    pair = conjugate.model, conjugate.guide(slope=0.3, scale=0.9), x
    bound = AnnealedBound(2).prepare(*pair)
    terms = bound.terms(*pair)
    assert set(terms) == {"elbo", "annealing"}
    assert bound.per_datum(*pair).shape == (2,)
    again = AnnealedBound(2).prepare(*pair)
    again.load_state_dict(bound.state_dict())
    assert repr(bound) == "AnnealedBound(num_temperatures=2, num_particles=1, correction=True)"


def test_refusals():
    x = torch.zeros(2)
    pair = conjugate.model, conjugate.guide(), x
    with pytest.raises(ValueError, match="num_temperatures must be at least 1, got 0"):
        AnnealedBound(0)
    with pytest.raises(ValueError, match="hidden must be a sequence of widths, got 8"):
        AnnealedBound(2, hidden=8)
    with pytest.raises(ValueError, match="leave correction=True"):
        AnnealedBound(2, hidden=(8,), correction=False)
    with pytest.raises(ValueError, match=r"no parameters yet: call bound.prepare"):
        AnnealedBound(2).per_datum(*pair)
    bound = AnnealedBound(2).prepare(*pair)
    with pytest.raises(RuntimeError, match=r"SVI would leave the parameters of AnnealedBound untrained"):
        bound.loss_and_grads(*pair)
    with pytest.raises(ValueError, match="num_chains >= 25"):
        bound.interval(*pair, num_chains=3)

    def other(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"prepared for latents of shapes .* make an AnnealedBound for each model"):
        bound.per_datum(other, AutoNormal(other), x)

    def discrete(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def coin(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))

    with pytest.raises(ValueError, match="'z' is discrete"):
        AnnealedBound(2).prepare(discrete, coin, x)
