"""Plots.

Every function takes arrays, tensors, a history or a result of the diagnostics, and returns a matplotlib figure without
showing it.  Lines differ by marker or dash as well as by colour, so that they differ in grey too.
"""

from pyro_hvae.plots.images import reconstructions, samples, traversal
from pyro_hvae.plots.latents import latent_map, schedule
from pyro_hvae.plots.training import layer_kl, training_curves
from pyro_hvae.plots.trust import calibration_ecdf, evidence_bracket, khat_scatter

__all__ = [
    "calibration_ecdf",
    "evidence_bracket",
    "khat_scatter",
    "latent_map",
    "layer_kl",
    "reconstructions",
    "samples",
    "schedule",
    "training_curves",
    "traversal",
]
