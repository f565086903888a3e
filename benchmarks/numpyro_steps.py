"""The same hierarchical VAE in NumPyro: ``svi.update`` jitted, and many updates in one ``lax.scan`` (extra
``bench``)."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO

__all__ = ["numpyro_steps"]


def numpyro_steps(
    x: np.ndarray, latents: list[int], hidden: tuple[int, ...], particles: int, scanned: int
) -> dict[str, Callable[[], object]]:
    """Steps by name: ``numpyro`` makes one, ``scan`` makes ``scanned`` of them in one call."""
    pixels = x.shape[1]

    def mlp(name: str, value: jnp.ndarray, out: int) -> jnp.ndarray:
        widths = [value.shape[-1], *hidden, out]
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            key = jax.random.key(hash((name, layer)) % 2**31)
            bound = (6.0 / (fan_in + fan_out)) ** 0.5
            start = jax.random.uniform(key, (fan_in, fan_out), minval=-bound, maxval=bound)
            weight = numpyro.param(f"{name}_w{layer}", start)
            bias = numpyro.param(f"{name}_b{layer}", jnp.zeros(fan_out))
            value = value @ weight + bias
            value = jnp.tanh(value) if layer + 1 < len(widths) - 1 else value
        return value

    def gaussian(name: str, parent: jnp.ndarray, width: int) -> dist.Distribution:
        loc, raw = jnp.split(mlp(name, parent, 2 * width), 2, -1)
        return dist.Normal(loc, jax.nn.softplus(raw) + 1e-4).to_event(1)

    def model(x: jnp.ndarray) -> None:
        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample(f"z{len(latents)}", dist.Normal(jnp.zeros(latents[-1]), 1.0).to_event(1))
            for t in range(len(latents) - 1, 0, -1):
                z = numpyro.sample(f"z{t}", gaussian(f"p{t}", z, latents[t - 1]))
            numpyro.sample("x", dist.Bernoulli(logits=mlp("px", z, pixels)).to_event(1), obs=x)

    def guide(x: jnp.ndarray) -> None:
        with numpyro.plate("data", x.shape[0]):
            parent = x
            for t, width in enumerate(latents, start=1):
                parent = numpyro.sample(f"z{t}", gaussian(f"q{t}", parent, width))

    # RenyiELBO at alpha=0 is the importance-weighted bound.
    loss = Trace_ELBO() if particles == 1 else RenyiELBO(alpha=0.0, num_particles=particles)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), loss)
    data = jnp.asarray(x)
    state = svi.init(jax.random.key(0), data)
    update = jax.jit(svi.update)

    @jax.jit
    def many(state: object, batches: jnp.ndarray) -> tuple[object, jnp.ndarray]:
        return lax.scan(svi.update, state, batches)

    # A batch of its own for each step, so that nothing can be computed once for all.
    batches = jnp.asarray(np.stack([np.roll(x, shift, 0) for shift in range(scanned)]))
    held = {"update": state, "scan": state}

    def one() -> object:
        held["update"], loss = update(held["update"], data)
        return loss.block_until_ready()

    def scan() -> object:
        held["scan"], losses = many(held["scan"], batches)
        return losses.block_until_ready()

    return {"numpyro": one, "scan": scan}
