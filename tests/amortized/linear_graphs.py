"""Linear-Gaussian graphs, of which the evidence and every conditional are known in closed form.

Each node is a number for each datum: N(sum of its parents by weights, variance).  With B the weights and S the
variances the joint covariance is inv(I - B) S inv(I - B)'.
"""

import pyro
import pyro.distributions as dist
import torch


class LinearGraph:
    """A model of the graph, called with one keyword for each observed node."""

    def __init__(self, parents, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.parents, self.names = parents, list(parents)
        self.observed = [name for name in parents if name.startswith("x")]
        self.latents = [name for name in parents if name not in self.observed]
        size = len(parents)
        self.weights = torch.zeros(size, size)
        for row, name in enumerate(self.names):
            for parent in parents[name]:
                weight = 0.6 + 0.6 * torch.rand((), generator=generator)
                sign = 1.0 if torch.rand((), generator=generator) < 0.5 else -1.0
                self.weights[row, self.names.index(parent)] = sign * weight
        self.variances = 0.4 + torch.rand(size, generator=generator)
        inverse = torch.linalg.inv(torch.eye(size) - self.weights)
        self.covariance = inverse @ torch.diag(self.variances) @ inverse.T

    def model(self, **x):
        values = {}
        with pyro.plate("data", len(next(iter(x.values())))):
            for row, name in enumerate(self.names):
                loc = sum(self.weights[row, self.names.index(p)] * values[p] for p in self.parents[name])
                fn = dist.Normal(loc + torch.zeros(()), self.variances[row].sqrt())
                values[name] = pyro.sample(name, fn, obs=x.get(name))

    def draw(self, count, seed=1):
        """Draws of all nodes, (count, nodes)."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, len(self.names), generator=generator)
        return noise @ torch.linalg.cholesky(self.covariance).T

    def data(self, draws):
        return {name: draws[:, self.names.index(name)] for name in self.observed}

    def index(self, names):
        return torch.tensor([self.names.index(name) for name in names], dtype=torch.long)

    def log_evidence(self, draws):
        at = self.index(self.observed)
        covariance = self.covariance[at][:, at]
        return dist.MultivariateNormal(torch.zeros(len(at)), covariance).log_prob(draws[:, at])

    def conditional(self, name, given):
        """Gain and variance of a node given others."""
        a, b = self.index([name]), self.index(given)
        cross, inner = self.covariance[a][:, b], self.covariance[b][:, b]
        gain = cross @ torch.linalg.inv(inner) if len(given) else torch.zeros(1, 0)
        return gain[0], (self.covariance[a][:, a] - gain @ cross.T)[0, 0]

    def mutual_information(self, name, other, given):
        """I(name; other | given) in nats."""
        without = self.conditional(name, list(given))[1]
        return 0.5 * torch.log(without / self.conditional(name, [*given, other])[1])


def random_graph(count, seed):
    """A random graph; a third of the nodes, and every node without children, is observed."""
    generator = torch.Generator().manual_seed(seed)
    links = torch.rand(count, count, generator=generator) < 2.0 / count
    seen = torch.rand(count, generator=generator) < 1 / 3
    names = []
    for node in range(count):
        childless = not links[node + 1 :, node].any()
        names.append(f"x{node}" if bool(seen[node]) or childless else f"z{node}")
    return {names[node]: [names[j] for j in range(node) if links[node, j]] for node in range(count)}
