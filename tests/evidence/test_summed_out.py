"""Evidence of models that sum discrete sites out, from the prior and from guides; against mixtures in closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hvae.evidence import anneal, evidence_sandwich, log_evidence, posterior_gap

PARALLEL = {"enumerate": "parallel"}
SHARES = torch.tensor([0.4, 0.6], dtype=torch.float64)
X = torch.tensor([0.5, -1.0, 3.0], dtype=torch.float64)


def global_mean(x):
    """A mean for all data, and a sign for each datum that is summed out."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.5))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(SHARES), infer=PARALLEL)
        pyro.sample("x", dist.Normal(mean * (2.0 * k - 1.0), 0.7), obs=x)


def exact_global_mean(x):
    grid = torch.linspace(-12.0, 12.0, 40_001)
    log_f = dist.Normal(0.0, 1.5).log_prob(grid)
    for value in x:
        parts = [SHARES[k].log() + dist.Normal((2 * k - 1) * grid, 0.7).log_prob(value) for k in range(2)]
        log_f = log_f + torch.logsumexp(torch.stack(parts), 0)
    return log_f.logsumexp(0) + math.log(float(grid[1] - grid[0]))


def components(x, means=(-4.0, 4.0)):
    """A latent whose prior is a mixture over the site that is summed out; narrow components, far apart."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(SHARES), infer=PARALLEL)
        z = pyro.sample("z", dist.Normal(torch.where(k == 1, means[1], means[0]), 0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def exact_components(x):
    width = 1.25**0.5
    parts = [SHARES[k].log() + dist.Normal(mean, width).log_prob(x) for k, mean in enumerate((-4.0, 4.0))]
    return torch.logsumexp(torch.stack(parts), 0)


def test_annealing_from_the_prior_of_a_mixture_with_a_global_mean():
    chains = anneal(global_mean, None, X, base="prior", num_chains=200, betas=20, num_leapfrog=3)
    weights = chains.log_weights
    error = ((2 * weights.log_softmax(0)).logsumexp(0).exp() - 1 / 200).sqrt()
    assert weights.shape == (200,)
    assert abs(weights.logsumexp(0) - math.log(200) - exact_global_mean(X)) < 4 * error
    bracket = evidence_sandwich(global_mean, None, X, num_chains=32, betas=40, num_leapfrog=3)
    assert bracket.lower - 0.05 < exact_global_mean(X) < bracket.upper + 0.05
    assert bracket.width < 0.5


@pytest.mark.parametrize("verb", [anneal, evidence_sandwich])
def test_a_prior_that_is_a_mixture_is_no_base(verb):
    with pytest.raises(ValueError, match=r"prior of site\(s\) \['z'\] depends on \['k'\].* from a guide instead"):
        verb(components, None, X, base="prior", num_chains=8, betas=3)


def components_guide(x):
    """Wide enough for both components."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), 4.0))


@pytest.mark.parametrize("method", ["importance", "prior", "bayes", "annealed"])
def test_every_method_sums_a_mixture_out(method):
    samples = 100 if method == "annealed" else 20_000
    found = log_evidence(components, components_guide, X, method=method, num_samples=samples)
    assert ((found.value - exact_components(X)).abs() < 4 * found.stderr).all()
    assert (found.stderr < 0.25).all()


def test_draws_of_a_mixtures_prior_visit_all_components():
    """Draws of one component alone would leave out, at each datum, what the other explains: 26 nats here."""
    x = torch.tensor([4.0, -4.0, 3.0, -3.5])
    found = log_evidence(components, None, x, method="prior", num_samples=6000, chunk_size=3000)
    assert ((found.value - exact_components(x)).abs() < 4 * found.stderr).all()
    assert (found.stderr < 0.05).all()


def all_summed(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(SHARES), infer=PARALLEL)
        pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)


@pytest.mark.parametrize("method", ["importance", "prior", "bayes", "annealed", "enumerate"])
@pytest.mark.parametrize("guide", [None, lambda x: None], ids=["none", "empty"])
def test_nothing_is_drawn_where_all_latents_are_summed_out(method, guide):
    found = log_evidence(all_summed, guide, X, method=method)
    parts = [SHARES[k].log() + dist.Normal(2.0 * k, 1.0).log_prob(X) for k in range(2)]
    torch.testing.assert_close(found.value, torch.logsumexp(torch.stack(parts), 0), atol=1e-12, rtol=0.0)
    assert (found.stderr == 0).all()
    assert found.method == "enumerate"


def test_a_continuous_latent_is_not_summed_without_a_guide():
    with pytest.raises(ValueError, match="draws from a guide, and guide is None"):
        log_evidence(global_mean, None, X)
    with pytest.raises(ValueError, match="sums over latents that are all discrete"):
        log_evidence(global_mean, None, X, method="enumerate")


def in_classes(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(SHARES))
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(3.0 * y + z, 1.0), obs=x)


def classes_summed(x):
    """q(y|x) by a fixed table, and the exact q(z|x, y)."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])), infer=PARALLEL)
        pyro.sample("z", dist.Normal((x - 3.0 * y) / 2, 0.5**0.5))


@pytest.mark.parametrize("method", ["importance", "bayes"])
def test_a_guide_that_sums_classes_out(method):
    found = log_evidence(in_classes, classes_summed, X, method=method, num_samples=50, chunk_size=20)
    parts = [SHARES[k].log() + dist.Normal(3.0 * k, 2**0.5).log_prob(X) for k in range(2)]
    torch.testing.assert_close(found.value, torch.logsumexp(torch.stack(parts), 0), atol=1e-10, rtol=0.0)


def test_a_guide_that_sums_classes_out_is_no_base():
    with pytest.raises(ValueError, match=r"guide enumerates site\(s\) \['y'\].* anneal from the prior"):
        anneal(in_classes, classes_summed, X, betas=3)
    with pytest.raises(ValueError, match=r"\['y'\] .* can't be refined"):
        posterior_gap(in_classes, classes_summed, X)


def test_masked_classes_have_evidence_zero():
    keep = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=keep):
            k = pyro.sample("k", dist.Categorical(SHARES), infer=PARALLEL)
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    parts = [SHARES[k].log() + dist.Normal(2.0 * k, 1.0).log_prob(X) for k in range(2)]
    exact = torch.where(keep, torch.logsumexp(torch.stack(parts), 0), 0.0)
    torch.testing.assert_close(log_evidence(model, None, X).value, exact, atol=1e-12, rtol=0.0)
