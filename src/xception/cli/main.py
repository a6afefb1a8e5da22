"""The entry point: parse, run one command, and answer every mistake with one line and the right exit status.

0 all well, 1 some inputs failed, 2 wrong use, 128 + n stopped by signal n. Nothing heavy is imported here.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import sys
from collections.abc import Sequence

from xception.cli.output import complain
from xception.errors import XceptionError
from xception.training.interrupt import Stopped

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``xception ARGV...`` and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] in (["--version"], ["-V"]):
            from xception.cli.models import version_line

            print(version_line())
            return 0
        from xception.cli.parse import parse

        command = parse(arguments)
        if isinstance(command, int):
            return command
        status = command.run()
        sys.stdout.flush()
        return status
    except XceptionError as error:
        return complain(str(error))
    except Stopped as stopped:
        complain(str(stopped))
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Who read our output has gone, as `| head` does; Python must not try to flush to it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return complain(f"{name}{error.strerror or error}")
    except MemoryError as error:
        return complain(f"out of memory: {error}" if str(error) else "out of memory")


def _prepare_streams() -> None:
    """Python has None for a standard stream that was closed (``<&-``): nothing comes from it, nothing is kept.

    What a stream's encoding lacks, as ASCII lacks most of the world's file names, is written as an escape.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # for the process's life
        elif name != "stdin" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def script() -> None:
    """What the installed ``xception`` command calls."""
    _prepare_streams()
    # Libraries make objects by the hundred thousand while they load, which stay: to look every 700 of them for cycles
    # takes a tenth of a short command's time.
    gc.set_threshold(5_000, 10, 10)
    # Where the home folder is read-only it warns in three lines of a cache that it can do without.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    status = main()
    gc.freeze()  # what is there goes with the process: to look for cycles in all of it once more takes half a second
    sys.exit(status)
