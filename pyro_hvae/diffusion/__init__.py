r"""Variational diffusion models: Markovian hierarchical VAEs whose guide has nothing to learn.

The guide noises a datum step by step, the model takes the noise off again; both are Pyro programs with sites
z1, ..., zT and x, so every bound applies.  :class:`~pyro_hvae.bounds.DiffusionELBO` has one whose cost does not grow
with T.
"""

from pyro_hvae.diffusion.denoising import BinnedGaussian, DenoisingChain
from pyro_hvae.diffusion.inpainting import inpaint
from pyro_hvae.diffusion.likelihood import FlowLikelihood, dequantised_log_likelihood, flow_log_likelihood
from pyro_hvae.diffusion.parameterisations import PARAMETERISATIONS, convert
from pyro_hvae.diffusion.process import Diffusion, Noising
from pyro_hvae.diffusion.samplers import ddim, dpm_solver, guided, probability_flow
from pyro_hvae.diffusion.variance import ReverseVariance

__all__ = [
    "PARAMETERISATIONS",
    "BinnedGaussian",
    "DenoisingChain",
    "Diffusion",
    "FlowLikelihood",
    "Noising",
    "ReverseVariance",
    "convert",
    "ddim",
    "dequantised_log_likelihood",
    "dpm_solver",
    "flow_log_likelihood",
    "guided",
    "inpaint",
    "probability_flow",
]
