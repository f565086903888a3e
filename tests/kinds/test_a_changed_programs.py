"""Kind A: what is known of a pair follows the programs, although their arguments keep their shapes."""

from __future__ import annotations

import gc
import math
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from scipy import integrate, stats
from torch import Tensor, nn

import pyro_hvae as ph
from tests.kinds.checks import close, on_second_call, refused, right_or_refused

DATA = [0.5, -1.0, 2.0, 0.1]


def standard() -> dist.Normal:
    return dist.Normal(torch.zeros(()), 1.0)


def marginal(x: Tensor) -> Tensor:
    """Log-density of x where z ~ N(0, 1) and x ~ N(z, 1)."""
    return dist.Normal(0.0, 2**0.5).log_prob(x)


def log_weights(model: Any, guide: Any, x: Tensor) -> Tensor:
    tree = ph.to_datatree(model, guide, x, num_draws=3, groups=["sample_stats"])
    return torch.as_tensor(tree["sample_stats"]["log_weight"].values[0, 0])


@pytest.mark.parametrize(
    "verb",
    [
        lambda *pair: ph.log_evidence(*pair, num_samples=20).value,
        lambda *pair: ph.log_evidence(*pair, num_samples=20, method="bayes").value,
        lambda *pair: ph.evidence_sandwich(*pair, num_chains=2, betas=3).upper,
        ph.TraceELBO().per_datum,
        ph.VRBound(0.5, 3).per_datum,
        ph.ThermodynamicBound(3, [0.0, 0.5, 1.0]).per_datum,
        log_weights,
    ],
    ids=["importance", "bayes", "sandwich", "trace", "renyi", "thermodynamic", "to_datatree"],
)
def test_values_per_datum_after_a_change_of_the_plate_size(verb: Any) -> None:
    setting = SimpleNamespace(size=6)
    counts = torch.tensor([0.0, 3.0, 1.0])

    def model(x: Tensor) -> None:
        with pyro.plate("rows", setting.size, subsample=torch.arange(3)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.5))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def posterior(x: Tensor) -> None:
        with pyro.plate("rows", setting.size, subsample=torch.arange(3)):
            pyro.sample("rate", dist.Gamma(2.0 + x, 2.5))

    truth = torch.as_tensor(stats.nbinom(2, 1.5 / 2.5).logpmf(counts.numpy()))
    value = on_second_call(lambda: verb(model, posterior, counts), lambda: setattr(setting, "size", 300))
    close(value, truth, 1e-6)
    close(ph.TraceELBO().loss(model, posterior, counts), -100.0 * truth.sum(), 1e-6)


def test_a_plate_of_one_becomes_a_plate_of_three() -> None:
    setting = SimpleNamespace(size=1)
    x = torch.tensor([0.7])

    def model(x: Tensor) -> None:
        with pyro.plate("copies", setting.size):
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(setting.size))

    def posterior(x: Tensor) -> None:
        with pyro.plate("copies", setting.size):
            pyro.sample("z", dist.Normal(x.expand(setting.size) / 2, 0.5**0.5))

    value = on_second_call(
        lambda: ph.log_evidence(model, posterior, x, num_samples=20).value, lambda: setattr(setting, "size", 3)
    )
    close(value, marginal(x).expand(3))


def test_a_plate_becomes_an_event() -> None:
    setting = SimpleNamespace(rows=True)
    x = torch.tensor(DATA)

    def rows(loc: Tensor, scale: float) -> Any:
        found = dist.Normal(loc + torch.zeros(4), scale)
        return found if setting.rows else found.to_event(1)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 4) if setting.rows else nullcontext():
            z = pyro.sample("z", rows(torch.zeros(()), 1.0))
            pyro.sample("x", rows(z, 1.0), obs=x)

    def posterior(x: Tensor) -> None:
        with pyro.plate("rows", 4) if setting.rows else nullcontext():
            pyro.sample("z", rows(x / 2, 0.5**0.5))

    value = on_second_call(lambda: ph.IWELBO(4).per_datum(model, posterior, x), lambda: setattr(setting, "rows", False))
    close(value, marginal(x).sum())


def test_a_latent_leaves_the_plate() -> None:
    setting = SimpleNamespace(shared=False)
    x = torch.tensor([0.5, -1.0])

    def model(x: Tensor) -> None:
        if setting.shared:
            z = pyro.sample("z", standard())
        with pyro.plate("rows", 2):
            if not setting.shared:
                z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def posterior(x: Tensor) -> None:
        if setting.shared:
            pyro.sample("z", dist.Normal(x.sum() / 3, 3**-0.5))
        else:
            with pyro.plate("rows", 2):
                pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    value = on_second_call(
        lambda: ph.IWELBO(2).per_datum(model, posterior, x), lambda: setattr(setting, "shared", True)
    )
    close(value, dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1.0).log_prob(x))


def test_draws_that_are_no_longer_reparameterised_are_refused() -> None:
    family = SimpleNamespace(use=dist.Normal)
    loc = nn.Parameter(torch.tensor(0.2))
    x = torch.tensor(DATA)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = loc

        def forward(self, x: Tensor) -> None:
            with pyro.plate("rows", 4):
                pyro.sample("z", family.use(self.loc.expand(4), torch.ones(4)))

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 4):
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = Guide()
    ph.TraceELBO().differentiable_loss(model, guide, x)
    family.use = NonreparameterizedNormal
    refused(lambda: ph.TraceELBO().differentiable_loss(model, guide, x), "reparameteri", "z")


def test_a_connection_is_switched_on() -> None:
    setting = SimpleNamespace(linked=False)
    x = torch.tensor(1.0)

    def model(x: Tensor) -> None:
        top = pyro.sample("top", standard())
        low = pyro.sample("low", dist.Normal(top if setting.linked else torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(low, 1.0), obs=x)

    def posterior(x: Tensor) -> None:  # of the linked model
        low = pyro.sample("low", dist.Normal(2 * x / 3, (2 / 3) ** 0.5))
        pyro.sample("top", dist.Normal(low / 2, 0.5**0.5))

    bound = ph.LayerwiseELBO(20_000)
    terms = on_second_call(
        lambda: bound.terms(model, posterior, x),  # type: ignore[arg-type, return-value]
        lambda: setattr(setting, "linked", True),
    )
    assert "kl_low" not in terms
    close(bound.per_datum(model, posterior, x), stats.norm(0, 3**0.5).logpdf(1.0), 0.05)


def test_particles_are_mixed_by_a_switch() -> None:
    setting = SimpleNamespace(all=False)
    covariance = torch.linalg.inv(torch.eye(3) + torch.ones(3, 3))

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum() if setting.all else z.sum(-1), 1.0), obs=x)

    def posterior(x: Tensor) -> None:
        pyro.sample("z", dist.MultivariateNormal(covariance @ (x * torch.ones(3)), covariance))

    x = torch.tensor(1.3)
    ph.TraceELBO(3).per_datum(model, posterior, x)
    setting.all = True
    truth = dist.Normal(0.0, 2.0).log_prob(x)
    right_or_refused(lambda: ph.TraceELBO(3).per_datum(model, posterior, x), truth, 1e-8, "x", "z")


@pytest.mark.parametrize("lengths", [(4, 2), (2, 4), (1, 3), (3, 1)])
def test_numpy_arguments_of_another_length(lengths: tuple[int, int]) -> None:
    def model(x: Any) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.as_tensor(x))

    def posterior(x: Any) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.as_tensor(x) / 2, 0.5**0.5))

    for length in lengths:
        x = np.linspace(-1.0, 2.0, length)
        close(ph.IWELBO(3).per_datum(model, posterior, x), stats.norm(0, 2**0.5).logpdf(x))


def test_a_prior_of_another_family() -> None:
    setting = SimpleNamespace(prior=standard())
    x = torch.tensor([0.4])

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 1):
            z = pyro.sample("z", setting.prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", 1):
            pyro.sample("z", dist.Normal(x / 3, 0.8))

    def integrand(z: float) -> float:
        q = stats.norm(0.4 / 3, 0.8)
        return q.pdf(z) * (stats.cauchy.logpdf(z) + stats.norm.logpdf(0.4, z) - q.logpdf(z))

    bound = ph.LayerwiseELBO(50_000)
    value = on_second_call(
        lambda: bound.per_datum(model, guide, x),
        lambda: setattr(setting, "prior", dist.Cauchy(torch.zeros(()), 1.0)),
    )
    close(value, [integrate.quad(integrand, -8, 8)[0]], 0.03)


def test_a_mask_is_switched_on() -> None:
    setting = SimpleNamespace(keep=None)
    x = torch.tensor([0.5, -1.0, 2.0])

    def masked() -> Any:
        return nullcontext() if setting.keep is None else poutine.mask(mask=setting.keep)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 3), masked():
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", 3), masked():
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    keep = torch.tensor([True, False, True])
    value = on_second_call(
        lambda: ph.log_evidence(model, guide, x, num_samples=30).value, lambda: setattr(setting, "keep", keep)
    )
    close(value, torch.where(keep, marginal(x), 0.0))


def test_a_mask_appears_in_the_model_alone() -> None:
    setting = SimpleNamespace(keep=None)
    x = torch.tensor([0.5, -1.0, 2.0])

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 3), nullcontext() if setting.keep is None else poutine.mask(mask=setting.keep):
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    ph.log_evidence(model, guide, x, num_samples=30)
    setting.keep = torch.tensor([True, False, True])
    truth = torch.where(setting.keep, marginal(x), 0.0)
    right_or_refused(lambda: ph.log_evidence(model, guide, x, num_samples=30).value, truth, 1e-8, "z")


def test_a_subsampled_inner_plate_is_refused_when_it_appears() -> None:
    setting = SimpleNamespace(size=4)
    x = torch.tensor(DATA)

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", standard())
        with pyro.plate("rows", setting.size, subsample=torch.arange(4)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("loc", dist.Normal(x.sum() / 5, 5**-0.5))

    ph.IWELBO(5).per_datum(model, guide, x)
    setting.size = 400
    refused(lambda: ph.IWELBO(5).per_datum(model, guide, x), "subsampl", "rows")


def test_a_site_is_marked_for_summation() -> None:
    setting = SimpleNamespace(infer={})
    x = torch.tensor([0.5, 3.0])

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 2):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)), infer=dict(setting.infer))
            pyro.sample("x", dist.Normal(3.0 * k, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", 2):
            if not setting.infer:
                pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))

    bound = ph.TraceELBO(gradient="score")
    value = on_second_call(
        lambda: bound.per_datum(model, guide, x), lambda: setattr(setting, "infer", {"enumerate": "parallel"})
    )
    parts = [math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(x), math.log(0.3) + dist.Normal(3.0, 1.0).log_prob(x)]
    close(value, torch.logsumexp(torch.stack(parts), 0))


def poisson_model(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
        pyro.sample("count", dist.Poisson(rate), obs=x)


def poisson_guide(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("rate", dist.Gamma(2.0 + x.abs(), 2.0))


@pytest.mark.parametrize(
    "verb",
    [
        lambda x: ph.log_evidence(poisson_model, poisson_guide, x, num_samples=50),
        lambda x: ph.TraceELBO().per_datum(poisson_model, poisson_guide, x),
        lambda x: ph.LayerwiseELBO().terms(poisson_model, poisson_guide, x),
        lambda x: ph.IWELBO(4).per_datum(poisson_model, poisson_guide, x),
        lambda x: ph.diagnostics.khats(poisson_model, poisson_guide, x, num_draws=50),
        lambda x: ph.to_datatree(poisson_model, poisson_guide, x, num_draws=5),
        lambda x: ph.evidence_sandwich(poisson_model, poisson_guide, x, num_chains=2, betas=3),
    ],
    ids=["log_evidence", "trace", "terms", "iwelbo", "khats", "to_datatree", "sandwich"],
)
@pytest.mark.parametrize("bad", [[-1.0, 2.0], [0.5, 2.0]], ids=["negative", "fraction"])
def test_observations_are_checked_at_each_evaluation(verb: Any, bad: list[float]) -> None:
    verb(torch.tensor([1.0, 2.0]))
    refused(lambda: verb(torch.tensor(bad)), "support", "count")


def test_arguments_are_released() -> None:
    class Table:
        def __init__(self) -> None:
            self.values = torch.tensor(DATA)

    def model(table: Table, weight: float) -> None:
        with pyro.plate("rows", 4):
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=table.values)

    def guide(table: Table, weight: float) -> None:
        with pyro.plate("rows", 4):
            pyro.sample("z", standard())

    alive = []
    for step in range(20):
        table = Table()
        alive.append(weakref.ref(table))
        ph.TraceELBO().loss(model, guide, table, 0.01 * step)
    del table
    gc.collect()
    assert sum(reference() is not None for reference in alive) == 0
