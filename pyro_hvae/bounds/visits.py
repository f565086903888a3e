"""Run a function of the two chains of a diffusion inside the calls of a pair, which may nest them in larger chains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_hvae.bounds.capability import check_same_process
from pyro_hvae.problem.checks import check_observation
from pyro_hvae.problem.structure import sample_sites

__all__ = ["Visited", "outer_terms", "visit_pair"]


@dataclass(frozen=True)
class Visited:
    """Traces with the parameters of a visit and the sites outside of a nested diffusion; they stand for a run.

    Attributes:
        nests: whether the diffusion is nested in the programs.
    """

    model_trace: Trace
    guide_trace: Trace
    nests: bool


def visit_pair(model: Any, guide: Any, data: tuple, inside: Callable[[Any, Any, Tensor, Any], None]) -> Visited:
    """Call ``inside(p, q, z, mask)`` with the model's and the guide's chain, inside of the calls of both programs.

    Args:
        model, guide: a diffusion and its noising process, or programs in which they are nested.
        data: x, context, mask and data_size of the call.
        inside: z is the datum of the diffusion, x or the last draw of the guide outside of it; its mask is that of x,
            or None.
    """
    x, context, mask, data_size = data
    nests = getattr(guide, "nested", None) is not None
    args = (x, context) if nests else (x,)
    keywords = {"mask": mask, "data_size": data_size} if nests else {}
    traces: list[Trace] = []

    def within(f: Callable[..., Any]) -> Callable[[Any], Any]:
        return (lambda program: program.around(f, *args, **keywords)) if nests else f

    def inside_guide(q: Any, values: dict[str, Tensor] | None = None) -> None:
        z, seen = (x, mask) if values is None else (list(values.values())[-1], None)

        def inside_model(p: Any) -> Tensor:
            check_same_process(p, q, context)
            inside(p, q, z, seen)
            return z

        with ExitStack() as stack:
            if values is not None:  # the guide's trace is not to have the model's sites
                stack.enter_context(poutine.block(hide_fn=lambda site: site["type"] == "sample"))
                stack.enter_context(poutine.condition(data=values))
            traces.append(poutine.trace(model).get_trace(*(args if nests else ()), visit=within(inside_model)))

    guide_trace = poutine.trace(guide).get_trace(*args, visit=within(inside_guide))
    return Visited(traces[0], guide_trace, nests)


def outer_terms(inner: dict[str, Tensor], visited: Visited) -> dict[str, Tensor]:
    """Return the terms of a pair that nests a diffusion, from those of the diffusion and the sites outside of it.

    The diffusion's own reconstruction is log p of its datum z, the last draw of the guide outside of it, and becomes a
    part of ``rate_<z>``.

    Raises:
        ValueError: in training, for a draw without reparameterisation; for data outside of the likelihood's support.
    """
    try:
        for trace in (visited.model_trace, visited.guide_trace):
            trace.compute_log_prob()
    except ValueError:
        for site in sample_sites(visited.model_trace):
            check_observation(site["name"], site["fn"], site["value"])
        raise
    guide_sites = {site["name"]: site for site in sample_sites(visited.guide_trace)}
    fixed = [name for name, site in guide_sites.items() if not site["fn"].has_rsample]
    if fixed and torch.is_grad_enabled():
        raise ValueError(
            f"site(s) {fixed} have no reparameterised draws, so the gradient of DiffusionELBO would be wrong: give the "
            "latents outside of the diffusion kernels such as Gaussian, or use TraceELBO(gradient='score')"
        )
    log_q = {name: site["unscaled_log_prob"] for name, site in guide_sites.items()}
    log_p = {site["name"]: site["unscaled_log_prob"] for site in sample_sites(visited.model_trace)}
    *others, last = log_q
    observed = [term for name, term in log_p.items() if name not in log_q]
    terms = {"reconstruction": sum(observed[1:], start=observed[0])}
    terms |= {f"rate_{name}": log_q[name] - log_p[name] for name in others}
    terms[f"rate_{last}"] = log_q[last] - inner["reconstruction"]
    return terms | {name: inner[name] for name in ("prior_matching", "denoising_matching")}
