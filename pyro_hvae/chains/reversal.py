r"""A bottom-up Gaussian guide, drawn from the top down.

A chain :math:`q(z_1|x)\prod_t q(z_t|z_{t-1})` with Gaussian first layer :math:`N(m_1(x), P_1(x))` and linear-Gaussian
layers :math:`z_t = A_t z_{t-1} + a_t + N(0, Q_t)` has Gaussian marginals given x,

.. math:: m_t = A_t m_{t-1} + a_t,\qquad P_t = A_t P_{t-1} A_t^\top + Q_t,

and by Bayes' rule the exact factorisation :math:`q(z_T|x)\prod_t q(z_{t-1}|z_t,x)`,

.. math:: q(z_{t-1}|z_t,x) = N\bigl(m_{t-1} + G_t(z_t-m_t),\ (I-G_tA_t)P_{t-1}(I-G_tA_t)^\top + G_tQ_tG_t^\top\bigr),
          \qquad G_t = P_{t-1}A_t^\top P_t^{-1}.

It is the same distribution in another order, in which no model parent of a layer descends from it: every term of
:class:`~pyro_hvae.bounds.LayerwiseELBO` is then a KL divergence in closed form.  A diffusion is the same with scalar
covariances.

Reference: Maximum likelihood estimates of linear dynamic systems (Rauch, Tung and Striebel, 1965).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_hvae.chains.arguments import batch_size
from pyro_hvae.chains.base import Node
from pyro_hvae.chains.directions import BottomUp
from pyro_hvae.chains.missing import zero_masked
from pyro_hvae.kernels import LinearGaussian

__all__ = ["Reversed"]


class _Layer(NamedTuple):
    """One layer given x: its marginal, and the linear map and noise that lead to it from the layer below."""

    site: str
    mean: Tensor
    covariance: Tensor
    weight: Tensor | None
    noise: Tensor | None


class Reversed(PyroModule):
    """The same guide, sampled from the top layer down; its parameters are the guide's own.

    Args:
        guide: a chain whose first kernel is Gaussian (of any network) and whose others are
            :class:`~pyro_hvae.kernels.LinearGaussian`, over vectors.

    Raises:
        TypeError: naming the first kernel that is neither, on construction or, for the first one, on the call.

    Example:
        >>> from pyro_hvae.kernels import Gaussian
        >>> _ = torch.manual_seed(0)
        >>> bottom_up = BottomUp(z1=Gaussian(torch.nn.Linear(5, 6)), z2=LinearGaussian(3, 2))
        >>> {site: tuple(z.shape) for site, z in Reversed(bottom_up)(torch.zeros(4, 5)).items()}
        {'z2': (4, 2), 'z1': (4, 3)}
    """

    def __init__(self, guide: BottomUp) -> None:
        if not isinstance(guide, BottomUp):
            raise TypeError(f"Reversed takes a BottomUp chain, got {type(guide).__name__}.")
        for site, kernel in list(guide.kernels.items())[1:]:
            if not isinstance(kernel, LinearGaussian):
                raise TypeError(
                    f"kernel {site!r} of {guide.name!r} is a {type(kernel).__name__}, and only a chain of "
                    "LinearGaussian kernels above the first can be reversed: otherwise its layers given x are not "
                    "Gaussian."
                )
        super().__init__(guide.name)
        self.bottom_up = guide
        self.plate_name = guide.plate_name

    @property
    def name(self) -> str:
        """Root of the parameters' names."""
        return self._pyro_name

    def forward(
        self,
        x: Tensor,
        context: Any = None,
        *,
        mask: Tensor | None = None,
        data_size: int | None = None,
        visit: Callable[[Reversed], Any] | None = None,
    ) -> Any:
        """Draw the latents given x, arguments as those of the chain.

        Returns:
            Draws by site, (..., N, d_t), the top layer first.
        """
        if visit is not None:
            return visit(self)
        size = batch_size(self.name, x, context, mask, None)
        chain = self.bottom_up
        values: dict[str, Tensor] = {}
        with chain.data_plate(size, data_size, x.device):
            layers = self._marginals(chain, zero_masked(x, mask), context)
            value = above = None
            for layer in reversed(layers):
                value = values[layer.site] = pyro.sample(layer.site, _given(layer, above, value))
                above = layer
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
        self.bottom_up.refuse_global()
        nodes: list[Node] = []
        above: _Layer | None = None
        for layer in reversed(self._marginals(self.bottom_up, zero_masked(x, mask), context)):

            def given(*values: Tensor, layer: _Layer = layer, above: _Layer | None = above) -> Any:
                return _given(layer, above, values[0] if values else None)

            nodes.append(("draw", layer.site, () if above is None else (above.site,), given))
            above = layer
        return nodes

    def _marginals(self, chain: BottomUp, x: Tensor, context: Any) -> list[_Layer]:
        layers: list[_Layer] = []
        for site, kernel, _ in chain.steps():
            if not layers:
                first = chain.distribution(site, kernel, x, context)
                layers.append(_Layer(site, first.mean, _covariance(site, first), None, None))
                continue
            below = layers[-1]
            whole, noise = kernel.weight, kernel.covariance  # type: ignore[attr-defined]
            weight = whole[..., : below.mean.shape[-1]]
            mean = chain.distribution(site, kernel, below.mean, context).mean
            layers.append(_Layer(site, mean, weight @ below.covariance @ weight.mT + noise, weight, noise))
        return layers


def _covariance(site: str, first: Any) -> Tensor:
    if isinstance(first, dist.MultivariateNormal):
        return first.covariance_matrix
    base = getattr(first, "base_dist", None)
    if isinstance(base, dist.Normal) and len(first.event_shape) == 1:
        return first.variance.diag_embed()
    raise TypeError(f"the first layer {site!r} must be a Gaussian over vectors to be reversed, got {first}.")


def _given(layer: _Layer, above: _Layer | None, value: Tensor | None) -> Any:
    """Return the distribution of a layer given x and the draw of the layer above, if there is one."""
    mean, covariance = layer.mean, layer.covariance
    if above is not None and value is not None:
        mean, covariance = _conditional(layer, above, value)
    return dist.MultivariateNormal(mean, scale_tril=torch.linalg.cholesky(covariance))


def _conditional(layer: _Layer, above: _Layer, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of a layer given x and the draw of the layer above."""
    assert above.weight is not None
    assert above.noise is not None
    crossed = above.weight @ layer.covariance
    gain = torch.cholesky_solve(crossed, torch.linalg.cholesky(above.covariance)).mT
    mean = layer.mean + (gain @ (value - above.mean).unsqueeze(-1)).squeeze(-1)
    remainder = torch.eye(gain.shape[-2], dtype=gain.dtype, device=gain.device) - gain @ above.weight
    return mean, remainder @ layer.covariance @ remainder.mT + gain @ above.noise @ gain.mT
