"""Variational auto-encoders, Markovian hierarchical VAEs and variational diffusion models as Pyro programs.

All three are a generative chain and an inference chain that run in opposite directions.  Bounds, evidence and
diagnostics work on any pair of Pyro programs.

Programs
    Chains :class:`TopDown`, :class:`BottomUp`, :class:`Ladder`, :class:`Reversed`; in time :class:`StateSpace`,
    :class:`Filter`, :class:`Smoother`; :class:`Diffusion` with :class:`DenoisingChain`, and
    :class:`DiscreteDiffusion` with :class:`DiscreteDenoisingChain`; their kernels (:class:`Gaussian`,
    :class:`Bernoulli`, ...); ready-made pairs (:func:`vae`, :func:`hvae`, :func:`ladder_vae`, :func:`vdm`,
    :func:`discrete_diffusion`, :func:`latent_diffusion`, :func:`deep_markov`, :func:`table_vae`); :func:`encode`,
    :func:`decode`, :func:`reconstruct`, :func:`impute`, :func:`forecast`.  More in :mod:`pyro_hvae.kernels`,
    :mod:`~pyro_hvae.chains`, :mod:`~pyro_hvae.diffusion`,
    :mod:`~pyro_hvae.distributions`, :mod:`~pyro_hvae.nn`, :mod:`~pyro_hvae.models`.

Bounds
    :class:`TraceELBO`, :class:`LayerwiseELBO`, :class:`IWELBO`, :class:`AnnealedBound` and others; :func:`explain` says
    what a bound does with a pair.  More in :mod:`pyro_hvae.bounds`.

Evidence and diagnostics
    :class:`Problem` binds a pair and its data; :func:`amortize` makes a guide from a model;
    :func:`log_evidence`, :func:`evidence_interval`, :func:`evidence_sandwich`, :func:`condition`,
    :func:`diagnose`, :func:`posterior_error`, :func:`to_datatree`, and products of factors (:func:`forward_kl`,
    :func:`reverse_kl`).
    More in :mod:`pyro_hvae.problem`, :mod:`~pyro_hvae.amortized`, :mod:`~pyro_hvae.evidence`,
    :mod:`~pyro_hvae.diagnostics`, :mod:`~pyro_hvae.factorized`,
    :mod:`~pyro_hvae.weights`, :mod:`~pyro_hvae.plots`.

Training
    :func:`fit`, :func:`fit_restarts`, :func:`load`, :func:`compile_step`.  More in :mod:`pyro_hvae.training`,
    :mod:`~pyro_hvae.data`.
"""

from pyro_hvae._version import __version__
from pyro_hvae.amortized import amortize
from pyro_hvae.bounds import (
    CUBO,
    EUBO,
    IWELBO,
    DiffusionELBO,
    LayerwiseELBO,
    Regularised,
    ReweightedWakeSleep,
    SleepPhase,
    SMCBound,
    ThermodynamicBound,
    TraceELBO,
    VRBound,
    WakePhase,
    explain,
)
from pyro_hvae.chains import (
    BottomUp,
    Filter,
    Ladder,
    Reversed,
    Smoother,
    StateSpace,
    TopDown,
    decode,
    encode,
    forecast,
    impute,
    interpolate,
    reconstruct,
)
from pyro_hvae.diagnostics import diagnose, posterior_error, to_datatree
from pyro_hvae.diffusion import DenoisingChain, Diffusion, DiscreteDenoisingChain, DiscreteDiffusion
from pyro_hvae.evidence import AnnealedBound, condition, evidence_interval, evidence_sandwich, log_evidence
from pyro_hvae.factorized import compare_guides, forward_kl, reverse_kl, total_correlation
from pyro_hvae.kernels import (
    Bernoulli,
    Beta,
    Categorical,
    Columns,
    DiscretizedLogistic,
    Flow,
    Gamma,
    Gaussian,
    LinearGaussian,
    LogNormal,
    NegativeBinomial,
    Ordinal,
    Poisson,
    StandardNormal,
    StudentT,
    Transition,
    WithoutContext,
    ZeroInflated,
)
from pyro_hvae.models import deep_markov, discrete_diffusion, hvae, ladder_vae, latent_diffusion, table_vae, vae, vdm
from pyro_hvae.problem import Problem, predict
from pyro_hvae.training import compile_step, fit, fit_restarts, load

# Programs
__all__ = [
    "Bernoulli",
    "Beta",
    "BottomUp",
    "Categorical",
    "Columns",
    "DenoisingChain",
    "Diffusion",
    "DiscreteDenoisingChain",
    "DiscreteDiffusion",
    "DiscretizedLogistic",
    "Filter",
    "Flow",
    "Gamma",
    "Gaussian",
    "Ladder",
    "LinearGaussian",
    "LogNormal",
    "NegativeBinomial",
    "Ordinal",
    "Poisson",
    "Reversed",
    "Smoother",
    "StandardNormal",
    "StateSpace",
    "StudentT",
    "TopDown",
    "Transition",
    "WithoutContext",
    "ZeroInflated",
    "__version__",
    "decode",
    "deep_markov",
    "discrete_diffusion",
    "encode",
    "forecast",
    "hvae",
    "impute",
    "interpolate",
    "ladder_vae",
    "latent_diffusion",
    "reconstruct",
    "table_vae",
    "vae",
    "vdm",
]

# Bounds
__all__ += [
    "CUBO",
    "EUBO",
    "IWELBO",
    "AnnealedBound",
    "DiffusionELBO",
    "LayerwiseELBO",
    "Regularised",
    "ReweightedWakeSleep",
    "SMCBound",
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
    "amortize",
    "compare_guides",
    "condition",
    "diagnose",
    "evidence_interval",
    "evidence_sandwich",
    "forward_kl",
    "log_evidence",
    "posterior_error",
    "predict",
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
