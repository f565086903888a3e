"""Noise levels and the shape of data: one gamma for a datum, or one for each of its entries."""

from __future__ import annotations

from torch import Tensor

from pyro_hvae.diffusion.schedules import Schedule

__all__ = ["broadcast_level", "check_event_shape", "check_one_gamma"]


def broadcast_level(level: Tensor, like: Tensor, event_dim: int, event_shape: tuple[int, ...] = ()) -> Tensor:
    """Reshape a noise level per datum (or one for all) so that it broadcasts against events ``like``.

    Args:
        level: (...), or with a level for each entry (..., *event_shape).
        like: events, (..., *event).
        event_dim: dims of one datum.
        event_shape: that of the schedule.

    Raises:
        ValueError: for a level for each entry of another shape than the data.
    """
    if not event_shape:
        return level.reshape(level.shape + (1,) * event_dim) if level.dim() else level
    shapes = (tuple(each.shape[each.dim() - len(event_shape) :]) for each in (level, like))
    if any(shape != event_shape for shape in shapes):
        raise ValueError(
            f"a schedule with event_shape={event_shape} must return gamma of shape (..., *event_shape) for data of "
            f"that shape; got gamma of shape {tuple(level.shape)} and data of shape {tuple(like.shape)}"
        )
    return level


def check_event_shape(schedule: Schedule, event_dim: int, event_shape: tuple[int, ...] | None = None) -> None:
    """Refuse a schedule whose gammas are of another shape than the data.

    Raises:
        ValueError: with both shapes.
    """
    shape = schedule.event_shape
    if shape and (len(shape) != event_dim or (event_shape is not None and shape != event_shape)):
        data = f"event_dim={event_dim}" if event_shape is None else f"event_shape={event_shape}"
        raise ValueError(
            f"the schedule has a gamma for each entry of data of shape {shape}, and the diffusion has {data}: give "
            "both one shape, or a schedule with one gamma"
        )


def check_one_gamma(schedule: Schedule, what: str, instead: str) -> None:
    """Refuse a schedule with a gamma for each entry.

    Raises:
        ValueError: naming what needs one gamma, and what to do instead.
    """
    if schedule.event_shape:
        raise ValueError(
            f"{what} follows one noise level, and the schedule {schedule!r} has one for each entry of data of shape "
            f"{schedule.event_shape}: {instead}"
        )
