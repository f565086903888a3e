"""Models with discrete latents whose evidence is a sum over all of their values, for tests of annealing."""

import itertools

import pyro
import pyro.distributions as dist
import torch

INITIAL = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MOVES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)
MEANS, NOISE = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64), 0.7
SHARES = torch.tensor([0.4, 0.6], dtype=torch.float64)
CENTRES, SPREAD, WITHIN = torch.tensor([-1.0, 1.0], dtype=torch.float64), 1.5, 0.6


def hidden_chain(x):
    with pyro.plate("data", len(x)):
        states = []
        for t in range(4):
            states.append(pyro.sample(f"z{t}", dist.Categorical(MOVES[states[-1]] if states else INITIAL)))
        pyro.sample("x", dist.Normal(MEANS[torch.stack(states, -1)], NOISE).to_event(1), obs=x)


def guide_of_chain(x):
    """Each state by its own observation, from the last."""
    with pyro.plate("data", len(x)):
        for t in reversed(range(4)):
            pyro.sample(f"z{t}", dist.Categorical(logits=-0.5 * (x[:, t, None] - MEANS) ** 2))


def paths():
    return torch.tensor(list(itertools.product(range(3), repeat=4)))


def joint_of_chain(x):
    """log p(x, z) for all 81 paths: (81, data)."""
    z = paths()
    log_p = INITIAL.log()[z[:, 0]] + sum(MOVES.log()[z[:, t], z[:, t + 1]] for t in range(3))
    return log_p[:, None] + dist.Normal(MEANS[z][:, None], NOISE).log_prob(x).sum(-1)


def base_of_chain(x):
    """log q(z|x) for all 81 paths."""
    logits = (-0.5 * (x[..., None] - MEANS) ** 2).log_softmax(-1)
    return torch.stack([sum(logits[:, t, z[t]] for t in range(4)) for z in paths()])


def mixture(x):
    """Sets of 4 points, each with means of its own: (sets, 4)."""
    with pyro.plate("sets", len(x), dim=-2):
        means = pyro.sample("means", dist.Normal(CENTRES, SPREAD).expand([len(x), 1, 2]).to_event(1))
        with pyro.plate("points", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Categorical(SHARES))
            mean = torch.where(z == 1, means[..., 1], means[..., 0])
            pyro.sample("x", dist.Normal(mean, WITHIN), obs=x)


def exact_mixture(x):
    """log p(x, z) for all 16 assignments: given them, points of a component are jointly normal."""
    terms = []
    for z in itertools.product(range(2), repeat=x.shape[1]):
        z = torch.tensor(z)
        covariance = SPREAD**2 * (z[:, None] == z).to(x) + WITHIN**2 * torch.eye(len(z))
        normal = dist.MultivariateNormal(CENTRES[z], covariance)
        terms.append(SHARES.log()[z].sum() + normal.log_prob(x))
    return torch.stack(terms)


COUPLING = torch.tensor([[0, 1.2, -0.7, 0.3], [0, 0, 0.9, -0.4], [0, 0, 0, 1.5], [0, 0, 0, 0]], dtype=torch.float64)
FIELD = torch.tensor([0.4, -0.3, 0.1, 0.6], dtype=torch.float64)


def coupled(z, x):
    """Energy of four spins of 0 and 1, the last dim."""
    return (z @ COUPLING.to(z) * z).sum(-1) + x * z.sum(-1)


def spins(x):
    """One vector of spins for each datum, with a coupling."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=FIELD).to_event(1))
        pyro.factor("coupling", coupled(z, x))


def spins_of_a_plate(x):
    """The same spins along a plate, whose indices depend on each other by the coupling."""
    data, spins = pyro.plate("data", len(x), dim=-2), pyro.plate("spins", 4, dim=-1)
    with data, spins:
        z = pyro.sample("z", dist.Bernoulli(logits=FIELD))
    with data:
        pyro.factor("coupling", coupled(z, x).unsqueeze(-1))


def net(x):
    """Four binary units, each with a parent, and an observation of all."""
    with pyro.plate("data", len(x)):
        z0 = pyro.sample("z0", dist.Bernoulli(torch.tensor(0.6)))
        z1 = pyro.sample("z1", dist.Bernoulli(0.2 + 0.6 * z0))
        z2 = pyro.sample("z2", dist.Bernoulli(0.9 - 0.5 * z0))
        z3 = pyro.sample("z3", dist.Bernoulli(0.1 + 0.4 * z1 + 0.4 * z2))
        pyro.sample("x", dist.Normal(z0 + z1 - z2 + 2 * z3, 0.5), obs=x)


def binary():
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)))


def joint_of_spins(x):
    z = binary()
    return dist.Bernoulli(logits=FIELD).log_prob(z).sum(-1)[:, None] + coupled(z[:, None], x)


def joint_of_net(x):
    z0, z1, z2, z3 = binary().T
    log_p = dist.Bernoulli(torch.tensor(0.6)).log_prob(z0) + dist.Bernoulli(0.2 + 0.6 * z0).log_prob(z1)
    log_p = log_p + dist.Bernoulli(0.9 - 0.5 * z0).log_prob(z2) + dist.Bernoulli(0.1 + 0.4 * z1 + 0.4 * z2).log_prob(z3)
    return log_p[:, None] + dist.Normal((z0 + z1 - z2 + 2 * z3)[:, None], 0.5).log_prob(x)


def prior_of_spins(x):
    return dist.Bernoulli(logits=FIELD).log_prob(binary()).sum(-1)[:, None].expand(16, len(x))


CHAIN_X = torch.tensor([[-0.8, 0.1, 1.4, 2.2], [0.4, -1.5, 0.3, 1.0], [2.1, 2.0, -0.2, -1.1]], dtype=torch.float64)
MIXTURE_X = torch.tensor([[-1.2, 0.3, 1.1, 0.9], [2.0, 2.3, -0.5, 0.1]], dtype=torch.float64)
SPIN_X = torch.tensor([0.3, -0.8, 0.0], dtype=torch.float64)

CASES = {
    "chain-prior": (hidden_chain, None, CHAIN_X, joint_of_chain),
    "chain-guide": (hidden_chain, guide_of_chain, CHAIN_X, joint_of_chain),
    "mixture": (mixture, None, MIXTURE_X, exact_mixture),
    "spins": (spins, None, SPIN_X, joint_of_spins),
    "spins-plate": (spins_of_a_plate, None, SPIN_X, joint_of_spins),
    "net": (net, None, SPIN_X, joint_of_net),
}
