r"""Bounds by sequential Monte Carlo: particles are resampled along a chain.

.. math:: \mathrm E\log\hat Z \le \log\mathrm E\hat Z = \log p(x),

with :math:`\hat Z` of :mod:`pyro_hvae.bounds.particles`.  Importance weights of a whole chain degenerate with its
length: their variance grows exponentially, that of resampled ones linearly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_hvae.bounds.base import Bound, Estimate, Evaluation, Treatment
from pyro_hvae.bounds.particles import Filtered, Resampling, run_particles
from pyro_hvae.bounds.resampling import RESAMPLING
from pyro_hvae.bounds.stepwise import check_stepwise, segments_of, stages_of
from pyro_hvae.modules import evaluation_mode
from pyro_hvae.problem import Problem, Structure
from pyro_hvae.problem.checks import check_observations
from pyro_hvae.problem.isolation import RUNNING, evaluating, kept_buffers, noted_parameters
from pyro_hvae.problem.verbs import problem_of
from pyro_hvae.weights.means import unchecked_sample_size

__all__ = ["SMCBound", "filtered_run"]


@dataclass(frozen=True)
class _Visited:
    """Traces with the parameter statements of a visit; they stand for a run."""

    model_trace: Trace
    guide_trace: Trace


class SMCBound(Bound):
    r"""Filtering variational objective :math:`\log\hat Z` per datum, from particles that are resampled along the chain.

    Each datum of a minibatch has its own ancestors.  Without resampling it is :class:`IWELBO` of the same draws.
    The pair lists its sites by a method ``stepwise`` (:mod:`pyro_hvae.bounds.stepwise`), as the chains of this package
    do; particles step in the order of the guide.  Programs written for :class:`pyro.infer.SMCFilter` step after
    :func:`pyro_hvae.chains.unroll`.

    The gradient ``"ignore"`` differentiates log Zhat through the draws with the ancestors held.  It is biased, since
    the probabilities of the ancestors depend on the parameters too; its variance is the smaller one.  ``"score"`` adds
    their score, and that of draws that can't be reparameterised, and is unbiased.

    Args:
        num_particles: K >= 1.
        resample: ``"systematic"``, ``"multinomial"`` or ``"none"``.
        ess_threshold: between 0 and 1: the particles of a datum are resampled where their effective number is below
            this share of K; 1 resamples at each step.
        gradient: ``"ignore"`` or ``"score"``.  A decision by the effective number jumps as the parameters move, and the
            probability of systematic ancestors has a score of infinite variance, so ``"score"`` takes
            ``resample="multinomial", ess_threshold=1.0``, or ``resample="none"``.
        twist: None, or ``twist(step, value, *args, **kwargs)``, the logarithm of a positive function of the draw of a
            step (counted from 0 in the order of the guide) and of the programs' arguments (without ``data_size``);
            it broadcasts to (K, N).  Targets of the steps but the last are multiplied by it.  The best is the density
            of what the model has not seen yet given the draw: then, with the exact conditionals as the guide, the
            variance is zero.  A module is trained with the pair where the objective is a module, as in
            :func:`pyro_hvae.fit`.

    Raises:
        ValueError: for arguments out of range; for a pair with latents outside of the data's plates, with sites that
            are summed out, with a point estimate, or with draws that the gradient can't handle.
        TypeError: for a program without ``stepwise``.

    Reference:
        Filtering Variational Objectives (Maddison et al., 2017); Auto-Encoding Sequential Monte Carlo (Le et al.,
        2018); Variational Sequential Monte Carlo (Naesseth et al., 2018); Twisted Particle Filters (Whiteley and Lee,
        2014).

    Example:
        >>> import pyro_hvae as ph
        >>> _ = torch.manual_seed(0)
        >>> model, guide = ph.hvae(6, (2, 2), hidden=(8,))
        >>> SMCBound(16).per_datum(model, guide, torch.ones(3, 6)).shape
        torch.Size([3])
    """

    gradients = ("ignore", "score")

    def __init__(
        self,
        num_particles: int,
        resample: str = "systematic",
        ess_threshold: float = 0.5,
        gradient: str = "ignore",
        twist: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__(num_particles, gradient)
        if resample not in RESAMPLING:
            raise ValueError(f"unknown resample {resample!r}; there are {', '.join(map(repr, RESAMPLING))}")
        if not 0.0 <= ess_threshold <= 1.0:  # false for NaN too
            raise ValueError(f"ess_threshold is a share of the particles, between 0 and 1; got {ess_threshold}")
        if gradient == "score" and not (resample == "none" or (resample == "multinomial" and ess_threshold == 1.0)):
            raise ValueError(
                f"gradient='score' is unbiased where ancestors are drawn independently at each step, not with "
                f"resample={resample!r} and ess_threshold={ess_threshold:g}: write resample='multinomial', "
                "ess_threshold=1.0, or gradient='ignore'"
            )
        if twist is not None and not callable(twist):
            raise TypeError(f"twist is a function of (step, value, *args, **kwargs), got {twist!r}")
        self.resample = resample
        self.ess_threshold = float(ess_threshold)
        self.twist = twist

    def _arguments(self) -> dict[str, Any]:
        arguments = {"num_particles": self.num_particles, "resample": self.resample}
        arguments |= {"ess_threshold": self.ess_threshold, "gradient": self.gradient}
        return arguments if self.twist is None else arguments | {"twist": self.twist}

    def refusals(self, structure: Structure) -> list[str]:
        name = type(self).__name__
        return super().refusals(structure) + _refusals(structure, name)

    def treatment(self, name: str, structure: Structure, dependencies: Any) -> Treatment:
        treatment = super().treatment(name, structure, dependencies)
        if treatment.gradient == "ignore" or structure.sites[name].role == "observed":
            gradient = treatment.gradient if self.gradient == "score" else "pathwise, ancestors held (biased)"
            why = "enters the weights as soon as all draws that it depends on are there"
            return Treatment("Monte Carlo, resampled", why, gradient)
        return treatment

    def estimate(self, problem: Problem) -> Estimate:
        with_score = self.gradient == "score" and torch.is_grad_enabled()
        filtered, visited, structure = self._run(problem, with_score)
        value = filtered.log_evidence
        surrogate = value + filtered.score_term() if with_score else value
        return Estimate(value, surrogate, _scale(structure), run=visited)

    def evaluate(self, problem: Problem) -> Evaluation:
        """Return the bound and diagnostics of the particles; shape of the plates.

        Returns:
            ``bound`` (nats); ``ess``, the effective number of the last particles; ``least_ess``, the least over the
            steps, before resampling; ``resamplings``, how many times the particles were resampled.
        """
        filtered, _, structure = self._run(problem, False)
        terms = {
            "bound": filtered.log_evidence,
            "ess": unchecked_sample_size(filtered.log_weights),
            "least_ess": filtered.ess.amin(0),
            "resamplings": filtered.resampled.sum(0).to(filtered.log_evidence),
        }
        return Evaluation(filtered.log_evidence, terms, structure, _scale(structure))

    @evaluating()
    def filter(self, model: Any, guide: Any = None, *args: Any, **kwargs: Any) -> Filtered:
        """Run the particles without gradient, and keep their draws and ancestors.

        Returns:
            :class:`~pyro_hvae.bounds.particles.Filtered`; its ``paths()`` with weights ``log_weights.softmax(0)``
            approximate the posterior, and ``ess`` and ``resampled`` show the particles step by step.

        Example:
            >>> import pyro_hvae as ph
            >>> _ = torch.manual_seed(0)
            >>> model, guide = ph.hvae(6, (2, 2), hidden=(8,))
            >>> filtered = SMCBound(16).filter(model, guide, torch.ones(3, 6))
            >>> filtered.ess.shape, filtered.paths()["z2"].shape
            (torch.Size([2, 3]), torch.Size([16, 3, 2]))
        """
        with torch.no_grad():
            return self._run(problem_of(model, guide, args, kwargs), False, keep=True)[0]

    @evaluating()
    def from_posterior(
        self, model: Any, guide: Any, samples: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        r"""Return the mean of log Zhat with one particle on a posterior draw: an upper bound in expectation.

        Conditional sequential Monte Carlo: particle 0 follows the draw, the others run and resample as they do in the
        bound.  If the draws are exact, :math:`\mathrm E[1/\hat Z]=1/p(x)`, so :math:`\mathrm E\log\hat Z\ge\log p(x)`.
        Exact ones exist for simulated data: the latents that a datum was simulated from.

        Args:
            samples: for each draw of the guide a tensor (S, N, *event) of S posterior draws.

        Returns:
            Tensor of the shape of the plates, in nats, without gradient.

        Raises:
            ValueError: with systematic resampling, or if a draw of the guide is not among ``samples``.

        Reference:
            Particle Markov Chain Monte Carlo Methods (Andrieu, Doucet and Holenstein, 2010).

        Example:
            >>> import pyro_hvae as ph
            >>> _ = torch.manual_seed(0)
            >>> model, guide = ph.hvae(6, (2, 2), hidden=(8,))
            >>> latents = {"z1": torch.zeros(1, 3, 2), "z2": torch.zeros(1, 3, 2)}
            >>> SMCBound(16, resample="multinomial").from_posterior(model, guide, latents, torch.ones(3, 6)).shape
            torch.Size([3])
        """
        if self.resample == "systematic":
            raise ValueError(
                "conditional sequential Monte Carlo draws the other particles' ancestors independently: write "
                "SMCBound(..., resample='multinomial')"
            )
        with torch.no_grad():
            problem = problem_of(model, guide, args, kwargs)
            structure = self._checked(problem)
            resampling = Resampling(self.resample, self.ess_threshold)
            plates = tuple(plate.size for plate in structure.common)
            values = []
            for draw in _paths(samples, plates):
                filtered, _ = filtered_run(
                    problem, self.num_particles, resampling, twist=self._bound_twist(problem), retained=draw
                )
                values.append(filtered.log_evidence)
            return torch.stack(values).mean(0)

    def _run(self, problem: Problem, score: bool, keep: bool = False) -> tuple[Filtered, _Visited, Structure]:
        structure = self._checked(problem)
        resampling = Resampling(self.resample, self.ess_threshold, score)
        filtered, visited = filtered_run(
            problem, self.num_particles, resampling, twist=self._bound_twist(problem), keep=keep
        )
        return filtered, visited, structure

    def _checked(self, problem: Problem) -> Structure:
        check_stepwise(problem.model, problem.guide)
        if not problem.training:
            check_observations(problem.look()[0])
        structure = problem.structure
        problem.require_density(type(self).__name__)
        self.check(structure)
        return structure

    def _bound_twist(self, problem: Problem) -> Callable[[int, Tensor], Tensor] | None:
        twist = self.twist
        if twist is None:
            return None
        kwargs = {name: value for name, value in problem.kwargs.items() if name != "data_size"}
        return lambda step, value: twist(step, value, *problem.args, **kwargs)


def filtered_run(
    problem: Problem,
    num_particles: int,
    resampling: Resampling,
    *,
    twist: Callable[[int, Tensor], Tensor] | None = None,
    retained: Mapping[str, Tensor] | None = None,
    keep: bool = False,
) -> tuple[Filtered, _Visited]:
    """Run particles along the draws of a problem whose programs list their sites; see :func:`run_particles`."""
    args, kwargs = problem.args, problem.kwargs
    shape = (num_particles, *(plate.size for plate in problem.structure.common))
    segmented = not hasattr(problem.model, "stepwise")
    results: list[Filtered] = []
    inner: list[Trace] = []
    # Pyro's handlers take the keyword context for themselves
    visiting = {name: value for name, value in kwargs.items() if name != "context"}
    model, guide, _ = replace(problem.programs, kwargs={}).bound()

    def inside_guide(q: Any) -> None:
        def inside_model(p: Any) -> None:
            stages: Sequence[Any]
            if segmented:
                if twist is not None or retained is not None or keep:
                    raise ValueError(
                        "programs with init and step have no list of draws, which twist=, filter() and "
                        "from_posterior() need: give them a method stepwise (pyro_hvae.bounds.stepwise)"
                    )
                stages = segments_of(q.segments(*args, **kwargs), p.segments(*args, **kwargs))
            else:
                stages = stages_of(q.stepwise(*args, **kwargs), p.stepwise(*args, **kwargs))
            results.append(run_particles(stages, shape, resampling, twist=twist, retained=retained, keep=keep))

        inner.append(poutine.trace(model).get_trace(*args, visit=inside_model, **visiting))

    with RUNNING, ExitStack() as stack:
        stack.enter_context(pyro.validation_enabled(False))
        if not problem.training:
            stack.enter_context(evaluation_mode(problem.model, problem.guide))
            stack.enter_context(kept_buffers(problem.model, problem.guide))
            stack.enter_context(noted_parameters())
        guide_trace = poutine.trace(guide).get_trace(*args, visit=inside_guide, **visiting)
    return results[0], _Visited(inner[0], guide_trace)


def _paths(samples: Mapping[str, Tensor], plates: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Return draws one by one.

    Raises:
        ValueError: for values without the dims of draws and plates, or of different numbers of draws.
    """
    for name, value in samples.items():
        if tuple(value.shape[1 : 1 + len(plates)]) != plates:
            wanted = ", ".join(("draws", *map(str, plates), "*event"))
            raise ValueError(f"samples of '{name}' have shape {tuple(value.shape)}, where ({wanted}) is needed")
    counts = {len(value) for value in samples.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"samples need one number of draws for all sites, at least 1; they have {sorted(counts)}")
    return [{name: value[index] for name, value in samples.items()} for index in range(counts.pop())]


def _scale(structure: Structure) -> float:
    scale = 1.0
    for plate in structure.common:
        scale *= plate.scale
    return scale


def _refusals(structure: Structure, name: str) -> list[str]:
    """Return why particles can't be resampled along a pair; weights must be of a datum, and every latent drawn."""
    summed = [*structure.enumerated, *structure.enumerated_in_guide]
    if summed:
        return [
            f"site(s) {summed} are summed out, and {name} needs a draw of each latent: use IWELBO, whose weights are "
            "exact sums over them, or draw them in the guide"
        ]
    scaled = [site for site, info in structure.sites.items() if info.user_scaled]
    if scaled:
        return [f"site(s) {scaled} carry a poutine.scale, which {name} does not apply: use IWELBO, or leave it out"]
    outside = [site for site in structure.drawn if structure.sites[site].plates != structure.common]
    if outside:
        return [
            f"site(s) {outside} are not in the plates {[plate.name for plate in structure.common]} of a datum alone, "
            f"and {name} resamples the particles of each datum for itself: use IWELBO(..., share_globals=True) or "
            "TraceELBO"
        ]
    if structure.max_plate_nesting != len(structure.common):
        return [
            f"the programs have plates around some of their sites only, and {name} takes plates around all of them: "
            "use IWELBO"
        ]
    return []
