"""Variational auto-encoders of perceptrons, with one layer of latents or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, TypedDict, Unpack

from torch import Tensor, nn

from pyro_hvae.arguments import check_choice, check_count, sequence_of
from pyro_hvae.chains import BottomUp, Ladder, LadderEvidence, TopDown
from pyro_hvae.chains.arguments import event_sizes
from pyro_hvae.kernels import (
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    Gaussian,
    NegativeBinomial,
    Poisson,
)
from pyro_hvae.kernels.base import join
from pyro_hvae.models.priors import check_prior, make_prior
from pyro_hvae.nn import MLP, xavier_

__all__ = ["PairOptions", "hvae", "ladder_vae", "vae"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}

# kernel, and how many parameters a variable its network yields (side by side along the first event dim)
LIKELIHOODS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "bernoulli": (Bernoulli, 1),
    "categorical": (Categorical, 1),
    "discretized_logistic": (DiscretizedLogistic, 2),
    "gaussian": (Gaussian, 2),
    "negative_binomial": (NegativeBinomial, 2),
    "poisson": (Poisson, 1),
}

# floor of the standard deviations of p(z_t | z_{t+1}), t < T, in a ladder: see ladder_vae
_LADDER_FLOOR = 0.9

Hidden = Sequence[int] | Sequence[Sequence[int]]


class PairOptions(TypedDict, total=False):
    """Options of :func:`vae`, :func:`hvae` and :func:`ladder_vae`; those of the likelihood's kernel have no default.

    Attributes:
        hidden: widths of hidden layers, (200, 200) by default: one sequence for all layers, or one for each layer, from
            z_1 upwards.  q(z_t | z_{t-1}) has those of layer t, and p(z_{t-1} | z_t) has them reversed.
        likelihood: ``"bernoulli"`` (the default), ``"gaussian"``, ``"discretized_logistic"``, ``"poisson"``,
            ``"negative_binomial"`` or ``"categorical"`` (integers below ``num_categories``).
        activation: ``"tanh"`` (the default), ``"relu"``, ``"leaky_relu"``, ``"elu"``, ``"gelu"``, ``"silu"`` or
            ``"softplus"``.
        scale: the map from a network's output to a standard deviation, ``"softplus"`` (the default) or ``"exp"``.
        context_dim: width of the context of both programs, 0 (the default) for none.
        prior: of the top latent, ``"standard_normal"`` (the default), ``"mixture"`` of Gaussians, ``"vamp"`` (mixture
            of the guide's posteriors at learned inputs) or ``"flow"``; not for :func:`ladder_vae`, whose guide
            multiplies Gaussians.
        num_components: of the priors ``"mixture"`` and ``"vamp"``, 20 by default.
        num_bins, low, high: of ``"discretized_logistic"``.
        num_categories: of ``"categorical"``.
        min_scale: of ``"gaussian"``.
    """

    hidden: Hidden
    likelihood: str
    activation: str
    scale: str
    context_dim: int
    prior: str
    num_components: int
    num_bins: int
    low: float
    high: float
    num_categories: int
    min_scale: float


_DEFAULTS: dict[str, Any] = {
    "hidden": (200, 200),
    "likelihood": "bernoulli",
    "activation": "tanh",
    "scale": "softplus",
    "context_dim": 0,
}


def vae(
    event_shape: int | Sequence[int], latent_dim: int, **options: Unpack[PairOptions]
) -> tuple[TopDown, BottomUp]:
    """Return variational auto-encoder: p(z_1) p(x | z_1) and q(z_1 | x).

    Args:
        event_shape: shape of one datum; a number is a width.
        latent_dim: width of z_1.
        options: see :class:`PairOptions`; ``hidden`` is one sequence of widths.

    Returns:
        Model and guide.

    Raises:
        ValueError: for an unknown name, or a width below 1.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model, guide = vae((1, 8, 8), 5, hidden=(32,))
        >>> model(size=3).shape
        torch.Size([3, 1, 8, 8])
    """
    return _pair("vae", {"event_shape": event_shape, "latent_dim": latent_dim, **options}, [latent_dim], BottomUp)


def hvae(
    event_shape: int | Sequence[int], latent_dims: Sequence[int], **options: Unpack[PairOptions]
) -> tuple[TopDown, BottomUp]:
    """Return markovian hierarchical VAE (seed eq. 15 and 17).

    Args:
        event_shape: shape of one datum; a number is a width.
        latent_dims: widths of z_1, ..., z_T, from the data upwards.
        options: see :class:`PairOptions`.

    Returns:
        Model and guide.

    Raises:
        ValueError: for no layer at all, ``hidden`` that does not fit, an unknown name, or a width below 1.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model, guide = hvae(64, (8, 4), hidden=[(32,), (16,)])
        >>> guide(model(size=3))["z2"].shape
        torch.Size([3, 4])
    """
    return _pair("hvae", {"event_shape": event_shape, "latent_dims": latent_dims, **options}, latent_dims, BottomUp)


def ladder_vae(
    event_shape: int | Sequence[int], latent_dims: Sequence[int], **options: Unpack[PairOptions]
) -> tuple[TopDown, Ladder]:
    """Return ladder VAE: the model of :func:`hvae` with a guide that runs top-down (:class:`~pyro_hvae.chains.Ladder`).

    Layer t of the upward pass has the hidden widths of layer t, its features d_t the last of them, and a linear head.

    The standard deviations of p(z_t | z_{t+1}) stay above 0.9. The unit of a latent is free, so that this
    costs the model little; without it the first steps, in which all latents are but noise to the decoder,
    shrink z_t together with its posterior, and a layer that small no longer gets a gradient.

    Args:
        event_shape: as in :func:`hvae`.
        latent_dims: as in :func:`hvae`.
        options: see :class:`PairOptions`; ``hidden`` needs at least one width a layer.

    Returns:
        Model and guide. The guide holds the model and owns the evidence networks only.

    Raises:
        ValueError: as :func:`hvae`.

    Reference: Ladder Variational Autoencoders (Sønderby et al., 2016).

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model, guide = ladder_vae(64, (8, 4), hidden=(32,))
        >>> list(guide(model(size=3)))
        ['z2', 'z1']
    """
    args = {"event_shape": event_shape, "latent_dims": latent_dims, **options}
    return _pair("ladder_vae", args, latent_dims, Ladder)


def _pair(factory: str, args: dict[str, Any], dims: Sequence[int], family: type) -> tuple[TopDown, Any]:
    """Build model and guide; the order of the networks is the same for each family of guides."""
    sizes = ("event_shape", "latent_dim", "latent_dims")
    shapes: dict[str, Any] = {name: args.pop(name) for name in sizes if name in args}
    args = {**shapes, **_DEFAULTS, **args}
    dims = sequence_of("latent_dims", dims)
    if not dims:
        raise ValueError("latent_dims holds the widths of z_1, ..., z_T, at least one; got none.")
    for width in dims:
        check_count("latent_dims" if "latent_dims" in shapes else "latent_dim", width)
    event = event_sizes(args["event_shape"])
    check_count("context_dim", args["context_dim"], 0)
    activation = _choose("activation", args["activation"], ACTIVATIONS)
    likelihood, count = _choose("likelihood", args["likelihood"], LIKELIHOODS)
    hidden = _layers(args["hidden"], len(dims))
    context = args["context_dim"]
    options = {name: value for name, value in args.items() if name not in shapes and name not in _DEFAULTS}
    prior, components = options.pop("prior", "standard_normal"), options.pop("num_components", None)
    check_prior(prior, components, context, ladder=family is Ladder)
    scale = args["scale"]

    def net(before: int | tuple[int, ...], after: int | tuple[int, ...], widths: Sequence[int]) -> nn.Module:
        inner = MLP(_width(before) + context, _width(after), widths, activation, xavier=True)
        if all(isinstance(shape, int) or len(shape) == 1 for shape in (before, after)):
            return inner
        return Folded(inner, before, after)

    out = (count * event[0], *event[1:])
    if args["likelihood"] == "categorical":
        if "num_categories" not in options:
            raise ValueError("likelihood='categorical' needs num_categories=, the number of values of a variable.")
        out = (*event, options.pop("num_categories"))
    floor = _LADDER_FLOOR if family is Ladder else 1e-3
    decoders = [
        Gaussian(net(above, 2 * here, widths[::-1]), scale=scale, min_scale=floor)
        for here, above, widths in zip(dims, dims[1:], hidden[1:])
    ]
    observed = likelihood(net(dims[0], out, hidden[0][::-1]), len(event), **options)
    below: list[Any] = [event, *dims]
    encoders = [
        Gaussian(net(below[t], 2 * dims[t], hidden[t]), scale=scale) for t in range(len(dims)) if family is BottomUp
    ]
    kernels: dict[str, nn.Module] = {f"z{len(dims)}": make_prior(prior, dims[-1], encoders, below[-2], components)}
    kernels.update({f"z{t}": decoders[t - 1] for t in range(len(dims) - 1, 0, -1)})
    kernels["x"] = observed

    model = TopDown(**kernels)  # type: ignore[arg-type]

    guide: BottomUp | Ladder
    if family is Ladder:
        if not all(hidden):
            raise ValueError(f"a ladder needs at least one hidden width a layer, that of its features; got {hidden}.")
        features: list[Any] = [event, *(widths[-1] for widths in hidden)]
        evidence = {
            f"z{t + 1}": LadderEvidence(
                net(features[t], features[t + 1], hidden[t][:-1]),
                xavier_(nn.Linear(hidden[t][-1], 2 * dims[t])),
                activation(),
            )
            for t in range(len(dims))
        }
        guide = Ladder(model, **evidence)
    else:
        guide = BottomUp(**{f"z{t + 1}": encoder for t, encoder in enumerate(encoders)})
    record = {"factory": f"pyro_hvae.models.{factory}", "args": _as_lists(args)}
    model.factory = guide.factory = record
    return model, guide


class Folded(nn.Module):
    """Call a network over vectors on events of any shape: flatten, join the context, call, reshape.

    Args:
        net: network from vectors (..., c + prod(before)) to vectors (..., prod(after)).
        before: shape of the input's events.
        after: shape of the output's events.
    """

    def __init__(self, net: nn.Module, before: int | tuple[int, ...], after: int | tuple[int, ...]) -> None:
        super().__init__()
        self.net = net
        self.before = (before,) if isinstance(before, int) else before
        self.after = (after,) if isinstance(after, int) else after

    def forward(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Return (..., *before) and (..., c) to (..., *after)."""
        value = value.reshape(*value.shape[: value.dim() - len(self.before)], math.prod(self.before))
        output = self.net(value if context is None else join(value, context))
        return output.reshape(*output.shape[:-1], *self.after)


def _width(shape: int | tuple[int, ...]) -> int:
    return shape if isinstance(shape, int) else math.prod(shape)


def _layers(hidden: Hidden, depth: int) -> list[list[int]]:
    """Return the hidden widths, one list a layer."""
    entries = sequence_of("hidden", hidden)
    if all(isinstance(width, int) for width in entries):
        return [list(entries) for _ in range(depth)]
    for width in entries:
        if not isinstance(width, Iterable):
            check_count("hidden", width)
    if any(isinstance(width, int) for width in entries) or len(entries) != depth:
        raise ValueError(
            f"hidden is one sequence of widths for all layers, or a sequence a layer, {depth} of them; got {hidden}."
        )
    return [list(widths) for widths in entries]


def _choose(what: str, name: str, choices: dict[str, Any]) -> Any:
    check_choice(what, name, sorted(choices))
    return choices[name]


def _as_lists(value: Any) -> Any:
    """Turn tuples into lists and integers into int, so that JSON and YAML return the record unchanged."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, dict):
        return {key: _as_lists(entry) for key, entry in value.items()}
    return [_as_lists(entry) for entry in value] if isinstance(value, (tuple, list)) else value
