r"""Gradient estimators for functions of log-weights.

A bound is :math:`L=\mathrm E\,f(\log w_1,\dots,\log w_K)` with :math:`f` symmetric.  Each estimator here returns a
*surrogate*, a tensor per datum whose gradient is an estimate of :math:`\nabla L`; its value has no meaning.

======== =========================================================== ==========================================
name     what is differentiated                                      source
======== =========================================================== ==========================================
pathwise f, through the draws                                        Auto-Encoding Variational Bayes (Kingma and
                                                                     Welling, 2014); Burda et al. (2016)
stl      f, with the guide's parameters fixed in log q               Sticking the Landing (Roeder, Wu and
                                                                     Duvenaud, 2017)
dreg     w̃², through the draws, and w̃, of the model's density        Doubly Reparameterized Gradient Estimators
                                                                     (Tucker et al., 2019)
score    f, plus (f - f without k) times log q of particle k at the  Variational Inference for Monte Carlo
         sites that have no reparameterisation                       Objectives (Mnih and Rezende, 2016)
======== =========================================================== ==========================================

``vimco`` is the name of ``score`` for the importance-weighted bound.  With one particle the baseline is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_hvae import devices
from pyro_hvae.problem import Problem, Run, total
from pyro_hvae.problem.isolation import fingerprint
from pyro_hvae.problem.parameters import graph_leaves
from pyro_hvae.problem.supports import support_ends

__all__ = [
    "GRADIENTS",
    "Reduction",
    "averaged",
    "check_holdable",
    "check_replayable",
    "dreg",
    "fold",
    "leave_one_out",
    "means_of_others",
    "refuse_moved_deltas",
    "score",
    "signal",
    "stl",
    "without_each",
]

Reduction = Callable[[Tensor], Tensor]


def stl(run: Run, log_weights: Tensor, reduce: Reduction, repeats: int = 1) -> Tensor:
    """Stop the gradient at the guide's parameters in log q, not in the draws.

    Unbiased for K = 1 only; zero variance where the guide is the exact posterior.
    """
    held = run.replay(freeze=True, detach=False)
    return averaged((total(run.log_p) - total(held.log_q)).expand_as(log_weights), reduce, repeats)


def dreg(run: Run, log_weights: Tensor, reduce: Reduction, repeats: int = 1) -> Tensor:
    r"""Return the doubly reparameterised gradient of the importance-weighted bound.

    .. math:: \sum_k \tilde w_k^2\,[\log p(x,z_k)-\log q(z_k|x)]_{\text{parameters held}}
              + \sum_k \tilde w_k\,[\log p(x,z_k)]_{\text{draws held}}

    A parameter shared by model and guide (as in a ladder) gets a gradient from each of the two brackets.
    """
    through_draws = run.replay(freeze=True, detach=False)
    of_model = run.replay(freeze=False, detach=True)
    weights = fold(log_weights.detach(), repeats).softmax(0)
    log_p = fold(total(of_model.log_p).expand_as(log_weights), repeats)
    surrogate = (weights**2 * fold(through_draws.log_weights, repeats) + weights * log_p).sum(0)
    return surrogate.mean(0) if repeats > 1 else surrogate


def check_holdable(problem: Problem, run: Run, gradient: str) -> None:
    """Refuse ``stl`` and ``dreg`` where the guide's parameters can't be fixed in log q; checked once a structure.

    They can't be fixed where the guide reads trainable tensors that it neither owns nor names; where a ``Delta`` site
    transforms an auxiliary draw with parameters, since its density depends on them, but not as a function of the draw;
    where the support of a draw depends on the parameters; nor where a second run of the programs on the same draws
    gives other densities.

    Raises:
        ValueError: naming such a site, or the shapes of such tensors.
    """
    facts, key = run.structure.facts, ("holdable", gradient, fingerprint(problem.model, problem.guide))
    if key in facts:
        return
    check_replayable(problem, run, f"the {gradient!r} gradient")
    for name in run.structure.drawn:
        if _support_moves(run.guide_trace.nodes[name]["fn"]):
            raise ValueError(
                f"the support of site '{name}' depends on the parameters of the guide, so the mean of the score "
                f"is not zero and the {gradient!r} gradient would be biased: use gradient='pathwise', or a "
                "distribution with a fixed support"
            )
    held = run.replay(freeze=True, detach=True)
    try:
        unnamed = graph_leaves(term for term in held.log_q.values())
    except (KeyError, NotImplementedError) as error:
        raise ValueError(
            f"the guide draws from a flow without an inverse, so the {gradient!r} gradient can't evaluate log q with "
            f"its parameters held ({type(error).__name__}): use gradient='pathwise', or a flow with an inverse"
        ) from error
    if unnamed:
        shapes = [tuple(tensor.shape) for tensor in unnamed.values()]
        raise ValueError(
            f"the guide reads {len(shapes)} trainable tensor(s) of shapes {shapes[:5]} that are neither parameters of "
            f"its module nor pyro.param statements, so the {gradient!r} gradient can't hold them in log q and would "
            "be biased: register them, or use gradient='pathwise'"
        )
    refuse_moved_deltas(run, f"the {gradient!r} gradient, which holds the guide's parameters in log q")
    facts[key] = True


def refuse_moved_deltas(run: Run, what: str) -> None:
    """Refuse a ``Delta`` of the guide that transforms auxiliary draws with parameters.

    Its log-density at fixed draws does not have the right gradient in the parameters.

    Raises:
        ValueError: naming the site.
    """
    sites = run.structure.sites
    deltas = [name for name in run.structure.drawn if sites[name].guide_distribution == "Delta"]
    if not deltas:
        return
    moved = run.replay(freeze=False, detach=True)
    for name in deltas:
        if any(part.requires_grad for part in _delta_parts(moved.guide_trace.nodes[name]["fn"])):
            raise ValueError(
                f"site '{name}' is a Delta that transforms auxiliary draws with parameters of the guide, so {what}, "
                "would miss a part: use gradient='pathwise' (TraceELBO, IWELBO), or draw the site from a "
                "TransformedDistribution"
            )


def check_replayable(problem: Problem, run: Run, what: str) -> None:
    """Refuse programs that give other densities in a second run on the same draws; checked once a structure.

    Raises:
        ValueError: naming the sites.
    """
    facts, key = run.structure.facts, ("replayable", fingerprint(problem.model, problem.guide))
    if key in facts:
        return
    with torch.no_grad():
        again = run.replay(freeze=False, detach=True)
        changed = [
            name
            for first, second in ((run.log_p, again.log_p), (run.log_q, again.log_q))
            for name in first
            if not devices.close(first[name], second[name])
        ]
    if changed:
        raise ValueError(
            f"{what} runs the programs twice on the same draws, and the density of site(s) {sorted(set(changed))} "
            "differs the second time: networks draw noise of their own (dropout). Put them into evaluation mode, or "
            "use gradient='pathwise'"
        )
    facts[key] = True


def _support_moves(fn: Any) -> bool:
    """Whether an end of a distribution's support depends on trainable tensors."""
    for end in filter(devices.has_values, support_ends(fn)):
        leaves = list(graph_leaves([end]).values())
        if leaves:
            slopes = torch.autograd.grad(end.sum(), leaves, allow_unused=True, retain_graph=True)
            if any(slope is not None and bool((slope != 0).any()) for slope in slopes):
                return True
    return False


def _delta_parts(fn: Any) -> list[Tensor]:
    while not isinstance(fn, Delta):
        fn = fn.base_dist
    return [part for part in (fn.v, fn.log_density) if isinstance(part, Tensor)]


def score(
    run: Run, log_weights: Tensor, reduce: Reduction, repeats: int = 1, leave_out: Reduction | None = None
) -> Tensor:
    """Score function with a leave-one-out baseline at discrete sites, pathwise at the others.

    Args:
        leave_out: f less its baselines, by default :func:`leave_one_out`.
    """
    leave_out = partial(leave_one_out, reduce=reduce) if leave_out is None else leave_out
    estimate = averaged(log_weights, reduce, repeats)
    log_q = run.score_log_q()
    if log_q is None:
        return estimate
    weight = leave_out(fold(log_weights.detach(), repeats))
    score_term = (weight * fold(log_q.expand_as(log_weights), repeats)).sum(0)
    return estimate + (score_term.mean(0) if repeats > 1 else score_term)


def fold(particles: Tensor, repeats: int) -> Tensor:
    """Reshape ``(K * M, ...)`` to ``(K, M, ...)``; unchanged for M = 1."""
    return particles if repeats == 1 else particles.unflatten(0, (-1, repeats))


def averaged(log_weights: Tensor, reduce: Reduction, repeats: int) -> Tensor:
    """Reduce each of M groups of particles, and average over the groups."""
    estimate = reduce(fold(log_weights, repeats))
    return estimate if repeats == 1 else estimate.mean(0)


def leave_one_out(log_weights: Tensor, reduce: Reduction) -> Tensor:
    """Return f(w) - f(w with the k-th log-weight replaced by a mean of the others) for each k; shape of the weights.

    Computed in chunks of bounded size; bounds with a closed form override it at linear cost.
    """
    count = log_weights.shape[0]
    estimate = reduce(log_weights)
    if count == 1:
        return estimate.unsqueeze(0)
    others = means_of_others(log_weights)
    size = max(1, 2_000_000 // log_weights.numel())
    baselines = []
    for start in range(0, count, size):
        part = torch.arange(start, min(start + size, count), device=log_weights.device)
        replaced = log_weights.unsqueeze(1).repeat(1, len(part), *(1 for _ in log_weights.shape[1:]))
        replaced[part, part - start] = others[part]  # dim 0: draws, dim 1: k
        baselines.append(reduce(replaced))
    return signal(estimate, torch.cat(baselines))


def signal(estimate: Tensor, baselines: Tensor) -> Tensor:
    """Return the factor of each draw's score, estimate less baseline; a baseline of -inf counts as 0."""
    return estimate.unsqueeze(0) - baselines.masked_fill(baselines == -math.inf, 0.0)


def means_of_others(log_weights: Tensor) -> Tensor:
    """Return the mean log-weight of the other draws, for each draw.

    Where another weight is zero, the logarithm of their mean weight replaces it.
    """
    count = log_weights.shape[0]
    zero = log_weights == -math.inf
    finite = log_weights.masked_fill(zero, 0.0)
    means = (finite.sum(0, keepdim=True) - finite) / (count - 1)
    others_have_zero = (zero.sum(0, keepdim=True) - zero.to(torch.long)) > 0
    return torch.where(others_have_zero, without_each(log_weights) - math.log(count - 1), means)


def without_each(log_weights: Tensor) -> Tensor:
    """Log of the sum of all weights but the k-th, for each k, by sums from either side."""
    none = log_weights.new_full((1, *log_weights.shape[1:]), -math.inf)
    before = torch.cat([none, log_weights.logcumsumexp(0)[:-1]])
    after = torch.cat([log_weights.flip(0).logcumsumexp(0).flip(0)[1:], none])
    return torch.logaddexp(before, after)


GRADIENTS: dict[str, Callable[..., Tensor]] = {
    "stl": stl,
    "dreg": dreg,
    "score": score,
    "vimco": score,
}
