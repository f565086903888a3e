"""Tables: what the columns of a ``pandas.DataFrame`` are, as numbers for programs, and the way back.

:class:`Schema` describes the columns: family, standardisation, categories.  :func:`table` infers it from a frame and
converts the frame to numbers and a mask of its missing entries; :class:`Imputations` are draws of the missing entries
as frames.
"""

from pyro_hvae.tables.column import FAMILIES, Column
from pyro_hvae.tables.imputations import Imputations
from pyro_hvae.tables.schema import Schema, Table, is_frame, table

__all__ = ["FAMILIES", "Column", "Imputations", "Schema", "Table", "is_frame", "table"]
