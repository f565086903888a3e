r"""Reading Pyro traces: the one place of the package that knows what a trace looks like.

A *pair* is a model and a guide, any two Pyro programs.  Running the guide and replaying the model on its draws
gives two traces; what every bound needs of them is the **log-weight per datum**

.. math:: \log w_{kn} = \sum_{\text{model sites}} \log p_{kn} \;-\; \sum_{\text{guide sites}} \log q_{kn},

one for particle :math:`k` and datum :math:`n`.  A *datum* is an index of the plates **common** to all sites of
the pair.  The scale :math:`N/B` that such a plate puts on a minibatch stays outside of the weight
(:attr:`Reading.scale`), since a logarithm of an average must not see it; a user's own ``poutine.scale`` and every
mask stay inside.

- :func:`read` runs a pair and returns a :class:`Reading`;
- :func:`log_weights` evaluates many particles without a gradient, in bounded memory;
- :class:`Evaluator` and :func:`given` evaluate it at given draws, :func:`simulate` draws from the model itself,
  and :func:`prior_guide` makes a guide of its prior;
- :func:`structure` says what was found, without keeping a trace.
"""

from pyro_hvae.traces.evaluate import Evaluator, given, log_weights, prior_guide, simulate
from pyro_hvae.traces.reading import Reading
from pyro_hvae.traces.running import read, structure
from pyro_hvae.traces.structure import Plate, SiteInfo, Structure

__all__ = [
    "Evaluator",
    "Plate",
    "Reading",
    "SiteInfo",
    "Structure",
    "given",
    "log_weights",
    "prior_guide",
    "read",
    "simulate",
    "structure",
]
