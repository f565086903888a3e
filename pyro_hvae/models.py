r"""Ready-made pairs: functions that return (model, guide), built from the kernels and chains of this package.

For events of shape ``event_shape`` and latents z_1, ..., z_T of widths d_1, ..., d_T, all networks perceptrons:

- :func:`vae`: p(z_1) p(x | z_1) and q(z_1 | x);
- :func:`hvae`: p(z_T) prod p(z_{t-1} | z_t) p(x | z_1), and bottom-up q(z_1 | x) prod q(z_t | z_{t-1});
- :func:`ladder_vae`: the same model, and a guide that runs top-down and merges evidence with the model's prior;
- :func:`vdm`: the same model again, all transitions sharing one denoiser, and a guide without parameters;
- :func:`discrete_diffusion`: the same with noise on categories;
- :func:`latent_diffusion`: a VAE whose prior is a diffusion.

All weights start by Xavier's rule and all biases at zero. ``vae`` is ``hvae`` with one layer, parameter for
parameter. Every pair records on its programs how it was made, as plain
data: ``model.factory == {"factory": "pyro_hvae.models.hvae", "args": {...}}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, TypedDict, Unpack

from torch import Tensor, nn

from pyro_hvae.chains import BottomUp, Ladder, LadderEvidence, TopDown
from pyro_hvae.chains.arguments import event_sizes
from pyro_hvae.diffusion.denoising import DenoisingChain
from pyro_hvae.diffusion.pairs import discrete_diffusion, latent_diffusion
from pyro_hvae.diffusion.process import Diffusion
from pyro_hvae.diffusion.schedules import LinearSchedule, Schedule
from pyro_hvae.diffusion.variance import ReverseVariance
from pyro_hvae.kernels import (
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    Gaussian,
    NegativeBinomial,
    Poisson,
    StandardNormal,
)
from pyro_hvae.kernels.base import join
from pyro_hvae.nn import MLP, xavier_

__all__ = ["PairOptions", "discrete_diffusion", "hvae", "ladder_vae", "latent_diffusion", "vae", "vdm"]

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
        num_bins, low, high: of ``"discretized_logistic"``.
        num_categories: of ``"categorical"``.
        min_scale: of ``"gaussian"``.
    """

    hidden: Hidden
    likelihood: str
    activation: str
    scale: str
    context_dim: int
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
    dims = list(dims)
    if not dims or min(dims) < 1:
        raise ValueError(f"latent_dims holds the widths of z_1, ..., z_T, at least one and each >= 1; got {dims}.")
    event = event_sizes(args["event_shape"])
    if args["context_dim"] < 0:
        raise ValueError(f"context_dim is the width of the context, 0 for none; got {args['context_dim']}.")
    activation = _choose("activation", args["activation"], ACTIVATIONS)
    likelihood, count = _choose("likelihood", args["likelihood"], LIKELIHOODS)
    hidden = _layers(args["hidden"], len(dims))
    context = args["context_dim"]
    options = {name: value for name, value in args.items() if name not in shapes and name not in _DEFAULTS}
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
    kernels: dict[str, nn.Module] = {f"z{len(dims)}": StandardNormal(dims[-1])}
    kernels.update({f"z{t}": decoders[t - 1] for t in range(len(dims) - 1, 0, -1)})
    kernels["x"] = likelihood(net(dims[0], out, hidden[0][::-1]), len(event), **options)

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
        below: list[Any] = [event, *dims]
        encoders = [net(below[t], 2 * dims[t], hidden[t]) for t in range(len(dims))]
        guide = BottomUp(**{f"z{t + 1}": Gaussian(encoder, scale=scale) for t, encoder in enumerate(encoders)})
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
    entries: list[Any] = list(hidden)
    if all(isinstance(width, int) for width in entries):
        return [list(entries) for _ in range(depth)]
    if any(isinstance(width, int) for width in entries) or len(entries) != depth:
        raise ValueError(
            f"hidden is one sequence of widths for all layers, or a sequence a layer, {depth} of them; got {hidden}."
        )
    return [list(widths) for widths in entries]


def _choose(what: str, name: str, choices: dict[str, Any]) -> Any:
    if name not in choices:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, sorted(choices)))}; got {name!r}.")
    return choices[name]


def _as_lists(value: Any) -> Any:
    """Turn tuples into lists and integers into int, so that JSON and YAML return the record unchanged."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, dict):
        return {key: _as_lists(entry) for key, entry in value.items()}
    return [_as_lists(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def vdm(
    denoiser: nn.Module,
    *,
    event_shape: Sequence[int] | int,
    num_layers: int | None,
    schedule: Schedule | None = None,
    likelihood: nn.Module | None = None,
    parameterisation: str = "eps",
    reverse_variance: ReverseVariance | None = None,
) -> tuple[DenoisingChain, Diffusion]:
    """Return a variational diffusion model: a denoising chain, and the noising process as its guide.

    Args:
        denoiser: module called with (z, gamma), or (z, gamma, context).
        event_shape: of one datum.
        num_layers: T; None for continuous time.
        schedule: gamma(t); :class:`~pyro_hvae.diffusion.LinearSchedule` by default.  A learned one is trained
            as a part of the model.
        likelihood: kernel for p(x | z_1); by default the Gaussian that the first noise level leaves.
        parameterisation: what the denoiser predicts: ``"eps"``, ``"x0"``, ``"v"`` or ``"score"``.
        reverse_variance: a :class:`~pyro_hvae.diffusion.ReverseVariance`, learned or calibrated.

    Raises:
        ValueError: for an ``event_shape`` without sizes or with one below 1, T < 1, or an unknown parameterisation.

    Reference:
        Variational Diffusion Models (Kingma, Salimans, Poole and Ho, 2021).

    Example:
        >>> from pyro_hvae.nn import DenoisingMLP
        >>> model, guide = vdm(DenoisingMLP(2), event_shape=2, num_layers=10)
        >>> model(size=3).shape
        torch.Size([3, 2])
    """
    shape = event_sizes(event_shape)
    noise = LinearSchedule() if schedule is None else schedule
    model = DenoisingChain(
        denoiser,
        event_shape=shape,
        schedule=noise,
        num_layers=num_layers,
        likelihood=likelihood,
        parameterisation=parameterisation,
        reverse_variance=reverse_variance,
    )
    return model, Diffusion(noise, num_layers, event_dim=len(shape))
