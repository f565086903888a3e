r"""Variational diffusion models: Markovian hierarchical VAEs whose guide has no parameters.

The guide adds noise to a datum step by step, by a noise schedule; the model removes it. Noise is Gaussian
(:class:`Diffusion`), or masks, replaces or moves the entries of discrete data (:class:`DiscreteDiffusion`).  Both are
Pyro programs with sites z1, ..., zT and x, so every bound applies.  The cost of
:class:`~pyro_hvae.bounds.DiffusionELBO` does not grow with T.
"""

from pyro_hvae.diffusion.corruption import Absorbing, AnyOrder, Corruption, Uniform
from pyro_hvae.diffusion.denoising import BinnedGaussian, DenoisingChain
from pyro_hvae.diffusion.discrete import DiscreteDenoisingChain, DiscreteDiffusion
from pyro_hvae.diffusion.inpainting import inpaint
from pyro_hvae.diffusion.likelihood import FlowLikelihood, dequantised_log_likelihood, flow_log_likelihood
from pyro_hvae.diffusion.multivariate import MeanLevel, PolynomialSchedule
from pyro_hvae.diffusion.ordinal import Ordinal
from pyro_hvae.diffusion.parameterisations import PARAMETERISATIONS, convert
from pyro_hvae.diffusion.process import Diffusion, Noising
from pyro_hvae.diffusion.replacement import CosineReplacement, PowerReplacement, ReplacementSchedule
from pyro_hvae.diffusion.samplers import ddim, dpm_solver, guided, probability_flow
from pyro_hvae.diffusion.schedules import CosineSchedule, LearnedSchedule, LinearSchedule, MonotoneSchedule, Schedule
from pyro_hvae.diffusion.unmasking import ancestral, unmask
from pyro_hvae.diffusion.variance import ReverseVariance

__all__ = [
    "PARAMETERISATIONS",
    "Absorbing",
    "AnyOrder",
    "BinnedGaussian",
    "Corruption",
    "CosineReplacement",
    "CosineSchedule",
    "DenoisingChain",
    "Diffusion",
    "DiscreteDenoisingChain",
    "DiscreteDiffusion",
    "FlowLikelihood",
    "LearnedSchedule",
    "LinearSchedule",
    "MeanLevel",
    "MonotoneSchedule",
    "Noising",
    "Ordinal",
    "PolynomialSchedule",
    "PowerReplacement",
    "ReplacementSchedule",
    "ReverseVariance",
    "Schedule",
    "Uniform",
    "ancestral",
    "convert",
    "ddim",
    "dequantised_log_likelihood",
    "dpm_solver",
    "flow_log_likelihood",
    "guided",
    "inpaint",
    "probability_flow",
    "unmask",
]
