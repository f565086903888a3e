"""Variational auto-encoders, Markovian hierarchical VAEs and variational diffusion models as Pyro programs."""

__version__ = "0.1.0"
