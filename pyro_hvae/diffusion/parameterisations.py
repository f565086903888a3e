r"""What a denoiser predicts, and how each prediction is turned into the others.

With :math:`z = \alpha x + \sigma\epsilon` at noise level gamma,

============ ===============================  ==========================================
name         meaning                          from x
============ ===============================  ==========================================
``"x0"``     the datum x                      x
``"eps"``    the noise                        (z - alpha x) / sigma
``"v"``      alpha eps - sigma x              (alpha z - x) / sigma
``"score"``  gradient of log q(z)             (alpha x - z) / sigma^2
============ ===============================  ==========================================

``v`` is from Progressive Distillation for Fast Sampling of Diffusion Models (Salimans and Ho, 2022).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["PARAMETERISATIONS", "convert"]

PARAMETERISATIONS = ("eps", "x0", "v", "score")


def convert(prediction: Tensor, z: Tensor, gamma: Tensor, *, source: str, target: str) -> Tensor:
    """Convert a prediction of one kind to another.

    Args:
        prediction: of the kind ``source``, (..., *event).
        z: the noisy value it was made for, of the same shape.
        gamma: -log SNR, broadcasting against z.
        source, target: ``"eps"``, ``"x0"``, ``"v"`` or ``"score"``.

    Raises:
        ValueError: for an unknown kind.

    Example:
        >>> import torch
        >>> z, gamma = torch.tensor([1.0]), torch.tensor(0.0)
        >>> convert(torch.tensor([0.5]), z, gamma, source="eps", target="x0").round(decimals=4)
        tensor([0.9142])
    """
    for kind in (source, target):
        if kind not in PARAMETERISATIONS:
            raise ValueError(f"unknown parameterisation {kind!r}; there are {', '.join(PARAMETERISATIONS)}")
    if source == target:
        return prediction
    alpha, sigma = (0.5 * F.logsigmoid(-gamma)).exp(), (0.5 * F.logsigmoid(gamma)).exp()
    if source == "eps":
        eps = prediction
    elif source == "x0":
        eps = (z - alpha * prediction) / sigma
    elif source == "v":
        eps = sigma * z + alpha * prediction
    else:
        eps = -sigma * prediction
    if target == "eps":
        return eps
    if target == "score":
        return -eps / sigma
    if target == "v":
        return (eps - sigma * z) / alpha
    # x0 = (z - sigma eps) / alpha, taken from v or x0 directly where that is exact at low SNR
    return alpha * z - sigma * prediction if source == "v" else (z - sigma * eps) / alpha
