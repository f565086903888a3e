r"""Split the gap between the bound and the evidence into approximation and amortisation.

.. math:: \log p(x) - \mathrm{ELBO}(q) = \mathrm{KL}\bigl(q(z|x)\,\|\,p(z|x)\bigr)
          = \underbrace{\log p(x) - \mathrm{ELBO}(q^*)}_{\text{approximation}}
          + \underbrace{\mathrm{ELBO}(q^*) - \mathrm{ELBO}(q)}_{\text{amortisation}}

with :math:`q^*` the best member of the guide's family for this one datum.  A richer family would lower the first part;
a larger inference network or longer training would lower the second.

The family is the guide with free parameters for each of its sites and data: a Normal is shifted and rescaled, a
multivariate Normal is shifted and its Cholesky factor multiplied by a lower-triangular matrix, and any other density
is shifted and rescaled on the real line, mapped to its support.  With one latent site these are all Gaussians of that
kind; with several, the network's dependence of a site on the others stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.transforms import AffineTransform
from tqdm.auto import trange

from pyro_hvae.evidence.importance import Evidence, Sampling, draw_log_weights, log_evidence
from pyro_hvae.problem import Problem, of_pair

__all__ = ["PosteriorGap", "RefinedGuide", "posterior_gap", "refine"]


@dataclass(frozen=True)
class PosteriorGap:
    """log p(x) - ELBO in two parts, in nats, shape of the plates common to all sites.

    Attributes:
        evidence: log p(x), with its error.
        elbo: of the guide.
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
        """Gap of the best member of the family: log p(x) - ELBO(q*)."""
        return self.evidence.value - self.refined_elbo

    @property
    def amortisation(self) -> Tensor:
        """Gap of the network: ELBO(q*) - ELBO(q)."""
        return self.refined_elbo - self.elbo

    def __str__(self) -> str:
        good = self.evidence.good
        poor = int((self.evidence.khat > good).sum())
        who = f", mean over {self.elbo.numel()} data" if self.elbo.dim() else ""
        whom = f" for {poor}" if self.elbo.dim() else ""
        return (
            f"log p(x) - ELBO{who}: {float(self.total.mean()):.4f} nats = approximation "
            f"{float(self.approximation.mean()):.4f} + amortisation {float(self.amortisation.mean()):.4f}"
            + (f"; not to be trusted{whom}, where log p(x) has k-hat above {good:.2f}" if poor else "")
        )


@of_pair
def posterior_gap(
    problem: Problem,
    *,
    num_samples: int = 1000,
    num_steps: int = 500,
    learning_rate: float = 0.05,
    method: str = "importance",
    progress: bool = False,
) -> PosteriorGap:
    r"""Split log p(x) - ELBO = KL(q(z|x) || p(z|x)) into approximation and amortisation gap, per datum.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``; or a bound
            :class:`~pyro_hvae.problem.Problem` instead of all of these.
        num_samples: draws for each of the two bounds and for the evidence.
        num_steps, learning_rate: of the refinement, see :func:`refine`.
        method: of :func:`pyro_hvae.evidence.log_evidence`, with the refined guide as the proposal.
        progress: show a bar.

    Returns:
        :class:`PosteriorGap`.

    Raises:
        ValueError: for a discrete latent, or as :func:`pyro_hvae.evidence.log_evidence`.

    Reference:
        Inference Suboptimality in Variational Autoencoders (Cremer, Li and Duvenaud, 2018).

    Example:
        >>> from pyro_hvae.conjugate import guide, model
        >>> _ = torch.manual_seed(0)
        >>> gap = posterior_gap(model, guide(slope=0.0), torch.tensor([0.0, 2.0]))
        >>> bool((gap.total - torch.tensor([0.0, 1.0])).abs().max() < 0.1)
        True
        >>> bool(gap.approximation.abs().max() < 0.02)
        True
    """
    sampling = Sampling(num_samples, None, progress)
    before = draw_log_weights(problem, sampling)
    guide = refine(problem, num_steps=num_steps, learning_rate=learning_rate, progress=progress)
    refined = problem.with_guide(guide)
    after = draw_log_weights(refined, sampling)
    evidence = log_evidence(refined, num_samples=num_samples, method=method, progress=progress)
    return PosteriorGap(
        evidence=evidence,
        elbo=before.mean(0),
        refined_elbo=after.mean(0),
        elbo_stderr=before.std(0) / num_samples**0.5,
        refined_stderr=after.std(0) / num_samples**0.5,
        guide=guide,
    )


@of_pair
def refine(
    problem: Problem,
    *,
    num_steps: int = 500,
    num_particles: int = 16,
    learning_rate: float = 0.05,
    progress: bool = False,
) -> RefinedGuide:
    """Maximise the ELBO of every datum over its own free parameters; model and guide keep theirs.

    Args:
        num_steps: of Adam, with a cosine schedule from ``learning_rate`` to a hundredth of it.
        num_particles: draws a step.

    Raises:
        ValueError: for a guide with a discrete site, or counts below one.
    """
    if num_steps < 1 or num_particles < 1 or not learning_rate > 0:
        raise ValueError(
            "need num_steps >= 1, num_particles >= 1 and learning_rate > 0, got "
            f"{num_steps}, {num_particles}, {learning_rate}"
        )
    guide = RefinedGuide(problem)
    refined = problem.with_guide(guide)
    free = list(guide.parameters())
    optimizer = torch.optim.Adam(free, lr=learning_rate)
    for step in trange(num_steps, disable=not progress, desc="refining", unit="step"):
        fraction = step / num_steps
        optimizer.param_groups[0]["lr"] = learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fraction)))
        with torch.enable_grad():
            weights = refined.run(num_particles).log_weights
            # The data share no free parameter, so the gradient of the sum is that of each.
            slopes = torch.autograd.grad(-weights.mean(0).sum(), free)
        for parameter, slope in zip(free, slopes, strict=True):
            parameter.grad = slope
        optimizer.step()
    return guide


class RefinedGuide(nn.Module):
    """A guide with free parameters for each datum of one data set; the original guide's parameters stay fixed.

    Args:
        problem: a model and a guide with the data.

    Raises:
        ValueError: for a guide with a site that can't be reparameterised.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self._held = (problem.guide,)  # in a tuple, so that the guide is not registered as a submodule
        structure = problem.structure
        fixed = [name for name in structure.drawn if not structure.sites[name].has_rsample]
        if fixed:
            raise ValueError(
                f"site(s) {fixed} of the guide are discrete or have no reparameterised draws, so they can't be refined "
                "by gradient: sum them out in the model, or compare with log_evidence alone"
            )
        trace = problem.template
        self.names = {}
        for number, name in enumerate(structure.drawn):
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
        """Return the refined distribution of a site."""
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
    """Return a distribution without its declared event dims, and their number."""
    events = 0
    while isinstance(fn, torch.distributions.Independent):
        events += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    return fn, events
