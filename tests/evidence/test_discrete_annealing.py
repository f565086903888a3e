"""Annealing of discrete latents by Gibbs moves, against sums over all of their values."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hvae.evidence import anneal, evidence_sandwich
from pyro_hvae.evidence.gibbs import Gibbs
from pyro_hvae.evidence.path import Path
from pyro_hvae.problem import Problem
from tests.discrete import (
    CASES,
    CHAIN_X,
    FIELD,
    MIXTURE_X,
    SHARES,
    SPIN_X,
    WITHIN,
    base_of_chain,
    binary,
    guide_of_chain,
    hidden_chain,
    joint_of_chain,
    joint_of_spins,
    mixture,
    paths,
    prior_of_spins,
    spins,
    spins_of_a_plate,
)

# -- one move


def transition(gibbs, state, block, position, beta):
    """Matrix of probabilities from each state to each, from the conditionals of a move; chains are all states."""
    count = gibbs.path.num_chains
    probabilities = gibbs.conditional(state, block, position, beta).softmax(0).reshape(len(block.points), count, -1)
    keys = [key_of(state, k) for k in range(count)]
    matrix = torch.zeros(count, count)
    for choice in itertools.product(range(len(block.points)), repeat=probabilities.shape[-1]):
        drawn = torch.tensor(choice).expand(count, -1).reshape(count, *(plate.size for plate in block.plates))
        index = gibbs.path.layout.spread(drawn, block.plates, block.inner)
        value = torch.where(block.mask(position), block.points[index], state[block.name])
        moved = {**state, block.name: value}
        chance = torch.stack([probabilities[v, :, i] for i, v in enumerate(choice)]).prod(0)
        for k in range(count):
            matrix[k, keys.index(key_of(moved, k))] += chance[k]
    return matrix


def key_of(state, k):
    return tuple(float(v) for name in sorted(state) for v in state[name][k].flatten())


def all_states(path, values):
    """A state whose chains are all values of the sites, of one datum."""
    sites = {"z": values} if path.sites == ("z",) else {f"z{t}": values[:, t] for t in range(4)}
    shapes = {name: path.problem.template.nodes[name]["fn"].shape() for name in sites}
    return path.unconstrain({name: value.reshape(len(value), *shapes[name]) for name, value in sites.items()})


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("model", "guide", "values", "x", "log_q", "log_p"),
    [
        (hidden_chain, guide_of_chain, paths(), CHAIN_X[:1], base_of_chain, joint_of_chain),
        (spins, None, None, SPIN_X[:1], prior_of_spins, joint_of_spins),
        (spins_of_a_plate, None, None, SPIN_X[:1], prior_of_spins, joint_of_spins),
    ],
    ids=["chain", "spins", "spins-plate"],
)
def test_a_move_leaves_the_tempered_density_invariant(model, guide, values, x, log_q, log_p, beta):
    """The matrix of each move against f, both by enumeration: detailed balance, and f P = f for the whole sweep."""
    problem = Problem(model, guide)(x)
    values = binary() if values is None else values
    path = Path(problem if guide else problem.prior(), len(values))
    gibbs, state = Gibbs(path), all_states(path, values)
    f = ((1 - beta) * log_q(x) + beta * log_p(x))[:, 0].softmax(0)
    sweep = torch.eye(len(values))
    for block in gibbs.blocks:
        for position in block.positions:
            matrix = transition(gibbs, state, block, position, beta)
            flow = f[:, None] * matrix
            torch.testing.assert_close(flow, flow.T)
            sweep = sweep @ matrix
    assert len(gibbs.blocks) * len(gibbs.blocks[0].positions) == 4
    torch.testing.assert_close(f @ sweep, f)
    assert (torch.linalg.matrix_power(sweep, 200) - f).abs().max() < 1e-6  # every state is reached
    moved = gibbs(path.unconstrain(path.constrain(state)), beta)
    assert not torch.equal(moved[path.sites[0]], state[path.sites[0]])


def test_draws_follow_the_conditional():
    x, count = CHAIN_X[:2], 20_000
    path = Path(Problem(hidden_chain, guide_of_chain)(x), count)
    start = path.start()
    state = {name: value[:1].expand(value.shape) for name, value in start.items()}
    gibbs = Gibbs(path)
    block = gibbs.blocks[1]
    chances = gibbs.conditional(state, block, (), 0.6).softmax(0)[:, 0]
    drawn = gibbs.draw(state, block, (), 0.6)
    shares = torch.stack([(drawn["z1"] == v).double().mean(0) for v in range(3)])
    assert ((shares - chances).abs() < 4 * (chances * (1 - chances) / count).sqrt() + 1e-9).all()
    assert torch.equal(drawn["z2"], state["z2"])


def test_entries_of_a_plate_are_drawn_together_where_they_are_independent():
    together = Gibbs(Path(Problem(mixture)(MIXTURE_X).prior(), 8)).blocks[0]
    assert [plate.name for plate in together.plates] == ["sets", "points"]
    assert together.positions == [()]
    apart = Gibbs(Path(Problem(spins_of_a_plate)(SPIN_X).prior(), 8)).blocks[0]
    assert [plate.name for plate in apart.plates] == ["data"]
    assert apart.positions == [(0,), (1,), (2,), (3,)]

    def ring(x):
        with pyro.plate("data", len(x), dim=-2):
            level = pyro.sample("level", dist.Normal(x[:, None], 1.0))
            with pyro.plate("spins", 4, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(logits=FIELD))
                pyro.factor("neighbours", level * z * z.roll(1, -1))

    assert len(Gibbs(Path(Problem(ring)(SPIN_X).prior(), 8)).blocks[0].positions) == 4
    assert Gibbs(Path(Problem(mixture)(MIXTURE_X[:, :1]).prior(), 8)).blocks[0].positions == [()]
    vector = Gibbs(Path(Problem(spins)(SPIN_X).prior(), 8)).blocks[0]
    assert vector.positions == [(0,), (1,), (2,), (3,)]


def test_entries_drawn_together_follow_the_joint_conditional():
    """A move of all assignments at given means, against the sum over assignments."""
    x, count = MIXTURE_X[:1], 20_000
    path = Path(Problem(mixture)(x).prior(), count)
    means = torch.tensor([-0.4, 1.1]).expand(count, 1, 1, 2)
    state = path.unconstrain({"means": means, "z": torch.zeros(count, 1, 4, dtype=torch.long)})
    drawn = Gibbs(path)(state, 0.7)["z"].reshape(count, 4)
    z = binary().long()
    likelihood = dist.Normal(means[0, 0, 0][z], WITHIN).log_prob(x).sum(-1)
    exact = (SHARES.log()[z].sum(-1) + 0.7 * likelihood).softmax(0)
    shares = torch.bincount((drawn * torch.tensor([8, 4, 2, 1])).sum(-1), minlength=16) / count
    assert ((shares - exact).abs() < 4.5 * (exact * (1 - exact) / count).sqrt() + 1e-4).all()


# -- evidence


@pytest.mark.parametrize("name", CASES)
def test_mean_weight_is_the_evidence(name):
    model, guide, x, joint = CASES[name]
    count = 4000
    chains = anneal(model, guide, x, base="guide" if guide else "prior", num_chains=count, betas=8, num_leapfrog=3)
    weights = chains.log_weights
    assert weights.shape == (count, len(x))
    error = ((2 * weights.log_softmax(0)).logsumexp(0).exp() - 1 / count).clamp(min=0).sqrt()
    assert ((weights.logsumexp(0) - math.log(count) - joint(x).logsumexp(0)).abs() < 4 * error).all()
    assert (error < 0.1).all()


@pytest.mark.parametrize("name", ["chain-guide", "mixture", "spins"])
def test_last_draws_are_of_the_posterior(name):
    """Weighted means of the chains' values against sums over all values."""
    model, guide, x, joint = CASES[name]
    count = 1500
    chains = anneal(model, guide, x, base="guide" if guide else "prior", num_chains=count, betas=8, num_leapfrog=3)
    z = paths().to(x) if model is hidden_chain else binary().to(x)
    posterior = joint(x).softmax(0)
    if model is hidden_chain:
        values = torch.stack([chains.values[f"z{t}"] for t in range(4)], -1).to(x)
    else:
        values = chains.values["z"].to(x)
    weights = chains.log_weights.softmax(0)
    size = 1 / (weights**2).sum(0)
    for power in (1, 2):
        exact = torch.einsum("sn,sd->nd", posterior, z**power)
        spread = (torch.einsum("sn,sd->nd", posterior, z ** (2 * power)) - exact**2).sqrt()
        mean = torch.einsum("kn,knd->nd", weights, values.reshape(count, len(x), 4) ** power)
        assert ((mean - exact).abs() < 4 * spread / size[:, None] ** 0.5 + 1e-6).all()


@pytest.mark.parametrize(
    ("name", "base"), [("chain-guide", "prior"), ("chain-guide", "guide"), ("mixture", "prior"), ("net", "prior")]
)
def test_the_bracket_contains_the_evidence(name, base):
    """100 simulated data, each a repeat of its own, whose latents are exact posterior draws."""
    model, guide, x, joint = CASES[name]
    like = torch.zeros(100, *x.shape[1:])
    latents, simulated = Problem(model, guide)(like).simulate()
    (seen,) = simulated.args
    bracket = evidence_sandwich(
        simulated, posterior_samples=latents, base=base, num_chains=64, betas=30, num_leapfrog=3
    )
    exact = joint(seen).logsumexp(0)
    assert bracket.upper_is_bound
    assert int(((bracket.lower <= exact) & (exact <= bracket.upper)).sum()) >= 95
    assert bracket.width.mean() < (3.5 if model is mixture else 1.4)


def test_both_sides_close_in_on_the_evidence():
    latents, simulated = Problem(hidden_chain)(torch.zeros(20, 4)).simulate()
    exact = joint_of_chain(simulated.args[0]).logsumexp(0)
    widths = []
    for betas in (4, 16):
        bracket = evidence_sandwich(simulated, posterior_samples=latents, num_chains=64, betas=betas)
        assert int(((bracket.lower <= exact) & (exact <= bracket.upper)).sum()) >= 17
        widths.append(bracket.width.mean())
    assert widths[1] < 0.6 * widths[0]


def test_reverse_weights_average_to_the_inverse_evidence():
    """E[1/w] = 1/p(x) over chains from exact posterior draws, here drawn by enumeration."""
    x, count = SPIN_X, 2000
    posterior = joint_of_spins(x).softmax(0)
    starts = binary()[torch.multinomial(posterior.T, count, replacement=True).T]
    weights = -anneal(spins, None, x, base="prior", num_chains=count, betas=6, reverse_from={"z": starts}).log_weights
    error = ((2 * weights.log_softmax(0)).logsumexp(0).exp() - 1 / count).sqrt()
    assert ((weights.logsumexp(0) - math.log(count) + joint_of_spins(x).logsumexp(0)).abs() < 4 * error).all()
