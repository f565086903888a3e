"""Networks of deep Markov models: the gated transition, and the combiner of a latent with features of the data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Combiner", "GatedTransition"]


class GatedTransition(nn.Module):
    r"""Location and raw scale of z_t, a gated step between a linear and a nonlinear map of z_{t-1}.

    .. math:: g = \mathrm{sigmoid}(\mathrm{mlp}(z)),\quad m = \mathrm{mlp}(z),\quad
              \mu = (1-g)\odot(Wz+b) + g\odot m,\quad r = V\,\mathrm{relu}(m)+c

    W starts as the identity.

    Args:
        latent_dim: d.
        hidden: width of the two networks' hidden layer.
        context_dim: width of a context that is joined to z.

    Reference:
        Structured Inference Networks for Nonlinear State Space Models (Krishnan, Shalit and Sontag, 2017).

    Example:
        >>> GatedTransition(3, 8)(torch.zeros(4, 5, 3)).shape
        torch.Size([4, 5, 6])
    """

    def __init__(self, latent_dim: int, hidden: int, context_dim: int = 0) -> None:
        super().__init__()
        self.hidden = nn.Linear(latent_dim + context_dim, 2 * hidden)
        self.gate = nn.Linear(hidden, latent_dim)
        self.proposed = nn.Linear(hidden, latent_dim)
        self.linear = nn.Linear(latent_dim, latent_dim)
        self.scale = nn.Linear(latent_dim, latent_dim)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(latent_dim))
            self.linear.bias.zero_()

    def forward(self, joined: Tensor) -> Tensor:
        """Map (..., d + c) to (..., 2d)."""
        of_gate, of_mean = self.hidden(joined).relu().chunk(2, -1)
        gate, proposed = torch.sigmoid(self.gate(of_gate)), self.proposed(of_mean)
        linear = self.linear(joined[..., : self.linear.in_features])
        return torch.cat([linear + gate * (proposed - linear), self.scale(proposed.relu())], -1)


class Combiner(nn.Module):
    r"""Location and raw scale of z_t from z_{t-1} and features e_t of the data.

    .. math:: h = \tfrac12(\tanh(Wz+b) + e),\qquad (\mu, r) = Vh + c

    Args:
        latent_dim: d.
        features: width of e.

    Reference:
        Structured Inference Networks for Nonlinear State Space Models (Krishnan, Shalit and Sontag, 2017).

    Example:
        >>> Combiner(3, 8)(torch.zeros(4, 5, 3), torch.zeros(5, 8)).shape
        torch.Size([4, 5, 6])
    """

    def __init__(self, latent_dim: int, features: int) -> None:
        super().__init__()
        self.latent = nn.Linear(latent_dim, features)
        self.out = nn.Linear(features, 2 * latent_dim)

    def forward(self, z: Tensor, features: Tensor) -> Tensor:
        """Map (..., d) and (..., F) to (..., 2d)."""
        return self.out(0.5 * (torch.tanh(self.latent(z)) + features))
