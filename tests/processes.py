"""Actions in processes of their own.

A fork of a process that has threads may hang, and Python warns of it.  These processes are forks of a server that has
one thread and has imported what takes long; actions are pickled, so they are functions of a module, or partials of one.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
FAILED = 70
"""How a process ends after an exception."""
LIMIT = 180.0
"""Seconds after which two processes that talk to one another are taken to hang."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pyro_hvae.models", "pyro_hvae.training", "lightning_fabric.strategies"])


def start(action, *, environment=None, stderr=None):
    """Start ``action()``; returns a process with ``pid``, ``join`` and ``exitcode``, negative for a signal.

    Args:
        environment: variables of the process.
        stderr: a file that gets its standard error.
    """
    process = _context.Process(
        target=_perform, args=(action, torch.get_default_dtype(), environment or {}, stderr), daemon=True
    )
    before = dict(os.environ)
    try:  # for the server, which is started with the first process
        os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [before.get("PYTHONPATH")])])
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return process


def in_a_process(action, **options):
    """How ``action()`` ended: 0, its exit code, 70 for an exception, negative for a signal."""
    process = start(action, **options)
    process.join()
    return process.exitcode


def start_ranks(action, folder=None, count=2, fabric=True):
    """Start ``action(fabric)`` on processes that talk by gloo.

    Args:
        folder: gets the standard error of each, as ``stderr-0``, ...
        fabric: False for an action without argument.

    Returns:
        The processes, in order of rank.
    """
    port = str(free_port())
    variables = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    return [
        start(
            _Rank(action, count) if fabric else action,
            environment={**variables, "LOCAL_RANK": str(rank)},
            stderr=None if folder is None else folder / f"stderr-{rank}",
        )
        for rank in range(count)
    ]


def in_two_ranks(action, fabric=True):
    """Run ``action(fabric)`` on two processes that talk by gloo, and see that both end well."""
    ranks = start_ranks(action, fabric=fabric)
    end = time.monotonic() + LIMIT
    for process in ranks:
        process.join(max(end - time.monotonic(), 0.0))
    late = [process for process in ranks if process.is_alive()]
    for process in late:
        process.kill()
    assert not late, f"{len(late)} of the processes did not end within {LIMIT:g} s"
    assert [process.exitcode for process in ranks] == [0, 0]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class _Rank:
    def __init__(self, action, count):
        self.action, self.count = action, count

    def __call__(self):
        import warnings

        import lightning_fabric
        from lightning_fabric.strategies import DDPStrategy

        warnings.simplefilter("ignore")
        strategy = DDPStrategy(process_group_backend="gloo")
        fabric = lightning_fabric.Fabric(accelerator="cpu", devices=self.count, strategy=strategy)
        fabric.launch()
        fabric.barrier()  # a process that ends while another still connects would fail it
        self.action(fabric)


def _perform(action, dtype, environment, stderr):
    os.environ.update(environment)
    if stderr is not None:
        file = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 2)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(1)
    try:
        action()
    except Exception:
        traceback.print_exc(file=sys.__stderr__)
        sys.__stderr__.flush()
        os._exit(FAILED)
