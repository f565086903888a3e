"""Diagnostics of a variational posterior."""

from pyro_hvae.diagnostics.arviz_versions import to_inferencedata
from pyro_hvae.diagnostics.calibration import Calibration, calibrate
from pyro_hvae.diagnostics.datatree import GROUPS, to_datatree
from pyro_hvae.diagnostics.diagnose import diagnose
from pyro_hvae.diagnostics.information import layers
from pyro_hvae.diagnostics.khat import KHats, khats
from pyro_hvae.diagnostics.layers import active_units, mean_variances
from pyro_hvae.diagnostics.loo import compare, held_out, loo
from pyro_hvae.diagnostics.posterior_error import ErrorEstimates, PosteriorError, posterior_error
from pyro_hvae.diagnostics.predictive import pit, predictive_check
from pyro_hvae.diagnostics.report import LEVELS, Finding, Report
from pyro_hvae.diagnostics.weights import resample, smoothed_weights

__all__ = [
    "GROUPS",
    "LEVELS",
    "Calibration",
    "ErrorEstimates",
    "Finding",
    "KHats",
    "PosteriorError",
    "Report",
    "active_units",
    "calibrate",
    "compare",
    "diagnose",
    "held_out",
    "khats",
    "layers",
    "loo",
    "mean_variances",
    "pit",
    "posterior_error",
    "predictive_check",
    "resample",
    "smoothed_weights",
    "to_datatree",
    "to_inferencedata",
]
