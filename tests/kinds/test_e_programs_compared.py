"""Kind E: the model and the guide are compared as closely as they can be, before a number is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor

import pyro_hvae as ph
from tests.kinds.checks import close, refused, right_or_refused


def program(**sites: Any) -> Callable[[], None]:
    """A program that draws one site of each distribution, without plates."""

    def run() -> None:
        for name, distribution in sites.items():
            pyro.sample(name, distribution)

    return run


def standard() -> dist.Normal:
    return dist.Normal(torch.zeros(()), 1.0)


def evidence(*pair: Any) -> Tensor:
    return ph.log_evidence(*pair, num_samples=4000).value


# Supports. Where q does not cover the prior, no weight can bring back what it leaves out.

HALVES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "half_normal": lambda: (standard(), dist.HalfNormal(torch.tensor(1.0))),
    "log_normal": lambda: (dist.StudentT(torch.tensor(5.0), 0.0, 1.0), dist.LogNormal(torch.zeros(()), 1.0)),
    "narrow_uniform": lambda: (dist.Uniform(torch.tensor(-2.0), 2.0), dist.Uniform(torch.tensor(0.0), 1.0)),
    "beta": lambda: (dist.Gamma(torch.tensor(2.0), 1.0), dist.Beta(torch.tensor(2.0), 2.0)),
    "normal_for_beta": lambda: (dist.Beta(torch.tensor(2.0), 2.0), dist.Normal(torch.tensor(0.5), 0.3)),
    "pareto": lambda: (dist.Exponential(torch.tensor(1.0)), dist.Pareto(torch.tensor(0.5), 2.0)),
}


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("flipped", [False, True], ids=["as_is", "flipped"])
def test_supports_of_continuous_sites(name: str, flipped: bool) -> None:
    pair = [program(z=distribution) for distribution in HALVES[name]()[:: -1 if flipped else 1]]
    right_or_refused(lambda: evidence(*pair), 0.0, 0.1, "z")


def test_supports_of_simplices_and_vectors() -> None:
    real = program(z=dist.Normal(torch.full((3,), 1 / 3), 0.2).to_event(1))
    refused(lambda: evidence(real, program(z=dist.Dirichlet(torch.ones(3)))), "support", "z")


@pytest.mark.parametrize(
    "guide",
    [
        lambda: dist.Binomial(2, torch.tensor(0.5)),
        lambda: dist.Categorical(torch.tensor([0.5, 0.5])),
        lambda: dist.Bernoulli(torch.tensor(0.5)),
    ],
    ids=["binomial", "categorical", "bernoulli"],
)
def test_supports_of_counts(guide: Callable[[], Any]) -> None:
    counts = program(z=dist.Poisson(torch.tensor(3.0)))
    right_or_refused(lambda: evidence(counts, program(z=guide())), 0.0, 0.1, "z")


@pytest.mark.parametrize("bound", [ph.TraceELBO(50), ph.IWELBO(50), ph.LayerwiseELBO(50)], ids=str)
def test_supports_in_a_plate(bound: Any) -> None:
    x = torch.tensor([0.2, 1.0])

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 2):
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", 2):
            pyro.sample("z", dist.Gamma(torch.ones(2), 1.0))

    if isinstance(bound, ph.IWELBO):
        refused(lambda: bound.per_datum(model, guide, x), "support", "z")
    else:  # a lower bound all the same
        assert (bound.per_datum(model, guide, x) < dist.Normal(0.0, 2**0.5).log_prob(x)).all()


def test_equal_supports_of_other_families() -> None:
    beta, uniform = dist.Beta(torch.tensor(2.0), 2.0), dist.Uniform(torch.tensor(0.0), 1.0)
    close(evidence(program(z=beta), program(z=uniform)), 0.0, 0.05)
    gamma, exponential = dist.Gamma(torch.tensor(2.0), 1.0), dist.Exponential(torch.tensor(0.7))
    close(evidence(program(z=gamma), program(z=exponential)), 0.0, 0.1)


# Event shapes


def normal(*shape: int) -> Any:
    return dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))


SHAPES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "one_and_two": lambda: (normal(2), normal(1)),
    "two_and_one": lambda: (normal(1), normal(2)),
    "transposed": lambda: (normal(1, 3), normal(3, 1)),
    "row_and_vector": lambda: (normal(1, 3), normal(3)),
    "scalar_and_vector": lambda: (standard(), normal(1)),
    "full": lambda: (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), normal(1, 2)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_event_shapes_with_one_particle(name: str) -> None:
    model, guide = (program(z=distribution) for distribution in SHAPES[name]())
    refused(lambda: ph.TraceELBO().per_datum(model, guide), "shape", "z")


@pytest.mark.parametrize("name", ["one_and_two", "two_and_one", "transposed", "row_and_vector"])
@pytest.mark.parametrize("particles", [2, 3])
def test_event_shapes_with_as_many_particles_as_elements(name: str, particles: int) -> None:
    model, guide = (program(z=distribution) for distribution in SHAPES[name]())
    refused(lambda: ph.IWELBO(particles).per_datum(model, guide), "shape", "z")
    refused(lambda: evidence(model, guide), "shape", "z")


def test_an_event_for_a_plate() -> None:
    def model() -> None:
        with pyro.plate("rows", 3):
            pyro.sample("z", standard())

    refused(lambda: evidence(model, program(z=normal(3))), "shape|plate|event", "z", "rows")


def test_two_ways_to_write_one_event() -> None:
    model = program(z=dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    close(evidence(model, program(z=dist.Normal(torch.zeros(2), 1.0).to_event(1))), 0.0)


# Swapped programs


def gamma_model(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def gamma_guide(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("rate", dist.Gamma(2.0 + x, 2.0))


SWAPPED = {
    "evidence": lambda *pair: ph.log_evidence(*pair, num_samples=20),
    "trace": lambda *pair: ph.TraceELBO().loss(*pair),
    "layerwise": lambda *pair: ph.LayerwiseELBO().terms(*pair),
    "iwelbo": lambda *pair: ph.IWELBO(4).per_datum(*pair),
    "khats": lambda *pair: ph.diagnostics.khats(*pair, num_draws=40),
    "tree": lambda *pair: ph.to_datatree(*pair, num_draws=4),
    "sandwich": lambda *pair: ph.evidence_sandwich(*pair, num_chains=2, betas=3),
    "diagnose": lambda *pair: ph.diagnose(*pair, num_draws=100),
    "explain": lambda *pair: ph.explain(ph.TraceELBO(), *pair),
    "wake": lambda *pair: ph.WakePhase(3).loss(*pair),
}


@pytest.mark.parametrize("verb", SWAPPED)
@pytest.mark.parametrize("count", [1, 3])
def test_swapped_programs(verb: str, count: int) -> None:
    x = torch.tensor([0.0, 2.0, 5.0])[:count]
    SWAPPED[verb](gamma_model, gamma_guide, x)
    refused(lambda: SWAPPED[verb](gamma_guide, gamma_model, x), "swapped|observe", "x", "guide", "model")


@pytest.mark.parametrize("verb", ["evidence", "trace", "iwelbo", "khats", "explain"])
def test_one_program_in_both_places(verb: str) -> None:
    refused(lambda: SWAPPED[verb](gamma_model, gamma_model, torch.tensor([0.0, 2.0])), "observe", "x", "guide")


def test_fit_of_swapped_programs() -> None:
    torch.manual_seed(0)
    model, guide = ph.hvae(6, (3, 2), hidden=(4,), likelihood="gaussian")
    x = torch.randn(8, 6)
    for pair in ((guide, model), (model, model)):
        fit = partial(ph.fit, *pair, x, bound=ph.TraceELBO(), steps=2, progress=False)
        refused(fit, "swapped|observe", "x", "guide")


# Masks in one program


@pytest.mark.parametrize("where", ["model", "guide"])
@pytest.mark.parametrize("how", ["poutine", "distribution"])
def test_a_mask_over_a_latent_in_one_program(where: str, how: str) -> None:
    x, keep = torch.tensor([0.5, 1.5, -1.0]), torch.tensor([True, False, True])

    def masked(distribution: Any, use: bool) -> Any:
        return distribution.mask(keep) if use and how == "distribution" else distribution

    def model(x: Tensor) -> None:
        use = where == "model"
        with pyro.plate("rows", 3), poutine.mask(mask=keep if use and how == "poutine" else torch.ones(3) > 0):
            z = pyro.sample("z", masked(standard().expand([3]), use))
            pyro.sample("x", masked(dist.Normal(z, 1.0), use), obs=x)

    def guide(x: Tensor) -> None:
        use = where == "guide"
        with pyro.plate("rows", 3), poutine.mask(mask=keep if use and how == "poutine" else torch.ones(3) > 0):
            pyro.sample("z", masked(dist.Normal(x / 2, 0.5**0.5), use))

    complete = dist.Normal(0.0, 2**0.5).log_prob(x)
    truth = torch.where(keep, complete, 0.0) if where == "model" else complete
    right_or_refused(lambda: evidence(model, guide, x), truth, 1e-6, "z")


def test_a_masked_likelihood_is_right() -> None:
    x, keep = torch.tensor([0.5, 1.5, -1.0]), torch.tensor([True, False, True])

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 3):
            z = pyro.sample("z", standard())
            with poutine.mask(mask=keep):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(torch.where(keep, x / 2, 0.0), torch.where(keep, 0.5**0.5, 1.0)))

    close(evidence(model, guide, x), torch.where(keep, dist.Normal(0.0, 2**0.5).log_prob(x), 0.0), 1e-6)


@pytest.mark.parametrize("verb", ["trace", "evidence", "iwelbo"])
def test_a_partly_observed_site(verb: str) -> None:
    y, keep = torch.tensor([0.5, 9.0, -1.0]), torch.tensor([True, False, True])
    observed = y[keep]

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", standard())
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=keep)

    def guide(y: Tensor) -> None:  # the exact posterior of mu, and predictions of what is missing given mu
        mu = pyro.sample("mu", dist.Normal(observed.sum() / 3, 3**-0.5))
        with pyro.plate("rows", 3):
            pyro.sample("y_unobserved", dist.Normal(mu, 1.0))

    verbs = {
        "trace": lambda: ph.TraceELBO(4).per_datum(model, guide, y),
        "iwelbo": lambda: ph.IWELBO(4).per_datum(model, guide, y),
        "evidence": lambda: evidence(model, guide, y),
    }
    truth = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1).log_prob(observed)
    right_or_refused(verbs[verb], truth, 1e-6, "y", "y_unobserved")


# Deterministic sites


@pytest.mark.parametrize("where", ["model_after", "model_before", "guide_after", "guide_before"])
@pytest.mark.parametrize("verb", ["evidence", "iwelbo", "bayes", "khats", "sandwich"])
def test_a_deterministic_site_outside_of_the_plate(where: str, verb: str) -> None:
    x = torch.tensor([0.0, 2.0, 5.0, 1.0])

    def model(x: Tensor) -> None:
        if where == "model_before":
            pyro.deterministic("constant", torch.tensor(2.0))
        gamma_model(x)
        if where == "model_after":
            pyro.deterministic("constant", torch.tensor(2.0))

    def guide(x: Tensor) -> None:
        if where == "guide_before":
            pyro.deterministic("constant", torch.tensor(2.0))
        gamma_guide(x)
        if where == "guide_after":
            pyro.deterministic("constant", torch.tensor(2.0))

    truth = torch.lgamma(2 + x) - torch.lgamma(x + 1) - (2 + x) * math.log(2.0)
    if verb == "khats":
        found = ph.diagnostics.khats(model, guide, x, num_draws=40).per_datum
        assert found is not None
        assert found.shape == (4,)
        assert bool((found == -math.inf).all())
        return
    values = {
        "evidence": lambda: ph.log_evidence(model, guide, x, num_samples=20).value,
        "bayes": lambda: ph.log_evidence(model, guide, x, num_samples=20, method="bayes").value,
        "iwelbo": lambda: ph.IWELBO(4).per_datum(model, guide, x),
        "sandwich": lambda: ph.evidence_sandwich(model, guide, x, num_chains=2, betas=3).lower,
    }
    close(values[verb](), truth, 1e-6)


def test_a_deterministic_site_of_a_minibatch() -> None:
    x = torch.tensor([0.0, 2.0])

    def model(x: Tensor) -> None:
        pyro.deterministic("size", torch.tensor(20.0))
        with pyro.plate("rows", 20, subsample=torch.arange(2)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", 20, subsample=torch.arange(2)):
            pyro.sample("rate", dist.Gamma(2.0 + x, 2.0))

    truth = torch.lgamma(2 + x) - torch.lgamma(x + 1) - (2 + x) * math.log(2.0)
    close(ph.IWELBO(5).loss(model, guide, x), -10 * truth.sum(), 1e-6)
    close(ph.IWELBO(5).per_datum(model, guide, x), truth, 1e-6)
