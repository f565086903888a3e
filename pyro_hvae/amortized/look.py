"""Run a model for its observed values, masks and plates, with stand-ins for its latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_hvae.modules import evaluation_mode
from pyro_hvae.problem import Plate
from pyro_hvae.problem.isolation import kept_buffers, modules_of
from pyro_hvae.problem.structure import is_deterministic, is_enumerated, is_factor, plates_of

__all__ = ["InPlates", "Seen", "look"]


@dataclass(frozen=True)
class Seen:
    """A site of the model in one call.

    Attributes:
        kind: ``"latent"``, ``"observed"``, ``"factor"``, or ``"summed out"`` for latents that the model enumerates.
        value: observed, or a stand-in.
        fn: the distribution, for latents computed from stand-ins.
        mask: True where the site counts, of batch shape; None for no mask.
        entries: True where an entry of an event counts, of the value's shape; None for no such mask.
        frames: Pyro's frames of the plates.
    """

    name: str
    kind: str
    value: Tensor
    fn: Any
    mask: Tensor | None
    entries: Tensor | None
    frames: tuple[Any, ...]

    @property
    def plates(self) -> tuple[Plate, ...]:
        return plates_of({"cond_indep_stack": self.frames})


def look(model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Seen]:
    """Return the sites of a model by name; nothing is drawn but subsample indices.

    Outer handlers see the subsample indices alone, so that a replay of the model takes the same minibatch.
    """
    recorder = _StandIns()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if modules_of(model):
            stack.enter_context(evaluation_mode(model))
            stack.enter_context(kept_buffers(model))
        stack.enter_context(BlockMessenger(hide_fn=_hidden))
        stack.enter_context(recorder)
        model(*args, **kwargs)
    return recorder.sites


def _hidden(msg: Any) -> bool:
    return not (msg["type"] == "sample" and site_is_subsample(msg))


class _StandIns(Messenger):
    """Give latents a value of their support, and record all sites."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, Seen] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not (msg["is_observed"] or msg["done"] or site_is_subsample(msg)):
            msg["value"], msg["done"] = _stand_in(msg["fn"]), True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or is_deterministic(msg):
            return
        if is_factor(msg):
            kind = "factor"
        elif msg["is_observed"]:
            kind = "observed"
        else:
            kind = "summed out" if is_enumerated(msg) else "latent"
        name = msg["name"]
        self.sites[name] = Seen(name, kind, msg["value"], msg["fn"], *_masks(msg), tuple(msg["cond_indep_stack"]))


def _stand_in(fn: Any) -> Tensor:
    support = fn.support
    try:
        if support.is_discrete:
            return fn.enumerate_support(expand=True)[0]
        transform = biject_to(support)
        return transform(torch.zeros(transform.inverse_shape(fn.shape())))
    except (NotImplementedError, RuntimeError, ValueError):
        return fn.sample()


def _masks(site: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the masks of a site and of single entries of its events, those of its distribution included."""
    mask, entries, fn = site["mask"], None, site["fn"]
    rank = len(fn.batch_shape)
    while hasattr(fn, "base_dist"):
        if type(fn).__name__ == "MaskedDistribution":
            own = torch.as_tensor(fn._mask)
            if len(fn.batch_shape) > rank:
                entries = own if entries is None else entries & own
            else:
                mask = own if mask is None else torch.as_tensor(mask) & own
        fn = fn.base_dist
    return None if mask is None else torch.as_tensor(mask), entries


class InPlates(Messenger):
    """Put sites into plates that another program has opened."""

    def __init__(self, frames: tuple[Any, ...]) -> None:
        super().__init__()
        self.frames = frames

    def _pyro_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"] = self.frames + msg["cond_indep_stack"]
        BroadcastMessenger._pyro_sample(msg)
        for plate in plates_of({"cond_indep_stack": self.frames}):
            if plate.subsampled:
                msg["scale"] = msg["scale"] * plate.scale
