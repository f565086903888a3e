r"""Encoder and decoder as functions: the two halves of an auto-encoder (seed, question 4).

The encoder of x is q(z | x), the decoder of z is p(x | z). With both,

.. math::
    \mathrm{reconstruct}(x) = E_{q(z \mid x)}\, E_{p(x' \mid z)}[x'],\qquad
    \mathrm{impute}(x_{obs}) \sim \int p(x_{mis} \mid z)\, q(z \mid x_{obs})\, dz

The second is the exact predictive distribution of the missing entries where the guide is the exact posterior
given the observed ones, and otherwise as good as the guide. All run without gradients and in evaluation
mode. Draws are a leading dim: ``num_draws=S`` gives (S, N, ...), ``None`` one draw without that dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_hvae import distributions
from pyro_hvae.chains.directions import BottomUp, TopDown
from pyro_hvae.chains.frames import imputations, latents_frame
from pyro_hvae.chains.ladder import Ladder
from pyro_hvae.chains.weights import has_global
from pyro_hvae.modules import evaluation_mode

__all__ = ["decode", "encode", "impute", "interpolate", "reconstruct", "weighted_latents"]


class _Means(Messenger):
    """Set every latent to its conditional mean. Enter it before the plates, which expand the distributions."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and isinstance(msg["fn"], TorchDistribution | torch.distributions.Distribution):
            msg["value"] = msg["fn"].mean
            msg["done"] = True


def encode(
    guide: BottomUp | Ladder,
    x: Any,
    *,
    num_draws: int | None = None,
    mean: bool = False,
    context: Any = None,
    mask: Tensor | None = None,
) -> Any:
    """Draw z ~ q(z | x).

    Args:
        guide: a chain over x.
        x: data (N, *event_shape); a DataFrame or table for guides with a ``schema``.
        num_draws: S draws, or ``None`` for one without a leading dim.
        mean: take each layer's conditional mean instead of a draw. Only the first layer sampled is then a
            posterior mean; those after it are means given the means before them.
        context: covariates (N, c).
        mask: True = observed.

    Returns:
        Latents by site, (S, N, *latent_shape) or (N, *latent_shape).  Of a DataFrame a DataFrame with its index and
        columns ``z1[0]``, ...; draws are a first level of the index.

    Example:
        >>> from pyro_hvae.models import vae
        >>> model, guide = vae(6, 2, hidden=(4,))
        >>> encode(guide, torch.zeros(3, 6), num_draws=5)["z1"].shape
        torch.Size([5, 3, 2])
    """
    reading = None if isinstance(x, Tensor) else guide.read(x)
    if reading is not None:
        latents = encode(guide, reading.x, num_draws=num_draws, mean=mean, context=context, **reading.arguments)
        return latents_frame(latents, reading.table.index, num_draws)
    with torch.no_grad(), evaluation_mode(guide), _Means() if mean else nullcontext(), _draws(num_draws):
        trace = poutine.trace(guide).get_trace(x, context=context, mask=mask)
    return {site: trace.nodes[site]["value"] for site in trace.stochastic_nodes if site != guide.plate_name}


def decode(
    model: TopDown, latents: dict[str, Tensor], *, size: int | None = None, context: Any = None
) -> TorchDistribution:
    """Return the decoder p(x | z_1), the distribution of x given latents.

    Args:
        model: a generative chain.
        latents: values by site, (N, *latent_shape) or (S, N, *latent_shape). Those left out are drawn from
            the model, so ``{"z3": z3}`` alone gives a draw of what follows from the third layer.
        size: N, where ``latents`` is empty.
        context: covariates (N, c).

    Returns:
        The distribution of x, batch shape (N,) or (S, N).

    Raises:
        ValueError: for a site that is no latent of the model.

    Example:
        >>> from pyro_hvae.models import vae
        >>> model, guide = vae(6, 2, hidden=(4,))
        >>> decode(model, {"z1": torch.zeros(3, 2)}).mean.shape
        torch.Size([3, 6])
    """
    with torch.no_grad():
        return _likelihood(model, latents, size, context)[0]


def reconstruct(
    model: TopDown,
    guide: BottomUp | Ladder,
    x: Tensor,
    *,
    num_draws: int | None = None,
    context: Any = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the mean of x' ~ p(x' | z) with z ~ q(z | x), averaged over the draws.

    Args:
        model: a generative chain.
        guide: its guide.
        x: data (N, *event_shape).
        num_draws: draws of z to average over; ``None`` is one.
        context: covariates (N, c), for both.
        mask: True = observed; the guide does not see the rest.

    Returns:
        Means (N, *event_shape).

    Raises:
        ValueError: for a likelihood without a mean (categories): take draws by :func:`impute` instead.

    Example:
        >>> from pyro_hvae.models import vae
        >>> model, guide = vae(6, 2, hidden=(4,))
        >>> reconstruct(model, guide, torch.zeros(3, 6)).shape
        torch.Size([3, 6])
    """
    latents = encode(guide, x, num_draws=num_draws, context=context, mask=mask)
    means = _mean(model, decode(model, latents, context=context))
    return means if num_draws is None else means.mean(0)


def _mean(model: TopDown, likelihood: TorchDistribution) -> Tensor:
    """Return the mean of a likelihood.

    Raises:
        ValueError: for categories, which have none.
    """
    base: Any = likelihood
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    parts = base.parts if isinstance(base, distributions.Columns) else [base]
    if any(isinstance(part, torch.distributions.Categorical) for part in parts):
        raise ValueError(
            f"the likelihood of {model.observation!r} has no mean: its values are categories. Use "
            "decode(...) for the distribution, or impute(...) for draws."
        )
    return likelihood.mean


def interpolate(
    model: TopDown,
    guide: BottomUp | Ladder,
    first: Tensor,
    last: Tensor,
    *,
    num_steps: int = 8,
    context: Any = None,
) -> Tensor:
    r"""Decode points on the straight line between the latents of two data.

    .. math:: z(t) = (1 - t)\, z^{first} + t\, z^{last},\quad x(t) = E_{p(x \mid z(t))}[x],\qquad t = 0, \dots, 1

    The latents of a datum are the conditional means of the guide's layers, all of which are interpolated.

    Args:
        model: a generative chain.
        guide: its guide.
        first: data (N, *event_shape).
        last: data of the same shape.
        num_steps: number of points T >= 2, both ends included.
        context: covariates (N, c), for both.

    Returns:
        Means (T, N, *event_shape).

    Raises:
        ValueError: for data of different shapes, fewer than two points, or a likelihood without a mean (categories).

    Example:
        >>> from pyro_hvae.models import vae
        >>> model, guide = vae(6, 2, hidden=(4,))
        >>> interpolate(model, guide, torch.zeros(3, 6), torch.ones(3, 6), num_steps=5).shape
        torch.Size([5, 3, 6])
    """
    if first.shape != last.shape:
        raise ValueError(f"first and last must have one shape, got {tuple(first.shape)} and {tuple(last.shape)}.")
    if num_steps < 2:
        raise ValueError(f"num_steps must be >= 2, both ends included; got {num_steps}.")
    ends = [encode(guide, x, mean=True, context=context) for x in (first, last)]
    latents = {}
    for site, start in ends[0].items():
        t = torch.linspace(0, 1, num_steps, dtype=start.dtype, device=start.device)
        latents[site] = torch.lerp(start, ends[1][site], t.reshape(-1, *(1,) * start.dim()))
    return _mean(model, decode(model, latents, context=context))


def impute(
    model: TopDown,
    guide: BottomUp | Ladder,
    x: Any,
    mask: Tensor | None = None,
    *,
    num_draws: int | None = None,
    num_particles: int = 1,
    context: Any = None,
) -> Any:
    r"""Draw the missing entries given the observed ones, which are returned unchanged.

    With ``num_particles=L`` each datum gets L draws of the guide, of which those that explain its observed entries are
    chosen, with probabilities in proportion to p(x_obs, z) / q(z | x_obs); as L grows the draws become those of the
    model's exact posterior.  Entries are taken to be missing at random: whether one is missing may depend on observed
    entries, and not on its own value.

    Args:
        model: a generative chain.
        guide: its guide.
        x: data (N, *event_shape), anything (NaN too) where masked; or a DataFrame or table, for pairs with a
            ``schema``, whose missing entries are drawn.
        mask: True = observed, of the shape of x or (N,); None for a DataFrame.
        num_draws: S imputations, or ``None`` for one without a leading dim.
        num_particles: L >= 1 proposals for each datum, from which all its draws are chosen with replacement.
        context: covariates (N, c), for both.

    Returns:
        Completed data (S, N, *event_shape) or (N, *event_shape); of a DataFrame
        :class:`~pyro_hvae.tables.Imputations`: completed frames, intervals, pooled estimates.

    Raises:
        ValueError: for data without a mask, or weights of chains with Bayesian weights.

    Reference: MIWAE: deep generative modelling and imputation of incomplete data sets (Mattei and Frellsen, 2019).

    Example:
        >>> from pyro_hvae.models import vae
        >>> model, guide = vae(6, 2, hidden=(4,))
        >>> x = torch.tensor([[1.0, float("nan"), 0.0, 1.0, 0.0, 1.0]])
        >>> impute(model, guide, x, ~x.isnan(), num_draws=10).isnan().any()
        tensor(False)
    """
    reading = None if isinstance(x, Tensor) else model.read(x)
    if reading is not None:
        if mask is not None:
            raise ValueError("a DataFrame says itself which entries are missing: set them to NaN, and leave mask out.")
        options: Any = {"num_draws": num_draws, "num_particles": num_particles, "context": context}
        return imputations(reading.table, impute(model, guide, reading.x, reading.arguments["mask"], **options))
    if mask is None:
        raise ValueError("impute needs a mask, True where x is observed: pass ~x.isnan(), for one.")
    if num_particles == 1:
        latents = encode(guide, x, num_draws=num_draws, context=context, mask=mask)
    else:
        given = {"context": context, "mask": mask}
        latents = weighted_latents(model, guide, x, given, num_draws=num_draws, num_particles=num_particles)
    with torch.no_grad():
        drawn = _likelihood(model, latents, None, context)[1]
    seen = mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim()))
    return torch.where(seen, x, drawn.to(x.dtype))


def weighted_latents(
    model: TopDown,
    guide: BottomUp | Ladder,
    x: Tensor,
    given: Mapping[str, Any] | None = None,
    *,
    num_particles: int,
    num_draws: int | None = None,
) -> dict[str, Tensor]:
    """Draw z of the model's posterior by sampling-importance-resampling: choose among L draws of the guide.

    Args:
        model, guide, x, num_draws: as in :func:`impute`.
        given: the other arguments of both, ``context`` and ``mask``; tensors have a row for each datum.
        num_particles: L >= 1.

    Returns:
        Latents by site, (S, N, *latent_shape) or (N, *latent_shape).

    Raises:
        ValueError: for chains with Bayesian weights, which all data share.
    """
    if num_particles < 1:
        raise ValueError(f"num_particles must be >= 1, got {num_particles}.")
    if has_global(model) or has_global(guide):
        raise ValueError("draws of Bayesian weights belong to all data, so they can't be chosen by datum: use L = 1.")
    rows = max(1, _ELEMENTS // (num_particles * max(1, x[0].numel())))
    pieces: list[dict[str, Tensor]] = []
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        shown = {key: value[part] if isinstance(value, Tensor) else value for key, value in (given or {}).items()}
        with torch.no_grad(), evaluation_mode(guide), evaluation_mode(model):
            with _draws(num_particles):
                proposed = poutine.trace(guide).get_trace(x[part], shown.get("context"), mask=shown.get("mask"))
            with _draws(num_particles):
                replayed = poutine.replay(model, trace=proposed)
                explained = poutine.trace(replayed).get_trace(x[part], shown.get("context"), mask=shown.get("mask"))
            logits = _log_density(explained) - _log_density(proposed)
        logits = logits.expand(num_particles, len(x[part]))
        chosen = torch.distributions.Categorical(logits=logits.T).sample((num_draws or 1,))  # (S, rows)
        piece = {}
        for site in model.latents:
            value = proposed.nodes[site]["value"]
            event = value.shape[value.dim() - proposed.nodes[site]["fn"].event_dim :]
            pool = value.expand(num_particles, len(x[part]), *event)
            piece[site] = pool[chosen, torch.arange(len(x[part]), device=x.device)]
        pieces.append(piece)
    joined = {site: torch.cat([piece[site] for piece in pieces], 1) for site in model.latents}
    return joined if num_draws is not None else {site: value[0] for site, value in joined.items()}


_ELEMENTS = 2**23  # numbers of one likelihood that are held at once


def _log_density(trace: poutine.Trace) -> Tensor:
    """Return the sum of the log-densities of all sites of a trace, by draw and datum."""
    trace.compute_log_prob()
    sites = [node for node in trace.nodes.values() if node["type"] == "sample" and "log_prob" in node]
    return sum((node["log_prob"] for node in sites if node["log_prob"].dim()), torch.zeros(()))


def _draws(num_draws: int | None) -> Any:
    if num_draws is None:
        return nullcontext()
    if num_draws < 1:
        raise ValueError(f"num_draws must be >= 1, got {num_draws}.")
    return pyro.plate("_draws", num_draws, dim=-2)


def _likelihood(
    model: TopDown, latents: dict[str, Tensor], size: int | None, context: Any
) -> tuple[TorchDistribution, Tensor]:
    """Return the distribution of the observation given latents, and a draw from it."""
    if not isinstance(model, TopDown):
        raise TypeError(
            f"decode, reconstruct and impute take a TopDown chain, got {type(model).__name__}; for a StateSpace draw z "
            "by encode(guide, x), and x by poutine.condition(model, {'z': z})(size=, steps=), or use forecast"
        )
    unknown = set(latents) - set(model.latents)
    if unknown:
        raise ValueError(f"{sorted(unknown)} are no latents of {model.name!r}, which has {sorted(model.latents)}.")
    num_draws = None
    for site, value in latents.items():
        lead = value.shape[: value.dim() - _event_dim(model, site)]
        size = lead[-1]
        num_draws = lead[-2] if len(lead) > 1 else None
    first, nested = next(iter(model.kernels)), getattr(model, "nested", None)
    options: dict[str, Any] = {}
    if nested is not None and first in latents:  # what is above the value is not needed
        options["visit"] = lambda chain: chain.around(lambda _: latents[first], size=size, context=context)
    with evaluation_mode(model), ExitStack() as stack:
        stack.enter_context(_draws(num_draws))
        stack.enter_context(poutine.condition(data=latents))
        trace = poutine.trace(model).get_trace(size=size, context=context, **options)
    site = trace.nodes[model.observation]
    return site["fn"], site["value"]


def _event_dim(model: TopDown, site: str) -> int:
    """Return the event dims of a latent: the kernel's ``event_dim``, that of a diffusion, or 1."""
    for kernel in model.kernels.values():
        if site in getattr(kernel, "latents", ()):  # of a nested chain
            return _event_dim(kernel, site)  # type: ignore[arg-type]
    return getattr(model.kernels.get(site, model), "event_dim", 1)
