"""`vaepp-run`: reads the command line, and turns errors into messages and exit codes.

Exit codes: 0, 1 where the run failed, 2 for the user's mistake, 128 + signal where a signal ended it. A fault
of vaepp's own shows its traceback.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TextIO

import vaepp_sdk
from vaepp_sdk.cli.streams import let_go, open_missing
from vaepp_sdk.errors import RunError, VaeppError, VaeppWarning
from vaepp_sdk.runtime.inplace import end_with_launcher
from vaepp_sdk.runtime.leaving import GRACE, leave_soon
from vaepp_sdk.runtime.strays import MARK, end_job
from vaepp_sdk.runtime.voice import complain, first_to_say, tell
from vaepp_sdk.text import reason_of

__all__ = ["entry_point", "main"]


_ALONE = {
    "--plugins": (
        ("a spec", "--set", "--prompts", "--resume", "--check", "--quiet", "--schema"),
        "it lists what is installed",
    ),
    "--schema": (
        ("a spec", "--set", "--prompts", "--resume", "--check", "--quiet"),
        "every spec has the same schema",
    ),
    "--resume": (("a spec", "--prompts", "--check"), "the run's folder holds the spec"),
    "--check": (("--quiet",), "it draws no progress, and what it prints is what was asked for"),
}
"""What an argument does not go together with, because it would have no effect, and why."""


_STRAYS_GRACE = 2.0
"""How long this process waits for what plugins started in it, in seconds, once it has killed it."""


class _SignalledError(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def entry_point() -> None:
    """The console script."""
    open_missing()
    job = f"{os.getpid()} since {time.monotonic_ns()}"
    if "RANK" in os.environ:
        end_with_launcher()
        os.environ[MARK] = job  # for what plugins start: the ranks of a pool have a mark of their own
        # Where a rank is gone, torch's store prints a C++ stack for each try to reach it.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = main(sys.argv[1:])
    let_go(sys.stdout)
    let_go(sys.stderr)
    if "RANK" in os.environ:
        end_job(job, {}, _STRAYS_GRACE)
    if "RANK" in os.environ and code:
        # Under a launcher the other ranks may be gone: finalizers could wait for them.
        os._exit(code)
    gc.freeze()  # plugins may have brought torch along: searching all of it for cycles takes a second
    leave_soon(code, _tell_what_lingers)
    sys.exit(code)


def main(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    with _signals_raise(), _exits_raise(), _warnings_in_one_line():
        try:
            code: int = _command(options)
            sys.stdout.flush()
        except VaeppError as error:
            tell(str(error), *getattr(error, "__notes__", ()))
            return error.exit_code
        except BrokenPipeError:  # whoever read our output has gone
            return 128 + signal.SIGPIPE
        except OSError:
            full = let_go(sys.stdout, "\n")  # an unbuffered stream holds nothing that would fail again
            if full is None:
                raise
            complain(f"the results cannot be printed: {reason_of(full)}; what was saved stays")
            return 1
        except KeyboardInterrupt as error:
            _tell_end("SIGINT", error)
            return 128 + signal.SIGINT
        except _SignalledError as error:
            _tell_end(str(error), error)
            return 128 + error.number
    return code


def _tell_end(signal_name: str, error: BaseException) -> None:
    """Say that a signal ended this process where that is news: under a launcher, or with latents kept."""
    joined, notes = "RANK" in os.environ, getattr(error, "__notes__", ())
    if (joined or notes) and first_to_say(signal_name):
        why = ", as launchers do when another rank or node has failed" if joined else ""
        complain(f"ended by {signal_name}{why}", *notes)


def _tell_what_lingers(what: str) -> None:
    """Say what a plugin has left in this process."""
    tell(f"warning: the run is over, but {what} kept vaepp-run alive; ended after {GRACE:g} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vaepp-run",
        description="Run a diffusion pipeline on several ranks, the VAE's work included.",
        allow_abbrev=False,
    )
    parser.add_argument("spec", nargs="?", help="the pipeline spec, a TOML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help='override one key of the spec, as in parallel.tensor_parallel_size=2 or call.prompt="a cat"',
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='serve one request for each line of this file, a JSON object such as {"prompt": "a cat", '
        '"seed": 7} whose values replace those of [call]',
    )
    parser.add_argument(
        "--resume",
        metavar="FOLDER",
        help="decode the latents that a run has kept, as in out/run-7, and denoise nothing; --set may change "
        "how the VAE works and how many ranks there are",
    )
    parser.add_argument("--check", action="store_true", help="say what would run, and start nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--quiet", action="store_true", help="no progress and no table: only the files")
    parser.add_argument("--plugins", action="store_true", help="list plugins and what they register, as JSON")
    parser.add_argument("--schema", action="store_true", help="print the spec's JSON schema, for editors")
    parser.add_argument("--version", action="version", version=f"vaepp {vaepp_sdk.__version__}")
    return parser


def _command(options: argparse.Namespace) -> int:
    """Run the command that was asked for; each is imported at its use, so that all start fast."""
    problem = _idle_argument(options)
    if problem is not None:
        complain(problem)
        return 2
    if options.plugins:
        from vaepp_sdk.cli.plugins import list_plugins

        return list_plugins()
    if options.schema:
        from vaepp_sdk.spec.schema import schema_text

        print(schema_text(), end="")
        return 0
    if options.resume is not None:
        from vaepp_sdk.cli.run import resume

        return resume(options.resume, options.set, as_json=options.json, quiet=options.quiet)
    if options.spec is None:
        complain("which spec? Name a TOML file; --help lists what else there is")
        return 2
    if options.check:
        from vaepp_sdk.cli.check import check

        return check(options.spec, options.set, options.prompts, as_json=options.json)
    from vaepp_sdk.cli.run import run

    return run(options.spec, options.set, options.prompts, as_json=options.json, quiet=options.quiet)


def _idle_argument(options: argparse.Namespace) -> str | None:
    """What is said of an argument that another one leaves without effect."""
    given = {
        "a spec" if name == "spec" else f"--{name}"
        for name, value in vars(options).items()
        if value not in (None, False, [])
    }
    for name, (others, reason) in _ALONE.items():
        other = next((other for other in others if other in given), None)
        if name in given and other is not None:
            return f"{name} does not go together with {other}: {reason}"
    return None


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the run in good order; one that is ignored, as under nohup, stays so."""

    def raise_it(number: int, frame: FrameType | None) -> None:
        del frame
        raise _SignalledError(number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, raise_it)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _exits_raise() -> Iterator[None]:
    """Let a plugin's `os._exit` in this thread fail the run: with 0, it would look like a good end."""
    leave, here = os._exit, (os.getpid(), threading.get_ident())

    def refuse(status: int) -> NoReturn:
        if (os.getpid(), threading.get_ident()) != here:  # a fork, or a thread of ours that ends this process
            leave(status)
        caller = sys._getframe(1)
        place = f"{caller.f_code.co_filename}:{caller.f_lineno} in {caller.f_code.co_name}"
        raise RunError(f"os._exit({status}) is called by {place}")

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = leave


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show vaepp's own warnings as the messages they are."""
    usual = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, VaeppWarning):
            complain(f"warning: {message}")
        else:
            usual(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", VaeppWarning)
        warnings.showwarning = show
        yield
