r"""The evidence bound of a diffusion, at a cost independent of the number of layers.

.. math:: \log p(x) \ge \underbrace{\mathrm E\log p(x|z_1)}_{\text{reconstruction}}
          - \underbrace{\mathrm{KL}(q(z_T|x)\|p(z_T))}_{\text{prior matching}}
          - \underbrace{\sum_{t=2}^{T}\mathrm E\,\mathrm{KL}(q(z_{t-1}|z_t,x)\|p(z_{t-1}|z_t))}_{
          \text{denoising matching}}

A diffusion that is nested in a larger program, as the prior of its latent :math:`z_0`, adds the terms outside of it,
:math:`\mathrm E\,[\log p(x|z_0)-\log q(z_0|x)]`.

Its expectation is that of :class:`TraceELBO` on the same programs, since the reversal of q is exact.  The sum over
layers is estimated from a few of them; in continuous time it is an integral.

Reference: Variational Diffusion Models (Kingma, Salimans, Poole and Ho, 2021).
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_hvae.arguments import check_choice, check_count
from pyro_hvae.bounds.base import Bound, Estimate, Evaluation
from pyro_hvae.bounds.capability import check_capable, check_data, data_of, given_context, layer_times
from pyro_hvae.bounds.visits import Visited, outer_terms, visit_pair
from pyro_hvae.modules import evaluation_mode
from pyro_hvae.problem import Problem
from pyro_hvae.problem.checks import check_observation
from pyro_hvae.problem.isolation import RUNNING, evaluating, kept_buffers, noted_parameters

__all__ = ["DiffusionELBO", "SimpleDiffusionLoss"]

SAMPLING = ("antithetic", "uniform", "importance", "exact")
_BINS = 64


class DiffusionELBO(Bound):
    r"""Evidence lower bound of a diffusion, from a few of its layers.

    Args:
        num_layers_sampled: number of layers (or times) per datum; more give a lower variance.
        sampling: ``"antithetic"`` spreads the layers evenly over the data of a batch; ``"uniform"`` draws them
            independently; ``"importance"`` draws layers with large terms more often, with inverse weights;
            ``"exact"`` sums over all layers.

    Raises:
        ValueError: for counts below one, an unknown sampling, or ``"exact"`` in continuous time.
        TypeError: for programs without the capability (:mod:`pyro_hvae.bounds.capability`).

    Reference:
        Variational Diffusion Models (Kingma et al., 2021); Improved Denoising Diffusion Probabilistic Models (Nichol
        and Dhariwal, 2021) for importance sampling.

    Example:
        >>> from pyro_hvae.models import vdm
        >>> from pyro_hvae.nn import DenoisingMLP
        >>> _ = torch.manual_seed(0)
        >>> model, guide = vdm(DenoisingMLP(2), event_shape=(2,), num_layers=1000)
        >>> sorted(DiffusionELBO().terms(model, guide, torch.zeros(4, 2)))
        ['denoising_matching', 'prior_matching', 'reconstruction']
    """

    def __init__(self, num_layers_sampled: int = 1, sampling: str = "antithetic") -> None:
        super().__init__()
        check_count("num_layers_sampled", num_layers_sampled)
        check_choice("sampling", sampling, SAMPLING)
        self.num_layers_sampled = num_layers_sampled
        self.sampling = sampling
        if sampling == "importance":
            self.register_buffer("magnitudes", torch.ones(_BINS))

    magnitudes: Tensor
    """Mean squares of the terms by bin of times; importance sampling draws times from them."""

    def _arguments(self) -> dict[str, Any]:
        return {"num_layers_sampled": self.num_layers_sampled, "sampling": self.sampling}

    def restart(self) -> None:
        """Reset the distribution of times of importance sampling."""
        if self.sampling == "importance":
            self.magnitudes.fill_(1.0)

    def estimate(self, problem: Problem) -> Estimate:
        terms, visited, scale = self._visit(problem)
        value = _bound(terms)
        return Estimate(value, value, scale, run=visited)

    def evaluate(self, problem: Problem) -> Evaluation:
        """Return ``reconstruction``, ``prior_matching``, ``denoising_matching`` in nats (N,), and the bound.

        A pair that nests a diffusion has ``rate_<site>`` for each latent outside of it besides.
        """
        terms, _, scale = self._visit(problem)
        return Evaluation(_bound(terms), terms, scale=scale)

    @evaluating()
    def per_layer(
        self, model: Any, guide: Any, x: Tensor, *, num_layers: int = 50, context: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return the denoising-matching term of single layers, evenly spaced along the chain.

        Args:
            x: data (N, *event_shape).
            num_layers: number of layers, at most those of the chain.

        Returns:
            Times t of the layers' upper ends, (L,), and their terms, (L, N): nats, or in continuous time nats per unit
            of t.
        """
        check_capable(model, guide)
        terms: list[Tensor] = []
        upper: list[Tensor] = []

        def inside(p: Any, q: Any, z: Tensor, mask: Tensor | None) -> None:
            if q.num_layers == 1:
                raise ValueError("a diffusion of one layer has no denoising-matching term")
            q = given_context(q, context)
            one, size = _one(p, z), z.shape[0]
            if q.num_layers is None:
                layers = [(None, t) for t in torch.linspace(0.0, 1.0, num_layers).to(one)]
            else:
                count = min(num_layers, q.num_layers - 1)
                index = torch.linspace(2.0, float(q.num_layers), count).round().to(one)
                layers = list(zip(layer_times(q, index - 1), layer_times(q, index), strict=True))
            for lower, t in layers:
                s = None if lower is None else lower.expand(size)
                terms.append(_layer(p, q, s, t.expand(size), z, context))
                upper.append(t)

        with RUNNING, torch.no_grad(), evaluation_mode(model, guide), kept_buffers(model, guide), noted_parameters():
            visit_pair(model, guide, (x, context, None, None), inside)
        return torch.stack(upper), torch.stack(terms)

    def _visit(self, problem: Problem) -> tuple[dict[str, Tensor], Visited, float]:
        model, guide = problem.model, problem.guide
        check_capable(model, guide)
        x, context, mask, data_size = data_of(problem.args, problem.kwargs)
        learning = problem.training and torch.is_grad_enabled()
        terms: dict[str, Tensor] = {}
        chains: list[Any] = []

        def inside(p: Any, q: Any, z: Tensor, seen: Tensor | None) -> None:
            if z is x:
                chains.append(p)
            terms.update(self._layers(p, given_context(q, context), z, context, seen, learning))

        try:
            with RUNNING, ExitStack() as stack:
                if not problem.training:
                    stack.enter_context(evaluation_mode(model, guide))
                    stack.enter_context(kept_buffers(model, guide))
                    stack.enter_context(noted_parameters())
                visited = visit_pair(model, guide, (x, context, mask, data_size), inside)
        except (ValueError, RuntimeError):
            check_observation("x", None, x, mask)  # for NaN and infinities
            for chain in chains:
                check_data(chain, x, context, mask)
            raise
        scale = 1.0 if data_size is None else data_size / x.shape[0]
        return (outer_terms(terms, visited) if visited.nests else terms), visited, scale

    def _layers(
        self, p: Any, q: Any, x: Tensor, context: Any, mask: Tensor | None, learning: bool
    ) -> dict[str, Tensor]:
        data = x if mask is None else torch.where(_broadcast(mask, x), x, torch.zeros_like(x))
        one = _one(p, x)
        last = q.marginal(one, data)
        first_time = torch.zeros_like(one) if q.num_layers is None else one * layer_times(q, 1)
        likelihood = p.likelihood(_draw(q, q.marginal(first_time, data)), context)
        if mask is None:
            reconstruction = likelihood.log_prob(data)
        else:
            reconstruction = _masked_log_prob(likelihood, data, mask)
        prior = p.prior(x)
        terms = {
            "reconstruction": reconstruction,
            "prior_matching": _divergence(q, last, prior.expand(last.batch_shape)),
        }
        if q.num_layers == 1:
            terms["denoising_matching"] = torch.zeros_like(reconstruction)
        elif self.sampling == "exact":
            terms["denoising_matching"] = self._all(p, q, data, context)
        else:
            terms["denoising_matching"] = self._sampled(p, q, data, context, learning)
        return terms

    def _all(self, p: Any, q: Any, x: Tensor, context: Any) -> Tensor:
        if q.num_layers is None:
            raise ValueError("sampling='exact' sums over layers, and continuous time has infinitely many: sample them")
        ones = _one(p, x).expand(x.shape[0])
        total = torch.zeros_like(ones)
        for i in range(2, q.num_layers + 1):
            total = total + _layer(p, q, ones * layer_times(q, i - 1), ones * layer_times(q, i), x, context)
        return total

    def _sampled(self, p: Any, q: Any, x: Tensor, context: Any, learning: bool) -> Tensor:
        shape = (self.num_layers_sampled, x.shape[0])
        uniform = self._positions(shape, _one(p, x))
        density = torch.ones_like(uniform)
        if self.sampling == "importance":
            if self.magnitudes.device != uniform.device:  # once, where the programs are on another device
                self.magnitudes = self.magnitudes.to(uniform.device)
            uniform, density = self._stretched(uniform)
        repeated = x.expand(self.num_layers_sampled, *x.shape)
        if q.num_layers is None:
            term = _rate(p, q, uniform, repeated, context)
        else:
            count = q.num_layers - 1
            index = (uniform * count).floor().clamp(max=count - 1)
            if self.sampling == "importance":  # the probability of the layer's interval, not the density at a point
                density = self._mass(index / count, (index + 1) / count) * count
            term = count * _layer(p, q, layer_times(q, index + 1), layer_times(q, index + 2), repeated, context)
        if self.sampling == "importance" and learning:
            self._update_magnitudes(uniform.detach(), term.detach())
        return (term / density).mean(0)

    def _positions(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        """Draw uniform points of [0, 1); antithetic ones share one offset and cover the interval evenly."""
        if self.sampling == "uniform":
            return torch.rand(shape, dtype=like.dtype, device=like.device)
        count = shape[0] * shape[1]
        order = torch.randperm(count, device=like.device).to(like.dtype)
        return ((order + torch.rand((), dtype=like.dtype, device=like.device)) / count).reshape(shape) % 1.0

    def _weights(self, like: Tensor) -> Tensor:
        """Return the probability of each bin of times: 0.8 proportional to the terms' root mean square, 0.2 uniform."""
        root = self.magnitudes.to(like).sqrt()
        return 0.8 * root / root.sum() + 0.2 / _BINS

    def _stretched(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        weights = self._weights(uniform)
        edges = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
        edges = edges / edges[-1]
        index = torch.searchsorted(edges, uniform.contiguous(), right=True).clamp(1, _BINS) - 1
        share = (uniform - edges[index]) / (edges[index + 1] - edges[index])
        return ((index + share) / _BINS).clamp(max=1.0 - 1e-6), weights[index] * _BINS / weights.sum()

    def _mass(self, start: Tensor, stop: Tensor) -> Tensor:
        """Return the probability of an interval of times."""
        weights = self._weights(start)
        edges = torch.cat([weights.new_zeros(1), weights.cumsum(0)]) / weights.sum()

        def below(t: Tensor) -> Tensor:
            place = t * _BINS
            index = place.floor().clamp(0, _BINS - 1).long()
            return edges[index] + (place - index) * (edges[index + 1] - edges[index])

        return below(stop) - below(start)

    def _update_magnitudes(self, times: Tensor, terms: Tensor) -> None:
        """Update the mean squares of the terms by bin."""
        index = (times.reshape(-1) * _BINS).long().clamp(max=_BINS - 1)
        square = (terms.reshape(-1) ** 2).to(self.magnitudes)
        summed = torch.zeros_like(self.magnitudes).index_add(0, index, square)
        count = torch.zeros_like(self.magnitudes).index_add(0, index, torch.ones_like(square))
        fresh = summed / count.clamp(min=1.0)
        self.magnitudes.copy_(torch.where(count > 0, 0.95 * self.magnitudes + 0.05 * fresh, self.magnitudes))


def _bound(terms: dict[str, Tensor]) -> Tensor:
    return terms["reconstruction"] - sum(term for name, term in terms.items() if name != "reconstruction")


class SimpleDiffusionLoss(DiffusionELBO):
    r"""A noise-prediction loss :math:`\mathrm E_t\,w(t)\|\epsilon-\hat\epsilon\|^2`: a surrogate, no bound.

    It replaces the denoising matching, and its value is no estimate of log p(x); ``per_datum`` and ``terms`` are those
    of the bound.

    Args:
        weighting: ``"simple"`` (w = 1), ``"min-snr"`` (min(SNR, 5)/SNR) or ``"p2"`` (1/(1 + SNR)).
        num_layers_sampled, sampling: as :class:`DiffusionELBO`.

    References:
        Denoising Diffusion Probabilistic Models (Ho, Jain and Abbeel, 2020); Efficient Diffusion Training via Min-SNR
        Weighting Strategy (Hang et al., 2023); Perception Prioritized Training of Diffusion Models (Choi et al., 2022).
    """

    is_bound = False

    def __init__(self, weighting: str = "simple", num_layers_sampled: int = 1, sampling: str = "antithetic") -> None:
        super().__init__(num_layers_sampled, sampling)
        if weighting not in ("simple", "min-snr", "p2"):
            raise ValueError(f"unknown weighting {weighting!r}; there are simple, min-snr, p2")
        if sampling not in ("antithetic", "uniform"):
            raise ValueError(f"a surrogate takes sampling 'antithetic' or 'uniform', got {sampling!r}")
        self.weighting = weighting
        self.bound = DiffusionELBO(num_layers_sampled, sampling)

    def _sampled(self, p: Any, q: Any, x: Tensor, context: Any, learning: bool) -> Tensor:
        if getattr(p, "noise", "Gaussian") != "Gaussian":
            raise TypeError(
                "SimpleDiffusionLoss weighs the squared error of predicted Gaussian noise, and the noise of this pair "
                f"is {p.noise}: use DiffusionELBO"
            )
        times = self._positions((self.num_layers_sampled, x.shape[0]), x)
        if q.num_layers is not None:
            times = (times * q.num_layers).floor() / max(q.num_layers - 1, 1)
        repeated = x.expand(self.num_layers_sampled, *x.shape)
        marginal = q.marginal(times, repeated)
        z_t = marginal.rsample()
        gamma = given_context(p.schedule, context)(times)
        noise = (z_t - marginal.mean) / marginal.stddev
        dims = tuple(range(-(x.dim() - 1), 0))
        square = (noise - p.predict(z_t, gamma, context, target="eps")) ** 2
        snr = torch.exp(-gamma if gamma.dim() == square.dim() else -_broadcast(gamma, square))
        if self.weighting == "min-snr":
            square = square * (snr.clamp(max=5.0) / snr)
        elif self.weighting == "p2":
            square = square / (1 + snr)
        return square.sum(dims).mean(0)

    def evaluate(self, problem: Problem) -> Evaluation:
        """Return value and terms of the bound."""
        return self.bound.evaluate(problem)


def _rate(p: Any, q: Any, t: Tensor, x: Tensor, context: Any) -> Tensor:
    """Return the rate of the divergence at t; a learned schedule gets the gradient of the variance."""
    follows = hasattr(getattr(p, "schedule", None), "variance_gradient")
    with p.schedule.variance_gradient() if follows else nullcontext(lambda terms: None) as record:
        terms = _layer(p, q, None, t, x, context)
        record(terms)
    return terms


def _layer(p: Any, q: Any, s: Tensor | None, t: Tensor, x: Tensor, context: Any) -> Tensor:
    """Return the divergence of the layer from t to s, or its rate at t; shape of t."""
    z_t = _draw(q, q.marginal(t, x))
    if hasattr(p, "matching"):
        return p.matching(s, t, z_t, x, context)
    if s is None:
        raise TypeError("continuous time needs a model with matching(s, t, z_t, x, context)")
    return _divergence(q, q.posterior(s, t, z_t, x), p.transition(s, t, z_t, context))


def _draw(q: Any, marginal: Any) -> Tensor:
    """Draw from a marginal of the guide."""
    if marginal.has_rsample:
        return marginal.rsample()
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in q.parameters()):
        raise ValueError(
            f"the guide's marginal ({type(marginal).__name__}) has no reparameterised draws, so the gradient of "
            "DiffusionELBO in the guide's parameters would be wrong: fix them by requires_grad_(False)"
        )
    return marginal.sample()


def _divergence(guide: Any, q: Any, p: Any) -> Tensor:
    """Return KL(q || p), or where no formula is registered its estimate from one draw."""
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        z = _draw(guide, q)
        return q.log_prob(z) - p.log_prob(z)


def _one(p: Any, x: Tensor) -> Tensor:
    """Return the number 1 on the device of x, of its dtype or, for data of integers, of the model's."""
    if x.is_floating_point():
        return x.new_ones(())
    parameters = p.parameters() if hasattr(p, "parameters") else ()
    dtype = next((value.dtype for value in parameters if value.is_floating_point()), torch.get_default_dtype())
    return torch.ones((), dtype=dtype, device=x.device)


def _broadcast(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim()))


def _masked_log_prob(likelihood: Any, x: Tensor, mask: Tensor) -> Tensor:
    base: Any = likelihood
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    entries = base.log_prob(x)
    kept = torch.where(_broadcast(mask, entries), entries, torch.zeros_like(entries))
    return kept.sum(tuple(range(1, kept.dim())))
