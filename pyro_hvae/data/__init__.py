"""Example data, and batches of tensors in memory.

- :func:`digits`: 1797 handwritten digits, 8 x 8, that come with scikit-learn.
- :func:`idx_folder`: a folder of IDX files, the format of MNIST and its relatives, plain or compressed by gzip.
- :func:`binarize`: grey values to zeros and ones, by a threshold or at random.
- :class:`Batches`: batches by index over whole tensors.
- :func:`~pyro_hvae.tables.table`: a DataFrame as numbers with a mask of its missing entries, and the way back.
"""

from pyro_hvae.data.batches import Batches
from pyro_hvae.data.images import Split, binarize, check_finite, check_unit_interval, digits, idx_folder, read_idx
from pyro_hvae.tables import table

__all__ = [
    "Batches",
    "Split",
    "binarize",
    "check_finite",
    "check_unit_interval",
    "digits",
    "idx_folder",
    "read_idx",
    "table",
]
