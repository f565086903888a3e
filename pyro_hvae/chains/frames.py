"""Tables as arguments of chains: a DataFrame becomes x and mask, and results get its index, names and units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_hvae.tables import Imputations, Schema, Table, is_frame

__all__ = ["TableData", "latents_frame", "read_table"]


class TableData:
    """A table as the data of a chain: what estimators need to know of it.

    Attributes:
        table: the table, its tensors in dtype and device of the chain's parameters.
        x: values (N, D).
        arguments: further keyword arguments of the programs, ``mask`` (N, D).
        coords: labels by name of dim: the index for the plate, names of columns for the observation.
    """

    def __init__(self, table: Table, plate: str, observation: str | None) -> None:
        self.table, self.observation = table, observation
        self.x: Tensor = table.x
        self.arguments: dict[str, Tensor] = {"mask": table.mask}
        self.coords: dict[str, Any] = {plate: table.labels}
        if observation is not None:
            self.coords[f"{observation}_dim_0"] = table.schema.names

    def restore(self, site: str, values: np.ndarray, *, observed: bool = False) -> np.ndarray:
        """Return values of the observed site (..., D) in the units of the frame; codes for labels.

        Args:
            site: any site; values of others are returned as they are.
            observed: the values are the table's own, of which the missing ones become NaN.
        """
        if site != self.observation:
            return values
        restored = self.table.schema.restore(values)
        return np.where(self.table.mask.cpu().numpy(), restored, np.nan) if observed else restored

    def replicates(self, values: Mapping[str, Tensor]) -> Imputations:
        """Return draws of all entries as frames.

        Args:
            values: draws by site, of the observed one (S, N, D).
        """
        assert self.observation is not None
        nothing = Table(self.table.schema, self.table.x, torch.zeros_like(self.table.mask), self.table.source)
        return Imputations(nothing, values[self.observation])


def read_table(
    module: nn.Module, schema: Schema | None, data: Any, plate: str, observation: str | None = None
) -> TableData | None:
    """Convert a DataFrame or a table for a chain; None for other data.

    Raises:
        TypeError: for a frame where the chain has no schema.
    """
    if is_frame(data):
        if schema is None:
            raise TypeError(
                "the chain has no schema, so it can't read a DataFrame: pass pyro_hvae.data.table(frame), build the "
                "pair by models.table_vae(frame, ...), or set .schema of both programs to that of the table."
            )
        data = schema.table(data)
    elif not isinstance(data, Table):
        return None
    like = next((p for p in module.parameters() if p.is_floating_point()), data.x)
    moved = Table(data.schema, data.x.to(like), data.mask.to(like.device), data.source)
    return TableData(moved, plate, observation)


def latents_frame(latents: Mapping[str, Tensor], index: Any, num_draws: int | None) -> Any:
    """Return latents by site, (N, d) or (S, N, d), as a DataFrame with columns ``site[i]``; draws lead the index."""
    import pandas as pd

    arrays, names = [], []
    for site, value in latents.items():
        rows = len(index) * (num_draws or 1)
        flat = value.detach().cpu().reshape(rows, -1).numpy()
        arrays.append(flat)
        names += [f"{site}[{i}]" for i in range(flat.shape[1])]
    if num_draws is not None:
        index = pd.MultiIndex.from_product([range(num_draws), list(index)], names=["draw", index.name])
    return pd.DataFrame(np.concatenate(arrays, -1), index=index, columns=names)


def imputations(table: Table, draws: Tensor) -> Imputations:
    """Return draws (N, D) or (S, N, D) of completed data as imputations of a table."""
    return Imputations(table, draws if draws.dim() == 3 else draws.unsqueeze(0))
