r"""Sequential Monte Carlo along the draws of a pair, for each datum of a minibatch with its own resampling.

With proposals :math:`q(z_s|z_{<s})`, targets :math:`\gamma_s` and twists :math:`\psi_s > 0` (:math:`\psi_0=\psi_S=1`)
the weights of the particles are multiplied at stage s by

.. math:: \alpha_s = \frac{\gamma_s(z_{\le s})\,\psi_s(z_s)}
                    {\gamma_{s-1}(z_{<s})\,\psi_{s-1}(z_{s-1})\,q(z_s|z_{<s})},

and the estimate :math:`\hat Z` is the product, over the last stage and those after which particles were resampled, of
the mean weight since the resampling before.  :math:`\mathrm E\hat Z = p(x)` for every number of particles.

Reference: Filtering Variational Objectives (Maddison et al., 2017); Auto-Encoding Sequential Monte Carlo (Le et al.,
2018); Variational Sequential Monte Carlo (Naesseth et al., 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.bounds.resampling import ancestors_of, gather
from pyro_hvae.bounds.stepwise import Move, Node, Stage
from pyro_hvae.weights import log_mean_exp

__all__ = ["Filtered", "Resampling", "run_particles"]

Twist = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Resampling:
    """How particles are resampled.

    Attributes:
        scheme: ``"systematic"``, ``"multinomial"`` or ``"none"``.
        ess_threshold: resample the particles of a datum where their effective number is below this share of K.
        score: keep the terms of the score-function gradient.
    """

    scheme: str
    ess_threshold: float
    score: bool = False


@dataclass
class Filtered:
    """The particles of all data after the last stage.

    Attributes:
        log_evidence: log Zhat, shape of the plates, in nats.
        log_weights: of the last particles, since they were last resampled, (K, *plates).
        ess: effective number of particles at each stage before resampling, (S, *plates).
        resampled: where particles were resampled after a stage, (S, *plates), boolean.
        ancestors: of the particles at each stage but the first, (S - 1, K, *plates); empty unless kept.
        draws: values by site as they were drawn, (K, *plates, *event); empty unless kept.
        last: values by name at the last stage, without those that the stages drop, (K, *plates, *event).
    """

    log_evidence: Tensor
    log_weights: Tensor
    ess: Tensor
    resampled: Tensor
    ancestors: list[Tensor] = field(default_factory=list)
    draws: dict[str, Tensor] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    _scores: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def score_term(self) -> Tensor:
        """Return the score-function term of the gradient: each random choice's score times what comes after it.

        A choice only changes the estimate from its stage on.  The mean of the same quantity over the other data of
        the batch is subtracted; it is independent of the choice, so the expectation is the same.
        """
        total = torch.zeros_like(self.log_evidence)
        for score, start in self._scores:
            reward = (self.log_evidence - start).detach()
            total = total + score * (reward - _mean_of_others(reward))
        return total

    def paths(self) -> dict[str, Tensor]:
        """Return the values by site along the ancestry of the last particles, (K, *plates, *event)."""
        paths: dict[str, Tensor] = {}
        index: Tensor | None = None
        for stage, (site, value) in reversed(list(enumerate(self.draws.items()))):
            paths[site] = value if index is None else gather(value, index)
            if stage:
                ancestors = self.ancestors[stage - 1]
                index = ancestors if index is None else ancestors.gather(0, index)
        return dict(reversed(paths.items()))


def run_particles(
    stages: Sequence[Stage | Move],
    shape: tuple[int, ...],
    resampling: Resampling,
    *,
    twist: Twist | None = None,
    retained: Mapping[str, Tensor] | None = None,
    keep: bool = False,
) -> Filtered:
    """Run K particles through the stages of a pair.

    Args:
        stages: in the order of the guide; or the parts of programs that keep a state (:func:`segments_of`).
        shape: (K, *plates).
        twist: log psi of the stage (counted from 0) and its draw, broadcasting to ``shape``; not called at the last.
        retained: a path, values by site (*plates, *event), which particle 0 follows instead of its own draws
            (conditional sequential Monte Carlo); needs multinomial resampling.
        keep: keep draws and ancestors, for :meth:`Filtered.paths`.

    Raises:
        ValueError: for a draw that has other dims than ``shape`` and its event.
    """
    last = len(stages) - 1
    if retained is not None:
        names = [stage.draw[1] for stage in stages if isinstance(stage, Stage)]
        lacking = [name for name in names if name not in retained]
        if lacking:
            raise ValueError(f"samples lack {lacking[:5]}, which the guide draws; they have {sorted(retained)[:5]}")
    values: dict[str, Tensor] = {}
    log_weights: Any = None
    log_psi: Any = 0.0
    done: Any = 0.0
    none = torch.empty(0)
    filtered = Filtered(none, none, none, none)
    ess, resampled = [], []
    identity: Tensor | None = None
    for index, stage in enumerate(stages):
        start = done if log_weights is None else done + log_mean_exp(log_weights)
        if isinstance(stage, Stage):
            increment, score = _advance(stage, values, shape, retained)
            value = values[stage.draw[1]]
            if twist is not None:
                following = twist(index, value) if index < last else 0.0
                increment, log_psi = increment + (following - log_psi), following
            if keep:
                filtered.draws[stage.draw[1]] = value
            for name in stage.dropped:
                values.pop(name, None)
        else:
            increment, score = stage(values, shape)
            if not isinstance(increment, Tensor):
                increment = torch.zeros(())
        log_weights = increment if log_weights is None else log_weights + increment
        log_weights = log_weights.expand(shape)
        if score is not None and resampling.score:
            filtered._scores.append((score, _detached(start)))
        effective = _effective(log_weights)
        ess.append(effective)
        if index == last or resampling.scheme == "none":
            resampled.append(torch.zeros(shape[1:], dtype=torch.bool, device=log_weights.device))
            if keep and index < last:
                filtered.ancestors.append(_identity(shape, log_weights.device))
            continue
        # equal weights are left as they are: resampling would only lose particles
        chosen = effective < resampling.ess_threshold * shape[0] * (1 - 1e-6)
        resampled.append(chosen)
        if identity is None:
            identity = _identity(shape, log_weights.device)
        ancestors = ancestors_of(log_weights, resampling.scheme)
        if retained is not None:
            ancestors[0] = 0
        ancestors = torch.where(chosen, ancestors, identity)
        done = done + torch.where(chosen, log_mean_exp(log_weights), log_weights.new_zeros(()))
        if resampling.score:
            of_ancestors = _log_normalised(log_weights).gather(0, ancestors).sum(0)
            zero = torch.zeros_like(of_ancestors)
            filtered._scores.append((torch.where(chosen, of_ancestors, zero), _detached(done)))
        log_weights = torch.where(chosen, log_weights.new_zeros(()), log_weights)
        values = {name: gather(value, ancestors) for name, value in values.items()}
        if isinstance(log_psi, Tensor):
            log_psi = gather(log_psi.expand(shape), ancestors)
        if keep:
            filtered.ancestors.append(ancestors)
    filtered.log_evidence = done + log_mean_exp(log_weights)
    filtered.log_weights, filtered.last = log_weights, values
    filtered.ess, filtered.resampled = torch.stack(ess), torch.stack(resampled)
    return filtered


def _advance(
    stage: Stage, values: dict[str, Tensor], shape: tuple[int, ...], retained: Mapping[str, Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """Draw a stage's site and compute what follows from it; return the weights' increment and the draw's score."""
    for node in stage.before:
        values[node[1]] = _value(node, values)
    name = stage.draw[1]
    values[name], log_q, score = _draw(stage.draw, values, shape, None if retained is None else retained[name])
    increment = -log_q
    for node in stage.after:
        if node[0] == "value":
            values[node[1]] = _value(node, values)
        else:
            increment = increment + _value(node, values)
    return increment, score


def _value(node: Node, values: Mapping[str, Tensor]) -> Any:
    _, _, parents, function = node
    return function(*(values[parent] for parent in parents))


def _draw(
    node: Node, values: Mapping[str, Tensor], shape: tuple[int, ...], retained: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a draw, its log-density, and the sum of these over particles where it can't be reparameterised."""
    distribution = _value(node, values)
    if tuple(distribution.batch_shape) != shape:
        try:
            distribution = distribution.expand(shape)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"draw '{node[1]}' has batch shape {tuple(distribution.batch_shape)}, where particles and plates are "
                f"{shape}: put every other dim into the event (.to_event)"
            ) from error
    value = distribution.rsample() if distribution.has_rsample else distribution.sample()
    if retained is not None:
        value = torch.cat([retained.expand(value.shape[1:]).to(value).unsqueeze(0), value[1:]])
    log_q = distribution.log_prob(value)
    return value, log_q, None if distribution.has_rsample else log_q.sum(0)


def _effective(log_weights: Tensor) -> Tensor:
    weights = log_weights.detach()
    squares = 2 * weights.logsumexp(0) - (2 * weights).logsumexp(0)
    return torch.nan_to_num(squares.exp(), nan=1.0)  # all weights zero


def _log_normalised(log_weights: Tensor) -> Tensor:
    """Return log W; 0 where all weights are zero."""
    top = log_weights.detach().amax(0, keepdim=True)
    empty = top == -torch.inf
    return torch.where(empty, torch.zeros_like(log_weights), log_weights.masked_fill(empty, 0.0).log_softmax(0))


def _mean_of_others(reward: Tensor) -> Tensor:
    """Return the mean over the other data, 0 for one datum; infinite rewards count as 0."""
    if reward.numel() < 2:
        return torch.zeros_like(reward)
    finite = torch.where(reward.isfinite(), reward, torch.zeros_like(reward))
    return (finite.sum() - finite) / (reward.numel() - 1)


def _identity(shape: tuple[int, ...], device: torch.device) -> Tensor:
    index = torch.arange(shape[0], device=device)
    return index.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
