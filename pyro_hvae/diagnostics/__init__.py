"""What to trust of a variational posterior."""

from pyro_hvae.diagnostics.arviz_versions import to_inferencedata
from pyro_hvae.diagnostics.datatree import GROUPS, to_datatree
from pyro_hvae.diagnostics.layers import active_units, mean_variances

__all__ = ["GROUPS", "active_units", "mean_variances", "to_datatree", "to_inferencedata"]
