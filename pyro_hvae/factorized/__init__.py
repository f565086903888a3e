r"""Approximate a posterior by a product of factors, by either direction of the divergence (seed section 2).

.. math:: q(z) = \prod_b q_b(z_b)

- :func:`forward_kl` minimises :math:`\mathrm{KL}(p(z|x)\,\|\,q(z))`, the minimum is the product of the marginals,
  which cover every mode at full width;
- :func:`reverse_kl` minimises :math:`\mathrm{KL}(q(z)\,\|\,p(z|x))`, mean-field variational inference: the minimum
  is near one mode, with the width of the conditionals;
- :func:`total_correlation` is the smallest KL(p||q) of any product;
- :func:`compare_guides` returns a table of both divergences and k-hat.

The first two return a :class:`ProductGuide`, a Pyro program like any other guide.
"""

from pyro_hvae.factorized.compare import Comparison, compare_guides
from pyro_hvae.factorized.families import FAMILIES, Family
from pyro_hvae.factorized.forward import forward_kl, total_correlation
from pyro_hvae.factorized.guide import ProductGuide
from pyro_hvae.factorized.reverse import reverse_kl

__all__ = [
    "FAMILIES",
    "Comparison",
    "Family",
    "ProductGuide",
    "compare_guides",
    "forward_kl",
    "reverse_kl",
    "total_correlation",
]
