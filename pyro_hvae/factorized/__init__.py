r"""Products of factors in the place of a posterior, by either direction of the divergence (seed section 2).

.. math:: q(z) = \prod_b q_b(z_b)

- :func:`forward_kl` minimises :math:`\mathrm{KL}(p(z|x)\,\|\,q(z))`, which the marginals do: they cover every mode and
  each has its full width;
- :func:`reverse_kl` minimises :math:`\mathrm{KL}(q(z)\,\|\,p(z|x))`, mean-field variational inference: it settles in a
  mode and takes the width of the conditionals;
- :func:`total_correlation` is what no product can give back;
- :func:`compare_guides` puts both divergences and k-hat of each into a table.

Both return a :class:`ProductGuide`, a Pyro program like any other guide.
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
