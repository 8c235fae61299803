"""Entry point of the ``adaattn`` command."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from adaattn_core import __version__
from adaattn_core.cli.backends import backends
from adaattn_core.cli.demo import demo
from adaattn_core.cli.doctor import doctor
from adaattn_core.cli.explain import explain
from adaattn_core.cli.options import in_flags
from adaattn_core.cli.run import run
from adaattn_core.cli.warmup import warmup
from adaattn_core.errors import AdaAttnError, ArgumentError, FileError
from adaattn_core.plugins.registry import default_registry

EXIT_BAD_INPUT = 2
EXIT_BUG = 70
"""EX_SOFTWARE of sysexits.h."""
EXIT_SIGNAL = 128
"""Plus the number of the signal that ended the command, as shells count."""
TRACEBACK_VARIABLE = "ADAATTN_TRACEBACK"


def build_app() -> typer.Typer:
    """Return the command line with the built-in commands and those of every plugin."""
    app = typer.Typer(
        name="adaattn",
        help="Attention computed to a stated tolerance, with a certificate of its error.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback(invoke_without_command=True)(_root)
    for command in (demo, run, explain, backends, doctor, warmup):
        app.command()(command)
    default_registry().add_commands(app)
    return app


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a mendable error ends in three lines and exit code 2.

    SIGTERM and SIGHUP unwind the command, so that no temporary file stays; a reader that
    leaves (``| head``) ends it quietly.
    """
    try:
        with _unwinding_signals():
            _check_output()
            code = _run(arguments)
            sys.stdout.flush()
    except AdaAttnError as error:
        _fail(error)
    except typer.TyperException as error:
        _fail(
            ArgumentError(
                got=" ".join(error.format_message().split()),
                needed="a command and options that `adaattn --help` lists",
                do="see `adaattn --help`, or --help after the command",
            )
        )
    except (KeyboardInterrupt, typer.Abort):
        _leave(EXIT_SIGNAL + signal.SIGINT)
    except BrokenPipeError:
        _leave(EXIT_SIGNAL + 13)  # SIGPIPE, which not every system has
    except OSError as error:
        _fail(
            FileError(
                got=f"{error.filename or 'a file'}: {error.strerror or error}",
                needed="a file system that can be read and written there",
                do="check permissions and free space",
            )
        )
    except MemoryError as error:
        _fail(
            ArgumentError(
                got=f"not enough memory: {error or 'allocation failed'}",
                needed="a problem that fits into memory",
                do="run fewer heads or batch entries at a time",
            )
        )
    except Exception as error:  # a bug of ours or of a plugin: say so, and how to see where
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        bug = AdaAttnError(
            got=f"an internal error, {type(error).__name__}: {' '.join(str(error).split())}",
            needed="no error at all: this is a bug, not your input",
            do=f"report it with the output of {TRACEBACK_VARIABLE}=1 adaattn ...",
        )
        _fail(bug, EXIT_BUG)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _run(arguments: Sequence[str] | None) -> Any:
    try:
        return build_app()(args=arguments, prog_name="adaattn", standalone_mode=False)
    except SystemExit as stop:
        if stop.code == 1:  # typer's own answer to a pipe that nobody reads
            raise BrokenPipeError from stop
        raise


@contextmanager
def _unwinding_signals() -> Iterator[None]:
    """Let signals that end a process do so by way of every ``finally`` and ``except``."""
    names = ("SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    try:
        before = {number: signal.signal(number, _unwind) for number in numbers}
    except ValueError:  # not on the main thread: whoever runs us there handles signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _unwind(number: int, frame: Any) -> NoReturn:
    raise SystemExit(EXIT_SIGNAL + number)


def _check_output() -> None:
    """Refuse a closed standard output before any work; print every character somehow."""
    if sys.stdout is None:
        raise FileError(
            got="standard output: closed",
            needed="somewhere to print the result",
            do="send it to a file, or to /dev/null if nobody reads it",
        )
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _fail(error: AdaAttnError, code: int = EXIT_BAD_INPUT) -> NoReturn:
    if sys.stderr is not None:
        sys.stderr.write(f"{in_flags(str(error))}\n")
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process; what is still buffered for a broken standard output is given up."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
