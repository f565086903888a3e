"""Kalman filter and forward algorithm against dense Gaussians and enumeration: ragged, masked, with covariates."""

import itertools

import pytest
import torch
from torch import nn

import pyro_hvae as ph
from pyro_hvae.kernels import Bernoulli, LinearGaussian, Transition
from pyro_hvae.models import deep_markov
from tests.state_space import ORACLE_EVIDENCE, ORACLE_X, Linear

N, T, LATENT, WIDTH, COVARIATES = 3, 4, 2, 3, 2


def spd(size):
    root = torch.randn(size, size)
    return root @ root.mT + torch.eye(size)


def linear(covariates=0, history=None):
    more = covariates + (WIDTH if history else 0)
    return ph.StateSpace(
        initial=LinearGaussian(covariates, LATENT, covariance=spd(LATENT)),
        transition=LinearGaussian(LATENT + more, LATENT, covariance=0.3 * spd(LATENT)),
        emission=LinearGaussian(LATENT + more, WIDTH, bias=torch.randn(WIDTH), scale=torch.rand(WIDTH) + 0.5),
        history=history,
    )


def dense(model, x, context=None, observed=None, length=T):
    """log p(x) of one sequence from the joint Gaussian of all its entries, mean and covariance by the definition."""
    kernels, size = model.kernels, length * LATENT

    def mean(kernel, parent, t):
        given = [parent] + ([] if context is None else [context[t]])
        return kernels[kernel].weight @ torch.cat(given) + kernels[kernel].bias

    none, zero = torch.zeros(0), torch.zeros(LATENT)
    step, read = (kernels[name].weight[:, :LATENT] for name in ("transition", "emission"))
    lower = torch.eye(size)  # z = lower (offset + noise)
    for t, s in itertools.product(range(length), repeat=2):
        if s < t:
            block = torch.linalg.matrix_power(step, t - s)
            lower[t * LATENT : (t + 1) * LATENT, s * LATENT : (s + 1) * LATENT] = block
    first = kernels["initial"].bias if kernels["initial"].in_features == 0 else mean("initial", none, 0)
    offsets = [first, *(mean("transition", zero, t) for t in range(1, length))]
    noises = [kernels["initial"].covariance, *[kernels["transition"].covariance] * (length - 1)]
    z_mean, z_cov = lower @ torch.cat(offsets), lower @ torch.block_diag(*noises) @ lower.mT
    reads = torch.block_diag(*[read] * length)
    x_mean = reads @ z_mean + torch.cat([mean("emission", zero, t) for t in range(length)])
    x_cov = reads @ z_cov @ reads.mT + torch.block_diag(*[kernels["emission"].covariance] * length)
    seen = torch.ones(length * WIDTH, dtype=torch.bool) if observed is None else observed[:length].reshape(-1)
    found = torch.distributions.MultivariateNormal(x_mean[seen], x_cov[seen][:, seen])
    return found.log_prob(x[:length].reshape(-1)[seen])


@pytest.mark.parametrize("covariates", [0, COVARIATES])
@pytest.mark.parametrize("masked", ["nothing", "steps", "entries"])
def test_kalman_filter_is_the_dense_gaussian(covariates, masked):
    model = linear(covariates)
    x, lengths = torch.randn(N, T, WIDTH), torch.tensor([4, 2, 1])
    context = torch.randn(N, T, covariates) if covariates else None
    shape = {"nothing": None, "steps": (N, T), "entries": (N, T, WIDTH)}[masked]
    mask = None if shape is None else torch.rand(shape) < 0.6
    observed = None if mask is None else mask.reshape(N, T, -1).expand(N, T, WIDTH)
    if mask is not None:
        x = torch.where(observed, x, torch.nan)
    found = model.log_marginal(x, context, lengths, mask=mask)
    rows = [
        dense(model, x[n], None if context is None else context[n], None if mask is None else observed[n], lengths[n])
        for n in range(N)
    ]
    torch.testing.assert_close(found, torch.stack(rows), rtol=0, atol=1e-10)
    slopes = [
        torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        for total in (found.sum(), torch.stack(rows).sum())
    ]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


def test_oracle_and_log_evidence():
    by_hand = Linear()
    model = ph.StateSpace(
        initial=LinearGaussian(0, 1),
        transition=LinearGaussian(1, 1, weight=torch.tensor([[0.9]]), scale=0.5),
        emission=LinearGaussian(1, 1, weight=torch.ones(1, 1), scale=0.8),
    )
    x = torch.tensor(ORACLE_X).reshape(1, -1, 1)
    found = ph.log_evidence(model, None, x, method="exact")
    assert (found.method, float(found.stderr)) == ("exact", 0.0)
    assert float(found.value) == pytest.approx(ORACLE_EVIDENCE, abs=1e-7)
    torch.testing.assert_close(found.value, by_hand.kalman(x[..., 0]).detach(), rtol=0, atol=1e-10)
    assert not found.value.requires_grad


def test_autoregressive_emissions():
    """p(x_t | x_1, ..., x_{t-1}) is that of a model with x_{t-1} as its covariates."""
    model = linear(history="previous")
    x = torch.randn(2, T, WIDTH)
    before = torch.cat([torch.zeros(2, 1, WIDTH), x[:, :-1]], 1)
    expected = torch.stack([dense(model, one, context) for one, context in zip(x, before, strict=True)])
    torch.testing.assert_close(model.log_marginal(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("emission", ["categorical", "bernoulli"])
def test_forward_algorithm_is_the_sum_over_all_paths(emission):
    kernel = {
        "categorical": Transition(4, 3),
        "bernoulli": Bernoulli(nn.Sequential(nn.Embedding(3, WIDTH))),
    }[emission]
    model = ph.StateSpace(initial=Transition(3), transition=Transition(3, 3), emission=kernel)
    x = torch.randint(4, (N, T)) if emission == "categorical" else torch.randint(2, (N, T, WIDTH)).double()
    lengths, mask = torch.tensor([4, 3, 1]), torch.rand(N, T) < 0.7
    found = model.log_marginal(x, lengths=lengths, mask=mask)
    for n, length in enumerate(lengths.tolist()):
        paths = []
        for path in itertools.product(range(3), repeat=length):
            z = torch.tensor(path)
            total = model.initial(None).log_prob(z[0])
            for t in range(length):
                total = total + (model.transition(z[t - 1]).log_prob(z[t]) if t else 0)
                total = total + (kernel(z[t]).log_prob(x[n, t]) if mask[n, t] else 0)
            paths.append(total)
        torch.testing.assert_close(found[n], torch.stack(paths).logsumexp(0), rtol=0, atol=1e-10)


def test_what_has_no_exact_filter_is_refused():
    model, guide = deep_markov(2, 3, hidden=4, gate=4, features=4)
    x = torch.zeros(2, 5, 2)
    with pytest.raises(ValueError, match=r"exact for LinearGaussian kernels.*emission Bernoulli.*method='smc'"):
        ph.log_evidence(model, guide, x, method="exact")
    with pytest.raises(ValueError, match="log_marginal, which TopDown does not have"):
        ph.log_evidence(*ph.vae(4, 2), torch.zeros(2, 4), method="exact")


def test_evaluation_mode_and_generator():
    """Dropout of an emission is off, nothing is drawn, and the mode comes back."""
    model = ph.StateSpace(
        initial=Transition(3),
        transition=Transition(3, 3),
        emission=Bernoulli(nn.Sequential(nn.Embedding(3, WIDTH), nn.Dropout(0.5))),
    )
    model.train()
    x = torch.randint(2, (N, T, WIDTH)).double()
    state = torch.get_rng_state()
    one, other = (ph.log_evidence(model, None, x, method="exact").value for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert torch.equal(one, other)
    torch.testing.assert_close(one, model.eval().log_marginal(x), rtol=0, atol=1e-12)


def test_data_of_another_width_are_refused():
    model = linear()
    for x, shown in ((torch.randn(N, T, 1), r"\(1,\)"), (torch.randn(N, T), r"\(\)")):
        with pytest.raises(ValueError, match=rf"events of shape \(3,\), but an observation has shape {shown}"):
            model.log_marginal(x)
    with pytest.raises(ValueError, match="needs data"):
        model.log_marginal(None, torch.randn(N, T, 1))


def test_data_without_a_density_are_refused():
    x = torch.randn(N, T, WIDTH)
    x[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match=r"(?i)nan"):
        ph.log_evidence(linear(), None, x, method="exact")
    model = ph.StateSpace(
        initial=Transition(3), transition=Transition(3, 3), emission=Bernoulli(nn.Embedding(3, WIDTH))
    )
    with pytest.raises(ValueError, match="7"):
        ph.log_evidence(model, None, torch.full((N, T, WIDTH), 7.0), method="exact")
