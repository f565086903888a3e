"""The command line: ``pyro-hvae demo | fit | evaluate | sample | diagnose``.

Every verb is a function of :mod:`pyro_hvae.cli.verbs`; its arguments become flags, and entries of a YAML file
(``--config``). An invalid input gives one line on standard error and exit code 2; with ``--debug`` anywhere on
the line, the traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after the program's name; those of the process by default.

    Returns:
        Exit code: 0, or 2 for an input that can't be used.
    """
    from argparse import ArgumentError

    from pyro_hvae.cli import verbs

    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    verb_name = next((word for word in words if not word.startswith("-")), "")
    program = f"pyro-hvae {verb_name}" if verb_name in verbs.__all__ else "pyro-hvae"
    try:
        words = _prepared(words, verb_name)
        parser = _parser(verbs)
        namespace = parser.instantiate(parser.parse_args(words))
        arguments = dict(namespace[namespace.verb])
        arguments.pop("config", None)
        getattr(verbs, namespace.verb)(**arguments)
    except ArgumentError as error:
        if debug:
            raise
        print(f"{program}: {' '.join(str(error).split())} ({program} --help lists the arguments)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyro-hvae: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"{program}: {_told(error)}", file=sys.stderr)
        return 2
    return 0


def _parser(verbs: Any) -> Any:
    from jsonargparse import ArgumentParser

    import pyro_hvae

    parser = ArgumentParser(
        prog="pyro-hvae",
        exit_on_error=False,
        version=pyro_hvae.__version__,
        description="Variational auto-encoders, hierarchical VAEs and diffusion models as Pyro programs. "
        "--debug, anywhere, shows the traceback of an error.",
    )
    commands = parser.add_subcommands(title="verbs", metavar="VERB", dest="verb")
    for name in verbs.__all__:
        verb = getattr(verbs, name)
        summary = (verb.__doc__ or "").split("\n", 1)[0]
        command = ArgumentParser(description=summary, exit_on_error=False)
        command.add_argument("--config", action="config", help="YAML file with any of these arguments.")
        command.add_function_arguments(verb, as_positional=True)
        commands.add_subcommand(name, command, help=summary)
    return parser


def _prepared(words: list[str], verb_name: str) -> list[str]:
    """Return the words as jsonargparse takes them, after a check of what a YAML file names.

    Raises:
        ValueError: for an unknown verb, flag, bound or optimiser, with the nearest name.
    """
    from pyro_hvae.cli import verbs
    from pyro_hvae.cli.words import check_config, flags_of, prepare, suggest

    if not verb_name:
        return words
    if verb_name not in verbs.__all__:
        near = suggest(verb_name, verbs.__all__)
        raise ValueError(f"there is no verb {verb_name!r}{near}; there are {', '.join(verbs.__all__)}")
    verb = getattr(verbs, verb_name)
    words = prepare(words, flags_of(verb, *([] if verb_name in ("fit", "demo") else [verbs._load_pair])))
    check_classes(words)
    trust = any(word == "--trust" and follows.lower() in ("true", "yes") for word, follows in pairwise([*words, ""]))
    check_config(words, trust or "--trust=true" in words)
    return words


def check_classes(words: Sequence[str]) -> None:
    """Refuse a short name of a bound or an optimiser that is none.

    Raises:
        ValueError: with the nearest name.
    """
    import torch

    from pyro_hvae import bounds
    from pyro_hvae.bounds.base import Objective
    from pyro_hvae.cli.words import suggest

    known = {"bound": (bounds, Objective), "optimizer": (torch.optim, torch.optim.Optimizer)}
    for word, following in pairwise([*words, ""]):
        name, equals, value = word.removeprefix("--").partition("=")
        value = value if equals else following
        if not word.startswith("--") or name not in known or not value.isidentifier() or value == "null":
            continue
        module, base = known[name]
        names = [key for key, kind in vars(module).items() if isinstance(kind, type) and issubclass(kind, base)]
        if value not in names:
            names = [key for key in names if not key.startswith("_") and key != base.__name__]
            near, others = suggest(value, names), ", ".join(sorted(names))
            raise ValueError(f"there is no {name} {value!r}{near}; there are {others}")


def _told(error: Exception) -> str:
    """Return one line for an error; for one that a user's file raised, with file and line."""
    from pyro_hvae.cli.specs import place_of

    text = " ".join(str(error).split()) or type(error).__name__
    place = place_of(error)
    if isinstance(error, (ValueError, TypeError, ArithmeticError, ImportError, OSError, RuntimeError)) and not place:
        return text
    where = f"{place}: " if place else ""
    hint = "" if place else " (--debug shows where)"
    return f"{where}{type(error).__name__}: {text}{hint}"
