"""Variational auto-encoders, Markovian hierarchical VAEs and variational diffusion models as Pyro programs.

A generative chain and an inference chain, in opposite directions, are all three of them; bounds, evidence and
diagnostics read the traces of any pair of Pyro programs.
"""

__version__ = "0.1.0"

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
from pyro_hvae.chains import BottomUp, TopDown
from pyro_hvae.coding import decode, encode, impute, reconstruct
from pyro_hvae.compile import compile_step
from pyro_hvae.diagnostics import diagnose, to_datatree
from pyro_hvae.diffusion import DenoisingChain, Diffusion
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
from pyro_hvae.ladder import Ladder
from pyro_hvae.models import hvae, ladder_vae, vae, vdm
from pyro_hvae.reversal import Reversed
from pyro_hvae.training import fit, fit_restarts, load

__all__ = [
    "CUBO",
    "EUBO",
    "IWELBO",
    "Bernoulli",
    "BottomUp",
    "Categorical",
    "DenoisingChain",
    "Diffusion",
    "DiffusionELBO",
    "DiscretizedLogistic",
    "Flow",
    "Gaussian",
    "Ladder",
    "LayerwiseELBO",
    "LinearGaussian",
    "NegativeBinomial",
    "Poisson",
    "Regularised",
    "Reversed",
    "ReweightedWakeSleep",
    "SleepPhase",
    "StandardNormal",
    "ThermodynamicBound",
    "TopDown",
    "TraceELBO",
    "Transition",
    "VRBound",
    "WakePhase",
    "WithoutContext",
    "__version__",
    "compare_guides",
    "compile_step",
    "decode",
    "diagnose",
    "encode",
    "evidence_sandwich",
    "explain",
    "fit",
    "fit_restarts",
    "forward_kl",
    "hvae",
    "impute",
    "ladder_vae",
    "load",
    "log_evidence",
    "reconstruct",
    "reverse_kl",
    "to_datatree",
    "total_correlation",
    "vae",
    "vdm",
]
