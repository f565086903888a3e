r"""Guides made from models: :func:`amortize` reads a model's graph, inverts it, and returns a guide of networks.

See ``docs/amortize.md``.
"""

from pyro_hvae.amortized.graph import Graph, invert
from pyro_hvae.amortized.guide import AmortizedGuide, amortize
from pyro_hvae.amortized.inverse import Inverse

__all__ = ["AmortizedGuide", "Graph", "Inverse", "amortize", "invert"]
