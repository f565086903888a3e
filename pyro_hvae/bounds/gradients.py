r"""Gradient estimators for functions of log-weights.

A bound is :math:`L=\mathrm E\,f(\log w_1,\dots,\log w_K)` with :math:`f` symmetric.  Each estimator here returns a
*surrogate*, a tensor per datum whose gradient is an estimate of :math:`\nabla L`; its value is of no interest.

======== =========================================================== ==========================================
name     what is differentiated                                      source
======== =========================================================== ==========================================
pathwise f, through the draws                                        Auto-Encoding Variational Bayes (Kingma and
                                                                     Welling, 2014); Burda et al. (2016)
stl      f, with log q held at the guide's present parameters        Sticking the Landing (Roeder, Wu and
                                                                     Duvenaud, 2017)
dreg     w̃², through the draws, and w̃, of the model's density        Doubly Reparameterized Gradient Estimators
                                                                     (Tucker et al., 2019)
score    f, plus (f - f without k) times log q of particle k at the  Variational Inference for Monte Carlo
         sites that have no reparameterisation                       Objectives (Mnih and Rezende, 2016)
======== =========================================================== ==========================================

``vimco`` is ``score`` under the name that it has for the importance-weighted bound; with one particle there is no
other to compare with, and the baseline is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_hvae.traces import Reading
from pyro_hvae.traces.parameters import graph_leaves
from pyro_hvae.traces.reading import total

__all__ = [
    "GRADIENTS",
    "Reduction",
    "averaged",
    "check_holdable",
    "dreg",
    "fold",
    "leave_one_out",
    "pathwise",
    "score",
    "stl",
]

Reduction = Callable[[Tensor], Tensor]


def pathwise(reading: Reading, reduce: Reduction, repeats: int = 1) -> Tensor:
    """Differentiate the estimate itself; every draw has to be reparameterised."""
    return averaged(reading.log_weights, reduce, repeats)


def stl(reading: Reading, reduce: Reduction, repeats: int = 1) -> Tensor:
    """Stop the gradient at the guide's parameters in log q, not in the draws.

    Unbiased for K = 1 only; zero variance where the guide is the exact posterior.
    """
    held = reading.replay(freeze=True, detach=False)
    log_weights = total(reading.log_p) - total(held.log_q)
    return averaged(log_weights.expand_as(reading.log_weights), reduce, repeats)


def dreg(reading: Reading, reduce: Reduction, repeats: int = 1) -> Tensor:
    r"""Doubly reparameterised gradient of the importance-weighted bound.

    .. math:: \sum_k \tilde w_k^2\,[\log p(x,z_k)-\log q(z_k|x)]_{\text{parameters held}}
              + \sum_k \tilde w_k\,[\log p(x,z_k)]_{\text{draws held}}

    The two brackets split the roles that a parameter shared by model and guide (a ladder) plays in both.
    """
    through_draws = reading.replay(freeze=True, detach=False)
    of_model = reading.replay(freeze=False, detach=True)
    weights = fold(reading.log_weights.detach(), repeats).softmax(0)
    log_p = fold(total(of_model.log_p).expand_as(reading.log_weights), repeats)
    surrogate = (weights**2 * fold(through_draws.log_weights, repeats) + weights * log_p).sum(0)
    return surrogate.mean(0) if repeats > 1 else surrogate


def check_holdable(reading: Reading, gradient: str) -> None:
    """Refuse ``stl`` and ``dreg`` where the guide's parameters can't be held in log q.

    They can't where the guide reads trainable tensors that it neither owns nor names; nor where a ``Delta`` site
    passes an auxiliary draw through a transformation that has parameters: the density of the draw has them too, but
    not as a function of the draw.

    Raises:
        ValueError: naming such a site, or the shapes of such tensors.
    """
    held = reading.replay(freeze=True, detach=True)
    loose = graph_leaves(term for term in held.log_q.values())
    if loose:
        shapes = [tuple(tensor.shape) for tensor in loose.values()]
        raise ValueError(
            f"the guide reads {len(shapes)} trainable tensor(s) of shapes {shapes[:5]} that are neither parameters of "
            f"its module nor pyro.param statements, so the {gradient!r} gradient can't hold them in log q and would "
            "be biased: register them, or use gradient='pathwise'"
        )
    if not any(site.guide_distribution == "Delta" for site in reading.structure.sites.values()):
        return
    moved = reading.replay(freeze=False, detach=True)
    for name in reading.structure.drawn:
        if reading.structure.sites[name].guide_distribution != "Delta":
            continue
        if any(part.requires_grad for part in _delta_parts(moved.guide_trace.nodes[name]["fn"])):
            raise ValueError(
                f"site '{name}' is a Delta that transforms auxiliary draws with parameters of the guide, so the "
                f"{gradient!r} gradient, which holds those in log q, would miss a part: use gradient='pathwise', or "
                "draw the site from a TransformedDistribution"
            )


def _delta_parts(fn: Any) -> list[Tensor]:
    while not isinstance(fn, Delta):
        fn = fn.base_dist
    return [part for part in (fn.v, fn.log_density) if isinstance(part, Tensor)]


def score(reading: Reading, reduce: Reduction, repeats: int = 1) -> Tensor:
    """Score function with a leave-one-out baseline at discrete sites, pathwise at the others."""
    log_weights = reading.log_weights
    estimate = averaged(log_weights, reduce, repeats)
    log_q = reading.score_log_q()
    if log_q is None:
        return estimate
    signal = leave_one_out(fold(log_weights.detach(), repeats), reduce)
    score_term = (signal * fold(log_q.expand_as(log_weights), repeats)).sum(0)
    return estimate + (score_term.mean(0) if repeats > 1 else score_term)


def fold(particles: Tensor, repeats: int) -> Tensor:
    """``(K * M, ...)`` as ``(K, M, ...)``; as it is for M = 1."""
    return particles if repeats == 1 else particles.unflatten(0, (-1, repeats))


def averaged(log_weights: Tensor, reduce: Reduction, repeats: int) -> Tensor:
    """Reduce each of M groups of particles, and average over the groups."""
    estimate = reduce(fold(log_weights, repeats))
    return estimate if repeats == 1 else estimate.mean(0)


def leave_one_out(log_weights: Tensor, reduce: Reduction) -> Tensor:
    """f(w) - f(w with the k-th log-weight replaced by the mean of the others), for each k; shape of the weights."""
    count = log_weights.shape[0]
    estimate = reduce(log_weights)
    if count == 1:
        return estimate.unsqueeze(0)
    others = (log_weights.sum(0, keepdim=True) - log_weights) / (count - 1)
    diagonal = torch.eye(count, dtype=torch.bool, device=log_weights.device)
    diagonal = diagonal.reshape(count, count, *(1 for _ in range(log_weights.dim() - 1)))
    replaced = torch.where(diagonal, others.unsqueeze(0), log_weights.unsqueeze(1))
    return estimate.unsqueeze(0) - reduce(replaced)


GRADIENTS: dict[str, Callable[[Reading, Reduction, int], Tensor]] = {
    "pathwise": pathwise,
    "stl": stl,
    "dreg": dreg,
    "score": score,
    "vimco": score,
}
