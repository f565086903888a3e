"""What to trust of a variational posterior."""

from pyro_hvae.diagnostics.datatree import to_datatree

__all__ = ["to_datatree"]
