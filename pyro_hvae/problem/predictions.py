"""What :func:`~pyro_hvae.problem.predict` returns: draws by site, and as frames of a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["Predictions"]


class Predictions(Mapping[str, Tensor]):
    """Draws of observed sites at new data, by site: ``(S, *dims of plates, *event)``.

    Attributes:
        latents: draws of the other sites, by site.
        drawn_from: ``"guide"`` or ``"prior"`` by latent.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        latents: Mapping[str, Tensor],
        drawn_from: Mapping[str, str],
        reading: Any = None,
    ) -> None:
        self._values, self.latents, self.drawn_from, self._reading = dict(values), dict(latents), drawn_from, reading

    def __getitem__(self, site: str) -> Tensor:
        return self._values[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        parts = [", ".join(f"{site} {tuple(value.shape)}" for site, value in self._values.items())]
        for source in ("guide", "prior"):
            names = [site for site, origin in self.drawn_from.items() if origin == source]
            parts += [f"{', '.join(names)} drawn from the {source}"] if names else []
        return f"Predictions({'; '.join(parts)})"

    @property
    def frames(self) -> Any:
        """Draws of every entry of a table, as :class:`~pyro_hvae.tables.Imputations`: frames and intervals.

        Raises:
            TypeError: if the model was not called with a table.
        """
        if self._reading is None:
            raise TypeError("the model was not called with a DataFrame, so predictions are tensors: read them by site")
        return self._reading.replicates(self._values)

    @property
    def frame(self) -> Any:
        """DataFrame of one value for every entry, with the index of the frame that the model was called with.

        Raises:
            TypeError: if the model was not called with a table.
        """
        return self.frames.frame
