"""The command line: ``pyro-hvae demo | fit | evaluate | sample | diagnose``.

Every verb is a function of :mod:`pyro_hvae.cli.verbs`; its arguments become flags, and entries of a YAML file
(``--config``). An invalid input gives one line on standard error and exit code 2; with ``--debug`` anywhere on
the line, the traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after the program's name; those of the process by default.

    Returns:
        Exit code: 0, or 2 for an input that can't be used.
    """
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    import pyro_hvae
    from pyro_hvae.cli import verbs

    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
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
    program = next((f"pyro-hvae {word}" for word in words if word in verbs.__all__), "pyro-hvae")
    try:
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
    except (ValueError, TypeError, ArithmeticError, ImportError, OSError) as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{program}: {text}", file=sys.stderr)
        return 2
    return 0
