r"""Markov chains of kernels as Pyro programs: the generative chain and the inference chain against it.

With observation x, latents z_1, ..., z_T and kernels as in :mod:`pyro_hvae.kernels`, the joint of a Markovian
hierarchical VAE (seed eq. 14, 15) is :class:`TopDown`,

.. math::
    p_\theta(x, z_1, \dots, z_T) = p(z_T)\; p_\theta(x \mid z_1) \prod_{t=2}^T p_\theta(z_{t-1} \mid z_t),

and its approximate posterior (seed eq. 16, 17) is :class:`BottomUp`,

.. math::
    q_\phi(z_1, \dots, z_T \mid x) = q_\phi(z_1 \mid x) \prod_{t=2}^T q_\phi(z_t \mid z_{t-1}).

A VAE is the case T = 1. A posterior that runs top-down is :class:`Ladder`; a chain in time is
:class:`StateSpace`. Calling a chain runs a Pyro program: one ``pyro.sample`` a kernel, named as the keyword that gave
it, all inside one plate at
``dim=-1`` over the data, so ``poutine.condition``, ``Predictive``, ``NUTS`` and every estimator of Pyro apply.

**Context.** ``context`` is passed to every kernel as its second argument; kernels are called with the parent
alone where there is none. Pyro's own handlers take a keyword of that name for themselves, so give it by
position where they wrap a program: ``svi.step(x, context)``, ``poutine.condition(model, data)(None,
context)``.

**Missing data.** ``mask`` is boolean, True where observed, of the shape of x, or (N,) for whole data. A
masked entry is dropped from the likelihood (its log-density counts as 0) and the guide gets 0 in its
place; the masked value, NaN included, reaches neither values nor gradients. Entries can be masked one by one
only where the likelihood factorises over them; others take a mask of shape (N,).

**Minibatches.** With N data and ``data_size`` M, the plate has size M and Pyro scales every site
in it by M/N.

**Bayesian weights.** ``PyroSample`` attributes of kernels (and of ``PyroModule`` networks within) are drawn
before the plate is entered: they are global latents of the program, named as the parameter would be
(``model.z1.weight``).

**Names.** Parameters are named in Pyro's store ``<name>.<site>...``; two chains trained in one process need
two names. One kernel at two sites is one child, registered under the first; tensors shared between
kernels appear once in ``state_dict()``.

What is not enforced: finiteness and support of the data (a device synchronisation a call; the trace readers
do it once), and that networks keep data apart: batch normalisation couples the data of a plate, so that
densities per datum depend on the rest of the minibatch.
"""

from pyro_hvae.chains.autoencode import decode, encode, impute, interpolate, reconstruct
from pyro_hvae.chains.base import Chain
from pyro_hvae.chains.directions import BottomUp, TopDown
from pyro_hvae.chains.forecast import forecast, simulate
from pyro_hvae.chains.ladder import Ladder, LadderEvidence
from pyro_hvae.chains.reversal import Reversed
from pyro_hvae.chains.sequence_guides import Filter, Smoother
from pyro_hvae.chains.sequences import StateSpace
from pyro_hvae.chains.unrolled import unroll

__all__ = [
    "BottomUp",
    "Chain",
    "Filter",
    "Ladder",
    "LadderEvidence",
    "Reversed",
    "Smoother",
    "StateSpace",
    "TopDown",
    "decode",
    "encode",
    "forecast",
    "impute",
    "interpolate",
    "reconstruct",
    "simulate",
    "unroll",
]
