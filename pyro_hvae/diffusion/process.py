r"""The noising process and its guide.

With gamma(t) = -log SNR(t), s < t, and :math:`\alpha^2=\mathrm{sigmoid}(-\gamma)`,
:math:`\sigma^2=\mathrm{sigmoid}(\gamma)`,

.. math::
    q(z_t|x) &= N(\alpha_t x,\ \sigma_t^2 I) &&\text{marginal}\\
    q(z_t|z_s) &= N(\alpha_{t|s} z_s,\ \sigma^2_{t|s} I), \quad
        \alpha_{t|s} = \alpha_t/\alpha_s,\ \sigma^2_{t|s} = \sigma_t^2-\alpha_{t|s}^2\sigma_s^2 &&\text{step}\\
    q(z_s|z_t,x) &= N\Bigl(\frac{\alpha_{t|s}\sigma_s^2 z_t + \alpha_s\sigma_{t|s}^2 x}{\sigma_t^2},\
        \frac{\sigma_{t|s}^2\sigma_s^2}{\sigma_t^2} I\Bigr) &&\text{posterior}

A schedule with a gamma for each entry gives each entry its own alpha and sigma; the formulas are those of an entry.
Differences of nearby terms are taken as ``expm1`` of differences, so that a thousand layers in float32 stay accurate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor

from pyro_hvae.chains.arguments import batch_size, check_data_size
from pyro_hvae.chains.base import Node
from pyro_hvae.chains.missing import zero_masked
from pyro_hvae.diffusion.levels import broadcast_level, check_event_shape
from pyro_hvae.diffusion.schedules import Schedule

__all__ = ["Diffusion", "Noising", "NoisingProcess", "broadcast_level", "grid_like"]

_INFINITE = (
    "a diffusion in continuous time has infinitely many sites and can't be run as a program: train it with "
    "DiffusionELBO, or give num_layers"
)


class Noising(NamedTuple):
    """alpha and sigma of one or more noise levels gamma, and what lies between two of them; shapes of gamma."""

    gamma: Tensor

    @property
    def alpha(self) -> Tensor:
        return torch.exp(0.5 * F.logsigmoid(-self.gamma))

    @property
    def sigma(self) -> Tensor:
        return torch.exp(0.5 * F.logsigmoid(self.gamma))

    def step_from(self, other: Noising) -> tuple[Tensor, Tensor]:
        """Return (alpha_{t|s}, sigma^2_{t|s}) from a lower level s to this one."""
        log_ratio = F.logsigmoid(-self.gamma) - F.logsigmoid(-other.gamma)
        return torch.exp(0.5 * log_ratio), -torch.expm1(log_ratio)

    def posterior_to(self, other: Noising) -> tuple[Tensor, Tensor, Tensor]:
        """Return (weight of z_t, weight of x, variance) of q(z_s | z_t, x), from this level t down to s."""
        alpha_step, variance_step = self.step_from(other)
        of_z = alpha_step * torch.exp(F.logsigmoid(other.gamma) - F.logsigmoid(self.gamma))
        of_x = other.alpha * variance_step * torch.exp(-F.logsigmoid(self.gamma))
        variance = variance_step * torch.exp(F.logsigmoid(other.gamma) - F.logsigmoid(self.gamma))
        return of_z, of_x, variance


def grid_like(schedule: Schedule, num_layers: int, like: Tensor) -> Tensor:
    """Return the times of layers 1, ..., T, made on the device of ``like`` and of its dtype."""
    with like.device:
        return schedule.grid(num_layers).to(like)


class NoisingProcess(PyroModule):
    """Base of the noising processes as guides: q(z_1|x) prod q(z_t|z_{t-1}), of parts that are known in closed form.

    Subclasses define ``noise``, ``schedule``, :meth:`marginal`, :meth:`posterior`, :meth:`time` and
    :meth:`conditionals`.

    Args:
        num_layers: T; None for continuous time.
        name, plate: as in the chains.
        event_dim: dims of one datum.
    """

    def __init__(self, num_layers: int | None, *, name: str, plate: str, event_dim: int) -> None:
        super().__init__(name)
        self.num_layers = num_layers
        self.plate_name = plate
        self.event_dim = event_dim

    @property
    def name(self) -> str:
        return self._pyro_name

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the latents from the data upwards."""
        return tuple(f"z{i}" for i in range(1, (self.num_layers or 0) + 1))

    def steps(self) -> Iterator[Any]:
        """Yield (site name, kernel, None) from the data upwards, as a chain in which the process is nested needs them.

        Raises:
            ValueError: for continuous time.
        """
        if self.num_layers is None:
            raise ValueError(_INFINITE)
        conditionals: Iterator[Callable[[Tensor], TorchDistribution]] | None = None

        def kernel(value: Tensor, context: Any = None) -> TorchDistribution:
            nonlocal conditionals
            if conditionals is None:
                conditionals = self.given(context).conditionals(value)
            return next(conditionals)(value)

        for site in self.latents:
            yield site, kernel, None

    @property
    def noise(self) -> str:
        """Kind of noise, which model and guide must share."""
        raise NotImplementedError

    def time(self, index: Any) -> Any:
        """Return the times of layers ``index``, each in 1, ..., T."""
        raise NotImplementedError

    def given(self, context: Any) -> NoisingProcess:
        """Return the process of data with this context; noise that does not depend on a context returns itself."""
        return self

    def marginal(self, t: Tensor, x: Tensor) -> TorchDistribution:
        """Return q(z_t | x) at times t in [0, 1], per datum (..., N) or one for all."""
        raise NotImplementedError

    def posterior(self, s: Tensor, t: Tensor, z_t: Tensor, x: Tensor) -> TorchDistribution:
        """Return q(z_s | z_t, x) for s < t."""
        raise NotImplementedError

    def conditionals(self, x: Tensor) -> Iterator[Callable[[Tensor], TorchDistribution]]:
        """Yield q(z_1 | x), q(z_2 | z_1), ..., each a function of the value below."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *,
        context: Any = None,
        mask: Tensor | None = None,
        data_size: int | None = None,
        visit: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Draw z_1, ..., z_T given x; or run ``visit`` on this module, inside its call.

        Args:
            x: data (N, *event_shape).
            context: (N, c), for a schedule that depends on it.
            mask: True = observed; missing entries are noised as zeros.
            data_size: size of the data set of which x is a minibatch.

        Returns:
            Draws by site, (..., N, *event_shape).
        """
        if visit is not None:
            return visit(self)
        if self.num_layers is None:
            raise ValueError(_INFINITE)
        size = batch_size(self.name, x, None, mask, None)
        values: dict[str, Tensor] = {}
        value = zero_masked(x, mask)
        total = size if data_size is None else data_size
        check_data_size(total, size)
        with pyro.plate(self.plate_name, total, subsample=torch.arange(size, device=x.device), dim=-1):
            for i, conditional in enumerate(self.given(context).conditionals(value), start=1):
                value = values[f"z{i}"] = pyro.sample(f"z{i}", conditional(value))
        return values

    def stepwise(
        self, x: Tensor, context: Any = None, *, mask: Tensor | None = None, data_size: int | None = None
    ) -> list[Node]:
        """List the draws q(z_1 | x), q(z_2 | z_1), ..., for particles (:class:`pyro_hvae.SMCBound`).

        Args: those of the program.

        Returns:
            ``("draw", site, draws that it depends on, distribution as a function of these)`` for each site.
        """
        if self.num_layers is None:
            raise ValueError(
                "a diffusion in continuous time has infinitely many sites to step through: train it with "
                "DiffusionELBO, or give num_layers"
            )
        batch_size(self.name, x, None, mask, None)
        first = zero_masked(x, mask)

        def node(i: int, conditional: Callable[[Tensor], TorchDistribution]) -> Node:
            parents = (f"z{i}",) if i else ()
            return "draw", f"z{i + 1}", parents, lambda *values: conditional(values[0] if i else first)

        return [node(i, conditional) for i, conditional in enumerate(self.given(context).conditionals(first))]


class Diffusion(NoisingProcess):
    r"""The noising process as a guide: q(z_1|x) prod q(z_t|z_{t-1}), without parameters of its own.

    Args:
        schedule: gamma(t), one or one for each entry.  A learned one belongs to the model, which registers its
            parameters; the guide holds it.
        num_layers: T; None for continuous time, which has no program to run but serves
            :class:`~pyro_hvae.bounds.DiffusionELBO`.
        name, plate: as in the chains.
        event_dim: dims of one datum.

    Raises:
        ValueError: for T < 1; or on a call, for continuous time.

    Example:
        >>> from pyro_hvae.diffusion import LinearSchedule
        >>> _ = torch.manual_seed(0)
        >>> guide = Diffusion(LinearSchedule(-6.0, 4.0), num_layers=3)
        >>> {site: tuple(z.shape) for site, z in guide(torch.zeros(5, 2)).items()}
        {'z1': (5, 2), 'z2': (5, 2), 'z3': (5, 2)}
        >>> list(guide.parameters())
        []
    """

    def __init__(
        self,
        schedule: Schedule,
        num_layers: int | None,
        *,
        name: str = "guide",
        plate: str = "data",
        event_dim: int = 1,
    ) -> None:
        super().__init__(num_layers, name=name, plate=plate, event_dim=event_dim)
        check_event_shape(schedule, event_dim)
        if num_layers is not None:
            schedule.grid(num_layers)
        self._held = (schedule,)  # a tuple, so that torch does not register it a second time

    @property
    def noise(self) -> str:
        return "Gaussian"

    @property
    def schedule(self) -> Schedule:
        return self._held[0]

    def time(self, index: Any) -> Any:
        assert self.num_layers is not None
        return (index - 1) / (self.num_layers - 1) if self.num_layers > 1 else index

    def given(self, context: Any) -> Diffusion:
        schedule = self.schedule.given(context)
        if schedule is self.schedule:
            return self
        return Diffusion(schedule, self.num_layers, name=self.name, plate=self.plate_name, event_dim=self.event_dim)

    def marginal(self, t: Tensor, x: Tensor) -> TorchDistribution:
        """Return q(z_t | x) at times t in [0, 1], per datum (..., N) or one for all."""
        level = Noising(self._wide(self.schedule(t), x))
        return self._normal(level.alpha * x, level.sigma)

    def step(self, s: Tensor, t: Tensor, z_s: Tensor) -> TorchDistribution:
        """Return q(z_t | z_s) for s < t."""
        lower, upper = (Noising(self._wide(self.schedule(time), z_s)) for time in (s, t))
        alpha, variance = upper.step_from(lower)
        return self._normal(alpha * z_s, variance.sqrt())

    def posterior(self, s: Tensor, t: Tensor, z_t: Tensor, x: Tensor) -> TorchDistribution:
        """Return q(z_s | z_t, x) for s < t."""
        lower, upper = (Noising(self._wide(self.schedule(time), z_t)) for time in (s, t))
        of_z, of_x, variance = upper.posterior_to(lower)
        return self._normal(of_z * z_t + of_x * x, variance.sqrt())

    def conditionals(self, x: Tensor) -> Iterator[Callable[[Tensor], TorchDistribution]]:
        assert self.num_layers is not None
        gammas = self.schedule.layers(grid_like(self.schedule, self.num_layers, x))
        levels = [Noising(self._wide(gamma, x)) for gamma in gammas]

        def conditional(alpha: Tensor, scale: Tensor) -> Callable[[Tensor], TorchDistribution]:
            return lambda value: self._normal(alpha * value, scale)

        yield conditional(levels[0].alpha, levels[0].sigma)
        for below, level in itertools.pairwise(levels):
            alpha, variance = level.step_from(below)
            yield conditional(alpha, variance.sqrt())

    def _wide(self, level: Tensor, like: Tensor) -> Tensor:
        return broadcast_level(level, like, self.event_dim, self.schedule.event_shape)

    def _normal(self, loc: Tensor, scale: Tensor) -> TorchDistribution:
        return dist.Normal(loc, scale).to_event(self.event_dim)

    def __repr__(self) -> str:
        return f"Diffusion({self.schedule!r}, num_layers={self.num_layers}, name={self.name!r})"
