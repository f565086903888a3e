"""Eight schools (Rubin, 1981), and the mean-field guides with the largest ELBO."""

import pyro
import pyro.distributions as dist
import torch

__all__ = ["SCHOOLS", "eight_schools"]

SCHOOLS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

FITTED = {
    True: {
        "mu": [4.1, 1.782],
        "tau": [1.751, 0.242],
        "local": [
            [6.805, 4.973, 3.332, 4.636, 2.708, 3.501, 7.226, 4.702],
            [5.097, 4.768, 5.124, 4.87, 4.637, 4.856, 4.714, 5.152],
        ],
    },
    False: {
        "mu": [4.507, 3.158],
        "tau": [0.813, 0.725],
        "local": [
            [0.291, 0.078, -0.084, 0.055, -0.174, -0.079, 0.346, 0.073],
            [0.972, 0.947, 0.974, 0.954, 0.925, 0.952, 0.922, 0.97],
        ],
    },
}
"""Location and scale of AutoNormal's sites after 4,500 steps of TraceELBO; tau's are those of its logarithm."""


def eight_schools(centred):
    """The model, and the mean-field guide with the largest ELBO, as AutoNormal found it."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", 8):
            if centred:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, ERRORS), obs=y)

    numbers = FITTED[centred]

    def guide(y):
        pyro.sample("mu", dist.Normal(*torch.tensor(numbers["mu"])))
        pyro.sample("tau", dist.LogNormal(*torch.tensor(numbers["tau"])))
        with pyro.plate("school", 8):
            pyro.sample("theta" if centred else "eta", dist.Normal(*torch.tensor(numbers["local"])))

    return model, guide
