"""A guide made from a model: :func:`amortize`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import pyro
import pyro.poutine as poutine
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_hvae.amortized.encoder import Encoder, Shown, groups_of
from pyro_hvae.amortized.families import CustomHead, make_head
from pyro_hvae.amortized.inputs import Input, along, covariate_input, input_of
from pyro_hvae.amortized.inverse import Inverse, invert_model
from pyro_hvae.amortized.look import InPlates, Seen, look
from pyro_hvae.amortized.reading import ModelReading, predictive_draws, read_model, tensors_of
from pyro_hvae.problem.isolation import isolated
from pyro_hvae.problem.plates import batch_shape_of

__all__ = ["AmortizedGuide", "Conditional", "HasInverse", "amortize"]

Program = Callable[..., Any]


@runtime_checkable
class HasInverse(Protocol):
    """A model that has an inverse of its own: a guide, or None where it has not."""

    def amortized(self, *args: Any, hidden: Sequence[int], **kwargs: Any) -> Any: ...


class Conditional(nn.Module):
    """q(z | inputs) of one latent: an encoder and a family.

    Args:
        head: the family.
        encoder: the network; its outputs are the family's, or features of it.
        inputs: names of what it is shown.
        free: sizes along the plates, for a latent whose elements have parameters of their own; else None.
    """

    def __init__(self, head: Any, encoder: Encoder, inputs: Sequence[str], free: tuple[int, ...] | None) -> None:
        super().__init__()
        self.head, self.encoder = head, encoder
        self.inputs, self.free = tuple(inputs), free

    def forward(self, shown: Mapping[str, Shown], seen: Seen) -> Any:
        """Return the distribution, in the shape of the plates of this call."""
        shape = batch_shape_of(seen.plates)
        if self.free is not None and shape != self.free:
            raise ValueError(
                f"site '{seen.name}' has parameters of its own for {self.free} elements along its plates, and the "
                f"model has {shape} of them with these arguments: make a guide for these, or put the data of its "
                "elements into its plates, so that they can be encoded"
            )
        outputs = self.encoder(shown)
        batch = torch.broadcast_shapes(outputs.shape[:-1], shape)
        while len(batch) > len(shape) and batch[0] == 1:
            batch = batch[1:]
        outputs = outputs.reshape(outputs.shape[-len(batch) - 1 :] if outputs.dim() > len(batch) + 1 else outputs.shape)
        return self.head(outputs.expand(*batch, outputs.shape[-1]), seen.fn)


class AmortizedGuide(PyroModule):
    """A guide made from a model by :func:`amortize`.

    Attributes:
        inverse: what each latent is drawn given, and why; ``print`` it.
    """

    def __init__(self, model: Program, inverse: Inverse, guides: Sequence[Program], name: str = "guide") -> None:
        super().__init__(name)
        self._held = (model, *(guide for guide in guides if not isinstance(guide, nn.Module)))
        self.inverse = inverse
        self._others = tuple(guides)
        for number, other in enumerate(guides):
            if isinstance(other, nn.Module):
                setattr(self, f"given{number}", other)
        self._others_names = tuple(
            f"given{number}" if isinstance(other, nn.Module) else None for number, other in enumerate(guides)
        )
        self._keys = {node: f"input{number}" for number, node in enumerate(inverse.nodes)}
        self._sites = {site: f"site{number}" for number, site in enumerate(inverse.drawn)}

    @property
    def model(self) -> Program:
        """The model; its parameters are not the guide's."""
        return self._held[0]

    def conditional(self, site: str) -> Conditional:
        """Return the module of a latent."""
        return getattr(self, self._sites[site])

    def input(self, node: str) -> Input:
        return getattr(self, self._keys[node])

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters())
        return f"AmortizedGuide({', '.join(self._sites)}; {count} parameters)"

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        sites = look(self.model, args, kwargs)
        self._check(sites)
        values: dict[str, Tensor] = {}
        for number, other in enumerate(self._others):
            program = getattr(self, f"given{number}") if isinstance(other, nn.Module) else other
            with _Drawn() as drawn:
                program(*args, **kwargs)
            values.update(drawn.values)
        shown = _Inputs(self, sites, tensors_of(args, kwargs), values)
        for site in self._sites:
            conditional, seen = self.conditional(site), sites[site]
            distribution = conditional(shown.of(conditional.inputs), seen)
            masked = nullcontext() if seen.mask is None else poutine.mask(mask=seen.mask)
            with masked, InPlates(seen.frames):
                values[site] = pyro.sample(site, distribution, infer=dict(conditional.head.infer or {}))
        return values

    def _check(self, sites: Mapping[str, Seen]) -> None:
        kinds = {name: seen.kind for name, seen in sites.items()}
        if kinds == self.inverse.kinds:
            return
        differing = sorted(
            name for name in {*kinds, *self.inverse.kinds} if kinds.get(name) != self.inverse.kinds.get(name)
        )
        before = {name: self.inverse.kinds.get(name, "absent") for name in differing}
        now = {name: kinds.get(name, "absent") for name in differing}
        raise ValueError(
            f"the model has other sites with these arguments than in the example that the guide was made from: {now}, "
            f"where the example had {before}. Make a guide for each kind of data, or mask what is missing"
        )


class _Drawn(Messenger):
    """Record what a program draws."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            self.values[msg["name"]] = msg["value"]


class _Inputs:
    """Inputs of one call, each computed once."""

    def __init__(
        self, guide: AmortizedGuide, sites: Mapping[str, Seen], arguments: list[Any], values: dict[str, Tensor]
    ) -> None:
        self.guide, self.sites, self.arguments, self.values = guide, sites, arguments, values
        self.known: dict[str, Shown] = {}

    def of(self, names: Sequence[str]) -> dict[str, Shown]:
        return {name: self.known[name] if name in self.known else self._show(name) for name in names}

    def _show(self, name: str) -> Shown:
        encode = self.guide.input(name)
        if name in self.guide.inverse.covariates:
            position, plates = self.guide.inverse.covariates[name]
            result = Shown(encode(along(self.arguments[position], plates)), None)
        else:
            seen = self.sites[name]
            value = self.values[name] if seen.kind == "latent" else seen.value
            result = Shown(encode(value, seen.fn, seen.mask, seen.entries), seen.mask)
        self.known[name] = result
        return result


def amortize(
    model: Program,
    *args: Any,
    hidden: Sequence[int] = (64, 64),
    families: Mapping[str, Any] | None = None,
    guides: Sequence[Program] = (),
    leave_out: Sequence[str] = (),
    merge: Sequence[Sequence[str]] = (),
    pooled: bool = False,
    **kwargs: Any,
) -> Any:
    r"""Make a guide from a model: trained once, it answers for new data.

    .. math:: q(z \mid x) = \prod_i q\bigl(z_i \mid \text{boundary of } z_i\bigr)

    The factors are a faithful inverse of the model's graph: each latent is drawn given the smallest set of data,
    covariates and latents drawn before it that separates it from all others.  A latent inside of the plates of the
    data gets an encoder, which all elements of its plates share; inputs in further plates are pooled.  A latent of the
    whole data set has parameters of its own.  ``print(guide.inverse)`` shows all this, with reasons.

    The model is run at each call of the guide for the values, masks and plates of its sites, with stand-ins for
    its latents; its parameters are not the guide's.

    Args:
        model: a Pyro program.  What it observes and conditions on must be among its arguments, for new data.
        args, kwargs: example data of the model; they standardise the inputs.
        hidden: widths of hidden layers; ``()`` for encoders that are linear.
        families: by site, a Gaussian on the real line, mapped onto the support: ``"full"`` (the default of real latents
            of up to 40 dims), ``"skewed"`` (of full covariance and bent to a side, the default of latents with another
            support), ``"low_rank"`` (the default above 40 dims) or ``"diagonal"``; a function from the widths of
            features and event to a module that maps features to a distribution of so many real numbers, as a flow; for
            discrete sites ``"logits"`` (the default), or ``"enumerate"`` to sum over their values in the guide.
        guides: programs of yours, which take the model's arguments and draw some of the latents, before all others.
        leave_out: latents that another program draws; this guide neither draws nor sees them.
        merge: groups of latents of the same plates that are drawn jointly, with the inputs of all of them.
        pooled: latents of the whole data set get encoders of the pooled data too, for training on simulated data.

    Returns:
        A module that takes the model's arguments, and draws its latents.  For a :class:`~pyro_hvae.TopDown` chain
        whose latents are real vectors, and without other options than ``hidden``, it is the
        :class:`~pyro_hvae.BottomUp` chain of Gaussian kernels, which has no ``inverse`` to print.

    Raises:
        ValueError: for a model that can't be inverted: without latents or observations, with an improper prior, with
            sites or supports that change from draw to draw; for unknown sites.

    Reference:
        Faithful Inversion of Generative Models for Effective Amortized Inference (Webb et al., 2018).

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_hvae.bounds import TraceELBO
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(mean, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.tensor([0.5, -1.0, 2.0])
        >>> guide = amortize(model, x)
        >>> print(guide.inverse)
        mean  Gaussian, parameters of its own
        z     Gaussian, encoder of mean, x
                mean: parent
                x: child
        >>> {site: tuple(value.shape) for site, value in guide(torch.zeros(5)).items()}
        {'mean': (), 'z': (5,)}
    """
    if not callable(model):
        raise TypeError(f"the model must be a Pyro program, a function or module, got {model!r}")
    hidden = tuple(hidden)
    if isinstance(model, HasInverse) and not (families or guides or leave_out or merge or pooled):
        own = model.amortized(*args, hidden=hidden, **kwargs)
        if own is not None:
            return own
    reading = read_model(model, args, kwargs)
    first = _sites_of(guides, reading, args, kwargs)
    inverse = invert_model(reading, first=first, leave_out=leave_out, merge=merge, pooled=pooled)
    _check_families(families or {}, inverse)
    guide = AmortizedGuide(model, inverse, guides)
    like = _like(reading)
    simulated = predictive_draws(model, args, kwargs) if pooled else {}
    arguments = tensors_of(args, kwargs)
    for node in inverse.nodes:
        setattr(guide, guide._keys[node], _input(node, reading, arguments, simulated, linear=not hidden))
    for site in inverse.drawn:
        head = make_head(site, reading.sites[site].fn, (families or {}).get(site), reading.draws[site])
        setattr(guide, guide._sites[site], _conditional(guide, site, head, reading, hidden))
        inverse.families[site] = repr(head)
    guide.to(like)
    with isolated(model), torch.no_grad(), pyro.validation_enabled(False):
        guide(*args, **kwargs)
    for module in guide.modules():
        if isinstance(module, Encoder):
            module.calibrated = True
    return guide


def _conditional(
    guide: AmortizedGuide, site: str, head: Any, reading: ModelReading, hidden: tuple[int, ...]
) -> Conditional:
    inverse, seen = guide.inverse, reading.sites[site]
    inputs = inverse.inputs[site]
    free = batch_shape_of(seen.plates) if inverse.how[site] == "free" else None
    batch = batch_shape_of(seen.plates) if inverse.how[site] in ("free", "pooled") else ()
    groups = groups_of({name: guide.input(name).plates for name in inputs}, seen.plates)
    widths = {name: guide.input(name).width for name in inputs}
    if head.wants_features:
        outputs = hidden[-1] if hidden else max(1, sum(widths.values()))
        encoder = Encoder(groups, widths, outputs, hidden, batch)
        assert isinstance(head, CustomHead)
        head.build(outputs)
        if encoder.body is not None:
            encoder.body[-1].reset_parameters()  # type: ignore[operator]
    else:
        encoder = Encoder(groups, widths, head.outputs, hidden, batch)
    return Conditional(head, encoder, inputs, free)


def _input(
    node: str, reading: ModelReading, arguments: list[Any], simulated: Mapping[str, Tensor], *, linear: bool
) -> Input:
    if node in reading.covariates:
        position, plates = reading.covariates[node]
        laid = along(arguments[position], plates)
        made = covariate_input(arguments[position], plates, linear=linear)
        made.center = made.center.to(torch.get_default_dtype())
        made.standardise(made.columns(laid), None)
        return made
    seen = reading.sites[node]
    made = input_of(seen, linear=linear)
    if seen.kind == "latent":
        made.standardise(made.columns(reading.draws[node], seen.fn), None)
        made.masked = seen.mask is not None and seen.mask.numel() > 1
    else:
        values = simulated.get(node, seen.value)
        mask = None if seen.mask is None else seen.mask.expand(values.shape[: values.dim() - seen.fn.event_dim])
        made.standardise(made.columns(values), mask)
    return made


def _like(reading: ModelReading) -> Tensor:
    """Return a number of the dtype and device of the data."""
    for seen in reading.sites.values():
        if isinstance(seen.value, Tensor) and seen.value.is_floating_point() and seen.kind == "observed":
            return seen.value.new_zeros(())
    for draws in reading.draws.values():
        if draws.is_floating_point():
            return draws.new_zeros(())
    return torch.zeros(())


def _sites_of(guides: Sequence[Program], reading: ModelReading, args: tuple, kwargs: Mapping[str, Any]) -> list[str]:
    """Return the latents that the user's programs draw."""
    names: list[str] = []
    for guide in guides:
        with isolated(guide), pyro.validation_enabled(False), torch.no_grad(), _Drawn() as drawn:
            guide(*args, **kwargs)
        unknown = sorted(set(drawn.values) - set(reading.names("latent")))
        if unknown or not drawn.values:
            raise ValueError(
                f"a program of guides= draws {sorted(drawn.values)}, and the model's latents are "
                f"{reading.names('latent')}: each program must draw some of these, and nothing else"
            )
        names += drawn.values
    return names


def _check_families(families: Mapping[str, Any], inverse: Inverse) -> None:
    unknown = sorted(set(families) - set(inverse.drawn))
    if unknown:
        raise ValueError(f"families names {unknown}, and this guide draws {list(inverse.drawn)}")
