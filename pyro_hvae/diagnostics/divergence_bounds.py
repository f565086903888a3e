r"""Bounds of a posterior's errors from a bound of a divergence.

With the guide q, the posterior p, and :math:`\kappa\ge\mathrm{KL}(q\|p)`:

- total variation is at most :math:`\sqrt{\kappa/2}` (Pinsker) and :math:`\sqrt{1-e^{-\kappa}}` (Bretagnolle and Huber);
- the a-quantile of p lies between the quantiles of q at a less and a plus the total variation;
- if each coordinate of p is Gaussian, or has :math:`\mathrm E_p[e^{g}]` no larger than a Gaussian of its mean and
  variance for every quadratic function g, its mean :math:`\mu_p` and standard deviation :math:`\sigma_p` obey
  (Donsker and Varadhan's formula)

.. math:: \tfrac12\Bigl(s^2-1-\log s^2 + \tfrac{(\mu_q-\mu_p)^2}{\sigma_p^2}\Bigr)\le\kappa,\qquad
          s=\sigma_q/\sigma_p.

With :math:`\chi^2\ge\mathrm E_q[(p/q)^2]-1`, and no condition on p, every mean of a function f differs by at most
:math:`\sqrt{\chi^2\,\mathrm{Var}_q f}` (Cauchy and Schwarz).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MomentBounds", "errors_by_chi2", "errors_by_kl", "total_variation_bound"]


@dataclass(frozen=True)
class MomentBounds:
    """Bounds of the errors of means and standard deviations of every coordinate, shape of the data's plates.

    Attributes:
        condition: under which they hold.
        mean_shift: of the distance of the posterior's mean from the guide's, in standard deviations of the guide.
        sd_low, sd_high: of the posterior's standard deviation, in units of the guide's.
    """

    condition: str
    mean_shift: Tensor
    sd_low: Tensor
    sd_high: Tensor


def total_variation_bound(kl: Tensor) -> Tensor:
    r"""Bound the total variation by a divergence in nats: :math:`\min(\sqrt{\kappa/2}, \sqrt{1-e^{-\kappa}})`.

    Example:
        >>> total_variation_bound(torch.tensor([0.02, 10.0])).round(decimals=4)
        tensor([0.1000, 1.0000])
    """
    return torch.minimum((0.5 * kl).sqrt(), (-torch.expm1(-kl)).sqrt())


def errors_by_kl(kl: Tensor) -> MomentBounds:
    r"""Bound errors of means and standard deviations by :math:`\kappa\ge\mathrm{KL}(q\|p)`, for Gaussian coordinates.

    The largest distance of the means is :math:`\sigma_q\sqrt{e^{2\kappa}-1}`, at :math:`s=e^{-\kappa}`; s itself lies
    between the roots of :math:`s^2-1-\log s^2=2\kappa`.

    Args:
        kl: in nats, at least 0.

    Reference:
        Validated Variational Inference via Practical Posterior Error Bounds (Huggins, Kasprzak, Campbell and Broderick,
        2020) for the aim; the formulas are those of two Gaussians.

    Example:
        >>> errors = errors_by_kl(torch.tensor(0.02))
        >>> errors.mean_shift.round(decimals=3), errors.sd_low.round(decimals=3), errors.sd_high.round(decimals=3)
        (tensor(0.2020), tensor(0.8740), tensor(1.1600))
    """
    wide, narrow = _root(kl, above=True), _root(kl, above=False)
    return MomentBounds(
        "each coordinate of the posterior is Gaussian, or its quadratic functions have no larger exponential moments",
        torch.expm1(2 * kl).sqrt(),
        1 / wide,
        1 / narrow,
    )


def errors_by_chi2(chi2: Tensor, kurtosis: float) -> MomentBounds:
    r"""Bound errors of means and standard deviations by :math:`\chi^2\ge\mathrm E_q[(p/q)^2]-1`, for any posterior.

    :math:`|\mu_p-\mu_q|\le\chi\sigma_q` and
    :math:`|\mathrm E_p(z-\mu_q)^2-\sigma_q^2|\le\chi\sigma_q^2\sqrt{\mathrm{kurtosis}_q-1}`.

    Args:
        chi2: at least 0.
        kurtosis: the largest of the guide's coordinates; 3 for Gaussians.

    Example:
        >>> errors = errors_by_chi2(torch.tensor(0.01), 3.0)
        >>> errors.mean_shift.round(decimals=3), errors.sd_low.round(decimals=3), errors.sd_high.round(decimals=3)
        (tensor(0.1000), tensor(0.9210), tensor(1.0680))
    """
    spread = (chi2 * (kurtosis - 1)).sqrt()
    return MomentBounds(
        "none on the posterior, beyond that of chi2",
        chi2.sqrt(),
        (1 - spread - chi2).clamp(min=0).sqrt(),
        (1 + spread).sqrt(),
    )


def _root(kl: Tensor, *, above: bool) -> Tensor:
    r"""Return the root of :math:`s^2-1-\log s^2=2\kappa` above or below 1, rounded outwards."""
    k = kl.double()
    # In y = log s^2, the convex function e^y - 1 - y grows from 0 on both sides.
    far = torch.log1p(2 * k + (4 * k).sqrt()) if above else -(2 * k + 1)
    near = torch.zeros_like(k)
    for _ in range(100):
        middle = 0.5 * (near + far)
        inside = torch.expm1(middle) - middle < 2 * k
        near, far = torch.where(inside, middle, near), torch.where(inside, far, middle)
    root = (0.5 * far).exp()
    return torch.where(k.isinf(), torch.inf if above else 0.0, root).to(kl.dtype)
