"""Kind B: all passes of one evaluation see one minibatch and one noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor, nn

import pyro_hvae as ph
from pyro_hvae.nn import Flattened
from tests.kinds.checks import check_message, close, right_or_refused

SIZE = 40


def data() -> Tensor:
    return torch.linspace(-6.0, 5.0, SIZE)


def evidence(x: Tensor) -> Tensor:
    return dist.Normal(0.0, 2**0.5).log_prob(x)


def drawn(batch: int) -> tuple[Callable, Callable]:
    """Programs that draw their own minibatch, and the exact posterior: each log-weight is log p(x_i) of its datum."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x), subsample_size=batch) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def posterior(x: Tensor) -> None:
        with pyro.plate("rows", len(x), subsample_size=batch) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))

    return model, posterior


def of_distinct_data(value: Any, truth: Tensor, tolerance: float = 1e-8) -> None:
    """Assert that ``value`` (B,) holds the entries of ``truth`` (N,) that belong to B distinct data."""
    value = torch.as_tensor(value).detach().double()
    distance, index = (value[:, None] - truth).abs().min(1)
    assert distance.max() < tolerance, distance
    assert len(set(index.tolist())) == len(index), "a datum occurs twice in one minibatch"


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "verb",
    [
        lambda *pair: ph.log_evidence(*pair, num_samples=60, chunk_size=7).value,
        lambda *pair: ph.log_evidence(*pair, num_samples=60, chunk_size=7, method="bayes").value,
        ph.IWELBO(30, chunk_size=4).per_datum,
        ph.IWELBO(2, num_repeats=9, chunk_size=2).per_datum,
        ph.VRBound(0.5, 600).per_datum,
        ph.EUBO(600).per_datum,
    ],
    ids=["importance", "bayes", "iwelbo", "repeats", "renyi", "eubo"],
)
def test_chunks_weigh_the_same_data(verb: Any, batch: int) -> None:
    x = data()
    of_distinct_data(verb(*drawn(batch), x), evidence(x), 1e-6)


@pytest.mark.parametrize("batch", [1, 4])
def test_both_sides_of_a_bracket_weigh_the_same_data(batch: int) -> None:
    bracket = ph.evidence_sandwich(*drawn(batch), data(), num_chains=4, betas=4)
    close(bracket.upper, bracket.lower, 1e-6)
    of_distinct_data(bracket.lower, evidence(data()), 1e-6)


def test_k_hats_of_an_exact_guide() -> None:
    found = ph.diagnostics.khats(*drawn(4), data(), num_draws=60, chunk_size=9)
    assert found.per_datum is not None
    for khat in (found.joint, found.per_datum, found.per_layer["z"]):
        assert bool((khat == -math.inf).all()), khat


def test_loss_is_one_minibatch() -> None:
    x = data()
    loss = ph.IWELBO(40, chunk_size=5).loss(*drawn(1), x)
    of_distinct_data(-loss[None] / SIZE, evidence(x))


def counts() -> tuple[Callable, Callable, Tensor, Tensor]:
    """Gamma-Poisson rows with two columns, of which each evaluation draws one row and both columns; exact posterior."""
    x = torch.arange(24.0).reshape(12, 2) % 7 + torch.arange(12.0)[:, None]

    def model(x: Tensor) -> None:
        with pyro.plate("row", 12, subsample_size=3, dim=-1) as rows:
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 0.5))
            with pyro.plate("column", 2, dim=-2):
                pyro.sample("x", dist.Poisson(rate), obs=x[rows].T)

    def posterior(x: Tensor) -> None:
        with pyro.plate("row", 12, subsample_size=3, dim=-1) as rows:
            pyro.sample("rate", dist.Gamma(2.0 + x[rows].sum(1), 2.5))

    total = x.sum(1)
    truth = (
        2 * math.log(0.5)
        - (2 + total) * math.log(2.5)
        + torch.lgamma(2 + total)
        - torch.lgamma(x + 1).sum(1)
        - torch.lgamma(torch.tensor(2.0))
    )
    return model, posterior, x, truth


@pytest.mark.parametrize("draws", [10, 12, 50])
def test_rows_of_counts(draws: int) -> None:
    model, posterior, x, truth = counts()
    of_distinct_data(ph.log_evidence(model, posterior, x, num_samples=draws, chunk_size=2).value, truth)


def test_a_summed_out_latent_in_a_drawn_minibatch() -> None:
    x = data()

    def model(x: Tensor) -> None:
        with pyro.plate("rows", SIZE, subsample_size=5) as rows:
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=x[rows])
            pyro.sample("x", dist.Normal(3.0 * k, 1.0), obs=x[rows])

    def posterior(x: Tensor) -> None:
        with pyro.plate("rows", SIZE, subsample_size=5) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))

    parts = [math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(x), math.log(0.3) + dist.Normal(3.0, 1.0).log_prob(x)]
    truth = evidence(x) + torch.logsumexp(torch.stack(parts), 0)
    of_distinct_data(ph.log_evidence(model, posterior, x, num_samples=50, chunk_size=3).value, truth)


def test_terms_add_up_to_one_minibatch() -> None:
    x = data()
    terms = ph.LayerwiseELBO(3).terms(*drawn(4), x)
    loc, variance = x / 2, 0.5
    divergence = 0.5 * (loc**2 + variance - 1 - math.log(variance))
    of_distinct_data(terms["kl_z"], divergence)


class NoisyGuide(nn.Module):
    """q(z | noise) = N(loc * noise, 1), with dropout's mask over ones as the noise; the masks are recorded."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(1.0))
        self.drop = nn.Dropout(0.5)
        self.size = size
        self.masks: list[Tensor] = []

    def forward(self) -> None:
        noise = self.drop(torch.linspace(1.0, 2.0, self.size))
        self.masks.append(noise)
        pyro.sample("z", dist.Normal(self.loc * noise, 1.0).to_event(1))


def noise_model(size: int = 32) -> None:
    pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))


def test_sticking_the_landing_under_dropout() -> None:
    guide = NoisyGuide()

    def gradient() -> Tensor:
        (found,) = torch.autograd.grad(-ph.TraceELBO(gradient="stl").differentiable_loss(noise_model, guide), guide.loc)
        return min((found + (mask**2).sum() for mask in guide.masks), key=abs)

    right_or_refused(gradient, 0.0, 1e-8, "z", "dropout", "Dropout", "drop")


def test_double_reparameterisation_under_dropout() -> None:
    guide = NoisyGuide()

    def gradient() -> Tensor:  # with one particle, DReG is STL
        bound = ph.IWELBO(1, gradient="dreg")
        (found,) = torch.autograd.grad(-bound.differentiable_loss(noise_model, guide), guide.loc)
        return min((found + (mask**2).sum() for mask in guide.masks), key=abs)

    right_or_refused(gradient, 0.0, 1e-8, "z", "dropout", "Dropout", "drop")


class Model(nn.Module):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class Guide(nn.Module):
    """A guide whose layer changes its buffers at each forward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(self.layer(x), 0.7).to_event(1))


class RunningScale(nn.Module):
    """Divides by a moving average that it keeps in place, as batch norm's cousins do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("average", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(x.abs().mean(0), alpha=0.1)
        return self.weight / self.average * x


BUFFERS = ("buffer", "buffers", "z", "norm", "BatchNorm1d")


@pytest.mark.parametrize(
    "bound",
    [
        ph.WakePhase(4),
        ph.ReweightedWakeSleep(4),
        ph.TraceELBO(1, "stl"),
        ph.IWELBO(3, "dreg"),
        ph.LayerwiseELBO(2),
        ph.Regularised(ph.LayerwiseELBO(), kl_weight=0.5),
    ],
    ids=["wake", "reweighted", "stl", "dreg", "layerwise", "regularised"],
)
@pytest.mark.parametrize("wrapped", [True, False], ids=["flattened", "bare"])
def test_batch_norm_counts_one_batch_for_each_loss(bound: Any, wrapped: bool) -> None:
    x = torch.linspace(-1.0, 2.0, 12).reshape(6, 2)
    norm = nn.BatchNorm1d(2)
    objective = bound(Model(), Guide(Flattened(norm, 1) if wrapped else norm))

    def statistics() -> Tensor:
        for _ in range(3):
            objective(x).backward()
        return torch.stack([norm.num_batches_tracked.double(), *norm.running_mean])

    right_or_refused(statistics, [3.0, *(x.mean(0) * (1 - 0.9**3))], 1e-12, *BUFFERS)


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm1d(2), RunningScale], ids=["batch", "running_scale"])
@pytest.mark.parametrize("place", ["guide", "model"])
def test_layerwise_backward_after_a_forward_that_changes_buffers(make: Callable[[], nn.Module], place: str) -> None:
    x = torch.linspace(-1.0, 2.0, 12).reshape(6, 2)
    layer = Flattened(make(), 1)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> None:
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.layer(z), 1.0).to_event(1), obs=x)

    model, guide = (Model(), Guide(layer)) if place == "guide" else (Decoder(), Guide(nn.Linear(2, 2)))
    objective = ph.LayerwiseELBO()(model, guide)

    def finite() -> Tensor:
        objective(x).backward()
        return (
            torch.stack([p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None]).all().double()
        )

    right_or_refused(finite, 1.0, 0.0, *BUFFERS)


def test_a_drawn_minibatch_in_a_tree_is_one_or_refused() -> None:
    x = data()
    try:
        tree = ph.to_datatree(*drawn(4), x, num_draws=12, chunk_size=3)
    except (ValueError, TypeError) as error:
        check_message(error, ("rows", "subsample", "subsample_size"))
        return
    for weights in torch.as_tensor(tree["sample_stats"]["log_weight"].values[0]):
        of_distinct_data(weights, evidence(x))
        close(weights, tree["sample_stats"]["log_weight"].values[0, 0], 1e-8)


def test_a_masked_drawn_minibatch() -> None:
    x = data()
    keep = torch.arange(SIZE) % 2 == 0

    def model(x: Tensor) -> None:
        with pyro.plate("rows", SIZE, subsample_size=6) as rows, poutine.mask(mask=keep[rows]):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def posterior(x: Tensor) -> None:
        with pyro.plate("rows", SIZE, subsample_size=6) as rows, poutine.mask(mask=keep[rows]):
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))

    value = ph.log_evidence(model, posterior, x, num_samples=40, chunk_size=3).value
    of_distinct_data(value[value != 0], evidence(x)[keep])
