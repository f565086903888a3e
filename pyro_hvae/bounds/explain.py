"""What a bound will do with a pair, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from pyro_hvae.bounds.base import Bound, Program
from pyro_hvae.bounds.elbo import dependencies_of
from pyro_hvae.traces import Structure, read
from pyro_hvae.traces.dependencies import Dependencies
from pyro_hvae.traces.parameters import param_sites

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


@dataclass(frozen=True)
class Explanation:
    """What was found about a pair, and what follows from it for a bound.

    Attributes:
        bound: the bound's name and arguments.
        rows: one :class:`SiteRow` a site.
        data_plates: the plates that a datum indexes.
        trained_by_svi, trained_by_module: names of the parameters that either route would move; None for the
            module route where a program is no ``nn.Module``.
        untrained_by_svi: parameters of the modules that SVI would leave as they are.
        refusals: why the bound will refuse the pair; empty if it won't.
    """

    bound: str
    rows: tuple[SiteRow, ...]
    data_plates: tuple[str, ...]
    trained_by_svi: tuple[str, ...]
    trained_by_module: tuple[str, ...] | None
    untrained_by_svi: tuple[str, ...]
    refusals: tuple[str, ...]

    def __str__(self) -> str:
        header = (
            "site",
            "role",
            "model | guide",
            "plates",
            "scale",
            "parents: model | guide",
            "treatment",
            "gradient",
            "why",
        )
        lines = [header]
        for row in self.rows:
            parents = f"{', '.join(row.parents_model) or '-'} | {', '.join(row.parents_guide) or '-'}"
            lines.append(
                (
                    row.site,
                    row.role,
                    row.distributions,
                    row.plates,
                    row.scale,
                    parents,
                    row.treatment,
                    row.gradient,
                    row.why,
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        table.insert(1, "-" * max(map(len, table)))
        text = [
            self.bound,
            f"a datum is an index of: {', '.join(self.data_plates) or 'nothing (one weight for all)'}",
            *table,
        ]
        text.append(f"parameters trained by SVI: {len(self.trained_by_svi)}")
        if self.untrained_by_svi:
            text.append(f"NOT trained by SVI: {', '.join(self.untrained_by_svi)}")
        if self.trained_by_module is None:
            text.append("module route: none, since not both programs are nn.Modules")
        else:
            text.append(f"parameters trained by the module route: {len(self.trained_by_module)}")
        text += [f"REFUSED: {refusal}" for refusal in self.refusals]
        return "\n".join(text)


def explain(bound: Bound, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Explanation:
    """Say what ``bound`` will do with a pair: a row per site, what trains, and what it refuses.

    Args:
        bound: any :class:`~pyro_hvae.bounds.Bound`.
        model, guide: Pyro programs, called with ``args`` and ``kwargs``.

    Returns:
        An :class:`Explanation`; printing it shows a table.

    Raises:
        ValueError: where the two programs do not fit each other at all.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_hvae as ph
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> ph.explain(ph.LayerwiseELBO(), model, guide, torch.zeros(2)).rows[0].treatment
        'analytic'
    """
    reading = read(model, guide, args, kwargs)
    structure = reading.structure
    found = dependencies_of(model, guide, args, kwargs, structure).dependencies
    rows = tuple(_row(bound, name, structure, found) for name in structure.sites)
    sites = param_sites(reading.guide_trace, reading.model_trace)
    stored = {id(parameter) for parameter in sites.values()}
    owned: dict[str, Any] = {}
    for which, program in (("model", model), ("guide", guide)):
        if isinstance(program, nn.Module):
            owned |= {f"{which}.{name}": p for name, p in program.named_parameters() if p.requires_grad}
    modules = isinstance(model, nn.Module) and isinstance(guide, nn.Module)
    return Explanation(
        bound=repr(bound),
        rows=rows,
        data_plates=tuple(plate.name for plate in structure.common),
        trained_by_svi=tuple(sites),
        trained_by_module=tuple(owned) if modules else None,
        untrained_by_svi=tuple(name for name, parameter in owned.items() if id(parameter) not in stored),
        refusals=tuple(bound.refusals(structure)),
    )


def _row(bound: Bound, name: str, structure: Structure, found: Dependencies) -> SiteRow:
    site = structure.sites[name]
    treatment = bound.treatment(name, structure, found)
    scale = " x ".join(f"{p.full_size}/{p.size}" for p in site.plates if p.subsampled) or "1"
    scale += " x user" * site.user_scaled + ", masked" * site.masked
    unknown = () if found.complete else ("unknown",)
    return SiteRow(
        site=name,
        role=site.role,
        distributions=f"{site.model_distribution or '-'} | {site.guide_distribution or '-'}",
        plates=", ".join(plate.name for plate in site.plates) or "-",
        scale=scale,
        parents_model=tuple(sorted(found.model.get(name, unknown))),
        parents_guide=tuple(sorted(found.guide.get(name, unknown))) if name in structure.guide_order else (),
        treatment=treatment.how,
        why=treatment.why,
        gradient=treatment.gradient,
    )
