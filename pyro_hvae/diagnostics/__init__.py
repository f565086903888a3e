"""What to trust of a variational posterior."""

from pyro_hvae.diagnostics.datatree import to_datatree
from pyro_hvae.diagnostics.layers import active_units, mean_variances

__all__ = ["active_units", "mean_variances", "to_datatree"]
