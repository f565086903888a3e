"""Ready-made state-space models: the deep Markov model and the variational recurrent network."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyro_hvae.chains.sequence_guides import Filter, Smoother
from pyro_hvae.chains.sequences import StateSpace
from pyro_hvae.kernels import Bernoulli, Gaussian, LinearGaussian, Poisson, StandardNormal
from pyro_hvae.nn import MLP
from pyro_hvae.nn.sequences import Combiner, GatedTransition

__all__ = ["deep_markov", "variational_rnn"]

LIKELIHOODS: dict[str, tuple[Any, int]] = {
    "bernoulli": (Bernoulli, 1),
    "gaussian": (Gaussian, 2),
    "poisson": (Poisson, 1),
}


def deep_markov(
    width: int,
    latent_dim: int,
    *,
    hidden: int = 100,
    gate: int = 200,
    features: int = 600,
    likelihood: str = "bernoulli",
) -> tuple[StateSpace, Smoother]:
    """Return a deep Markov model over vectors, and its structured guide.

    A gated transition, an emission by a network of two hidden layers, and a guide whose draws combine z_{t-1} with a
    recurrent network that runs backwards over the data.

    Args:
        width: of one observation.
        latent_dim: d.
        hidden: width of the emission's hidden layers.
        gate: width of the transition's hidden layers.
        features: width of the guide's recurrent network.
        likelihood: ``"bernoulli"``, ``"gaussian"`` or ``"poisson"``.

    Returns:
        Model and guide, called with (x, context=None, lengths=None): x (N, T, width).

    Raises:
        ValueError: for a width below 1, or an unknown likelihood.

    Reference:
        Structured Inference Networks for Nonlinear State Space Models (Krishnan, Shalit and Sontag, 2017).

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model, guide = deep_markov(5, 2, hidden=8, gate=8, features=8)
        >>> guide(model(size=3, steps=7)).shape
        torch.Size([3, 7, 2])
    """
    args: dict[str, Any] = {"width": width, "latent_dim": latent_dim, "likelihood": likelihood}
    args |= {"hidden": hidden, "gate": gate, "features": features}
    kernel, count = _checked(args)
    model = StateSpace(
        initial=LinearGaussian(0, latent_dim),
        transition=Gaussian(GatedTransition(latent_dim, gate)),
        emission=kernel(MLP(latent_dim, count * width, (hidden, hidden), nn.ReLU)),
    )
    guide = Smoother(
        initial=Gaussian(nn.Linear(features, 2 * latent_dim)),
        transition=Gaussian(Combiner(latent_dim, features)),
        rnn=nn.RNN(width, features, nonlinearity="relu", batch_first=True),
    )
    return _recorded("deep_markov", args, model, guide)


def variational_rnn(
    width: int, latent_dim: int, *, hidden: int = 32, likelihood: str = "bernoulli"
) -> tuple[StateSpace, Filter]:
    """Return a variational recurrent network over vectors, and its guide.

    An LSTM over observations and latents is the history of both programs: p(z_t | z_{t-1}, h_t), p(x_t | z_t, h_t) and
    q(z_t | z_{t-1}, x_t, h_t).

    Args:
        width: of one observation.
        latent_dim: d.
        hidden: width of the LSTM and of all hidden layers.
        likelihood: ``"bernoulli"``, ``"gaussian"`` or ``"poisson"``.

    Returns:
        Model and guide, called with (x, context=None, lengths=None): x (N, T, width).

    Raises:
        ValueError: for a width below 1, or an unknown likelihood.

    Reference:
        A Recurrent Latent Variable Model for Sequential Data (Chung et al., 2015).

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model, guide = variational_rnn(5, 2, hidden=8)
        >>> guide(torch.zeros(3, 7, 5)).shape
        torch.Size([3, 7, 2])
    """
    args = {"width": width, "latent_dim": latent_dim, "hidden": hidden, "likelihood": likelihood}
    kernel, count = _checked(args)
    model = StateSpace(
        initial=StandardNormal(latent_dim),
        transition=Gaussian(MLP(latent_dim + hidden, 2 * latent_dim, (hidden,), nn.ReLU)),
        emission=kernel(MLP(latent_dim + hidden, count * width, (hidden,), nn.ReLU)),
        history=nn.LSTM(width + latent_dim, hidden, batch_first=True),
    )
    guide = Filter(
        initial=Gaussian(MLP(width, 2 * latent_dim, (hidden,), nn.ReLU)),
        transition=Gaussian(MLP(latent_dim + width + hidden, 2 * latent_dim, (hidden,), nn.ReLU)),
        model=model,
    )
    return _recorded("variational_rnn", args, model, guide)


def _checked(args: dict[str, Any]) -> tuple[Any, int]:
    for name, value in args.items():
        if name != "likelihood" and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if args["likelihood"] not in LIKELIHOODS:
        known = ", ".join(map(repr, LIKELIHOODS))
        raise ValueError(f"likelihood must be one of {known}; got {args['likelihood']!r}.")
    return LIKELIHOODS[args["likelihood"]]


def _recorded(name: str, args: dict[str, Any], model: Any, guide: Any) -> Any:
    model.factory = guide.factory = {"factory": f"pyro_hvae.models.{name}", "args": args}
    return model, guide
