"""Ready-made pairs of diffusions; :mod:`pyro_hvae.models` has them with the others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pyro_hvae.chains import BottomUp, TopDown
from pyro_hvae.chains.arguments import event_sizes
from pyro_hvae.diffusion.corruption import Absorbing, AnyOrder, Corruption, Uniform
from pyro_hvae.diffusion.denoising import DenoisingChain
from pyro_hvae.diffusion.discrete import DiscreteDenoisingChain, DiscreteDiffusion
from pyro_hvae.diffusion.ordinal import Ordinal
from pyro_hvae.diffusion.process import Diffusion
from pyro_hvae.diffusion.replacement import PowerReplacement, ReplacementSchedule
from pyro_hvae.diffusion.schedules import LinearSchedule, Schedule

__all__ = ["discrete_diffusion", "latent_diffusion", "vdm"]

NOISES: dict[str, type[Corruption]] = {
    "absorbing": Absorbing,
    "any_order": AnyOrder,
    "ordinal": Ordinal,
    "uniform": Uniform,
}


def vdm(
    denoiser: nn.Module,
    *,
    event_shape: Sequence[int] | int,
    num_layers: int | None,
    schedule: Schedule | None = None,
    likelihood: nn.Module | None = None,
    parameterisation: str = "eps",
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
    )
    return model, Diffusion(noise, num_layers, event_dim=len(shape))


def discrete_diffusion(
    denoiser: nn.Module,
    *,
    event_shape: Sequence[int] | int,
    num_categories: int,
    num_layers: int | None,
    corruption: str = "absorbing",
    schedule: ReplacementSchedule | None = None,
) -> tuple[DiscreteDenoisingChain, DiscreteDiffusion]:
    """Return a diffusion of categories: a denoising chain, and the noising process as its guide.

    Args:
        denoiser: module called with (z, gamma), or (z, gamma, context), to logits (..., *event_shape, C); see
            :class:`~pyro_hvae.diffusion.DiscreteDenoisingChain`.
        event_shape: of one datum.
        num_categories: C; data are integers in 0, ..., C - 1, of any dtype.
        num_layers: T; None for continuous time.
        corruption: ``"absorbing"`` masks entries, ``"uniform"`` replaces them by random ones, ``"ordinal"`` moves them
            to neighbours, for levels that have an order, and ``"any_order"`` masks one a layer, with T the number of
            entries.
        schedule: probability b(t) that an entry has been replaced; by default t, and in continuous time, where the
            estimates of :class:`~pyro_hvae.bounds.DiffusionELBO` under b = t have no variance, t^2, as for ordinal
            noise, whose standard deviation then grows in proportion to t.

    Raises:
        ValueError: for an ``event_shape`` without sizes or with one below 1, fewer than two categories, T < 1, an
            unknown corruption, or a schedule where there is none.

    References:
        Structured Denoising Diffusion Models in Discrete State-Spaces (Austin et al., 2021); Simplified and Generalized
        Masked Diffusion for Discrete Data (Shi et al., 2024).

    Example:
        >>> from pyro_hvae.nn import TokenMLP
        >>> model, guide = discrete_diffusion(TokenMLP(6, 4), event_shape=6, num_categories=4, num_layers=10)
        >>> model(size=3).shape
        torch.Size([3, 6])
    """
    shape = event_sizes(event_shape)
    if corruption not in NOISES:
        raise ValueError(f"corruption must be one of {', '.join(map(repr, sorted(NOISES)))}; got {corruption!r}.")
    if corruption == "any_order":
        if schedule is not None:
            raise ValueError("corruption='any_order' masks one entry a layer and has no schedule; leave schedule out.")
        noise: Corruption = AnyOrder(num_categories)
    else:
        default = PowerReplacement(2.0 if num_layers is None or corruption == "ordinal" else 1.0)
        noise = NOISES[corruption](num_categories, default if schedule is None else schedule)
    model = DiscreteDenoisingChain(denoiser, event_shape=shape, corruption=noise, num_layers=num_layers)
    return model, DiscreteDiffusion(noise, num_layers, event_dim=len(shape))


def latent_diffusion(
    denoiser: nn.Module,
    *,
    encoder: nn.Module,
    decoder: nn.Module,
    latent_shape: Sequence[int] | int,
    num_layers: int | None,
    schedule: Schedule | None = None,
) -> tuple[TopDown, BottomUp]:
    r"""Return a VAE whose prior is a diffusion: p(z_0) of a denoising chain, p(x|z_0), and q(z_0|x) under its noise.

    The pair is ``TopDown(z0=DenoisingChain(...), x=decoder)`` and ``BottomUp(z0=encoder, noise=Diffusion(...))``, which
    may be written out for other parameterisations, further latents, or noise on categories.
    :class:`~pyro_hvae.bounds.DiffusionELBO` has the bound at a cost without T,

    .. math:: \log p(x) \ge \mathrm E_{q(z_0|x)}\bigl[\log p(x|z_0) - \log q(z_0|x) + \mathrm{DiffusionELBO}(z_0)\bigr].

    Args:
        denoiser: module called with (z, gamma), or (z, gamma, context); it predicts the noise.
        encoder: kernel q(z_0|x), such as ``Gaussian(net)``.
        decoder: kernel p(x|z_0).
        latent_shape: of z_0.
        num_layers: T; None for continuous time.
        schedule: gamma(t); default ``LinearSchedule(-10.0, 5.0)``.

    Raises:
        ValueError: for a ``latent_shape`` without sizes or with one below 1, or T < 1.

    References:
        Score-Based Generative Modeling in Latent Space (Vahdat, Kreis and Kautz, 2021); High-Resolution Image Synthesis
        with Latent Diffusion Models (Rombach et al., 2022).

    Example:
        >>> import torch
        >>> from pyro_hvae.kernels import Bernoulli, Gaussian
        >>> from pyro_hvae.nn import MLP, DenoisingMLP
        >>> _ = torch.manual_seed(0)
        >>> encoder, decoder = Gaussian(MLP(6, 2 * 2)), Bernoulli(MLP(2, 6))
        >>> model, guide = latent_diffusion(
        ...     DenoisingMLP(2), encoder=encoder, decoder=decoder, latent_shape=2, num_layers=3
        ... )
        >>> model.latents, model(size=4).shape
        (('z3', 'z2', 'z1', 'z0'), torch.Size([4, 6]))
    """
    shape = event_sizes(latent_shape)
    noise = LinearSchedule(-10.0, 5.0) if schedule is None else schedule
    chain = DenoisingChain(denoiser, event_shape=shape, schedule=noise, num_layers=num_layers)
    process = Diffusion(noise, num_layers, event_dim=len(shape))
    return TopDown(z0=chain, x=decoder), BottomUp(z0=encoder, noise=process)
