"""Draws of what a model observes, at new data."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.guides import AutoCallable
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_hvae.problem.execute import Call, Particles, Programs, Released
from pyro_hvae.problem.isolation import evaluating, isolated
from pyro_hvae.problem.plates import Layout
from pyro_hvae.problem.predictions import Predictions
from pyro_hvae.problem.prior import no_latents
from pyro_hvae.problem.problem import Problem
from pyro_hvae.problem.run import Run
from pyro_hvae.problem.structure import is_deterministic, is_factor, plates_of, sample_sites
from pyro_hvae.weights import chunks

__all__ = ["NewData", "by_draw", "of_problem", "predict"]

_ELEMENTS = 2**23
"""Numbers of all sites that one chunk of draws holds."""

_ABSENT: Any = object()  # marks an argument that is not passed, since None is one of the new data


class NewData:
    """A model with new data, whose latents are draws of a guide where these apply, and else of its prior.

    Args:
        problem: the model with the new data.
        names: sites that the guide draws.
        local: the guide's draws of latents in the plates over new rows are for these rows.
        plates: names of those plates; None for those around predicted sites that have as many indices as the first
            tensor of the new data has rows.
        predicted: sites that are predicted; by default those that the guide does not draw.
    """

    def __init__(
        self,
        problem: Problem,
        names: Collection[str],
        local: bool,
        plates: Collection[str] | None,
        predicted: Collection[str] | None = None,
    ) -> None:
        self.predicted = predicted
        self.programs = Programs(problem.model, no_latents, problem.args, problem.kwargs)
        self.problem, self.names = problem, frozenset(names)
        self.rows = next((len(v) for v in (*problem.args, *problem.kwargs.values()) if _has_rows(v)), None)
        self.local, self.plates = local, None if plates is None else frozenset(plates)
        self._kept: frozenset[str] | None = None

    def draw(self, values: Mapping[str, Tensor]) -> Trace:
        """Return a trace of the model, observations drawn, at one draw of the guide (values without a draw dim).

        Raises:
            ValueError: for a latent that does not fit the model at the new data.
        """
        if self._kept is None:
            self._kept = self._choose(values)
        held = {name: values[name] for name in self._kept}
        trace = self._run(held)
        for name, value in held.items():
            site = trace.nodes.get(name)
            if site is None or site["value"] is not value:
                _refuse(name, value, site)
        return trace

    def draw_many(self, values: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """Return draws (K, *dims of plates, *event) of all sites at K draws of the guide, all at once.

        For a model that is known to keep draws apart.
        """
        single = self.draw({name: value[0] for name, value in values.items()})
        sites = {site["name"]: site["fn"] for site in sample_sites(single) if not _computed(site)}
        nesting = max(len(fn.batch_shape) for fn in sites.values())
        layout = Layout(nesting, count)
        assert self._kept is not None
        held = {n: layout.place(values[n], sites[n].shape(), sites[n].event_dim) for n in self._kept}
        trace = self._run(held, Particles(count, -nesting - 1) if count > 1 else None)
        result = {}
        for name, fn in sites.items():
            value = trace.nodes[name]["value"]
            lead = value.dim() - len(fn.shape())
            result[name] = value.reshape(value.shape[:1] * (lead > 0) + fn.shape()).expand(count, *fn.shape())
        return result

    def observed(self, trace: Trace) -> list[str]:
        """Return the sites that are predicted: those that the guide does not draw."""
        if self.predicted is not None:
            return list(self.predicted)
        sites = [site for site in sample_sites(trace) if not (_computed(site) or _marked(site))]
        return [site["name"] for site in sites if site["name"] not in self.names]

    def drawn_from(self, trace: Trace) -> dict[str, str]:
        """Return ``"guide"`` or ``"prior"`` by latent."""
        predicted = set(self.observed(trace))
        names = [s["name"] for s in sample_sites(trace) if s["name"] not in predicted and not _computed(s)]
        return {name: "guide" if name in (self._kept or ()) else "prior" for name in names}

    def _choose(self, values: Mapping[str, Tensor]) -> frozenset[str]:
        """Return the latents that the guide's draws apply to: all, or those outside of the plates over new rows."""
        if self.local:
            return self.names & values.keys()
        trace = self._run(values)
        over = self.plates
        if over is None:
            around = {plate for name in self.observed(trace) for plate in plates_of(trace.nodes[name])}
            over = frozenset(plate.name for plate in around if plate.size == self.rows)
        return frozenset(
            site["name"]
            for site in sample_sites(trace)
            if site["name"] in values and not over & {plate.name for plate in plates_of(site)}
        )

    def _run(self, values: Mapping[str, Tensor], particles: Particles | None = None) -> Trace:
        """Run the model with its observations drawn, and with these values where they have the shapes of the sites."""
        model, _, kwargs = self.programs.bound()
        model = Released()(model)
        if particles is not None:
            model = particles(model)
        with Call(self.programs, None)._modes():
            return poutine.trace(_Fitting(values)(model)).get_trace(*self.problem.args, **kwargs)


class _Fitting(Messenger):
    """Set sites to values of their shapes."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is not None and not msg["is_observed"] and msg["fn"].shape() == value.shape:
            msg["value"], msg["done"] = value, True


def _refuse(name: str, value: Tensor, site: Any) -> None:
    if site is None:
        raise ValueError(f"the guide draws '{name}', which is no site of the model at the new data")
    names = [plate.name for plate in plates_of(site)]
    raise ValueError(
        f"the guide's draw of '{name}' has shape {tuple(value.shape)}, and the model's site "
        f"{tuple(site['fn'].shape())} at the new data: if its plates {names} are over new rows, name them in plates=, "
        f"so that '{name}' is drawn from its prior"
    )


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _computed(site: Any) -> bool:
    return is_deterministic(site) or is_factor(site)


def _marked(site: Any) -> bool:
    """Return whether the model sums this site out in an evaluation."""
    return (site["infer"] or {}).get("enumerate") in ("parallel", "sequential")


def predict(
    model: Any,
    guide: Any = _ABSENT,
    *args: Any,
    num_draws: int = 1000,
    plates: Collection[str] | None = None,
    **kwargs: Any,
) -> Predictions:
    r"""Draw what a model observes, at new data, from the posterior predictive distribution.

    .. math:: y^{new} \sim \int p(y^{new} \mid z, x^{new})\, q(z)\, dz

    The new data are the arguments of the programs: new rows, new covariates, and ``None`` for what is to be predicted.
    Where the model observes something, as a table with missing entries or data that are to be replicated, observed
    sites are drawn too.

    Latents are drawn, by the call,

    - ``predict(Problem(model, guide)(*old), *new)``: from the guide given the old data; those in the plates over rows
      from the prior, being of new rows;
    - ``predict(model, guide, *new)``: from the guide, called with the new data; of an AutoGuide, whose parameters
      belong to the old rows, those in the plates over rows from the prior;
    - ``predict(model, None, *new)``: from the prior.

    The result says where each latent was drawn from.  Not detected: a guide of one's own whose parameters are one for
    each old row, called with as many new rows; bind the old data in a problem then.

    Args:
        model: Pyro program; or a :class:`Problem` bound to the data that the guide has seen.
        guide: Pyro program, or None.
        args, kwargs: the new data.
        num_draws: S >= 1.  Where the guide is called with the new data and these are observed, all draws run at once in
            chunks; otherwise one after the other.
        plates: names of the plates over new rows; by default those around predicted sites that have as many indices as
            the first tensor of the new data has rows.

    Returns:
        :class:`Predictions`, a mapping from site to draws ``(S, *dims of plates, *event)``.

    Raises:
        ValueError: for ``num_draws < 1``, a guide that can't be called with the new data, or a latent whose plates have
            other sizes in the new data.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)
        >>> guide = AutoNormal(model)
        >>> guide(torch.ones(3), torch.ones(3))["slope"].shape
        torch.Size([])
        >>> predict(model, guide, torch.ones(5), num_draws=10)
        Predictions(y (10, 5); slope drawn from the guide)
    """
    if not isinstance(num_draws, int) or isinstance(num_draws, bool) or num_draws < 1:
        raise ValueError(f"num_draws must be an integer of at least 1, got {num_draws!r}")
    with torch.no_grad(), evaluating():
        if isinstance(model, Problem):
            new = args if guide is _ABSENT else (guide, *args)
            return _from_problem(model, Problem(model.model, None, new, kwargs), num_draws, plates)
        guide = None if guide is _ABSENT else guide
        problem = Problem(model, guide, args, kwargs)
        if guide is not None and not _by_row(guide) and _observed(problem):
            return _replicates(problem, num_draws)
        return _one_by_one(problem, guide, num_draws, plates)


def _by_row(guide: Any) -> bool:
    """Return whether a guide has parameters of its own for the rows that it has seen."""
    return isinstance(guide, AutoGuide) and not isinstance(guide, AutoCallable)


def _observed(problem: Problem) -> list[str]:
    """Return the sites that the model observes among the new data."""
    call = Call(Programs(problem.model, no_latents, problem.args, problem.kwargs), None)
    with isolated(problem.model):
        model, _, kwargs = call.programs.bound()
        with call._modes():
            trace = poutine.trace(model).get_trace(*problem.args, **kwargs)
    return [site["name"] for site in sample_sites(trace) if site["is_observed"] and not _computed(site)]


def _replicates(problem: Problem, num_draws: int) -> Predictions:
    """Draw the observed sites at draws of the guide given the same data, many at once."""
    structure = problem.structure
    parts: list[dict[str, Tensor]] = []
    names = [name for name in structure.observed if not structure.sites[name].deterministic]
    own = frozenset(structure.auxiliary)  # of the guide alone; no draws of the model
    latents = [n for n in (*structure.drawn, *structure.enumerated, *structure.enumerated_in_guide) if n not in own]
    size = max(1, _ELEMENTS // max(1, sum(s["value"].numel() for s in sample_sites(problem.look()[0]))))
    for count in chunks(num_draws, size):
        run = problem.run(count, draw_enumerated=True)
        draws = run.guide_trace.copy()
        for name, value in run.draw_states().items():
            draws.add_node(name, type="sample", name=name, value=value, is_observed=False, infer={})
        trace, layout = problem.released(count, draws), Layout(structure.max_plate_nesting, count)
        part = {}
        for name in (*names, *latents):
            site = trace.nodes[name]
            event = site["value"].shape[site["value"].dim() - site["fn"].event_dim :]
            part[name] = layout.put(site["value"], plates_of(site), event)
        parts.append(part)
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Predictions(
        {name: joined[name] for name in names},
        {name: joined[name] for name in latents},
        dict.fromkeys(latents, "guide"),
        problem.reading,
    )


def _from_problem(seen: Problem, new: Problem, num_draws: int, plates: Collection[str] | None) -> Predictions:
    """Draw at the new data, with the latents of a guide that has seen other data.

    That draws do not mix is checked where the programs run with the old data.
    """
    data = of_problem(seen, new, plates)
    parts: list[dict[str, Tensor]] = []
    size = max(2, _ELEMENTS // max(1, sum(s["value"].numel() for s in sample_sites(seen.look()[0]))))
    for count in chunks(num_draws, size):
        run = seen.run(max(count, 2), draw_enumerated=True)  # two, so that the check is made
        values = {name: by_draw(run, name, seen.template)[:count] for name in data.names}
        parts.append(data.draw_many(values, count))
    trace = data.draw({name: value[0] for name, value in values.items()})
    joined, origin = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, data.drawn_from(trace)
    return Predictions(
        {name: joined[name] for name in data.observed(trace)}, {n: joined[n] for n in origin}, origin, new.reading
    )


def of_problem(seen: Problem, new: Problem, plates: Collection[str] | None = None) -> NewData:
    """Return the new data with the sites of the guide of a problem with other data."""
    structure = seen.structure
    drawn = (*structure.drawn, *structure.enumerated_in_guide)
    return NewData(new, set(drawn) - set(structure.auxiliary), False, plates)


def by_draw(run: Run, name: str, template: Trace) -> Tensor:
    """Return draws (K, *shape) of a site, in the shape that programs with one particle have."""
    fn, value = template.nodes[name]["fn"], run.values[name]
    shape = fn.shape()
    lead = value.dim() - len(shape)
    return value.reshape(value.shape[:1] * (lead > 0) + shape).expand(run.num_particles, *shape)


def _one_by_one(problem: Problem, guide: Any, num_draws: int, plates: Collection[str] | None) -> Predictions:
    """Draw guide and model one after the other."""
    programs = Programs(guide or no_latents, no_latents, problem.args, problem.kwargs)

    def values() -> Iterator[dict[str, Tensor]]:
        for _ in range(num_draws):
            yield {s["name"]: s["value"] for s in sample_sites(_called(programs)) if _is_latent(s)}

    names = [s["name"] for s in sample_sites(_called(programs, look=True)) if _is_latent(s)]
    if guide is None and (observed := _observed(problem)):
        return _collected(NewData(problem, names, True, plates, observed), values(), num_draws)
    return _collected(NewData(problem, names, not _by_row(guide), plates), values(), num_draws)


def _is_latent(site: Any) -> bool:
    """Return whether a site of the guide is one of the model's."""
    return not (site["is_observed"] or site["infer"].get("is_auxiliary"))


def _called(programs: Programs, look: bool = False) -> Trace:
    """Return a trace of the guide.

    Raises:
        ValueError: for a guide that fails.
    """
    try:
        with isolated(programs.model) if look else nullcontext():
            guide, _, kwargs = programs.bound()
            with Call(programs, None)._modes():
                return poutine.trace(guide).get_trace(*programs.args, **kwargs)
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the guide can't be called with the new data ({type(error).__name__}: {str(error).splitlines()[0]}). For "
            "latents given the data that it has seen, write predict(Problem(model, guide)(*old), *new); for latents of "
            "the prior, predict(model, None, *new)"
        ) from error


def _collected(new: NewData, values: Iterator[dict[str, Tensor]], num_draws: int) -> Predictions:
    """Stack the draws of all sites."""
    drawn: dict[str, list[Tensor]] = {}
    trace = Trace()
    for value in values:
        trace = new.draw(value)
        for site in sample_sites(trace):
            if not _computed(site):
                drawn.setdefault(site["name"], []).append(site["value"])
    bad = [name for name, draws in drawn.items() if len(draws) < num_draws or len({d.shape for d in draws}) > 1]
    if bad:
        raise ValueError(f"sites {bad} are not drawn in the same shape at each draw, so draws can't be stacked")
    stacked, predicted = {name: torch.stack(draws) for name, draws in drawn.items()}, new.observed(trace)
    origin = new.drawn_from(trace)
    return Predictions(
        {name: stacked[name] for name in predicted}, {n: stacked[n] for n in origin}, origin, new.problem.reading
    )
