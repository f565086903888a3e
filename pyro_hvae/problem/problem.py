"""A model and a guide with their data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from pyro_hvae.problem.cached import cached
from pyro_hvae.problem.checks import check_observations, check_particles
from pyro_hvae.problem.compare import compare_programs
from pyro_hvae.problem.dependencies import Dependencies, dependencies_of
from pyro_hvae.problem.deriving import derive_structure
from pyro_hvae.problem.draws import given, place, shared
from pyro_hvae.problem.execute import Call, Programs
from pyro_hvae.problem.isolation import RUNNING, fingerprint, isolated
from pyro_hvae.problem.knowledge import Knowledge, argument_key, knowledge_of
from pyro_hvae.problem.particles import check_particles_apart
from pyro_hvae.problem.prior import no_latents, prior_guide
from pyro_hvae.problem.reading import read_arguments
from pyro_hvae.problem.run import Run
from pyro_hvae.problem.simulate import Simulation, simulate
from pyro_hvae.problem.structure import Structure, signature_of, structure_of

__all__ = ["Problem"]

Program = Callable[..., Any]
NO_SITES: frozenset[str] = frozenset()


class Problem:
    """A model, a guide and the data that both are called with.

    ``Problem(model, guide)(*args, **kwargs)`` binds the data.  One problem is one evaluation: all its runs use the
    same minibatch, and modules run in evaluation mode.

    Args:
        model: a Pyro program, a function or a module.
        guide: a Pyro program; None for a model of which every latent is enumerated, or for :meth:`prior` and
            :meth:`simulate`.

    Attributes:
        args, kwargs: the data.
        reading: the table that the model has read (:class:`~pyro_hvae.problem.Reading`), or None.

    Raises:
        TypeError: for a model or guide that can't be called.

    Example:
        >>> from pyro_hvae.conjugate import guide, model
        >>> problem = Problem(model, guide())(torch.tensor([0.0, 2.0]))
        >>> problem.structure.latent, problem.structure.observed
        (('z',), ('x',))
        >>> problem.run(num_particles=3).log_weights
        tensor([[-1.2655, -2.2655],
                [-1.2655, -2.2655],
                [-1.2655, -2.2655]])
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None = None,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        training: bool = False,
        registering: bool = True,
    ) -> None:
        for which, program in (("model", model), ("guide", guide)):
            if not callable(program) and not (which == "guide" and program is None):
                raise TypeError(f"the {which} must be a Pyro program, a function or module, got {program!r}")
        self.guided = guide is not None
        args, kwargs, self.reading = read_arguments(model, tuple(args), kwargs or {})
        self.programs = Programs(
            model, no_latents if guide is None else guide, args, kwargs, registering, training
        )
        self._indices: dict[str, Tensor] = {}
        self._checked = training
        self._weighed_by: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Problem:
        """Return the same programs with these data."""
        return self._with(args=args, kwargs=kwargs)

    @property
    def model(self) -> Program:
        return self.programs.model

    @property
    def guide(self) -> Program:
        return self.programs.guide

    @property
    def args(self) -> tuple:
        return self.programs.args

    @property
    def kwargs(self) -> Mapping[str, Any]:
        return self.programs.kwargs

    @property
    def training(self) -> bool:
        """Whether modules keep their mode and observations are not checked at each evaluation."""
        return self.programs.training

    def __repr__(self) -> str:
        names = [getattr(p, "__name__", type(p).__name__) for p in (self.model, self.guide)]
        count = len(self.args) + len(self.kwargs)
        return f"Problem({names[0]}, {names[1] if self.guided else None}, {count} arguments)"

    def with_guide(self, guide: Program) -> Problem:
        """Return the same model and data with another guide, on the same minibatch."""
        return self._on_same_minibatch(guide=guide)

    def with_model(self, model: Program) -> Problem:
        """Return another model with the same guide and data, on the same minibatch."""
        return self._on_same_minibatch(model=model)

    def evaluation(self) -> Problem:
        """Return the same programs and data in evaluation mode, on the same minibatch."""
        return self._on_same_minibatch(training=False, registering=True) if self.training else self

    def unregistered(self) -> Problem:
        """Return the same programs and data on the same minibatch; modules register no parameters in Pyro's store."""
        return self._on_same_minibatch(registering=False)

    def _on_same_minibatch(self, **changes: Any) -> Problem:
        other = self._with(**changes)
        other._indices = self._indices
        return other

    def _with(self, **changes: Any) -> Problem:
        options: dict[str, Any] = vars(self.programs) | {"guide": self.guide if self.guided else None}
        other = Problem(**options | changes)
        if not {"args", "kwargs"} & changes.keys():
            other.reading = self.reading
        return other

    # -- structure

    @cached
    def knowledge(self) -> Knowledge:
        """The cache of results that earlier runs of the two programs gave."""
        return knowledge_of(self.model, self.guide)

    @cached
    def _key(self) -> tuple:
        return argument_key(self.args, self.kwargs)

    @property
    def structure(self) -> Structure:
        """Sites, roles and plates; derived from one particle where arguments of this kind are new.

        Raises:
            ValueError: if the two programs do not match, a site's shape does not fit its plates, or an observed
                value is not finite or outside of its distribution's support.
        """
        structure = self.knowledge.guess(self._key)
        return self._derive_structure() if structure is None else structure

    def look(self) -> tuple[Trace, Trace]:
        """Return traces of model and guide, with one particle and nothing enumerated, without side effects.

        It is read for shapes and distributions, and stays out of a graph that a compiled step traces.
        """
        with isolated(self.model, self.guide), torch.no_grad(), disable_proxy_modes_tracing():
            return Call(self.programs, None, indices=self._indices).traces()

    def settle(self) -> None:
        """Compare the cached structure with a run of one particle, without side effects.

        For evaluations that lay out their tensors by the structure before they run.
        """
        expected = self.knowledge.guess(self._key) if self.guided else None
        if expected is None:
            return
        with isolated(self.model, self.guide), torch.no_grad():
            traces = Call(self.programs, None, indices=dict(self._indices)).traces()
            self._recognise(expected, *traces)

    def _derive_structure(self) -> Structure:
        """Derive the structure; a minibatch that this draws is not the one of the evaluation."""
        indices = dict(self._indices)
        structure = derive_structure(self.programs, indices)
        self._checked = self._checked or indices.keys() == self._indices.keys()
        return self.knowledge.keep(structure, self._key)

    @property
    def dependencies(self) -> Dependencies:
        """Which site depends on which draw of the guide; analysed once for each structure and setting of switches."""
        structure = self.structure
        key = "dependencies", fingerprint(self.model, self.guide)
        if key not in structure.facts:
            structure.facts[key] = dependencies_of(self.programs, structure)
        return structure.facts[key]

    @property
    def separable(self) -> bool:
        """Whether no site of the guide depends on a draw of it, so that its distributions hold for other draws too."""
        structure = self.structure
        if structure.auxiliary or structure.enumerated_in_guide:
            return False
        if any(structure.sites[name].guide_distribution == "Delta" for name in structure.drawn):
            return False
        return self.dependencies.complete and not any(self.dependencies.guide.values())

    @property
    def points(self) -> tuple[str, ...]:
        """Latents of which the guide is a point estimate: it has no density there, and no weights.

        A ``Delta`` that transforms draws of auxiliary sites, as in AutoGuides, is no point estimate.
        """
        structure = self.structure
        deltas = [
            name
            for name in structure.latent
            if structure.sites[name].guide_distribution == "Delta"
            and structure.sites[name].model_distribution != "Delta"
        ]
        if not deltas or not structure.auxiliary:
            return tuple(deltas)
        dependencies = self.dependencies
        if not dependencies.complete:
            return ()
        reached = {site for name in structure.auxiliary for site in dependencies.descendants(name)}
        return tuple(name for name in deltas if name not in reached)

    def require_density(self, what: str) -> None:
        """Refuse a guide that is a point estimate, or that covers only a part of the model's support.

        A later run of this problem that turns out to have such a guide is refused too.

        Args:
            what: the name of what needs a density, as the subject of a sentence.

        Raises:
            ValueError: naming the sites.
        """
        self._weighed_by = what
        if any(site.guide_distribution == "Delta" for site in self.structure.sites.values()) and self.points:
            raise ValueError(
                f"{what} weighs draws by the guide's density, and the guide is a point estimate of {list(self.points)} "
                "(a Delta), which has none: use a guide with a density (AutoNormal, AutoMultivariateNormal, a chain); "
                "TraceELBO trains a point estimate as it is"
            )
        if self.structure.uncovered:
            raise ValueError(
                f"{what} weighs draws by the guide's density, and the guide draws {list(self.structure.uncovered)} "
                "on a part of the model's support alone; weights can't correct for the rest: draw on the same support"
            )

    # -- runs

    def run(
        self,
        num_particles: int = 1,
        values: Mapping[str, Tensor] | None = None,
        *,
        once: frozenset[str] = NO_SITES,
        held: Mapping[str, Tensor] | None = None,
        draw_enumerated: bool = False,
    ) -> Run:
        """Run the guide and the model on its draws, all particles at once.

        Args:
            num_particles: K >= 1.
            values: draws that replace the guide's: for each drawn site K values on the leftmost dim, or one value
                without that dim if K = 1.  A site that the guide computes or enumerates may be left out.
            once: sites that are drawn once, without a particle dim.
            held: values of sites that all particles share, without a particle dim; all other sites are drawn.
            draw_enumerated: draw the sites that the guide enumerates.

        Raises:
            ValueError: if the two programs do not match, a site's shape does not fit its plates, an observed value is
                not finite or outside of its distribution's support, particles depend on each other, or ``values``
                lack a site.
        """
        check_particles(num_particles)
        with RUNNING:
            structure = self.structure
            if draw_enumerated:
                structure = structure.with_guide_drawn
            if held:
                once = once | frozenset(held)
            if num_particles > 1 and structure.drawn:
                check_particles_apart(self, once)
            draws = None if values is None else given(self, structure, values, num_particles)
            if held:
                draws = shared(self, held)
            return self.execute(structure, num_particles, once, draws)

    def rerun(self, run: Run, values: Mapping[str, Tensor]) -> Run:
        """Evaluate other draws with the guide's distributions of a run; for a pair that is :attr:`separable`.

        Args:
            run: of this problem; gradients flow to the guide's parameters through it.
            values: for each drawn site as many values as the run has particles, as in :meth:`run`.
        """
        draws = run.guide_trace.copy()
        for name in run.structure.drawn:
            draws.nodes[name] = {**draws.nodes[name], "value": place(self, name, values[name], run.num_particles)}
        model_trace, guide_trace = run.call.traces(draws, settled=True)
        actual = self._recognise(run.structure, model_trace, guide_trace)
        if actual is run.structure or actual.laid_out_as(run.structure):
            return Run(model_trace, guide_trace, actual, run.call)
        return self.run(run.num_particles, values)

    def runs(self, counts: list[int]) -> Iterator[Run]:
        """Yield one run for each number of particles, all on one minibatch."""
        for count in counts:
            yield self.run(count)

    def execute(
        self, structure: Structure, num_particles: int, once: frozenset[str] = NO_SITES, draws: Trace | None = None
    ) -> Run:
        """Run; repeat the run if the programs have other plates or enumerated sites than expected."""
        for _ in range(3):
            call = Call(self.programs, structure, num_particles, once, self._indices)
            model_trace, guide_trace = call.traces(draws)
            actual = self._recognise(structure, model_trace, guide_trace)
            if structure.guide_drawn:
                actual = structure if actual is structure else actual.with_guide_drawn
            if not self._checked:
                check_observations(model_trace)
                self._checked = True
            if actual is structure or actual.laid_out_as(structure):
                return Run(model_trace, guide_trace, actual, call)
            structure = actual
        raise ValueError(
            "the plates or enumerated sites of the programs change from run to run, so draws have no fixed dims; "
            "keep the structure of a program the same for the same arguments"
        )

    def _recognise(self, structure: Structure, model_trace: Trace, guide_trace: Trace) -> Structure:
        """Return the structure of a run; control flow or data may have changed it."""
        signature = signature_of(model_trace, guide_trace)
        if signature == structure.signature:
            return structure
        actual = self.knowledge.find(signature)
        if actual is None:
            actual = self._derive_structure()
            if actual.signature != signature:  # it changes from run to run
                compare_programs(model_trace, guide_trace)
                actual = structure_of(model_trace, guide_trace)
        actual = self.knowledge.keep(actual, self._key)
        if self._weighed_by is not None:
            self.require_density(self._weighed_by)
        return actual

    @cached
    def template(self) -> Trace:
        """A trace of the guide with one particle; it gives the shapes of the sites' draws."""
        return self.look()[1]

    # -- the model alone

    def released(self, num_particles: int = 1, draws: Trace | None = None) -> Trace:
        """Return a trace of the model with its observations drawn, on the minibatch of the evaluation.

        Args:
            num_particles: K.
            draws: values of latents, in the dims of a run of K particles; those that it lacks are drawn.
        """
        return Call(self.programs, self.structure, num_particles, indices=self._indices).released(draws)

    def prior(self) -> Problem:
        """Return the same problem with the model's prior as the guide."""
        return self.with_guide(prior_guide(self.model))

    def simulate(self) -> Simulation:
        """Draw latents and data from the model.

        Returns:
            :class:`Simulation`: ``values`` by latent site, and a ``problem`` with the simulated data.

        Raises:
            ValueError: for a model whose data can't be simulated as a whole; see :class:`Simulation`.
        """
        return simulate(self)
