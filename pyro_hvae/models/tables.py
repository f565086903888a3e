"""A VAE of the rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pyro_hvae.chains import BottomUp, TopDown
from pyro_hvae.kernels import Columns, Gaussian
from pyro_hvae.kernels.heads import column_kernels
from pyro_hvae.models.priors import make_prior
from pyro_hvae.nn import MLP, TableEncoder, xavier_
from pyro_hvae.tables import Schema, Table, is_frame, table

__all__ = ["table_vae"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


def table_vae(
    frame: Any,
    latent_dim: int,
    *,
    hidden: Sequence[int] = (128, 128),
    activation: str = "relu",
    min_scale: float = 0.1,
    prior: str = "standard_normal",
) -> tuple[TopDown, BottomUp]:
    """Return a VAE of the rows of a table: p(z) prod_j p_j(x_j | z), one family a column, and q(z | observed entries).

    Entries that are missing leave the likelihood, and the guide sees them as missing.  Both programs carry the table's
    ``schema``, by which ``fit``, ``encode``, ``impute``, bounds, ``diagnose`` and ``to_datatree`` take DataFrames with
    the same columns.  Densities are those of standardised values; ``schema.log_scale`` converts them.

    Args:
        frame: a ``pandas.DataFrame`` with missing entries, whose families are inferred, or what describes one: a
            :class:`~pyro_hvae.tables.Table` (``table(frame, families={...})`` sets families), its ``schema``, or
            ``schema.record()``.
        latent_dim: width of the latent z1.
        hidden: widths of the encoder's hidden layers; the decoder has them reversed.
        activation: ``"relu"``, ``"silu"`` or ``"tanh"``.
        min_scale: floor of the scales of real and positive columns, in standard deviations of the column, in (0, 1).
            The smaller it is, the sooner the model fits the entries that it sees more closely than those that it
            does not, and its intervals become too narrow.

        prior: of the latent, ``"standard_normal"``, ``"mixture"`` of Gaussians or ``"flow"``.

    Returns:
        Model and guide.

    Raises:
        TypeError: for a frame that is no frame.
        ValueError: for a column that can't be modelled, an unknown name, or a width below 1.

    Reference: MIWAE: deep generative modelling and imputation of incomplete data sets (Mattei and Frellsen, 2019).

    Example:
        >>> import pandas as pd, torch
        >>> _ = torch.manual_seed(0)
        >>> frame = pd.DataFrame({"age": [31.5, None, 60.0, 41.0], "visits": [0, 3, None, 1]})
        >>> model, guide = table_vae(frame, 2, hidden=(16,))
        >>> guide(**table(frame).arguments)["z1"].shape
        torch.Size([4, 2])
    """
    schema = _schema(frame)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, _ACTIVATIONS))}; got {activation!r}.")
    if not hidden or min(latent_dim, *hidden) < 1:
        raise ValueError(f"latent_dim and at least one hidden width must be >= 1, got {latent_dim} and {hidden}.")
    if prior not in ("standard_normal", "mixture", "flow"):
        raise ValueError(f"prior must be one of 'standard_normal', 'mixture', 'flow'; got {prior!r}.")
    made, back = _ACTIVATIONS[activation], list(hidden)[::-1]
    trunk = nn.Sequential(xavier_(MLP(latent_dim, back[-1], back[:-1], made)), made())
    columns = column_kernels(schema.columns, back[-1], min_scale=min_scale)
    model = TopDown(z1=make_prior(prior, latent_dim, (), 0, None), x=Columns(trunk, columns, order=schema.names))
    guide = BottomUp(z1=Gaussian(TableEncoder(schema.columns, 2 * latent_dim, hidden, made)))
    model.schema = guide.schema = schema
    args = {
        "frame": schema.record(), "latent_dim": int(latent_dim), "hidden": [int(width) for width in hidden],
        "activation": activation, "min_scale": min_scale, "prior": prior,
    }  # fmt: skip
    model.factory = guide.factory = {"factory": "pyro_hvae.models.table_vae", "args": args}
    return model, guide


def _schema(frame: Any) -> Schema:
    if is_frame(frame):
        return table(frame).schema
    if isinstance(frame, Table):
        return frame.schema
    if isinstance(frame, Schema):
        return frame
    if isinstance(frame, Sequence) and frame and all(isinstance(entry, Mapping) for entry in frame):
        return Schema.of_record(frame)
    raise TypeError(f"table_vae takes a pandas.DataFrame or a description of one, got {type(frame).__name__}.")
