"""From arguments to a command object, by tyro over frozen dataclasses; its errors as one line."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Annotated, Any, Protocol, Union, cast

import tyro

from xception.cli.benchmark import Benchmark
from xception.cli.convert import Convert
from xception.cli.evaluate import Evaluate
from xception.cli.models import Models
from xception.cli.output import complain
from xception.cli.predict import Predict
from xception.cli.reproduce import Reproduce
from xception.cli.train import Demo, Train, train_defaults
from xception.cli.tune import Tune
from xception.models.fields import unknown_name


class Command(Protocol):
    """What a command line becomes."""

    def run(self) -> int:
        """Do it; returns the exit status."""
        ...


# In the order in which a newcomer meets them.
COMMANDS: dict[str, type[Any]] = {
    "demo": Demo,
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "convert": Convert,
    "models": Models,
    "benchmark": Benchmark,
    "reproduce": Reproduce,
    "tune": Tune,
}


def parse(arguments: list[str]) -> Command | int:
    """The command that `arguments` ask for, or an exit status where help was shown or the use was wrong."""
    if not arguments:
        return complain(
            f"expected a command: {', '.join(COMMANDS)}; begin with: xception demo, or see: xception --help"
        )
    if arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
        return complain(str(unknown_name("command", arguments[0], COMMANDS)))
    name = next((a for a in arguments if not a.startswith("-")), None)
    default: Any = tyro.MISSING
    if name == "train":
        default = train_defaults(arguments)
    union: Any = Union[  # noqa: UP007  # built at run time
        tuple(
            Annotated[
                command,
                tyro.conf.subcommand(name=word, **({"default": default} if word == name == "train" else {})),
            ]
            for word, command in COMMANDS.items()
        )
    ]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command = tyro.cli(cast(Any, union), prog="xception", args=arguments, description=_DESCRIPTION)
    except SystemExit as leave:
        if leave.code in (0, None):
            return 0
        return complain(_first_message(said.getvalue()))
    return cast(Command, command)


_DESCRIPTION = "Xception and its Inception family: train, evaluate and use image classifiers. Begin with: xception demo"


def _first_message(boxed: str) -> str:
    """tyro draws a box, in ASCII where it must: the title, then the message up to a rule, then help.

    The message is what we want, on one line.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    lines = [line.strip().strip("│|").strip() for line in plain.splitlines()]
    # Rules, also those that frame the title, end a part; the first part is the title, alone or in a rule.
    parts: list[list[str]] = [[]]
    for line in lines:
        if len(line) > 3 and not set(line[-3:]) - set("─-+╮╯"):
            parts.append([])
        elif line:
            parts[-1].append(line)
    parts = [part for part in parts if part]
    title_alone = len(parts) > 1 and not lines[0].startswith(("╭", "+"))
    message = " ".join(parts[1 if title_alone else 0]) if parts else ""
    message = re.sub(r"__tyro-dummy-inner__\.?", "", message)
    # Where a value may be of several kinds, tyro tells what each of them says to it, in Rich's markup.
    several = re.match(r"Error parsing (\S+): no type matching (.+) could be instantiated from \[(.*)\]\. Got", message)
    if several is not None:
        option, kinds, given = several.groups()
        kinds = re.sub(r"[{}]", "", kinds).replace("|", " or ")
        message = f"{option} must be {kinds}; got {given}"
    return message or "wrong use: see xception --help"
