"""Variational auto-encoders, Markovian hierarchical VAEs and variational diffusion models as Pyro programs.

All three are a generative chain and an inference chain that run in opposite directions.  Bounds, evidence and
diagnostics work on any pair of Pyro programs.

Programs
    Chains :class:`TopDown`, :class:`BottomUp`, :class:`Ladder`, :class:`Reversed`; :class:`Diffusion` with
    :class:`DenoisingChain`, and :class:`DiscreteDiffusion` with :class:`DiscreteDenoisingChain`; their kernels
    (:class:`Gaussian`, :class:`Bernoulli`, ...); ready-made pairs (:func:`vae`, :func:`hvae`, :func:`ladder_vae`,
    :func:`vdm`, :func:`discrete_diffusion`, :func:`latent_diffusion`); :func:`encode`, :func:`decode`,
    :func:`reconstruct`, :func:`impute`.
    More in :mod:`pyro_hvae.kernels`, :mod:`~pyro_hvae.chains`, :mod:`~pyro_hvae.diffusion`,
    :mod:`~pyro_hvae.distributions`, :mod:`~pyro_hvae.nn`, :mod:`~pyro_hvae.models`.

Bounds
    :class:`TraceELBO`, :class:`LayerwiseELBO`, :class:`IWELBO` and others; :func:`explain` says what a bound does with
    a pair.  More in :mod:`pyro_hvae.bounds`.

Evidence and diagnostics
    :class:`Problem` binds a pair and its data; :func:`log_evidence`, :func:`evidence_sandwich`, :func:`diagnose`,
    :func:`to_datatree`, and products of factors (:func:`forward_kl`, :func:`reverse_kl`).  More in
    :mod:`pyro_hvae.problem`, :mod:`~pyro_hvae.evidence`, :mod:`~pyro_hvae.diagnostics`, :mod:`~pyro_hvae.factorized`,
    :mod:`~pyro_hvae.weights`, :mod:`~pyro_hvae.plots`.

Training
    :func:`fit`, :func:`fit_restarts`, :func:`load`, :func:`compile_step`.  More in :mod:`pyro_hvae.training`,
    :mod:`~pyro_hvae.data`.
"""

from pyro_hvae._version import __version__
from pyro_hvae.bounds import (
    CUBO,
    EUBO,
    IWELBO,
    DiffusionELBO,
    LayerwiseELBO,
    Regularised,
    ReweightedWakeSleep,
    SleepPhase,
    ThermodynamicBound,
    TraceELBO,
    VRBound,
    WakePhase,
    explain,
)
from pyro_hvae.chains import BottomUp, Ladder, Reversed, TopDown, decode, encode, impute, reconstruct
from pyro_hvae.diagnostics import diagnose, to_datatree
from pyro_hvae.diffusion import DenoisingChain, Diffusion, DiscreteDenoisingChain, DiscreteDiffusion
from pyro_hvae.evidence import evidence_sandwich, log_evidence
from pyro_hvae.factorized import compare_guides, forward_kl, reverse_kl, total_correlation
from pyro_hvae.kernels import (
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    Flow,
    Gaussian,
    LinearGaussian,
    NegativeBinomial,
    Poisson,
    StandardNormal,
    Transition,
    WithoutContext,
)
from pyro_hvae.models import discrete_diffusion, hvae, ladder_vae, latent_diffusion, vae, vdm
from pyro_hvae.problem import Problem
from pyro_hvae.training import compile_step, fit, fit_restarts, load

# Programs
__all__ = [
    "Bernoulli",
    "BottomUp",
    "Categorical",
    "DenoisingChain",
    "Diffusion",
    "DiscreteDenoisingChain",
    "DiscreteDiffusion",
    "DiscretizedLogistic",
    "Flow",
    "Gaussian",
    "Ladder",
    "LinearGaussian",
    "NegativeBinomial",
    "Poisson",
    "Reversed",
    "StandardNormal",
    "TopDown",
    "Transition",
    "WithoutContext",
    "__version__",
    "decode",
    "discrete_diffusion",
    "encode",
    "hvae",
    "impute",
    "ladder_vae",
    "latent_diffusion",
    "reconstruct",
    "vae",
    "vdm",
]

# Bounds
__all__ += [
    "CUBO",
    "EUBO",
    "IWELBO",
    "DiffusionELBO",
    "LayerwiseELBO",
    "Regularised",
    "ReweightedWakeSleep",
    "SleepPhase",
    "ThermodynamicBound",
    "TraceELBO",
    "VRBound",
    "WakePhase",
    "explain",
]

# Evidence and diagnostics
__all__ += [
    "Problem",
    "compare_guides",
    "diagnose",
    "evidence_sandwich",
    "forward_kl",
    "log_evidence",
    "reverse_kl",
    "to_datatree",
    "total_correlation",
]

# Training
__all__ += [
    "compile_step",
    "fit",
    "fit_restarts",
    "load",
]


def __dir__() -> list[str]:
    return __all__
