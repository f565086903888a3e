r"""Linear-Gaussian chains, for which everything is known in closed form. The reference of many tests.

.. math::
    p(z_T) = N(0, I),\qquad p(z_{t-1} \mid z_t) = N(W_t z_t + b_{t-1}, S_{t-1}),\qquad z_0 = x

Marginals: m_{t-1} = W_t m_t + b_{t-1}, C_T = I, C_{t-1} = W_t C_t W_t' + S_{t-1}; so log p(x) = log N(x; m_0,
    C_0). The exact posterior is Markov bottom-up,

.. math::
    q(z_t \mid z_{t-1}) = N(m_t + G_t (z_{t-1} - m_{t-1}),\; C_t - G_t W_t C_t),\qquad G_t = C_t W_t'
    C_{t-1}^{-1}

and Markov top-down given x. Guides are read as lists of linear conditionals, whose joint moments, KL from the
posterior and ELBO, term by term, are exact. All is plain torch in the dtype of the model, differentiable in
the parameters of both programs.

Use::

    case = linear_gaussian(2)                     # .model .exact .other .top_down .other_top_down .x
    oracle = Oracle(case.model)
    oracle.log_evidence(case.x)                   # (N,)
    oracle.elbo(case.other, case.x)               # (N,), with gradients
    oracle.kl(case.other, case.x)                 # (N,) = log p(x) - ELBO
    oracle.terms(case.other, case.x)              # {"reconstruction": (N,), "z1": (N,), "z2": (N,)}, z*: to
    be subtracted
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_hvae.chains import BottomUp, TopDown
from pyro_hvae.kernels import LinearGaussian, StandardNormal

__all__ = ["Case", "Conditional", "Oracle", "TopDownGuide", "linear_gaussian", "read_guide"]


@dataclass
class Conditional:
    """z_t | parent, x ~ N(A z_parent + B x + a, V); parent is 0 where there is none."""

    t: int
    parent: int
    on_parent: Tensor | None
    on_x: Tensor | None
    bias: Tensor
    covariance: Tensor


class TopDownGuide(PyroModule):
    """q(z_T | x) prod_t q(z_t | z_{t+1}, x) with linear-Gaussian kernels that see x as their context."""

    def __init__(self, *, name: str = "guide", plate: str = "data", **kernels: LinearGaussian) -> None:
        super().__init__(name)
        self.plate_name = plate
        self.order = tuple(kernels)
        for site, kernel in kernels.items():
            setattr(self, site, kernel)

    def forward(self, x: Tensor, data_size: int | None = None) -> None:
        value = None
        size = x.shape[0]
        with pyro.plate(self.plate_name, data_size or size, subsample=torch.arange(size), dim=-1):
            for site in self.order:
                value = pyro.sample(site, getattr(self, site)(value, x))


def read_guide(guide: BottomUp | TopDownGuide) -> list[Conditional]:
    """The conditionals of a guide made of linear-Gaussian kernels, in the order of sampling."""
    found = []
    before = 0
    if isinstance(guide, BottomUp):
        for site, kernel in guide.kernels.items():
            t = int(site[1:])
            on_x, on_parent = (kernel.weight, None) if before == 0 else (None, kernel.weight)
            found.append(Conditional(t, before, on_parent, on_x, bias(kernel), kernel.covariance))
            before = t
        return found
    for site in guide.order:
        kernel, t = getattr(guide, site), int(site[1:])
        weight = kernel.weight
        width = 0 if before == 0 else getattr(guide, f"z{before}").out_features
        on_parent = weight[:, :width] if width else None
        found.append(Conditional(t, before, on_parent, weight[:, width:], bias(kernel), kernel.covariance))
        before = t
    return found


def bias(kernel: LinearGaussian) -> Tensor:
    return kernel.weight.new_zeros(kernel.out_features) if kernel.bias is None else kernel.bias


def log_normal(deviation: Tensor, covariance: Tensor) -> Tensor:
    """log N(deviation; 0, covariance), deviation (N, d) to (N,)."""
    factor = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, deviation.mT, upper=False).mT
    constant = deviation.shape[-1] * math.log(2 * math.pi)
    return -0.5 * ((white**2).sum(-1) + constant) - factor.diagonal().log().sum()


class Oracle:
    """Closed forms of a ``TopDown`` with a ``StandardNormal`` at the top and ``LinearGaussian`` kernels named z*, x.

    The programs' parameters are read when the object is made, with their gradients.
    """

    def __init__(self, model: TopDown) -> None:
        *latents, observation = model.kernels.values()
        self.depth = T = len(latents)
        downward = [*latents[1:], observation]  # t - 1 for t = T, ..., 1
        self.weight = {t: kernel.weight for t, kernel in zip(range(T, 0, -1), downward)}
        self.bias = {t - 1: bias(kernel) for t, kernel in zip(range(T, 0, -1), downward)}
        self.noise = {t - 1: kernel.covariance for t, kernel in zip(range(T, 0, -1), downward)}
        top = self.weight[T].shape[1]
        self.mean = {T: self.weight[T].new_zeros(top)}
        self.cov = {T: torch.eye(top, dtype=self.weight[T].dtype)}
        for t in range(T, 0, -1):
            W = self.weight[t]
            self.mean[t - 1] = W @ self.mean[t] + self.bias[t - 1]
            self.cov[t - 1] = W @ self.cov[t] @ W.mT + self.noise[t - 1]

    def cross(self, s: int, t: int) -> Tensor:
        """Cov(z_s, z_t)."""
        if s > t:
            return self.cross(t, s).mT
        found = self.cov[t]
        for level in range(t, s, -1):
            found = self.weight[level] @ found
        return found

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) (N,)."""
        return log_normal(x - self.mean[0], self.cov[0])

    def bottom_up(self) -> list[Conditional]:
        """The exact posterior as q(z_1 | x), ..., q(z_T | z_{T-1})."""
        found = []
        for t in range(1, self.depth + 1):
            gain = torch.linalg.solve(self.cov[t - 1], self.weight[t] @ self.cov[t]).mT
            covariance = self.cov[t] - gain @ self.weight[t] @ self.cov[t]
            shift = self.mean[t] - gain @ self.mean[t - 1]
            on_x, on_parent = (gain, None) if t == 1 else (None, gain)
            found.append(Conditional(t, t - 1, on_parent, on_x, shift, 0.5 * (covariance + covariance.mT)))
        return found

    def top_down(self) -> list[Conditional]:
        """The exact posterior as q(z_T | x), q(z_{T-1} | z_T, x), ..., q(z_1 | z_2, x)."""
        found = []
        for t in range(self.depth, 0, -1):
            given = [0] if t == self.depth else [t + 1, 0]
            between = torch.cat([self.cross(t, s) for s in given], -1)
            among = torch.cat([torch.cat([self.cross(r, s) for s in given], -1) for r in given], -2)
            gain = torch.linalg.solve(among, between.mT).mT
            covariance = self.cov[t] - gain @ between.mT
            shift = self.mean[t] - gain @ torch.cat([self.mean[s] for s in given])
            width = 0 if t == self.depth else self.cov[t + 1].shape[0]
            on_parent = gain[:, :width] if width else None
            covariance = 0.5 * (covariance + covariance.mT)
            found.append(Conditional(t, t + 1 if width else 0, on_parent, gain[:, width:], shift, covariance))
        return found

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, D) and covariance (D, D) of p(z_1, ..., z_T | x), stacked in that order."""
        levels = range(1, self.depth + 1)
        prior = torch.cat([torch.cat([self.cross(s, t) for t in levels], -1) for s in levels], -2)
        between = torch.cat([self.cross(t, 0) for t in levels], -2)
        gain = torch.linalg.solve(self.cov[0], between.mT).mT
        mean = torch.cat([self.mean[t] for t in levels]) + (x - self.mean[0]) @ gain.mT
        return mean, prior - gain @ between.mT

    def moments(self, guide: BottomUp | TopDownGuide | list[Conditional], x: Tensor) -> tuple[dict, dict]:
        """Means {t: (N, d_t)} and covariances {(s, t): (d_s, d_t)} of a guide."""
        conditionals = guide if isinstance(guide, list) else read_guide(guide)
        mean: dict[int, Tensor] = {}
        cov: dict[tuple[int, int], Tensor] = {}
        for found in conditionals:
            loc = found.bias.expand(x.shape[0], -1)
            if found.on_x is not None:
                loc = loc + x @ found.on_x.mT
            own = found.covariance
            for s in mean:
                cov[found.t, s] = torch.zeros(own.shape[0], mean[s].shape[1], dtype=x.dtype)
            if found.on_parent is not None:
                loc = loc + mean[found.parent] @ found.on_parent.mT
                own = own + found.on_parent @ cov[found.parent, found.parent] @ found.on_parent.mT
                for s in mean:
                    cov[found.t, s] = found.on_parent @ cov[found.parent, s]
            for s in mean:
                cov[s, found.t] = cov[found.t, s].mT
            mean[found.t], cov[found.t, found.t] = loc, own
        return mean, cov

    def kl(self, guide: BottomUp | TopDownGuide | list[Conditional], x: Tensor) -> Tensor:
        """KL(q(z | x) || p(z | x)) in nats (N,): the gap of the ELBO (seed eq. 9)."""
        mean, cov = self.moments(guide, x)
        levels = range(1, self.depth + 1)
        loc = torch.cat([mean[t] for t in levels], -1)
        joint = torch.cat([torch.cat([cov[s, t] for t in levels], -1) for s in levels], -2)
        true_loc, true_joint = self.posterior(x)
        difference = true_loc - loc
        trace = torch.linalg.solve(true_joint, joint).diagonal().sum()
        quadratic = (difference * torch.linalg.solve(true_joint, difference.mT).mT).sum(-1)
        volume = torch.logdet(true_joint) - torch.logdet(joint)
        return 0.5 * (trace + quadratic - loc.shape[-1] + volume)

    def terms(self, guide: BottomUp | TopDownGuide | list[Conditional], x: Tensor) -> dict[str, Tensor]:
        """E_q log p(x | z_1), and for every z_t E_q[log q(z_t | .) - log p(z_t | z_{t+1})], in nats (N,)."""
        conditionals = guide if isinstance(guide, list) else read_guide(guide)
        mean, cov = self.moments(conditionals, x)
        W = self.weight[1]
        found = {
            "reconstruction": log_normal(x - mean[1] @ W.mT - self.bias[0], self.noise[0])
            - 0.5 * torch.linalg.solve(self.noise[0], W @ cov[1, 1] @ W.mT).diagonal().sum()
        }
        for conditional in conditionals:
            t, d = conditional.t, conditional.covariance.shape[0]
            log_q = -0.5 * (torch.logdet(conditional.covariance) + d * (1 + math.log(2 * math.pi)))
            if t == self.depth:
                deviation, spread, noise = mean[t], cov[t, t], self.cov[t]
            else:
                W = self.weight[t + 1]
                deviation, noise = mean[t] - mean[t + 1] @ W.mT - self.bias[t], self.noise[t]
                mixed = W @ cov[t + 1, t]
                spread = cov[t, t] - mixed - mixed.mT + W @ cov[t + 1, t + 1] @ W.mT
            log_p = log_normal(deviation, noise) - 0.5 * torch.linalg.solve(noise, spread).diagonal().sum()
            found[f"z{t}"] = log_q - log_p
        return found

    def elbo(self, guide: BottomUp | TopDownGuide | list[Conditional], x: Tensor) -> Tensor:
        """The ELBO in nats (N,): reconstruction less prior matching (seed eq. 12, 13)."""
        terms = self.terms(guide, x)
        return terms.pop("reconstruction") - sum(terms.values())


@dataclass
class Case:
    """A model, guides for it and data.

    Attributes:
        model: the generative chain.
        exact: bottom-up guide that is the exact posterior (full covariances).
        other: bottom-up guide that is not (diagonal covariances).
        top_down: top-down guide that is the exact posterior.
        other_top_down: top-down guide that is not (diagonal covariances).
        x: data (N, d_0), drawn from the model.
    """

    model: TopDown
    exact: BottomUp
    other: BottomUp
    top_down: TopDownGuide
    other_top_down: TopDownGuide
    x: Tensor


def kernel_of(found: Conditional, *, learn: bool, nudge: float = 0.0) -> LinearGaussian:
    """A kernel with a conditional's numbers, or, nudged, one with others and a diagonal covariance."""
    weight = torch.cat([part for part in (found.on_parent, found.on_x) if part is not None], -1)
    out, width = weight.shape
    if not nudge:
        return LinearGaussian(width, out, weight=weight, bias=found.bias, covariance=found.covariance, learn=learn)
    return LinearGaussian(
        width,
        out,
        weight=weight + nudge * torch.randn_like(weight),
        bias=found.bias + nudge * torch.randn_like(found.bias),
        scale=found.covariance.diagonal().sqrt() * torch.exp(nudge * torch.randn(out)),
        learn=learn,
    )


def linear_gaussian(
    depth: int,
    *,
    dims: tuple[int, ...] | None = None,
    size: int = 5,
    full: bool = False,
    learn: bool = True,
    nudge: float = 0.2,
    seed: int = 0,
) -> Case:
    """A random linear-Gaussian chain of given depth T with sites z_T, ..., z_1, x, guides and data.

    Args:
        depth: T >= 1.
        dims: d_0 (of x), d_1, ..., d_T; default 3, 2, 3, 2, ...
        size: number of data.
        full: whether the model's noise covariances are full or diagonal.
        learn: whether weights and covariances are parameters.
        nudge: how far the other guides are from the exact ones.
        seed: of the numbers; the global generator is left as it was.
    """
    dims = dims or tuple(3 if t % 2 == 0 else 2 for t in range(depth + 1))
    assert len(dims) == depth + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kernels: dict[str, torch.nn.Module] = {f"z{depth}": StandardNormal(dims[depth])}
        for t in range(depth, 0, -1):
            out = dims[t - 1]
            root = 0.5 * torch.randn(out, out)
            noise = {"covariance": root @ root.mT + 0.3 * torch.eye(out)} if full else {"scale": 0.4 + torch.rand(out)}
            weight = torch.randn(out, dims[t]) / dims[t] ** 0.5
            kernels["x" if t == 1 else f"z{t - 1}"] = LinearGaussian(
                dims[t], out, weight=weight, bias=0.3 * torch.randn(out), learn=learn, **noise
            )
        model = TopDown(**kernels)
        with torch.no_grad():
            oracle = Oracle(model)
            up, down = oracle.bottom_up(), oracle.top_down()
            x = model(size=size)
        return Case(
            model=model,
            exact=BottomUp(**{f"z{found.t}": kernel_of(found, learn=learn) for found in up}),
            other=BottomUp(**{f"z{found.t}": kernel_of(found, learn=learn, nudge=nudge) for found in up}),
            top_down=TopDownGuide(**{f"z{found.t}": kernel_of(found, learn=learn) for found in down}),
            other_top_down=TopDownGuide(
                **{f"z{found.t}": kernel_of(found, learn=learn, nudge=nudge) for found in down}
            ),
            x=x,
        )
