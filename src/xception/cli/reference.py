"""The page docs/cli.md, made from the commands' own help: ``python -m xception.cli.reference > docs/cli.md``."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys

from xception.cli.parse import COMMANDS, parse

_HEAD = """# The command line

Made from `--help` by `python -m xception.cli.reference`; a test holds it against the code.
Exit status: 0 all well, 1 some inputs failed, 2 wrong use, 128 + n stopped by signal n.
With `--json`, standard output has machine-readable lines only, and everything for people goes to standard error.
"""


def reference() -> str:
    """The whole page, Markdown."""
    pages = [_HEAD, _section("xception", [])]
    pages += [_section(f"xception {name}", [name]) for name in COMMANDS]
    return "\n".join(pages)


def _section(title: str, arguments: list[str]) -> str:
    text = io.StringIO()
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "110"
    try:
        with contextlib.redirect_stdout(text):
            parse([*arguments, "--help"])
    finally:
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())
    lines = [line.rstrip() for line in plain.strip().splitlines()]
    return f"## {title}\n\n```text\n" + "\n".join(lines) + "\n```\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
