"""Particles: programs that see the dim of particles, and programs that only seem to."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyro_hvae as ph
from tests.kinds.outcomes import right_or_refused

T = torch.tensor
C = [1.0, 2.0, -1.0]  # coefficients of three latents with other means
LOC = [1.2, -0.8, 0.4]


def normal(size):
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


def assert_mean(estimate, truth, repeats, names=(r"\bw\b", r"\bx\b", "particle")):
    """Assert that the mean of an estimate is the truth to 5 standard errors, or that it is refused."""

    def value():
        values = torch.stack([torch.as_tensor(estimate()).detach().double() for _ in range(repeats)])
        error = 5 * values.std() / repeats**0.5 + 0.01
        assert (values.mean() - truth).abs() < error, (values.mean(), truth, error)
        return truth

    right_or_refused(value, truth, 0.0, names=names)


# --- one latent of three elements, one observation

WAYS = {  # the location of x as a user writes it without particles
    "unpacked": lambda w: (lambda a, b, c: a + 2 * b - c)(*w),
    "first index": lambda w: w[0] + 2 * w[1] - w[2],
    "zip": lambda w: sum(c * v for c, v in zip(C, w, strict=False)),
    "unbind": lambda w: sum(c * v for c, v in zip(C, w.unbind(), strict=False)),
    "matrix product": lambda w: T(C) @ w,
    "einsum": lambda w: torch.einsum("i,i->", T(C), w),
    "reshaped": lambda w: (T(C) * w.reshape(3)).sum(-1),
    "length": lambda w: (T(C) * w).sum(-1) * len(w) / 3,
    "number of elements": lambda w: (T(C) * w).sum(-1) * w.numel() / 3,
    "size": lambda w: (T(C) * w).sum(-1) * w.size(0) / 3,
    "last of a running sum": lambda w: (T(C) * w).cumsum(0)[-1],
    "index_select": lambda w: (T(C) * w.index_select(0, T([0, 1, 2]))).sum(-1),
    "list": lambda w: (T(C) * torch.stack(list(w), -1)).sum(-1),
    "trace": lambda w: torch.trace(torch.diag(T(C) * w)),
}


def pair(way):
    def model():
        w = pyro.sample("w", normal(3))
        pyro.sample("x", dist.Normal(way(w), 1.0), obs=T(1.3))

    def guide():
        pyro.sample("w", dist.Normal(T(LOC), 0.5).to_event(1))

    return model, guide


def log_weights(num_draws, num_particles, loc=lambda w: (T(C) * w).sum(-1)):
    w = T(LOC) + 0.5 * torch.randn(num_draws, num_particles, 3)
    log_p = normal(3).log_prob(w) + dist.Normal(loc(w), 1.0).log_prob(T(1.3))
    return log_p - dist.Normal(T(LOC), 0.5).to_event(1).log_prob(w)


@pytest.mark.parametrize(
    ("way", "num_particles"), [(way, k) for way in WAYS for k in (2, 3) if way not in ("length", "size") or k == 2]
)
def test_elements_of_one_latent(way, num_particles):
    model, guide = pair(WAYS[way])
    bound = ph.TraceELBO(num_particles)
    assert_mean(lambda: -bound.loss(model, guide), log_weights(200_000, 1).mean(), 300)


@pytest.mark.parametrize("way", ["unpacked", "matrix product", "number of elements"])
def test_elements_of_one_latent_in_a_weighted_bound(way):
    model, guide = pair(WAYS[way])
    bound = ph.IWELBO(3)
    truth = (log_weights(100_000, 3).logsumexp(1) - T(3.0).log()).mean()
    assert_mean(lambda: bound.per_datum(model, guide), truth, 300)


@pytest.mark.parametrize("way", ["unpacked", "matrix product"])
def test_particles_as_many_as_elements_by_chunks(way):
    """Nine draws are weighed three at a time, and three is the number of elements."""
    model, guide = pair(WAYS[way])
    bound = ph.IWELBO(9, chunk_size=3)
    truth = (log_weights(50_000, 9).logsumexp(1) - T(9.0).log()).mean()
    assert_mean(lambda: bound.per_datum(model, guide), truth, 200)


TOGETHER = {  # what all particles decide in the user's way, and by hand
    "sorted": (lambda w: w.sort(0)[0][..., 0], lambda w: w.min(-1)[0]),
    "largest": (lambda w: 3 * w.topk(2, 0)[0][..., 0], lambda w: 3 * w.max(-1)[0]),
    "count": (lambda w: w[..., 0] + (w > 1).sum().clamp(max=3), lambda w: w[..., 0] + (w > 1).sum(-1)),
    "nonzero": (lambda w: w[..., 0] + len((w > 1).nonzero()), lambda w: w[..., 0] + (w > 1).sum(-1)),
}


@pytest.mark.parametrize("num_particles", [2, 3])
@pytest.mark.parametrize("way", TOGETHER)
def test_what_all_particles_decide_together(way, num_particles):
    model, guide = pair(TOGETHER[way][0])
    bound = ph.TraceELBO(num_particles)
    assert_mean(lambda: -bound.loss(model, guide), log_weights(200_000, 1, TOGETHER[way][1]).mean(), 300)


@pytest.mark.parametrize("num_particles", [2, 3])
def test_gradient_of_unpacked_elements(num_particles):
    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(T(LOC))

        def forward(self):
            pyro.sample("w", dist.Normal(self.loc, 0.5).to_event(1))

    model, guide = pair(WAYS["unpacked"])[0], Guide()
    bound = ph.TraceELBO(num_particles)
    # d/dm of |m|^2 / 2 + (c.m - 1.3)^2 / 2, the first element
    right = LOC[0] + C[0] * (sum(c * m for c, m in zip(C, LOC, strict=True)) - 1.3)
    assert_mean(lambda: torch.autograd.grad(bound.differentiable_loss(model, guide), guide.loc)[0][0], T(right), 300)


# --- several latents of a plate, and observations that pick some of them

GROUPS = T([1, 0, 1, 1, 0])
Y = T([0.5, -1.0, 1.5, 0.2, -0.3])
PICKS = {
    "index": lambda e: e[GROUPS],
    "index_select": lambda e: e.index_select(0, GROUPS),
    "gather": lambda e: e.gather(0, GROUPS),
    "one-hot product": lambda e: F.one_hot(GROUPS, 2).to(e.dtype) @ e,
    "embedding": lambda e: F.embedding(GROUPS, e.unsqueeze(-1)).squeeze(-1),
    "repeat_interleave": lambda e: e.repeat_interleave(T([2, 3]))[T([2, 0, 3, 4, 1])],
    "stacked": lambda e: torch.stack([e[i] for i in GROUPS.tolist()]),
}


@pytest.mark.parametrize("num_particles", [2, 4, 5])
@pytest.mark.parametrize("pick", PICKS)
def test_groups_that_are_picked_by_index(pick, num_particles):
    def model(y):
        with pyro.plate("groups", 2):
            e = pyro.sample("e", dist.Normal(T(0.0), 1.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(PICKS[pick](e), 1.0), obs=y)

    def guide(y):
        with pyro.plate("groups", 2):
            pyro.sample("e", dist.Normal(T([-0.3, 1.0]), 0.6))

    e = T([-0.3, 1.0]) + 0.6 * torch.randn(200_000, 2)
    truth = dist.Normal(0.0, 1.0).log_prob(e).sum(-1) + dist.Normal(e[:, GROUPS], 1.0).log_prob(Y).sum(-1)
    truth = (truth - dist.Normal(T([-0.3, 1.0]), 0.6).log_prob(e).sum(-1)).mean()
    bound = ph.TraceELBO(num_particles)
    assert_mean(lambda: -bound.loss(model, guide, Y), truth, 200, names=[r"\be\b", r"\by\b", "groups", "data"])


def test_a_group_index_of_a_permutation_where_all_sizes_agree():
    """Two groups, two data, two particles: e[T([1, 0])] swaps particles where it should swap groups."""

    def model(y):
        with pyro.plate("groups", 2):
            e = pyro.sample("e", dist.Normal(T(0.0), 1.0))
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Normal(e[T([1, 0])], 1.0), obs=y)

    def guide(y):
        with pyro.plate("groups", 2):
            pyro.sample("e", dist.Normal(T([-1.0, 2.0]), 0.5))

    y = T([2.0, -1.0])
    # E log N(y; e, 1) = -log(2 pi)/2 - ((y - m)^2 + s^2)/2, minus the divergence
    likelihood = sum(-0.5 * np.log(2 * np.pi) - 0.25 / 2 for _ in range(2))
    kl = sum(-np.log(0.5) + (0.25 + m**2) / 2 - 0.5 for m in (-1.0, 2.0))
    bound = ph.TraceELBO(2)
    assert_mean(lambda: -bound.loss(model, guide, y), T(likelihood - kl), 200, names=[r"\be\b", r"\by\b"])


def test_the_advised_group_index_works():
    """A guard: e[..., index] is right at any number of particles."""

    def model(y):
        with pyro.plate("groups", 2):
            e = pyro.sample("e", dist.Normal(T(0.0), 1.0))
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Normal(e[..., T([1, 0])], 1.0), obs=y)

    def guide(y):
        with pyro.plate("groups", 2):
            pyro.sample("e", dist.Normal(y.flip(0) / 2, 0.5**0.5))  # the posterior

    y = T([2.0, -1.0])
    found = ph.IWELBO(2).per_datum(model, guide, y)
    assert torch.allclose(found.sum(), dist.Normal(0.0, 2**0.5).log_prob(y).sum())


# --- batches of one, networks that take the particles for something else


@pytest.mark.parametrize("bound", [ph.TraceELBO(3), ph.LayerwiseELBO(3), ph.IWELBO(3)], ids=repr)
def test_squeezed_draws_of_a_batch_of_one(bound):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(1))
            pyro.sample("x", dist.Normal(z.squeeze(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, None] / 2, 0.5**0.5).to_event(1))  # the posterior

    x = T([2.0])
    truth = dist.Normal(0.0, 2**0.5).log_prob(x)
    exact = 1e-9 if isinstance(bound, ph.TraceELBO | ph.IWELBO) else 3.0
    right_or_refused(lambda: bound.per_datum(model, guide, x), truth, exact, names=[r"\bz\b", r"\bx\b", "data"])


class Decoder(pyro.nn.PyroModule):
    def __init__(self, net, size):
        super().__init__()
        self.net, self.size = net, size

    def forward(self, x):
        with pyro.plate("data", self.size):
            z = pyro.sample("z", normal(3))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


def encoder(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.5).to_event(1))


@pytest.mark.parametrize("num_particles", [2, 3])
@pytest.mark.parametrize("bound", [ph.TraceELBO, ph.LayerwiseELBO])
def test_unwrapped_batch_norm_with_as_many_channels_as_data(bound, num_particles):
    """(K, N, features) reads as (N, channels, length) to it: each datum gets a channel's mean, not each feature."""
    net = nn.BatchNorm1d(3, affine=False)
    net.running_mean.copy_(T([4.0, -3.0, 1.0]))
    model = Decoder(net.eval(), 3).eval()
    x = T([[2.0, -1.5, 0.5], [2.2, -1.0, 0.0], [1.0, -2.0, 1.0]])
    shift = T([4.0, -3.0, 1.0])

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(x + shift, 0.5).to_event(1))

    z = x + shift + 0.5 * torch.randn(100_000, 3, 3)
    mean = (z - net.running_mean) / (1 + 1e-5) ** 0.5
    truth = normal(3).log_prob(z) + dist.Normal(mean, 1.0).to_event(1).log_prob(x)
    truth = (truth - dist.Normal(x + shift, 0.5).to_event(1).log_prob(z)).sum(-1).mean()
    bound = bound(num_particles)
    assert_mean(lambda: -bound.loss(model, guide, x), truth, 100, names=[r"\bx\b", "particle", "batch norm"])


class NormGuide(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(2, affine=False)
        self.bn.running_mean.copy_(T([3.0, -2.0]))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x, 0.5).to_event(1))
            pyro.sample("z2", dist.Normal(self.bn(z1), 0.5).to_event(1))


@pytest.mark.parametrize("num_particles", [2, 5])
def test_unwrapped_batch_norm_on_a_draw_of_the_guide(num_particles):
    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", normal(2))
            z1 = pyro.sample("z1", dist.Normal(z2 + T([3.0, -2.0]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x)

    x = T([[3.0, -2.0], [4.0, -1.0]])
    guide = NormGuide().eval()
    z1 = x + 0.5 * torch.randn(100_000, 2, 2)
    loc = (z1 - T([3.0, -2.0])) / (1 + 1e-5) ** 0.5
    z2 = loc + 0.5 * torch.randn(100_000, 2, 2)
    truth = normal(2).log_prob(z2) + dist.Normal(z2 + T([3.0, -2.0]), 1.0).to_event(1).log_prob(z1)
    truth = truth + dist.Normal(z1, 1.0).to_event(1).log_prob(x) - dist.Normal(x, 0.5).to_event(1).log_prob(z1)
    truth = (truth - dist.Normal(loc, 0.5).to_event(1).log_prob(z2)).sum(-1).mean()
    bound = ph.TraceELBO(num_particles)
    assert_mean(lambda: -bound.loss(model, guide, x), truth, 150, names=["z2", "particle", "batch norm"])


class Recurrent(nn.Module):
    """A sequence of three steps, unbatched; with particles GRU takes these for the time."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 3)

    def forward(self, z):
        return self.gru(z)[0]


def test_a_network_that_takes_particles_for_time():
    """A guard: such a network is told from one that keeps particles apart."""
    torch.manual_seed(3)
    net = Recurrent()
    model = Decoder(net, 3)
    x = T([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5], [2.0, 0.0, -1.0]])
    with torch.no_grad():
        z = x + 0.5 * torch.randn(3_000, 3, 3)
        truth = normal(3).log_prob(z)
        truth = truth + dist.Normal(net(z.transpose(0, 1)).transpose(0, 1), 1.0).to_event(1).log_prob(x)
        truth = (truth - dist.Normal(x, 0.5).to_event(1).log_prob(z)).sum(-1).mean()
    bound = ph.TraceELBO(3)
    assert_mean(lambda: -bound.loss(model, encoder, x), truth, 150, names=[r"\bx\b", r"\bz\b", "particle"])


# --- noise and state that are not torch's

JITTER = {
    "numpy": lambda: np.random.randn(),  # noqa: NPY002
    "numpy, several": lambda: float(np.random.normal(size=3).sum() / 3**0.5),  # noqa: NPY002
    "random": lambda: random.gauss(0.0, 1.0),
}


@pytest.mark.parametrize("num_particles", [2, 5])
@pytest.mark.parametrize("noise", JITTER)
def test_noise_of_other_libraries(noise, num_particles):
    """x is moved by .5 e: E log N(x + .5 e; z, 1) has .25 more variance.  Or a refusal that says so."""
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)

    def model(x):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + 0.5 * JITTER[noise](), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = T([1.0, -0.5])
    # the exact guide has log p(x) without the noise, which costs .25 / 2 a datum
    truth = dist.Normal(0.0, 2**0.5).log_prob(x).sum() - 2 * 0.125
    bound = ph.TraceELBO(num_particles)
    assert_mean(lambda: -bound.loss(model, guide, x), truth, 500, names=["random", "numpy", "noise", "generator"])


class Tracking(pyro.nn.PyroModule):
    """Normalises by a moving average of the data, which each training pass moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + self.mean, 1.0), obs=x)


@pytest.mark.parametrize("num_particles", [1, 2, 4])
def test_a_moving_average_in_a_buffer(num_particles):
    x = T([3.0, 5.0])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - 0.4) / 2, 0.5**0.5))  # the posterior after one pass

    model = Tracking().train()
    right_or_refused(
        lambda: -ph.TraceELBO(num_particles).differentiable_loss(model, guide, x),
        dist.Normal(0.4, 2**0.5).log_prob(x).sum(),
        1e-9,
        names=["buffer", "mean", "changes"],
    )


@pytest.mark.parametrize(("moved", "refused"), [(1.2e-7, False), (1e-4, True)])
def test_round_off_of_a_narrow_posterior_far_from_zero_is_no_mixing(moved, refused):
    """Networks round their outputs otherwise for several particles: by 3e-6 at 30, a third of this guide's sd."""
    zero = torch.zeros((), dtype=torch.float32)

    def model():
        for name in ("a", "b"):
            pyro.sample(name, dist.Normal(zero, 10.0))

    def guide():
        a = pyro.sample("a", dist.Normal(zero, 1.0))
        pyro.sample("b", dist.Normal(30.0 * (1.0 + moved * (a.dim() > 0)) + 0.0 * a, 1e-5))

    bound = ph.TraceELBO(3)
    if refused:
        with pytest.raises(ValueError, match=r"density of site\(s\) \['b'\] in one particle"):
            bound.per_datum(model, guide)
    else:
        assert bound.per_datum(model, guide).isfinite()
