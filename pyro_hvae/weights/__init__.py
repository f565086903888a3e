r"""Statistics of log-weights, for tensors from any source.

A log-weight is :math:`\log w_s = \log p(x, z_s) - \log q(z_s)` of draw s, in nats.  Every function takes a tensor of
log-weights and the dim of the draws (the first by default), and treats all other dims one by one.  No function here
runs a program.

- Means: :func:`log_mean_exp`, its standard error :func:`log_mean_exp_stderr`, :func:`effective_sample_size`.
- Tails: :func:`pareto_khat`, :func:`psis` (k-hat and smoothed weights), :func:`good_khat` (the limit for k-hat).
- Bounds of log p(x) with a stated probability: :func:`product_lower`, :func:`markov_lower`, :func:`median_lower`
  without an assumption, :func:`variance_upper` with the :func:`relative_variance` of the weights; :func:`mean_lower`
  for the mean log-weight.
- Checks: :func:`check_weights`.
- Chunks of draws: :func:`chunks`, :func:`default_chunk`, :func:`joined`.
"""

from pyro_hvae.weights.chunks import chunks, default_chunk, joined
from pyro_hvae.weights.confidence import (
    markov_lower,
    mean_lower,
    median_lower,
    product_lower,
    relative_variance,
    variance_upper,
)
from pyro_hvae.weights.means import check_weights, effective_sample_size, log_mean_exp, log_mean_exp_stderr
from pyro_hvae.weights.pareto import good_khat, pareto_khat, psis

__all__ = [
    "check_weights",
    "chunks",
    "default_chunk",
    "effective_sample_size",
    "good_khat",
    "joined",
    "log_mean_exp",
    "log_mean_exp_stderr",
    "markov_lower",
    "mean_lower",
    "median_lower",
    "pareto_khat",
    "product_lower",
    "psis",
    "relative_variance",
    "variance_upper",
]
