"""Values of NumPyro's estimators on one model, data and guide, for comparison in ``tests/bounds/test_numpyro.py``.

    pip install numpyro jax      # the extra `bench`
    python benchmarks/numpyro_values.py

z_n ~ N(0, 1), x_n | z_n ~ N(z_n, 1), guide N(0, 1.3); 40 data on a grid of [-2, 2], minibatches of 4.  Printed are
means and standard errors over repeats, of the loss that `svi.evaluate`-like calls return.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import RenyiELBO, Trace_ELBO

DATA = jnp.linspace(-2.0, 2.0, 40)
REPEATS = 20_000


def model(x, size=40):
    with numpyro.plate("data", size, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x, size=40):
    with numpyro.plate("data", size, subsample_size=len(x)):
        numpyro.sample("z", dist.Normal(0.0, 1.3))


def repeated(loss, batch):
    def once(key):
        pick, draw = jax.random.split(key)
        rows = jax.random.permutation(pick, 40)[:batch]
        return loss.loss(draw, {}, model, guide, DATA[rows])

    values = jax.lax.map(once, jax.random.split(jax.random.PRNGKey(0), REPEATS))
    return float(values.mean()), float(values.std() / REPEATS**0.5)


if __name__ == "__main__":
    numpyro.enable_x64()
    for name, loss in {
        "Trace_ELBO(num_particles=10)": Trace_ELBO(num_particles=10),
        "RenyiELBO(alpha=0, num_particles=10)": RenyiELBO(alpha=0.0, num_particles=10),
        "RenyiELBO(alpha=0.5, num_particles=10)": RenyiELBO(alpha=0.5, num_particles=10),
    }.items():
        for batch in (40, 4):
            mean, error = repeated(loss, batch)
            print(f"{name} batch {batch}: {mean:.4f} +- {error:.4f}")
