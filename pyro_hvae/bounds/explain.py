"""Explain how a bound treats a pair, before training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine import Trace
from torch import nn

from pyro_hvae.bounds.base import Bound
from pyro_hvae.bounds.divergences import divergence
from pyro_hvae.notebook import html_table
from pyro_hvae.problem import Structure, problem_of
from pyro_hvae.problem.dependencies import Dependencies
from pyro_hvae.problem.parameters import param_sites

__all__ = ["Explanation", "SiteRow", "explain"]


@dataclass(frozen=True)
class SiteRow:
    """One site of a pair, as a bound treats it.

    ``parents_model`` and ``parents_guide`` are the draws that the site's distribution depends on in either program.
    """

    site: str
    role: str
    distributions: str
    plates: str
    scale: str
    parents_model: tuple[str, ...]
    parents_guide: tuple[str, ...]
    treatment: str
    why: str
    gradient: str

    def cells(self) -> tuple[str, ...]:
        """Return the row of a table under the columns of ``_HEADER``."""
        parents = f"{', '.join(self.parents_model) or '-'} | {', '.join(self.parents_guide) or '-'}"
        front = (self.site, self.role, self.distributions, self.plates, self.scale)
        return (*front, parents, self.treatment, self.gradient, self.why)


_HEADER = (
    *("site", "role", "model | guide", "plates", "scale"),
    *("parents: model | guide", "treatment", "gradient", "why"),
)


@dataclass(frozen=True)
class Explanation:
    """Properties of a pair, and how a bound treats it.

    Attributes:
        bound: the bound's name and arguments.
        rows: one :class:`SiteRow` a site.
        data_plates: the plates that a datum indexes.
        trained_by_svi, trained_by_module: names of the parameters that either route would train; None for the
            module route where a program is no ``nn.Module``.
        untrained_by_svi: parameters of the modules that SVI would not train.
        refusals: the reasons why the bound refuses the pair; empty if it does not.
    """

    bound: str
    rows: tuple[SiteRow, ...]
    data_plates: tuple[str, ...]
    trained_by_svi: tuple[str, ...]
    trained_by_module: tuple[str, ...] | None
    untrained_by_svi: tuple[str, ...]
    refusals: tuple[str, ...]

    def __str__(self) -> str:
        lines = [_HEADER, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        table.insert(1, "-" * max(map(len, table)))
        return "\n".join([self.bound, self._datum(), *table, *self._notes()])

    def _repr_html_(self) -> str:
        rows = [row.cells() for row in self.rows]
        return html_table(self.bound, rows, header=_HEADER, notes=[self._datum(), *self._notes()])

    def _datum(self) -> str:
        return f"a datum is an index of: {', '.join(self.data_plates) or 'nothing (one weight for all)'}"

    def _notes(self) -> list[str]:
        text = [f"parameters trained by SVI: {len(self.trained_by_svi)}"]
        if self.untrained_by_svi:
            text.append(f"NOT trained by SVI: {', '.join(self.untrained_by_svi)}")
        if self.trained_by_module is None:
            text.append("module route: none, since not both programs are nn.Modules")
        else:
            text.append(f"parameters trained by the module route: {len(self.trained_by_module)}")
        return text + [f"REFUSED: {refusal}" for refusal in self.refusals]


def explain(bound: Bound, model: Any, guide: Any = None, *args: Any, **kwargs: Any) -> Explanation:
    """Describe how ``bound`` treats a pair: a row per site, the trained parameters, the refusals.

    Args:
        bound: any :class:`~pyro_hvae.bounds.Bound`.
        model, guide: Pyro programs, called with ``args`` and ``kwargs``; or a bound problem.

    Returns:
        An :class:`Explanation`; printing it shows a table.

    Raises:
        ValueError: where the two programs do not match.

    Example:
        >>> import torch, pyro_hvae as ph
        >>> from pyro_hvae.conjugate import guide, model
        >>> ph.explain(ph.LayerwiseELBO(), model, guide(), torch.zeros(2)).rows[0].treatment
        'analytic'
    """
    problem = problem_of(model, guide, args, kwargs)
    model_trace, guide_trace = problem.look()
    structure = problem.structure
    rows = tuple(_row(bound, name, structure, problem.dependencies) for name in structure.sites)
    rows = tuple(_with_formula(row, model_trace, guide_trace) for row in rows)
    sites = param_sites(guide_trace, model_trace)
    stored = {id(parameter) for parameter in sites.values()}
    owned: dict[str, Any] = {}
    for which, program in (("model", problem.model), ("guide", problem.guide)):
        if isinstance(program, nn.Module):
            owned |= {f"{which}.{name}": p for name, p in program.named_parameters() if p.requires_grad}
    modules = isinstance(problem.model, nn.Module) and isinstance(problem.guide, nn.Module)
    return Explanation(
        bound=repr(bound),
        rows=rows,
        data_plates=tuple(plate.name for plate in structure.common),
        trained_by_svi=tuple(sites),
        trained_by_module=tuple(owned) if modules else None,
        untrained_by_svi=tuple(name for name, parameter in owned.items() if id(parameter) not in stored),
        refusals=tuple(bound.refusals(structure)),
    )


def _with_formula(row: SiteRow, model_trace: Trace, guide_trace: Trace) -> SiteRow:
    """Return the row; Monte Carlo where its divergence has no closed form."""
    if row.treatment != "analytic":
        return row
    p, q = model_trace.nodes[row.site]["fn"], guide_trace.nodes[row.site]["fn"]
    with torch.no_grad():
        known = divergence(q, p) is not None
    return row if known else replace(row, treatment="Monte Carlo", why=f"no closed form of {row.why} is known")


def _row(bound: Bound, name: str, structure: Structure, dependencies: Dependencies) -> SiteRow:
    site = structure.sites[name]
    treatment = bound.treatment(name, structure, dependencies)
    scale = " x ".join(f"{p.full_size}/{p.size}" for p in site.plates if p.subsampled) or "1"
    scale += " x user" * site.user_scaled + ", masked" * site.masked
    unknown = () if dependencies.complete else ("unknown",)
    return SiteRow(
        site=name,
        role=site.role,
        distributions=f"{site.model_distribution or '-'} | {site.guide_distribution or '-'}",
        plates=", ".join(plate.name for plate in site.plates) or "-",
        scale=scale,
        parents_model=tuple(sorted(dependencies.model.get(name, unknown))),
        parents_guide=tuple(sorted(dependencies.guide.get(name, unknown))) if name in structure.guide_order else (),
        treatment=treatment.how,
        why=treatment.why,
        gradient=treatment.gradient,
    )
