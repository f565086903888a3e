r"""The ladder posterior: bottom-up evidence merged, layer by layer, with the model's own prior.

A deterministic pass upwards gives each layer features d_t and an evidence Gaussian,

.. math::
    d_0 = x,\qquad (d_t,\; N(\hat\mu_t, \hat\sigma_t^2)) = \mathrm{evidence}_t(d_{t-1}),\qquad t = 1, \dots,
    T,

and a stochastic pass downwards multiplies it with the model's kernel p(z_t | z_{t+1}) = N(mu_t, sigma_t^2),
weighing each by its precision:

.. math::
    q(z_t \mid z_{t+1}, x) = N\!\left(
        \frac{\hat\mu_t \hat\sigma_t^{-2} + \mu_t \sigma_t^{-2}}{\hat\sigma_t^{-2} + \sigma_t^{-2}},\;
        \frac{1}{\hat\sigma_t^{-2} + \sigma_t^{-2}}\right),
    \qquad q(z_1, \dots, z_T \mid x) = q(z_T \mid x) \prod_{t=1}^{T-1} q(z_t \mid z_{t+1}, x).

The top layer is merged with its prior p(z_T) as well (the paper takes the evidence alone there), so that
evidence without information, sigma-hat to infinity, gives back the model's prior at every layer. Since the
guide samples in the model's own direction, KL(q(z_t | z_{t+1}, x) || p(z_t | z_{t+1})) is analytic at each
layer.

Reference: Ladder Variational Autoencoders (Sønderby et al., 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_hvae.chains.arguments import batch_size
from pyro_hvae.chains.base import Chain, Node
from pyro_hvae.chains.directions import TopDown
from pyro_hvae.chains.missing import zero_masked
from pyro_hvae.chains.weights import draw_global, has_global
from pyro_hvae.kernels import Kernel
from pyro_hvae.kernels.base import halves

__all__ = ["Ladder", "LadderEvidence", "gaussian_product"]

_FIRST_PRECISION = 0.2  # small against a unit prior's, so that a posterior starts near its prior


class LadderEvidence(Kernel):
    r"""One layer of the upward pass: features d_t = activation(features(d_{t-1})), and evidence about z_t from them.

    The head yields (m, r), and from them the evidence is

    .. math:: \hat\sigma_t^{-2} = \lambda = \lambda_{min} + \operatorname{softplus}(r + c),\qquad
        \hat\mu_t = m\,(1 + 1 / \lambda),\qquad c: \lambda(0) = 0.2,

    so that m is the mean of the posterior under a standard normal prior, N(m, 1 / (1 + lambda)).  Its gradient does not
    vanish where lambda is near zero, as at the start of training; and a sharp posterior needs no large m.  With
    the evidence's own mean in the place of m the layer stays at its prior (measured on 8x8 digits: 0.00 nats, for any
    number of steps tried), with its precision times its mean it learns slowly (binary MNIST, three layers, five minutes
    of one thread: a bound of -90.7 nats an image, against -79.0 as it is here).

    Args:
        features: network from d_{t-1} (and the context, by the rule of :mod:`pyro_hvae.kernels`) to d_t.
        head: network from d_t to (..., 2 d): m and r side by side along the first event dim.
        activation: module applied to the features; default none.
        event_dim: dims of one event of z_t, >= 1.
        min_precision: lambda_min > 0, in units of z^-2.

    Raises:
        ValueError: for ``event_dim`` or ``min_precision`` out of range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> features, evidence = LadderEvidence(nn.Linear(5, 7), nn.Linear(7, 2 * 3))(torch.zeros(4, 5))
        >>> features.shape, evidence.shape()
        (torch.Size([4, 7]), torch.Size([4, 3]))
    """

    def __init__(
        self,
        features: nn.Module,
        head: nn.Module,
        activation: nn.Module | None = None,
        *,
        event_dim: int = 1,
        min_precision: float = 1e-3,
    ) -> None:
        super().__init__(features, event_dim)
        if event_dim < 1:
            raise ValueError(
                f"LadderEvidence needs event_dim >= 1, got {event_dim}: m and r stand side by side along the first "
                "event dim."
            )
        if not 0.0 < min_precision < _FIRST_PRECISION:
            raise ValueError(f"min_precision must lie in (0, {_FIRST_PRECISION}), got {min_precision}.")
        self.activation = nn.Identity() if activation is None else activation
        self.head = head
        self.min_precision = min_precision
        self._shift = math.log(math.expm1(_FIRST_PRECISION - min_precision))

    def forward(  # type: ignore[override]
        self, below: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, TorchDistribution]:
        features = self.activation(self.parameters_of(below, context))
        mean, raw = halves(self, self.head(features))
        precision = F.softplus(raw + self._shift) + self.min_precision
        return features, dist.Normal(mean * (1 + 1 / precision), precision.rsqrt()).to_event(self.event_dim)


class Ladder(Chain):
    """Top-down posterior that shares the model's kernels.

    The ladder refers to the model without owning it: the model's parameters are not among ``ladder.parameters()`` and
    keep the model's names in Pyro's store, where both programs' statements name the same tensors. Move and save the
    model itself.

    Args:
        model: the generative chain, whose latent kernels give diagonal Gaussians.
        name: root of the names of the evidence parameters.
        plate: name of the plate over the data, the model's.
        **evidence: a module a latent, in any order. Its ``forward(below, context=None)`` returns
            ``(features, distribution)``, as :class:`LadderEvidence` does, or a distribution alone, as a
            :class:`~pyro_hvae.kernels.Gaussian` kernel does, whose mean is then the input of the next layer.

    Raises:
        TypeError: if ``model`` is not a ``TopDown``.
        ValueError: if evidence and the model's latents don't match; on a call, for a kernel that is not
            diagonal Gaussian, widths that don't fit, or a model with Bayesian weights.

    Example:
        >>> from pyro_hvae.kernels import Bernoulli, Gaussian, StandardNormal
        >>> _ = torch.manual_seed(0)
        >>> decoder, upper = nn.Linear(3, 5), nn.Linear(2, 2 * 3)
        >>> model = TopDown(z2=StandardNormal(2), z1=Gaussian(upper), x=Bernoulli(decoder))
        >>> guide = Ladder(model, z1=Gaussian(nn.Linear(5, 2 * 3)), z2=Gaussian(nn.Linear(3, 2 * 2)))
        >>> {site: tuple(z.shape) for site, z in guide(torch.zeros(4, 5)).items()}
        {'z2': (4, 2), 'z1': (4, 3)}
    """

    def __init__(self, model: TopDown, *, name: str = "guide", plate: str = "data", **evidence: nn.Module) -> None:
        if not isinstance(model, TopDown):
            raise TypeError(f"a Ladder needs the TopDown whose latents it infers, got {type(model).__name__}.")
        if set(evidence) != set(model.latents):
            raise ValueError(
                "a Ladder needs one evidence module a latent of the model: latents "
                f"{sorted(model.latents)}, evidence {sorted(evidence)}."
            )
        super().__init__(name, plate, {site: evidence[site] for site in reversed(model.latents)})
        self._held = (model,)  # a tuple, so that torch does not register it as a child

    @property
    def model(self) -> TopDown:
        """The generative chain."""
        return self._held[0]

    def forward(
        self,
        x: Tensor,
        context: Any = None,
        *,
        mask: Tensor | None = None,
        data_size: int | None = None,
        visit: Callable[[Ladder], Any] | None = None,
    ) -> Any:
        """Draw the latents given x, the top layer first.

        Args:
            x: data (N, *event_shape).
            context: covariates (N, c), passed to every evidence module and every kernel of the model.
            mask: True = observed, of the shape of x or (N,); the first evidence module sees 0 elsewhere.
            data_size: size of the data set of which x is a minibatch.
            visit: run this function of the chain instead, inside of the module's call, where parameters register.

        Returns:
            Draws by site, (..., N, d_t).
        """
        if visit is not None:
            return visit(self)
        size = batch_size(self.name, x, context, mask, None)
        model = self._shared_model()
        draw_global(self)
        values: dict[str, Tensor] = {}
        value: Any = None
        # the model's parameters are named in its own context, and only where this program's own are
        naming = model._pyro_context if self._pyro_context.active else nullcontext()
        with self.data_plate(size, data_size, x.device), naming:
            evidence = self._evidence(x, context, mask)
            for site, kernel, infer in model.steps():
                if site == model.observation:
                    break
                prior = model.distribution(site, kernel, value, context)
                value = values[site] = pyro.sample(site, gaussian_product(site, prior, evidence[site]), infer=infer)
        return values

    def stepwise(
        self, x: Tensor, context: Any = None, *, mask: Tensor | None = None, data_size: int | None = None
    ) -> list[Node]:
        """List the draws q(z_T | x), q(z_{T-1} | z_T, x), ..., for particles (:class:`pyro_hvae.SMCBound`).

        Args: those of the program.

        Returns:
            ``("draw", site, draws that it depends on, distribution as a function of these)`` for each site.
        """
        batch_size(self.name, x, context, mask, None)
        model = self._shared_model()
        self.refuse_global()
        evidence = self._evidence(x, context, mask)
        nodes: list[Node] = []
        parents: tuple[str, ...] = ()
        for site, kernel, _ in model.steps():
            if site == model.observation:
                break

            def product(*values: Tensor, site: str = site, kernel: Any = kernel) -> TorchDistribution:
                prior = model.distribution(site, kernel, values[0] if values else None, context)
                return gaussian_product(site, prior, evidence[site])

            nodes.append(("draw", site, parents, product))
            parents = (site,)
        return nodes

    def _shared_model(self) -> TopDown:
        model = self.model
        if has_global(model):
            raise ValueError(
                f"{self.name!r} can't share the kernels of {model.name!r}: they have Bayesian weights "
                "(PyroSample), which this guide would draw from their prior. Use BottomUp, and a guide of "
                "your own for the weights."
            )
        return model

    def _evidence(self, x: Tensor, context: Any, mask: Tensor | None) -> dict[str, TorchDistribution]:
        """Return the evidence about each layer, from the pass upwards."""
        evidence: dict[str, TorchDistribution] = {}
        below = zero_masked(x, mask, self._modules[self._steps[0][1]])
        for site, module, _ in self.steps():
            result = self.call(site, module, below, context)
            below, evidence[site] = result if isinstance(result, tuple) else (result.mean, result)
        return evidence

    def _path(self) -> list[str]:
        return ["x", *reversed(super()._path())]


def gaussian_product(site: str, prior: TorchDistribution, evidence: TorchDistribution) -> TorchDistribution:
    """Multiply two diagonal Gaussians and normalise.

    Raises:
        ValueError: if one is no diagonal Gaussian, or their event shapes differ.
    """
    parts = []
    for what, distribution in (("the model's kernel", prior), ("the evidence", evidence)):
        base: Any = distribution
        while isinstance(base, torch.distributions.Independent):
            base = base.base_dist
        if not isinstance(base, torch.distributions.Normal):
            raise ValueError(
                f"precision weighting needs diagonal Gaussians, but {what} of {site!r} is "
                f"{type(base).__name__}. Use Gaussian or StandardNormal there, or BottomUp as the guide."
            )
        parts.append(base)
    if prior.event_shape != evidence.event_shape:
        raise ValueError(
            f"evidence for {site!r} has event shape {tuple(evidence.event_shape)}, the model's kernel "
            f"{tuple(prior.event_shape)}; give them the same width."
        )
    p, e = parts
    p_var, e_var = p.scale**2, e.scale**2
    total = p_var + e_var
    loc = (p.loc * e_var + e.loc * p_var) / total
    return dist.Normal(loc, p.scale * e.scale * total.rsqrt()).to_event(prior.event_dim)
