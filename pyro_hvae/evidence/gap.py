r"""How far the bound is from the evidence, and whose fault it is.

.. math:: \log p(x) - \mathrm{ELBO}(q) = \mathrm{KL}\bigl(q(z|x)\,\|\,p(z|x)\bigr)
          = \underbrace{\log p(x) - \mathrm{ELBO}(q^*)}_{\text{approximation}}
          + \underbrace{\mathrm{ELBO}(q^*) - \mathrm{ELBO}(q)}_{\text{amortisation}}

with :math:`q^*` the best member of the guide's family for this one datum.  The first part is the family's, and a richer
guide would lower it; the second is the inference network's, and a longer or larger training would.

The family is what becomes of the guide when each of its sites has free numbers a datum: a Normal is shifted and
rescaled, a multivariate Normal is shifted and its Cholesky factor multiplied by a lower-triangular matrix, and anything
else with a density is shifted and rescaled on the real line that its support is mapped to.  With one latent site
these are all Gaussians of that kind; with several, the network's dependence of a site on the others stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.transforms import AffineTransform
from tqdm.auto import trange

from pyro_hvae.evidence.importance import Evidence, drawn_weights, log_evidence
from pyro_hvae.traces import read, structure

__all__ = ["PosteriorGap", "RefinedGuide", "posterior_gap", "refine"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class PosteriorGap:
    """log p(x) - ELBO in two parts, in nats, shape of the plates common to all sites.

    Attributes:
        evidence: log p(x), with its error.
        elbo: of the guide as it is.
        refined_elbo: of the guide refined for each datum.
        elbo_stderr, refined_stderr: Monte Carlo errors of the two.
        guide: the refined guide, a Pyro program for the same data.
    """

    evidence: Evidence
    elbo: Tensor
    refined_elbo: Tensor
    elbo_stderr: Tensor
    refined_stderr: Tensor
    guide: RefinedGuide

    @property
    def total(self) -> Tensor:
        """KL(q(z|x) || p(z|x))."""
        return self.evidence.value - self.elbo

    @property
    def approximation(self) -> Tensor:
        """What the best member of the family leaves: log p(x) - ELBO(q*)."""
        return self.evidence.value - self.refined_elbo

    @property
    def amortisation(self) -> Tensor:
        """What the network leaves of that: ELBO(q*) - ELBO(q)."""
        return self.refined_elbo - self.elbo

    def __str__(self) -> str:
        poor = int((self.evidence.khat >= 0.7).sum())
        return (
            f"log p(x) - ELBO, mean over {self.elbo.numel()} data: {float(self.total.mean()):.4f} nats = approximation "
            f"{float(self.approximation.mean()):.4f} + amortisation {float(self.amortisation.mean()):.4f}"
            + (f"; not to be trusted for {poor}, where log p(x) has k-hat >= 0.7" if poor else "")
        )


def posterior_gap(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 1000,
    num_steps: int = 500,
    num_particles: int = 16,
    learning_rate: float = 0.05,
    method: str = "importance",
    chunk_size: int | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> PosteriorGap:
    r"""Split log p(x) - ELBO = KL(q(z|x) || p(z|x)) into approximation and amortisation gap, per datum.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``.
        num_samples: draws for each of the two bounds and for the evidence.
        num_steps, num_particles, learning_rate: of the refinement, see :func:`refine`.
        method: of :func:`pyro_hvae.evidence.log_evidence`, with the refined guide as the proposal.
        chunk_size: draws that run at once.
        progress: show a bar.

    Returns:
        :class:`PosteriorGap`.

    Raises:
        ValueError: for a discrete latent, or as :func:`pyro_hvae.evidence.log_evidence`.

    Reference:
        Inference Suboptimality in Variational Autoencoders (Cremer, Li and Duvenaud, 2018).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(torch.zeros_like(x), 0.5**0.5))
        >>> gap = posterior_gap(model, guide, torch.tensor([0.0, 2.0]))
        >>> bool((gap.total - torch.tensor([0.0, 1.0])).abs().max() < 0.1)
        True
        >>> bool(gap.approximation.abs().max() < 0.02)
        True
    """
    plain = drawn_weights(model, guide, args, kwargs, num_samples, chunk_size, progress)
    refined = refine(
        model,
        guide,
        *args,
        num_steps=num_steps,
        num_particles=num_particles,
        learning_rate=learning_rate,
        progress=progress,
        **kwargs,
    )
    better = drawn_weights(model, refined, args, kwargs, num_samples, chunk_size, progress)
    evidence = log_evidence(
        model,
        refined,
        *args,
        num_samples=num_samples,
        method=method,
        chunk_size=chunk_size,
        progress=progress,
        **kwargs,
    )
    return PosteriorGap(
        evidence=evidence,
        elbo=plain.mean(0),
        refined_elbo=better.mean(0),
        elbo_stderr=plain.std(0) / num_samples**0.5,
        refined_stderr=better.std(0) / num_samples**0.5,
        guide=refined,
    )


def refine(
    model: Program,
    guide: Program,
    *args: Any,
    num_steps: int = 500,
    num_particles: int = 16,
    learning_rate: float = 0.05,
    progress: bool = False,
    **kwargs: Any,
) -> RefinedGuide:
    """Maximise the ELBO of every datum over free numbers of its own; model and guide keep their parameters.

    Args:
        num_steps: of Adam, whose rate falls along a cosine from ``learning_rate`` to a hundredth of it.
        num_particles: draws a step.

    Raises:
        ValueError: for a guide with a discrete site, or counts below one.
    """
    if num_steps < 1 or num_particles < 1 or not learning_rate > 0:
        raise ValueError(
            "need num_steps >= 1, num_particles >= 1 and learning_rate > 0, got "
            f"{num_steps}, {num_particles}, {learning_rate}"
        )
    refined = RefinedGuide(model, guide, args, kwargs)
    free = list(refined.parameters())
    optimizer = torch.optim.Adam(free, lr=learning_rate)
    for step in trange(num_steps, disable=not progress, desc="refining", unit="step"):
        fraction = step / num_steps
        optimizer.param_groups[0]["lr"] = learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fraction)))
        weights = read(model, refined, args, kwargs, num_particles=num_particles).log_weights
        # The data share no free number, so the gradient of the sum is that of each.
        slopes = torch.autograd.grad(-weights.mean(0).sum(), free)
        for number, slope in zip(free, slopes, strict=True):
            number.grad = slope.nan_to_num()
        optimizer.step()
    return refined


class RefinedGuide(PyroModule):
    """A guide with free numbers for each datum of the arguments it was made for.

    The free numbers are its parameters; the guide's own are not, and stay as they are.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``.

    Raises:
        ValueError: for a guide with a site that can't be reparameterised.
    """

    def __init__(self, model: Program, guide: Program, args: tuple, kwargs: Any) -> None:
        super().__init__("refined")
        self._held = (guide,)  # a tuple, so that the guide's parameters are not taken for this module's
        found = structure(model, guide, args, kwargs)
        rigid = [name for name in found.drawn if not found.sites[name].has_rsample]
        if rigid:
            raise ValueError(
                f"site(s) {rigid} of the guide are discrete or have no reparameterised draws, so they can't be refined "
                "by gradient: sum them out in the model, or compare with log_evidence alone"
            )
        trace = read(model, guide, args, kwargs).guide_trace
        self.names = {}
        for number, name in enumerate(found.drawn):
            fn = trace.nodes[name]["fn"]
            leaf, _ = _unwrap(fn)
            if isinstance(leaf, dist.Delta):
                continue
            self.names[name] = f"site{number}"
            shape = fn.shape()
            if not isinstance(leaf, (dist.Normal, dist.MultivariateNormal)):
                shape = biject_to(fn.support).inverse_shape(shape)
            like = trace.nodes[name]["value"].new_zeros(())
            setattr(self, f"shift_{self.names[name]}", nn.Parameter(like.new_zeros(shape)))
            setattr(self, f"stretch_{self.names[name]}", nn.Parameter(like.new_zeros(shape)))
            if isinstance(leaf, dist.MultivariateNormal):
                setattr(self, f"shear_{self.names[name]}", nn.Parameter(like.new_zeros(*shape, shape[-1])))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Refine(self):
            return self._held[0](*args, **kwargs)

    def distribution(self, name: str, fn: Any) -> Any:
        """The refined distribution of a site."""
        key = self.names[name]
        shift, stretch = getattr(self, f"shift_{key}"), getattr(self, f"stretch_{key}").exp()
        leaf, events = _unwrap(fn)
        if isinstance(leaf, dist.Normal):
            return dist.Normal(leaf.loc + shift, leaf.scale * stretch).to_event(events)
        if isinstance(leaf, dist.MultivariateNormal):
            shear = getattr(self, f"shear_{key}").tril(-1) + torch.diag_embed(stretch)
            return dist.MultivariateNormal(leaf.loc + shift, scale_tril=shear @ leaf.scale_tril).to_event(events)
        to_support = biject_to(fn.support)
        affine = AffineTransform(shift, stretch, event_dim=to_support.domain.event_dim)
        return dist.TransformedDistribution(fn, [to_support.inv, affine, to_support])


class _Refine(Messenger):
    def __init__(self, refined: RefinedGuide) -> None:
        super().__init__()
        self.refined = refined

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.refined.names and not site_is_subsample(msg):
            msg["fn"] = self.refined.distribution(msg["name"], msg["fn"])


def _unwrap(fn: Any) -> tuple[Any, int]:
    """A distribution without the event dims that were declared around it, and their number."""
    events = 0
    while isinstance(fn, torch.distributions.Independent):
        events += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    return fn, events
