r"""Kernels: maps from a parent value to a distribution, the parts of a chain.

A kernel is p(z | parent, context): any ``torch.nn.Module`` whose ``forward(parent, context=None)`` returns a
Pyro distribution over one datum's event, with every leading dim of ``parent`` (particles, data) as a batch
dim. The kernels here wrap a network ``net`` that turns the parent into the parameters of a family:

.. math::
    \mathrm{Gaussian:}\quad z \sim N(\mu, \operatorname{diag} \sigma^2),\qquad (\mu, r) =
    \mathrm{net}(parent), \qquad \sigma = s_{min} + \operatorname{softplus}(r + c),\quad c: \sigma(0) = 1

    \mathrm{LinearGaussian:}\quad z \sim N(W\,parent + b,\; S)

**Input of the network.** Of ``parent`` and ``context``, those that are not ``None`` (the first kernel of a ``TopDown``
has no parent): a single one is passed as ``net(value)``; both are passed as ``net(parent, context)`` where the
``forward`` of ``net`` names two positional arguments (or its attribute ``takes_context`` says so, True or False), else
joined on the last dim, ``net(cat([parent, context], -1))``. A kernel that must not see the context is wrapped in
:class:`WithoutContext`.

**Tables.** :class:`Columns` has one kernel a column, over the features that one network yields.

**Priors.** :class:`MixturePrior`, :class:`VampPrior` and :class:`FlowPrior` take the place of ``StandardNormal`` at the
top of a chain.

**Events.** ``event_dim`` dims on the right belong to one datum. A network that yields two parameters a
variable (``Gaussian``, ``NegativeBinomial``, ``DiscretizedLogistic``, ``Gamma``, ...) yields them side by side along
the *first event dim*: for vectors the last dim, 2d wide; for images with ``event_dim=3`` the channels.

Networks must accept any number of leading dims. Nothing here checks that the values are finite, since that
synchronises with the device at every call; the estimators check.
"""

from pyro_hvae.kernels.base import Kernel, WithoutContext
from pyro_hvae.kernels.columns import Columns
from pyro_hvae.kernels.continuous import Beta, Gamma, LogNormal, StudentT
from pyro_hvae.kernels.discrete import (
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    NegativeBinomial,
    Poisson,
    Transition,
)
from pyro_hvae.kernels.flow import Flow
from pyro_hvae.kernels.gaussian import Gaussian, LinearGaussian, StandardNormal
from pyro_hvae.kernels.graded import Ordinal, ZeroInflated
from pyro_hvae.kernels.priors import FlowPrior, MixturePrior, VampPrior

__all__ = [
    "Bernoulli",
    "Beta",
    "Categorical",
    "Columns",
    "DiscretizedLogistic",
    "Flow",
    "FlowPrior",
    "Gamma",
    "Gaussian",
    "Kernel",
    "LinearGaussian",
    "LogNormal",
    "MixturePrior",
    "NegativeBinomial",
    "Ordinal",
    "Poisson",
    "StandardNormal",
    "StudentT",
    "Transition",
    "VampPrior",
    "WithoutContext",
    "ZeroInflated",
]
