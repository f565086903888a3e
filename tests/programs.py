"""Registry of model/guide pairs that every bound is tested on, each with its exact evidence.

A pair joins the whole suite by one function decorated with ``@pair``; it returns a :class:`~tests.pair.Pair`.
:func:`~tests.pair.build` makes new programs with the same numbers, whatever the state of the generators.

``log_evidence`` is what the weights of the pair integrate to, per datum (the plates common to all sites), in nats;
None where the arguments are a minibatch on which no single value is bounded.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor, nn

from pyro_hvae.chains import BottomUp, Ladder, TopDown
from pyro_hvae.diffusion import LinearSchedule, PolynomialSchedule
from pyro_hvae.kernels import Bernoulli, Gaussian, StandardNormal, Transition
from pyro_hvae.models import discrete_diffusion, latent_diffusion, vdm
from tests.diffusion.categories import Linear, model_evidence
from tests.linear_gaussian import Oracle, linear_gaussian
from tests.pair import PAIRS, Pair, build, draw_weights, pair, parameters, reference_weights

__all__ = ["PAIRS", "Pair", "build", "draw_weights", "parameters", "reference_weights"]


def normal(value: Tensor, loc: Any, scale: Any) -> Tensor:
    return dist.Normal(torch.as_tensor(loc), torch.as_tensor(scale)).log_prob(value)


def gaussian(x: Tensor, covariance: Tensor) -> Tensor:
    return dist.MultivariateNormal(torch.zeros(x.shape[-1]), covariance).log_prob(x)


def data(size: int, whole: int | None = None, name: str = "data", dim: int = -1) -> pyro.plate:
    return pyro.plate(name, whole or size, subsample=torch.arange(size), dim=dim)


def zeros() -> Tensor:
    return torch.zeros(())


# Chains of kernels


def chain(depth: int, guide: str = "other") -> Pair:
    case = linear_gaussian(depth, size=4, nudge=0.05)
    evidence = Oracle(case.model).log_evidence(case.x).detach()
    return Pair(case.model, getattr(case, guide), (case.x,), log_evidence=evidence, exact=guide == "exact")


@pair
def chain_1() -> Pair:
    return chain(1)


@pair
def chain_2() -> Pair:
    return chain(2)


@pair
def chain_5() -> Pair:
    return chain(5)


@pair
def chain_exact() -> Pair:
    return chain(2, "exact")


@pair
def chain_top_down() -> Pair:
    return chain(3, "other_top_down")


def net(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, out))


def wide(width: int) -> Gaussian:
    """A kernel of a guide whose sd is above one, so that weights against a prior of sd one have moments."""
    made = net(width, 2)
    made[-1].bias.data[1] = 1.0
    return Gaussian(made)


def by_quadrature(model: TopDown, x: Tensor) -> Tensor:
    """log p(x) (N,) of a chain whose latents are one-dimensional, on a grid, from its kernels."""
    grid = torch.linspace(-9.0, 9.0, 721)
    step = math.log(18.0 / 720)
    with torch.no_grad():
        *latents, observation = model.kernels.values()
        log_p = normal(grid, 0.0, 1.0)
        for kernel in latents[1:]:
            log_p = (log_p[:, None] + kernel(grid[:, None]).base_dist.log_prob(grid).reshape(721, -1) + step).logsumexp(
                0
            )
        likelihood = observation(grid[:, None, None]).log_prob(x)
        return (log_p[:, None] + likelihood + step).logsumexp(0)


def binary(size: int = 4) -> Tensor:
    return (torch.rand(size, 5) < 0.5).to(torch.get_default_dtype())


@pair
def vae() -> Pair:
    model = TopDown(z=StandardNormal(1), x=Bernoulli(net(1, 5)))
    x = binary()
    return Pair(model, BottomUp(z=wide(5)), (x,), log_evidence=by_quadrature(model, x))


def two_layers() -> TopDown:
    return TopDown(z2=StandardNormal(1), z1=Gaussian(net(1, 2)), x=Bernoulli(net(1, 5)))


@pair
def hvae() -> Pair:
    model, x = two_layers(), binary()
    guide = BottomUp(z1=wide(5), z2=wide(1))
    return Pair(model, guide, (x,), log_evidence=by_quadrature(model, x))


@pair
def ladder() -> Pair:
    model, x = two_layers(), binary()
    guide = Ladder(model, z1=wide(5), z2=wide(1))
    return Pair(model, guide, (x,), log_evidence=by_quadrature(model, x))


@pair
def chain_minibatch() -> Pair:
    case = linear_gaussian(2, size=4, nudge=0.05)
    evidence = Oracle(case.model).log_evidence(case.x).detach()
    return Pair(case.model, case.other, (case.x,), {"data_size": 40}, log_evidence=evidence, scale=10.0)


# Written by hand


def slope(name: str, value: float) -> Tensor:
    return pyro.param(name, lambda: torch.tensor(value))


def spread(name: str, value: float) -> Tensor:
    return pyro.param(name, lambda: torch.tensor(value), constraint=dist.constraints.positive)


@pair
def by_hand() -> Pair:
    """Two layers with strong ties: the pair on which a mean-field KL of z1 loses .5103 nats a datum."""

    def model(x):
        with data(len(x)):
            z2 = pyro.sample("z2", dist.Normal(zeros(), 1.0))
            z1 = pyro.sample("z1", dist.Normal(slope("prior", 0.9) * z2, 0.5))
            pyro.sample("x", dist.Normal(1.2 * z1, 0.7), obs=x)

    def guide(x):
        with data(len(x)):
            z1 = pyro.sample("z1", dist.Normal(slope("encoder", 0.6) * x, spread("sd1", 0.45)))
            pyro.sample("z2", dist.Normal(slope("upper", 0.7) * z1, spread("sd2", 0.6)))

    x = 1.4 * torch.randn(5)
    return Pair(model, guide, (x,), log_evidence=normal(x, 0.0, (1.44 * (0.81 + 0.25) + 0.49) ** 0.5))


def nested(size: int, columns: int, whole: int | None = None) -> Pair:
    def model(x):
        with data(x.shape[-2], name="rows", dim=-2):
            a = pyro.sample("a", dist.Normal(zeros(), 1.0))
            with data(x.shape[-1], whole, "columns", -1):
                pyro.sample("x", dist.Normal(a, spread("noise", 2.0)), obs=x)

    def guide(x):
        with data(x.shape[-2], name="rows", dim=-2):
            pyro.sample("a", dist.Normal(slope("a_loc", 0.4) * x.mean(-1, keepdim=True), spread("a_sd", 0.8)))

    x = torch.randn(size, columns) + torch.randn(size, 1)
    evidence = None if whole else gaussian(x, 4 * torch.eye(columns) + 1.0)
    return Pair(model, guide, (x,), log_evidence=evidence, dims=(-2,), refused=("columns",) if whole else ())


@pair
def nested_plates() -> Pair:
    """a_m in the outer plate at dim -2, x_mj inside: a datum is a row."""
    return nested(4, 3)


@pair
def nested_subsampled() -> Pair:
    return nested(4, 3, 15)


@pair
def nested_all() -> Pair:
    """Every site in both plates: a datum is an entry of the matrix."""

    def model(x):
        with data(x.shape[-2], 6, "rows", -2), data(x.shape[-1], 8, "columns", -1):
            z = pyro.sample("z", dist.Normal(zeros(), 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(x):
        with data(x.shape[-2], 6, "rows", -2), data(x.shape[-1], 8, "columns", -1):
            pyro.sample("z", dist.Normal(slope("gain", 0.4) * x, spread("sd", 0.7)))

    x = torch.randn(3, 4)
    return Pair(model, guide, (x,), log_evidence=normal(x, 0.0, 1.64**0.5), dims=(-2, -1), scale=4.0)


@pair
def global_latent() -> Pair:
    def model(x):
        g = pyro.sample("g", dist.Normal(zeros(), 1.0))
        with data(len(x)):
            pyro.sample("x", dist.Normal(g, spread("noise", 1.0)), obs=x)

    def guide(x):
        pyro.sample("g", dist.Normal(slope("g_loc", 0.3), spread("g_sd", 0.5)))

    x = 0.4 + torch.randn(5)
    return Pair(model, guide, (x,), log_evidence=gaussian(x, torch.eye(5) + 1.0), dims=())


def globals_and_locals(whole: int | None) -> Pair:
    def model(x):
        g = pyro.sample("g", dist.Normal(zeros(), 1.0))
        with data(len(x), whole):
            z = pyro.sample("z", dist.Normal(slope("tie", 1.0) * g, 1.0))
            pyro.sample("x", dist.Normal(z, 0.6), obs=x)

    def guide(x):
        g = pyro.sample("g", dist.Normal(slope("g_loc", 0.3), spread("g_sd", 0.5)))
        with data(len(x), whole):
            pyro.sample("z", dist.Normal(slope("z_x", 0.6) * x + 0.2 * g, spread("z_sd", 0.7)))

    x = 0.4 + torch.randn(5)
    refused = ("data",) if whole else ()
    evidence = None if whole else gaussian(x, 1.36 * torch.eye(5) + 1.0)
    return Pair(model, guide, (x,), log_evidence=evidence, dims=(), refused=refused, shareable=True)


@pair
def global_and_local() -> Pair:
    return globals_and_locals(None)


@pair
def global_and_local_minibatch() -> Pair:
    return globals_and_locals(30)


@pair
def minibatch() -> Pair:
    def model(x):
        with data(len(x), 50):
            z = pyro.sample("z", dist.Normal(slope("prior", 0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with data(len(x), 50):
            pyro.sample("z", dist.Normal(slope("gain", 0.3) * x, spread("sd", 0.9)))

    x = torch.randn(5)
    return Pair(model, guide, (x,), log_evidence=normal(x, 0.0, 2**0.5), scale=10.0)


@pair
def masked() -> Pair:
    """Two sites observed a datum, each missing at places; one datum has neither."""
    given = torch.tensor([[True, True, False, False], [True, False, True, False]])

    def seen(x):
        return given[:, torch.arange(len(x)) % 4]

    def model(x, y):
        with data(len(x)):
            z = pyro.sample("z", dist.Normal(zeros(), 1.0))
            pyro.sample("x", dist.Normal(slope("on_x", 1.0) * z, 0.7).mask(seen(x)[0]), obs=x)
            with poutine.mask(mask=seen(x)[1]):
                pyro.sample("y", dist.Normal(z, 0.9), obs=y)

    def guide(x, y):
        with data(len(x)):
            shown = torch.where(seen(x)[0], x, zeros()) + torch.where(seen(x)[1], y, zeros())
            pyro.sample("z", dist.Normal(slope("gain", 0.4) * shown, spread("sd", 0.7)))

    x, y = torch.randn(4), torch.randn(4)
    both = gaussian(torch.stack([x, y], -1), torch.tensor([[1.49, 1.0], [1.0, 1.81]]))
    evidence = torch.stack([both[0], normal(x, 0.0, 1.49**0.5)[1], normal(y, 0.0, 1.81**0.5)[2], torch.zeros(())])
    return Pair(model, guide, (x, y), log_evidence=evidence, rows=(0, 0))


@pair
def ragged() -> Pair:
    """Sequences of lengths 3, 1, 2 in one tensor; what is past the end is masked in both programs."""
    lengths = torch.tensor([3, 1, 2])

    def unmasked(t, x):
        return t < lengths[torch.arange(x.shape[1]) % 3]

    def model(x):
        with data(x.shape[1], name="sequences"):
            z = torch.zeros(x.shape[1])
            for t in pyro.markov(range(3)):
                with poutine.mask(mask=unmasked(t, x)):
                    z = pyro.sample(f"z_{t}", dist.Normal(slope("decay", 0.8) * z, 1.0))
                    pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[t])

    def guide(x):
        with data(x.shape[1], name="sequences"):
            for t in range(3):
                with poutine.mask(mask=unmasked(t, x)):
                    pyro.sample(f"z_{t}", dist.Normal(slope("gain", 0.7) * x[t], spread("sd", 0.5)))

    x = torch.randn(3, 3)
    steps = torch.tensor([[1.0, 0.0, 0.0], [0.8, 1.0, 0.0], [0.64, 0.8, 1.0]])
    covariance = steps @ steps.T + 0.25 * torch.eye(3)
    evidence = torch.stack([gaussian(x[:n, i], covariance[:n, :n]) for i, n in enumerate(lengths.tolist())])
    return Pair(model, guide, (x,), log_evidence=evidence, rows=(1,))


@pair
def user_scale() -> Pair:
    """A likelihood to the power 1/2; p(x|z)^(1/2) is (4 pi)^(1/2) (2 pi)^(-1/4) N(x; z, 2)."""

    def model(x):
        with data(len(x), 20):
            z = pyro.sample("z", dist.Normal(slope("prior", 0.0), 1.0))
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with data(len(x), 20):
            pyro.sample("z", dist.Normal(slope("gain", 0.3) * x, spread("sd", 0.9)))

    x = torch.randn(4)
    evidence = normal(x, 0.0, 3**0.5) + 0.5 * math.log(4 * math.pi) - 0.25 * math.log(2 * math.pi)
    return Pair(model, guide, (x,), log_evidence=evidence, scale=5.0)


@pair
def several_plates() -> Pair:
    """One site observed in the data plate, another in it and a second one, a third drawn inside of both."""

    def model(x, y):
        with data(len(y)):
            z = pyro.sample("z", dist.Normal(zeros(), 1.0))
            pyro.sample("y", dist.Normal(slope("on_y", 1.0) * z, 1.0), obs=y)
            with data(len(x), name="features", dim=-2):
                u = pyro.sample("u", dist.Normal(z, 0.5))
                pyro.sample("x", dist.Normal(u, 0.5), obs=x)

    def guide(x, y):
        with data(len(y)):
            z = pyro.sample("z", dist.Normal(slope("gain", 0.3) * (y + x.sum(0)), spread("sd", 0.7)))
            with data(len(x), name="features", dim=-2):
                pyro.sample("u", dist.Normal(0.5 * (x + z), spread("u_sd", 0.45)))

    x, y = torch.randn(2, 4), torch.randn(4)
    covariance = torch.diag(torch.tensor([1.0, 0.5, 0.5])) + 1.0
    evidence = gaussian(torch.cat([y[None], x]).T, covariance)
    return Pair(model, guide, (x, y), log_evidence=evidence, rows=(1, 0))


@pair
def auxiliary() -> Pair:
    """The guide draws standard noise at a site of its own and passes it through a scaling."""

    def model(x):
        with data(len(x)):
            z = pyro.sample("z", dist.Normal(zeros(), 1.0))
            pyro.sample("x", dist.Normal(slope("on_x", 1.0) * z, 0.5), obs=x)

    def guide(x):
        with data(len(x)):
            noise = pyro.sample("noise", dist.Normal(zeros(), 1.0), infer={"is_auxiliary": True})
            sd = spread("sd", 0.6)
            pyro.sample("z", dist.Delta(slope("gain", 0.7) * x + sd * noise, log_density=-sd.log()))

    x = torch.randn(4)
    return Pair(model, guide, (x,), log_evidence=normal(x, 0.0, 1.25**0.5), moved="z")


# Discrete


def transition(*shape: int) -> Tensor:
    return torch.rand(*shape).add(0.2).softmax(-1)


@pair
def discrete_chain() -> Pair:
    top, middle, bottom = transition(2), transition(2, 3), transition(3, 4)
    model = TopDown(z2=Transition(2, probs=top), z1=Transition(3, 2, probs=middle), x=Transition(4, 3, probs=bottom))
    guide = BottomUp(z1=Transition(3, 4, probs=transition(4, 3)), z2=Transition(2, 3, probs=transition(3, 2)))
    x = torch.tensor([0, 1, 3, 2, 1])
    evidence = (top @ middle @ bottom).log()[x]
    return Pair(model, guide, (x,), log_evidence=evidence, discrete=("z1", "z2"))


@pair
def mixed() -> Pair:
    """A discrete layer above a continuous one, both drawn by the guide."""

    def model(x):
        with data(len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)))
            z = pyro.sample("z", dist.Normal(slope("reach", 2.0) * c - 1.0, 0.8))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with data(len(x)):
            c = pyro.sample("c", dist.Bernoulli(logits=slope("tilt", 0.8) * x))
            pyro.sample("z", dist.Normal(slope("gain", 0.7) * x + 0.2 * c, spread("sd", 0.5)))

    x = torch.randn(5)
    evidence = torch.logaddexp(math.log(0.7) + normal(x, -1.0, 0.89**0.5), math.log(0.3) + normal(x, 1.0, 0.89**0.5))
    return Pair(model, guide, (x,), log_evidence=evidence, discrete=("c",))


@pair
def enumerated() -> Pair:
    """The same, with the discrete layer summed out by Pyro; plainly: a mixture."""

    def model(x):
        with data(len(x), 25):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(slope("reach", 2.0) * c - 1.0, 0.8))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def plain(x):
        with data(len(x), 25):
            parts = dist.Normal(torch.tensor([-1.0, 1.0]), 0.8)
            mixture = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.7, 0.3])), parts)
            z = pyro.sample("z", mixture)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with data(len(x), 25):
            pyro.sample("z", dist.Normal(slope("gain", 0.7) * x, spread("sd", 0.6)))

    x = torch.randn(5)
    evidence = torch.logaddexp(math.log(0.7) + normal(x, -1.0, 0.89**0.5), math.log(0.3) + normal(x, 1.0, 0.89**0.5))
    return Pair(model, guide, (x,), log_evidence=evidence, scale=5.0, plain=(plain, guide))


def noised(corruption: str, num_layers: int) -> Pair:
    """A discrete diffusion of two entries with a denoiser that is wrong."""
    denoiser = Linear(2, 3)
    model, guide = discrete_diffusion(
        denoiser, event_shape=2, num_categories=3, num_layers=num_layers, corruption=corruption
    )
    x = torch.tensor([[0, 1], [2, 2], [1, 0], [0, 0]])
    latents = tuple(f"z{i}" for i in range(1, num_layers + 1))
    return Pair(model, guide, (x,), log_evidence=model_evidence(model, x), discrete=latents)


@pair
def absorbing() -> Pair:
    return noised("absorbing", 3)


@pair
def any_order() -> Pair:
    return noised("any_order", 2)


@pair
def uniform_noise() -> Pair:
    return noised("uniform", 2)


@pair
def ordinal_noise() -> Pair:
    return noised("ordinal", 2)


# Chains in chains


class Affine(nn.Module):
    """A denoiser that is affine in z, so that its chain is Gaussian."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, z: Tensor, gamma: Tensor) -> Tensor:
        return self.layer(torch.cat([z, gamma.unsqueeze(-1) / 10], -1))


def affine(kernel: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, offset and variance of an affine Gaussian kernel over one number."""
    at_0, at_1 = kernel(torch.zeros(1, 1)), kernel(torch.ones(1, 1))
    return at_1.mean - at_0.mean, at_0.mean, at_0.variance


@pair
def latent_noise() -> Pair:
    """A diffusion of three layers as the prior of a VAE's latent; the evidence by the moments down the chain."""
    encoder, decoder = Gaussian(nn.Linear(1, 2)), Gaussian(nn.Linear(1, 2))
    decoder.net.weight.data[1] = 0.0  # of the scale
    model, guide = latent_diffusion(
        Affine(), encoder=encoder, decoder=decoder, latent_shape=1, num_layers=3, schedule=LinearSchedule(-1.0, 2.0)
    )
    x, mean, variance = torch.randn(4, 1), torch.zeros(1, 1), torch.ones(1, 1)
    with torch.no_grad():
        for _, kernel, _ in list(model.steps())[1:]:
            slope, offset, noise = affine(kernel)
            mean, variance = slope * mean + offset, slope**2 * variance + noise
    evidence = normal(x, mean, variance.sqrt()).squeeze(-1)
    return Pair(model, guide, (x,), log_evidence=evidence)


class Coupled(nn.Module):
    """A denoiser of two entries that is affine in z, with a gamma for each entry."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, z: Tensor, gamma: Tensor) -> Tensor:
        return self.layer(torch.cat([z, gamma / 10], -1))


@pair
def entrywise_noise() -> Pair:
    """A diffusion of two layers with a learned gamma for each of two entries; the evidence by moments."""
    schedule = PolynomialSchedule((2,), -1.0, 1.0)
    with torch.no_grad():
        schedule.start += torch.tensor([[0.5, -0.5], [0.3, 0.0], [0.0, 0.4]])
        schedule.ends += torch.tensor([[0.2, -0.2], [0.0, 0.3]])
    model, guide = vdm(Coupled(), event_shape=2, num_layers=2, schedule=schedule)
    x, mean, covariance = torch.randn(4, 2), torch.zeros(2), torch.eye(2)
    with torch.no_grad():
        for _, kernel, _ in list(model.steps())[1:]:
            at_0, at_basis = kernel(torch.zeros(1, 2)), kernel(torch.eye(2))
            slope = (at_basis.mean - at_0.mean).T
            mean = slope @ mean + at_0.mean[0]
            covariance = slope @ covariance @ slope.T + torch.diag(at_0.variance.expand(1, 2)[0])
    return Pair(model, guide, (x,), log_evidence=gaussian(x - mean, covariance))


# AutoGuides


@pair
def auto_normal() -> Pair:
    def model(x):
        g = pyro.sample("g", dist.Normal(zeros(), 1.0))
        h = pyro.sample("h", dist.Normal(g, 0.5))
        with data(len(x)):
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    x = torch.randn(4)
    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"g": zeros(), "h": zeros()}), init_scale=0.5)
    return Pair(model, guide, (x,), log_evidence=gaussian(x, torch.eye(4) + 1.25), dims=())


@pair
def auto_multivariate() -> Pair:
    covariate = torch.tensor([-1.0, 0.0, 1.0, 2.0])

    def model(x):
        a = pyro.sample("a", dist.Normal(zeros(), 1.0))
        b = pyro.sample("b", dist.Normal(zeros(), 1.0))
        with data(len(x)):
            pyro.sample("x", dist.Normal(a + b * covariate[torch.arange(len(x)) % 4], 1.0), obs=x)

    x = torch.randn(4)
    guide = AutoMultivariateNormal(
        model, init_loc_fn=init_to_value(values={"a": zeros(), "b": zeros()}), init_scale=0.4
    )
    evidence = gaussian(x, torch.eye(4) + 1.0 + torch.outer(covariate, covariate))
    return Pair(model, guide, (x,), log_evidence=evidence, dims=())


@pair
def eight_schools() -> Pair:
    """Non-centred; the evidence by one-dimensional quadrature over tau."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(zeros(), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
        with data(8, name="schools"):
            eta = pyro.sample("eta", dist.Normal(zeros(), 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    start = {"mu": torch.tensor(4.4), "tau": torch.tensor(2.2), "eta": torch.zeros(8)}
    guide = AutoNormal(model, init_loc_fn=init_to_value(values=start), init_scale=0.9)
    return Pair(model, guide, (y,), log_evidence=torch.tensor(-31.3114), dims=(), shareable=True, rows=None)
