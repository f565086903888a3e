r"""Twists of a diffusion by a likelihood of its datum: functions of z_t that stand for p(y|z_t), which is not known.

With :math:`f(x)=\log p(y|x)` and the denoiser's estimate :math:`\hat x=\mathrm E[x|z_t]` the plain twist is

.. math:: \log\psi_t(z_t) = f(\hat x(z_t)).

It takes x as known.  The Laplace twist takes x as Gaussian with the covariance of Tweedie's formula,
:math:`\mathrm{Cov}[x|z_t]=\tfrac{\sigma_t^2}{\alpha_t}\,\partial\hat x/\partial z_t`, and is the maximum

.. math:: \log\psi_t(z_t) = \max_u\; f(\hat x + u) - \tfrac12 u^\top C^{-1}u,\qquad \hat x_y = \hat x + u,\qquad
          C = \mathrm{Cov}[x|z_t] + \epsilon\,\tfrac{\sigma_t^2}{\alpha_t^2}\,I,

to the extent that some conjugate gradients for :math:`(C^{-1}-\nabla^2 f)\,u=\nabla f`, preconditioned by C, and a
search along u find it.  :math:`\hat x_y` estimates :math:`\mathrm E[x|z_t,y]`, and proposals are the chain's layers
with it in the place of :math:`\hat x`.  The plain twist has :math:`u=C\,\nabla f`, and overshoots where y tells much
more of x than z_t does.  :math:`\epsilon` allows for a denoiser that is learned: an error in the noise that it
predicts, of this mean square, is one of variance :math:`\epsilon\,\sigma_t^2/\alpha_t^2` in :math:`\hat x`, large where
z_t is mostly noise.  With :math:`\epsilon = 0`, for Gaussian x and y the Laplace twist becomes p(y|z_t) up to a
constant, with as many iterations as :math:`C\nabla^2 f` has different eigenvalues.

For categories :math:`\hat x` are the probabilities :math:`\pi` of the entries, C is their multinomial covariance, u is
the change of :math:`\pi` that s adds to the logits, and the quadratic term is its divergence from :math:`\pi`.

References: Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu, Trippe, Naesseth, Blei and
Cunningham, 2023); Tweedie Moment Projected Diffusions for Inverse Problems (Boys, Girolami, Pidstrigach, Reich, Mosca
and Akyildiz, 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_hvae.diffusion.process import Noising, broadcast_level

_SHARES = (1.0, 0.5, 0.25, 0.1)
"""Shares of a step that are tried."""

__all__ = ["CategoricalTwist", "GaussianTwist", "LogLikelihood", "Twist", "Twisted"]

LogLikelihood = Callable[[Tensor], Tensor]
"""log p(y|x) in nats (..., N), from x (..., N, *event_shape), or for categories from probabilities (..., C)."""


class Twisted(NamedTuple):
    """A twist at values z_t (..., *event_shape).

    Attributes:
        log_psi: logarithm of the twist, nats (...).
        estimate: the denoiser's estimate of x, for the chain's own layer.
        shifted: the estimate given y besides, for the proposal.
    """

    log_psi: Tensor
    estimate: Tensor
    shifted: Tensor


class Twist:
    """Base of the twists of one chain by one likelihood.

    Args:
        chain: a denoising chain of finitely many layers.
        log_likelihood: of x; differentiable twice with ``cg_iterations``.
        context: for the denoiser.
        cg_iterations: of the Laplace twist, each with a gradient of the denoiser; 0 for the plain twist.
        denoiser_error: of the Laplace twist, for Gaussian noise: epsilon.

    Subclasses define :meth:`at`, :meth:`layer`, :meth:`last`, :meth:`example` and :meth:`argument`.
    """

    def __init__(
        self,
        chain: Any,
        log_likelihood: LogLikelihood,
        context: Any,
        *,
        cg_iterations: int,
        denoiser_error: float = 0.0,
    ) -> None:
        self.chain = chain
        self.log_likelihood = log_likelihood
        self.context = context
        self.cg_iterations = cg_iterations
        self.denoiser_error = denoiser_error

    def at(self, t: Tensor, z: Tensor) -> Twisted:
        """Return the twist at z_t."""
        raise NotImplementedError

    def layer(self, s: Tensor, t: Tensor, z: Tensor, estimate: Tensor) -> TorchDistribution:
        """Return the layer z_s given z_t = z with an estimate of x: the chain's own, or the shifted one."""
        raise NotImplementedError

    def last(self, t: Tensor, z: Tensor, estimate: Tensor) -> TorchDistribution:
        """Return the distribution of x given z_1 = z with an estimate of x."""
        raise NotImplementedError

    def example(self, *shape: int) -> Tensor:
        """Return an argument of the likelihood, for checks."""
        raise NotImplementedError

    def argument(self, x: Tensor) -> Tensor:
        """Return what the likelihood takes for data x."""
        raise NotImplementedError

    def moved(self, estimate: Tensor, dual: Tensor, shift: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Return the estimate after a share of the shift, and what the prior of x charges for it by entry, in nats."""
        raise NotImplementedError

    def _maximise(self, estimate: Tensor, covariance: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return log psi, and the shift C s of the estimate with s, from products with C."""
        dims = tuple(range(self._lead(estimate), estimate.dim()))
        with torch.enable_grad():
            leaf = estimate.detach().requires_grad_()
            value = self.log_likelihood(leaf)
            (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=self.cg_iterations > 0)
        value = value.detach()
        if not self.cg_iterations:
            return value, gradient, covariance(gradient)
        dual, shift = self._newton(gradient, leaf, covariance, dims)
        # Far from quadratic, a full step may be worse than none.
        best, length = value, torch.zeros_like(value)
        for share in _SHARES:
            argument, charge = self.moved(leaf.detach(), dual, shift, share)
            reached = self.log_likelihood(argument) - charge.sum(dims)
            better = reached > best
            best, length = torch.where(better, reached, best), torch.where(better, share, length)
        return best, _wide(length, dims) * dual, _wide(length, dims) * shift

    def _newton(
        self, gradient: Tensor, leaf: Tensor, covariance: Callable[[Tensor], Tensor], dims: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Return s and C s that maximise the quadratic, by conjugate gradients.

        C is the preconditioner, so that its inverse is not needed.
        """
        rest = gradient.detach()
        product = covariance(rest)
        dual, shift = torch.zeros_like(rest), torch.zeros_like(rest)
        direction, along, square = rest, product, (rest * product).sum(dims)
        for iteration in range(self.cg_iterations):
            if iteration:
                product = covariance(rest)
                before, square = square, (rest * product).sum(dims)
                ratio = _wide(_quotient(square, before), dims)
                direction, along = rest + ratio * direction, product + ratio * along
            bend = direction - _hessian_product(gradient, leaf, along)
            # Where the likelihood is not log-concave along the direction, the step is that without curvature.
            least = (direction * along).sum(dims)
            length = _wide(_quotient(square, torch.maximum((bend * along).sum(dims), least)), dims)
            dual, shift = dual + length * direction, shift + length * along
            rest = rest - length * bend
        return dual, shift

    def _lead(self, estimate: Tensor) -> int:
        return estimate.dim() - self.chain.event_dim


class GaussianTwist(Twist):
    """Twist of a chain of Gaussian layers; see the module."""

    def at(self, t: Tensor, z: Tensor) -> Twisted:
        gamma = self.chain.schedule(t)
        level = Noising(broadcast_level(gamma, z, self.chain.event_dim))
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            xhat = self.chain.predict(leaf, gamma, self.context)
            if not xhat.requires_grad:
                raise ValueError(
                    f"the denoiser {type(self.chain.denoiser).__name__} has no gradient with respect to z: leave out "
                    "detach() and torch.no_grad() in its forward"
                )

        def covariance(vector: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(xhat, leaf, vector, retain_graph=True)
            tweedie = level.sigma**2 / level.alpha * product
            if not self.cg_iterations:
                return tweedie
            # The Jacobian of a learned denoiser may be no covariance where z is mostly noise.
            valid = (vector * tweedie).sum(tuple(range(self._lead(vector), vector.dim())), keepdim=True) > 0
            floor = self.denoiser_error * (level.sigma / level.alpha) ** 2 * vector
            return floor + torch.where(valid, tweedie, torch.zeros_like(tweedie))

        log_psi, _, shift = self._maximise(xhat, covariance)
        return Twisted(log_psi, xhat.detach(), xhat.detach() + shift)

    def layer(self, s: Tensor, t: Tensor, z: Tensor, estimate: Tensor) -> TorchDistribution:
        return self.chain.transition_to(s, t, z, estimate)

    def last(self, t: Tensor, z: Tensor, estimate: Tensor) -> TorchDistribution:
        return self.chain.likelihood(z, self.context)

    def moved(self, estimate: Tensor, dual: Tensor, shift: Tensor, share: float) -> tuple[Tensor, Tensor]:
        return estimate + share * shift, 0.5 * share**2 * dual * shift

    def example(self, *shape: int) -> Tensor:
        return self.chain.reference().new_zeros(*shape, *self.chain.event_shape)

    def argument(self, x: Tensor) -> Tensor:
        return x


class CategoricalTwist(Twist):
    """Twist of a chain of categorical layers; the likelihood is called with probabilities of the categories."""

    def at(self, t: Tensor, z: Tensor) -> Twisted:
        logp = self.chain.predict(z, t, self.context)
        # the predictions are by the other entries; what z's own entry says enters here
        posterior = self.chain.corruption.log_posterior(torch.zeros_like(t), t, z, logp)
        probabilities = posterior[..., : self.chain.corruption.num_categories].softmax(-1)

        def covariance(vector: Tensor) -> Tensor:
            return probabilities * (vector - (probabilities * vector).sum(-1, keepdim=True))

        log_psi, dual, _ = self._maximise(probabilities, covariance)
        return Twisted(log_psi, logp, (logp + dual).log_softmax(-1))

    def layer(self, s: Tensor, t: Tensor, z: Tensor, estimate: Tensor) -> TorchDistribution:
        return self.chain.corruption.posterior(s, t, z, estimate, self.chain.event_dim)

    def last(self, t: Tensor, z: Tensor, estimate: Tensor) -> TorchDistribution:
        return self.chain.corruption.last(t, z, estimate, self.chain.event_dim)

    def moved(self, estimate: Tensor, dual: Tensor, shift: Tensor, share: float) -> tuple[Tensor, Tensor]:
        log_before = estimate.log()
        log_after = (log_before + share * dual).log_softmax(-1)
        after = log_after.exp()
        return after, torch.where(after > 0, after * (log_after - log_before), torch.zeros_like(after))

    def example(self, *shape: int) -> Tensor:
        count = self.chain.corruption.num_categories
        full = (*shape, *self.chain.event_shape, count)
        return torch.full(full, 1.0 / count, dtype=self.chain.reference().dtype, device=self.chain.reference().device)

    def argument(self, x: Tensor) -> Tensor:
        return F.one_hot(x.long(), self.chain.corruption.num_categories).to(self.chain.reference().dtype)

    def _lead(self, estimate: Tensor) -> int:
        return super()._lead(estimate) - 1


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below; 0 where either is not positive."""
    valid = (above > 0) & (below > 0)
    return torch.where(valid, above / torch.where(valid, below, torch.ones_like(below)), torch.zeros_like(above))


def _wide(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    return values.reshape(values.shape + (1,) * len(dims))


def _hessian_product(gradient: Tensor, leaf: Tensor, vector: Tensor) -> Tensor:
    """Return the derivative of a gradient along a vector; zeros where the gradient is constant."""
    if not gradient.requires_grad:
        return torch.zeros_like(leaf)
    (product,) = torch.autograd.grad(gradient, leaf, vector, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if product is None else product
