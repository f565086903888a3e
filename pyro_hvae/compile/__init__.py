r"""From a Pyro program to one compiled training step.

A step of training runs two Pyro programs, which costs .6-.8 ms and .3-.4 ms more a latent site before a number is
computed; their tensor operations are the same at every step.  So they are written down once: running loss and
gradient of ``bound(model, guide)`` under a tracer gives a flat graph of tensor operations, in which every effect
handler, plate and parameter store has vanished and random draws remain operations.  The update of the optimiser is
appended, and the whole is compiled,

.. math:: (\theta, m, v, t) \mapsto \text{loss},\ (\theta', m', v', t+1) \quad\text{in place}.
"""

from pyro_hvae.compile.graph import FlatGraph, NotTraceable, trace
from pyro_hvae.compile.program import CompileMismatchError
from pyro_hvae.compile.step import CompiledStep, CompileWarning, compile_step

__all__ = [
    "CompileMismatchError",
    "CompileWarning",
    "CompiledStep",
    "FlatGraph",
    "NotTraceable",
    "compile_step",
    "trace",
]
