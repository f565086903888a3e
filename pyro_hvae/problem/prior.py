"""The model's own prior as a guide."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pyro.poutine.block_messenger import BlockMessenger
from torch.distributions import Independent

__all__ = ["no_latents", "prior_guide"]

Program = Callable[..., Any]


def no_latents(*args: Any, **kwargs: Any) -> None:
    """Guide that draws nothing."""


def prior_guide(model: Program) -> Program:
    """Return a guide that draws the model's latents from their prior; enumerated ones are drawn too.

    Raises:
        ValueError: when it is run, for a latent that can't be drawn, as under an improper prior.
    """
    return partial(_run_prior, model)  # handlers that wrap a program take its keyword "context" for their own


def _run_prior(model: Program, /, *args: Any, **kwargs: Any) -> Any:
    with _Prior():
        return model(*args, **kwargs)


class _Prior(BlockMessenger):
    """Hide observed and summed-out sites, and name the latent that the prior can't draw."""

    def __init__(self) -> None:
        super().__init__(hide_fn=_hidden)
        self.last: Any = None

    def _process_message(self, msg: Any) -> None:
        super()._process_message(msg)
        if msg["type"] == "sample" and not msg["is_observed"]:
            self.last = msg["name"], msg["fn"]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        last, self.last = self.last, None
        super().__exit__(kind, error, trace)
        if isinstance(error, NotImplementedError) and last is not None:
            name, fn = last
            while isinstance(fn, Independent):
                fn = fn.base_dist
            raise ValueError(
                f"site '{name}' can't be drawn from its prior ({type(fn).__name__}): {str(error).splitlines()[0]}. "
                "Draw from a guide instead, or give the site a proper prior"
            ) from error


def _hidden(msg: Any) -> bool:
    if msg["type"] != "sample":
        return False
    return bool(msg["is_observed"]) or (msg["infer"] or {}).get("enumerate") in ("parallel", "sequential")
