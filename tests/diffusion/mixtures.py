"""Gaussian mixtures as priors: exact denoisers and posteriors, and the chain of a single Gaussian in closed form."""

import math

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pyro_hvae.diffusion import LinearSchedule, Noising
from pyro_hvae.models import vdm

__all__ = ["GaussianMixture", "chain_moments", "posterior"]


class GaussianMixture(nn.Module):
    """E[x | z] for sum_k w_k N(mu_k, C_k), in closed form."""

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.register_buffer("means", means)
        self.register_buffer("covariances", covariances)

    def forward(self, z: Tensor, gamma: Tensor) -> Tensor:
        level = Noising(gamma.reshape(-1)[0])  # one level for all
        eye = torch.eye(z.shape[-1], dtype=z.dtype)
        noisy = level.alpha**2 * self.covariances + level.sigma**2 * eye
        inverse = torch.linalg.inv(noisy)
        away = z.unsqueeze(-2) - level.alpha * self.means
        left = torch.einsum("kij,...kj->...ki", inverse, away)
        logits = self.weights.log() - 0.5 * (torch.logdet(noisy) + (away * left).sum(-1))
        each = self.means + level.alpha * torch.einsum("kij,...kj->...ki", self.covariances, left)
        return (logits.softmax(-1).unsqueeze(-1) * each).sum(-2)

    @staticmethod
    def random(components: int, dim: int, spread: float) -> "GaussianMixture":
        """A mixture with components of full covariance, of eigenvalues between 0.1 and 1."""
        weights = torch.rand(components) + 0.3
        turns = torch.linalg.qr(torch.randn(components, dim, dim)).Q
        values = 0.1 + 0.9 * torch.rand(components, 1, dim)
        means = spread * torch.randn(components, dim)
        return GaussianMixture(weights / weights.sum(), means, turns * values @ turns.mT)

    def model(self, num_layers: int):
        """The chain with this denoiser."""
        schedule = LinearSchedule(-11.0, 9.0)
        shape = self.means.shape[-1]
        return vdm(self, event_shape=shape, num_layers=num_layers, schedule=schedule, parameterisation="x0")[0]

    def sample(self, count: int) -> Tensor:
        which = torch.multinomial(self.weights, count, replacement=True)
        noise = torch.randn(count, self.means.shape[-1], 1)
        return self.means[which] + (torch.linalg.cholesky(self.covariances)[which] @ noise).squeeze(-1)


def posterior(prior: GaussianMixture, weight: Tensor, scale: float, y: Tensor) -> tuple[Tensor, GaussianMixture]:
    """log p(y) and p(x | y) for y ~ N(W x, scale^2 I), one y."""
    noise = scale**2 * torch.eye(len(weight))
    cross = prior.covariances @ weight.T
    total = weight @ cross + noise
    gain = cross @ torch.linalg.inv(total)
    located = prior.means @ weight.T
    parts = prior.weights.log() + MultivariateNormal(located, total).log_prob(y)
    means = prior.means + (gain @ (y - located).unsqueeze(-1)).squeeze(-1)
    covariances = prior.covariances - gain @ weight @ prior.covariances
    covariances = 0.5 * (covariances + covariances.mT)
    return parts.logsumexp(0), GaussianMixture(parts.softmax(0), means, covariances)


def chain_moments(model, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x under a chain of finitely many layers with the exact denoiser of N(mean, covariance)."""
    eye = torch.eye(len(mean))
    gammas = model.schedule(model.time(torch.arange(1.0, model.num_layers + 1)))
    located, spread = torch.zeros_like(mean), eye
    for lower, upper in zip(map(Noising, gammas[:-1].flip(0)), map(Noising, gammas[1:].flip(0)), strict=True):
        of_z, of_x, variance = upper.posterior_to(lower)
        gain = upper.alpha * covariance @ torch.linalg.inv(upper.alpha**2 * covariance + upper.sigma**2 * eye)
        moved = of_z * eye + of_x * gain
        located = moved @ located + of_x * (mean - upper.alpha * gain @ mean)
        spread = moved @ spread @ moved.T + variance * eye
    first = Noising(gammas[0])
    return located / first.alpha, spread / first.alpha**2 + math.exp(float(first.gamma)) * eye
