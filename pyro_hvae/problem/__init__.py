r"""A model and a guide with their data, and runs of them.

A *pair* is a model and a guide, any two Pyro programs.  A :class:`Problem` is a pair with its data; a :class:`Run` of
it is K draws of the guide, on which the model is replayed.  What every bound needs of a run is the **log-weight per
datum**

.. math:: \log w_{kn} = \sum_{\text{model sites}} \log p_{kn} \;-\; \sum_{\text{guide sites}} \log q_{kn},

one for particle :math:`k` and datum :math:`n`.  A *datum* is an index of the plates **common** to all sites of
the pair.  The scale :math:`N/B` that such a plate puts on a minibatch stays outside of the weight
(:attr:`Run.scale`), since a logarithm of an average must not see it; a user's own ``poutine.scale`` and every
mask stay inside.

Structures are cached by the shapes of the arguments.  Each run is compared with the cached structure: plates with their
sizes, distributions, masks and roles of the sites.
"""

from pyro_hvae.problem.plates import Layout
from pyro_hvae.problem.predict import predict
from pyro_hvae.problem.predictions import Predictions
from pyro_hvae.problem.problem import Problem
from pyro_hvae.problem.reading import Reading
from pyro_hvae.problem.run import Run, total
from pyro_hvae.problem.simulate import Simulation
from pyro_hvae.problem.structure import Plate, SiteInfo, Structure
from pyro_hvae.problem.verbs import of_model, of_pair, problem_of

__all__ = [
    "Layout",
    "Plate",
    "Predictions",
    "Problem",
    "Reading",
    "Run",
    "Simulation",
    "SiteInfo",
    "Structure",
    "of_model",
    "of_pair",
    "predict",
    "problem_of",
    "total",
]
