"""Distributions that torch and Pyro lack, or compute with too large an error.

- On grey levels: :class:`DiscretizedLogistic`, its mixture, and :class:`BinnedGaussian`. Their support,
  :class:`Levels`, holds the levels and nothing between them.
- Counts: :class:`Poisson` and :class:`NegativeBinomial`, whose log-probabilities keep their digits in float32 at large
  rates.
- :class:`Columns`: the entries of a row of a table, each column from a family of its own.
- :class:`Categorical`, whose divergence takes probabilities of zero in compiled code.
- Arrays in which random entries are masked or revealed: :class:`MaskedSubset`, :class:`OneRevealed`.
- The divergence of a full Gaussian from a diagonal one, registered with torch.
"""

import pyro_hvae.distributions.divergences  # noqa: F401 (registers them)
from pyro_hvae.distributions.categorical import Categorical
from pyro_hvae.distributions.columns import Columns
from pyro_hvae.distributions.counts import NegativeBinomial, Poisson
from pyro_hvae.distributions.levels import BinnedGaussian, Levels
from pyro_hvae.distributions.logistic import DiscretizedLogistic, DiscretizedLogisticMixture
from pyro_hvae.distributions.subsets import MaskedSubset, OneRevealed

__all__ = [
    "BinnedGaussian",
    "Categorical",
    "Columns",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Levels",
    "MaskedSubset",
    "NegativeBinomial",
    "OneRevealed",
    "Poisson",
]
