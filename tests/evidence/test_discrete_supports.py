"""Annealing of discrete latents beside other sites, on other supports and schedules; what is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_hvae.evidence import anneal, evidence_interval, evidence_sandwich, log_evidence
from pyro_hvae.evidence import gibbs as gibbs_module
from pyro_hvae.evidence.gibbs import Gibbs
from pyro_hvae.evidence.path import Path
from pyro_hvae.problem import Problem
from tests.discrete import (
    CASES,
    CENTRES,
    CHAIN_X,
    INITIAL,
    MEANS,
    MIXTURE_X,
    MOVES,
    NOISE,
    SHARES,
    SPREAD,
    WITHIN,
    exact_mixture,
    hidden_chain,
    joint_of_chain,
)

# -- what works together with the rest


@pytest.mark.parametrize("options", [{"betas": "adaptive"}, {"betas": 8, "resample": True}])
def test_other_schedules(options):
    for name in ("net", "mixture"):
        model, _, x, joint = CASES[name]
        chains = anneal(model, None, x, base="prior", num_chains=300, num_leapfrog=3, **options)
        estimate = chains.log_weights.logsumexp(0) - math.log(300)
        assert ((estimate - joint(x).logsumexp(0)).abs() < 0.3).all()


def test_one_chain_and_no_plate():
    def coin(x):
        z = pyro.sample("z", dist.Binomial(3, torch.tensor(0.4)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor(1.2)
    z = torch.arange(4.0)
    exact = (dist.Binomial(3, torch.tensor(0.4)).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)).logsumexp(0)
    single = torch.stack([anneal(coin, None, x, base="prior", num_chains=1, betas=20).log_weights for _ in range(40)])
    many = anneal(coin, None, x, base="prior", num_chains=400, betas=20)
    assert single.shape == (40, 1)
    assert abs(single.mean() - exact) < 0.2
    assert abs(many.log_weights.logsumexp(0) - math.log(400) - exact) < 0.1
    assert bool(many.step_sizes.isnan().all())
    assert (many.acceptance[1:] == 1).all()
    estimate = log_evidence(coin, None, x, method="annealed", num_samples=100)
    assert abs(estimate.value - exact) < 0.1


def test_other_supports():
    """Totals that differ between data, and one-hot categories."""
    totals, probs = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.2, 0.5, 0.3])

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Binomial(totals, torch.tensor(0.5)))
            one = pyro.sample("one", dist.OneHotCategorical(probs))
            pyro.sample("x", dist.Normal(k + one @ MEANS, 0.5), obs=x)

    x = torch.tensor([0.3, 2.2, 3.5])
    k = torch.arange(5.0)[:, None, None]
    inside = dist.Binomial(totals, torch.tensor(0.5)).log_prob(torch.minimum(k, totals))
    log_k = torch.where(k <= totals, inside, -math.inf)
    log_f = log_k + probs.log()[:, None] + dist.Normal(k + MEANS[:, None], 0.5).log_prob(x)
    chains = anneal(model, None, x, base="prior", num_chains=400, betas=20)
    estimate = chains.log_weights.logsumexp(0) - math.log(400)
    torch.testing.assert_close(estimate, log_f.flatten(0, 1).logsumexp(0), atol=0.15, rtol=0.0)
    assert (chains.values["k"] <= totals).all()
    assert (chains.values["one"].sum(-1) == 1).all()


def test_global_means_with_an_auto_guide_and_assignments_of_their_own():
    """Means in the coordinates of an AutoNormal, and 4 assignments drawn together, though no plate is common."""

    def model(x):
        means = pyro.sample("means", dist.Normal(CENTRES, SPREAD).to_event(1))
        with pyro.plate("points", len(x)):
            z = pyro.sample("z", dist.Categorical(SHARES))
            pyro.sample("x", dist.Normal(torch.where(z == 1, means[..., 1], means[..., 0]), WITHIN), obs=x)

    auto = AutoNormal(pyro.poutine.block(model, expose=["means"]), init_scale=0.7)

    def guide(x):
        auto(x)
        with pyro.plate("points", len(x)):
            pyro.sample("z", dist.Categorical(logits=torch.stack([-x, x], -1)))

    x = MIXTURE_X[0]
    guide(x)
    chains = anneal(model, guide, x, num_chains=300, betas=20, num_leapfrog=3)
    weights = chains.log_weights
    error = ((2 * weights.log_softmax(0)).logsumexp(0).exp() - 1 / 300).sqrt()
    assert abs(weights.logsumexp(0) - math.log(300) - exact_mixture(x[None]).logsumexp(0)[0]) < 4 * error
    assert chains.moves.gibbs.blocks[0].positions == [()]
    assert set(chains.values) >= {"means", "z"}


def test_a_summed_out_site_beside_a_drawn_one():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.3)))
            b = pyro.sample("b", dist.Categorical(INITIAL), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(a + MEANS[b], 0.5), obs=x)

    x = torch.tensor([0.2, 2.5])
    a = torch.tensor([0.0, 1.0])[:, None, None]
    log_f = dist.Bernoulli(torch.tensor(0.3)).log_prob(a) + INITIAL.log()[:, None]
    log_f = log_f + dist.Normal(a + MEANS[:, None], 0.5).log_prob(x)
    chains = anneal(model, None, x, base="prior", num_chains=400, betas=20)
    estimate = chains.log_weights.logsumexp(0) - math.log(400)
    torch.testing.assert_close(estimate, log_f.flatten(0, 1).logsumexp(0), atol=0.1, rtol=0.0)


def test_chains_that_start_at_the_impossible():
    """Transitions of probability zero: such starts have no weight, and the rest stands for them."""
    moves = torch.tensor([[0.0, -math.inf], [-0.5, -0.9]])

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(SHARES))
            b = pyro.sample("b", dist.Categorical(SHARES))
            pyro.factor("wall", moves[a, b])
            pyro.sample("x", dist.Normal(1.0 * a - b, 0.8), obs=x)

    x = torch.tensor([0.2, -0.7])
    a, b = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    log_f = (SHARES.log()[a] + SHARES.log()[b] + moves[a, b])[:, None]
    log_f = log_f + dist.Normal(1.0 * (a - b)[:, None], 0.8).log_prob(x)
    weights = anneal(model, None, x, base="prior", num_chains=1000, betas=10).log_weights
    assert (weights == -math.inf).any()
    torch.testing.assert_close(weights.logsumexp(0) - math.log(1000), log_f.logsumexp(0), atol=0.15, rtol=0.0)


def test_single_precision_and_few_values_at_once(monkeypatch):
    """Values that are evaluated one after another give the same conditionals."""
    x = CHAIN_X.float()

    def model(x):
        with pyro.plate("data", len(x)):
            states = []
            for t in range(4):
                chances = MOVES.float()[states[-1]] if states else INITIAL.float()
                states.append(pyro.sample(f"z{t}", dist.Categorical(chances)))
            mean = MEANS.float()[torch.stack(states, -1)]
            pyro.sample("x", dist.Normal(mean, NOISE).to_event(1), obs=x)

    torch.set_default_dtype(torch.float32)
    path = Path(Problem(model)(x).prior(), 5)
    gibbs, state = Gibbs(path), path.start()
    whole = [gibbs.conditional(state, block, (), 0.4) for block in gibbs.blocks]
    monkeypatch.setattr(gibbs_module, "default_chunk", lambda entries: 1)
    for block, logits in zip(gibbs.blocks, whole, strict=True):
        torch.testing.assert_close(gibbs.conditional(state, block, (), 0.4), logits)
    one = Gibbs(Path(Problem(model)(x).prior(), 1), gibbs.blocks)
    single = {name: value[0] for name, value in state.items()}
    for block, logits in zip(gibbs.blocks, whole, strict=True):
        torch.testing.assert_close(one.conditional(single, block, (), 0.4), logits[:, :1])
    weights = anneal(model, None, x, base="prior", num_chains=2000, betas=20).log_weights
    assert weights.dtype == torch.float32
    exact = joint_of_chain(CHAIN_X).logsumexp(0).float()
    torch.testing.assert_close(weights.logsumexp(0) - math.log(2000), exact, atol=0.15, rtol=0.0)


# -- what is refused


def test_infinite_ranges_are_refused_with_what_to_write():
    def model(x, latent):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", latent)
            pyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=x)

    x, probs = torch.zeros(2), torch.tensor(0.3)
    for latent in (dist.Poisson(torch.tensor(2.0)), dist.Geometric(probs), dist.NegativeBinomial(3, probs)):
        kind = type(latent).__name__
        with pytest.raises(ValueError, match=rf"'z' is discrete, .* \({kind}\).*dist.Categorical\(logits"):
            anneal(model, None, x, latent, base="prior")
    written = dist.Categorical(logits=dist.Poisson(torch.tensor(2.0)).log_prob(torch.arange(20.0)))
    chains = anneal(model, None, x, written, base="prior", num_chains=100, betas=10)
    z = torch.arange(20.0)
    exact = (written.log_prob(z) + dist.Normal(z, 1.0).log_prob(torch.tensor(0.0))).logsumexp(0)
    torch.testing.assert_close(chains.log_weights.logsumexp(0) - math.log(100), exact.expand(2), atol=0.3, rtol=0.0)
    with pytest.raises(ValueError, match="'z' is discrete, and its totals differ"):
        anneal(model, None, x, dist.BetaBinomial(2.0, 3.0, torch.tensor([2.0, 3.0])), base="prior")


def test_a_range_that_depends_on_another_draw_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Categorical(INITIAL))
            k = pyro.sample("k", dist.Binomial(1.0 + n, torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with pytest.raises(ValueError, match="'k' has a total_count that depends on other draws"):
        anneal(model, None, torch.zeros(3), base="prior")


def test_data_that_depend_on_each_other_are_refused():
    def ring(x):
        with pyro.plate("spins", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
            pyro.factor("neighbours", z * z.roll(2, -1))

    with pytest.raises(ValueError, match=r"plate 'spins' encloses all sites, .* depends on values of site 'z'"):
        anneal(ring, None, torch.zeros(5), base="prior")


def test_a_guide_without_density_at_a_possible_value_is_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            for t in range(4):
                gap = -math.inf if t == 2 else 0.0
                pyro.sample(f"z{t}", dist.Categorical(logits=torch.tensor([0.0, gap, 0.0])))

    with pytest.raises(ValueError, match="'z2' with probability zero at a value that is possible"):
        anneal(hidden_chain, guide, CHAIN_X, num_chains=8, betas=4)


def test_a_probability_of_zero_that_torch_rounds_up_is_annealed_from():
    """``Categorical(probs=)`` has a density of 2e-16 there; draws of the base miss the value, Gibbs moves do not."""

    def guide(x):
        with pyro.plate("data", len(x)):
            for t in range(4):
                pyro.sample(f"z{t}", dist.Categorical(probs=torch.tensor([0.5, 0.0, 0.5])))

    weights = anneal(hidden_chain, guide, CHAIN_X, num_chains=2000, betas=40).log_weights
    error = ((2 * weights.log_softmax(0)).logsumexp(0).exp() - 1 / 2000).sqrt()
    exact = joint_of_chain(CHAIN_X).logsumexp(0)
    assert ((weights.logsumexp(0) - math.log(2000) - exact).abs() < 4 * error).all()
    assert (error < 0.1).all()


def test_posterior_draws_must_be_values_of_the_site():
    for bad in (3.0, 0.5):
        values = {f"z{t}": torch.full((3,), bad if t == 1 else 1.0) for t in range(4)}
        with pytest.raises(ValueError, match="'z1' has 48 values that are NaN or outside"):
            evidence_sandwich(hidden_chain, None, CHAIN_X, posterior_samples=values, betas=4)


def test_intervals_anneal_discrete_latents_where_k_hat_asks_for_it():
    def narrow(x):
        with pyro.plate("data", len(x)):
            for t in range(4):
                pyro.sample(f"z{t}", dist.Categorical(logits=torch.tensor([4.0, 0.0, 0.0])))

    interval = evidence_interval(hidden_chain, narrow, CHAIN_X, budget=60_000)
    exact = joint_of_chain(CHAIN_X).logsumexp(0)
    assert "annealed" in interval.method
    assert (interval.lower <= exact).all()
    assert sum(stage.evaluations for stage in interval.stages) <= 60_000

    def partial(x):
        with pyro.plate("data", len(x)):
            for t in range(4):
                pyro.sample(f"z{t}", dist.Categorical(logits=torch.tensor([4.0, 0.0, -math.inf if t == 0 else 0.0])))

    interval = evidence_interval(hidden_chain, partial, CHAIN_X, budget=60_000)
    assert interval.method == "importance"
    assert "with probability zero at a value that is possible" in str(interval)
