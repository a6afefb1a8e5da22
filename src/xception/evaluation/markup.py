"""Pieces of HTML; every text from outside goes through `escape` or `name`."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence


def escape(text: object) -> str:
    """Any text as HTML, safe in content and in quoted attributes.

    Lone surrogates, which UTF-8 cannot hold, become the replacement character, and so do control characters.
    """
    whole = str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    printable = "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in whole
    )
    return html.escape(printable, quote=True)


def name(text: object) -> str:
    """A name from outside as HTML; isolated, so that right-to-left marks in it do not reach its neighbours."""
    return f"<bdi>{escape(text)}</bdi>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "", caption: str = "") -> str:
    """A table from cells that are HTML already; the first cell of a row is its heading."""
    lines = [f'<div class="scroll"><table class="{kind}">']
    if caption:
        lines.append(f"<caption>{caption}</caption>")
    lines.append("<thead><tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in head) + "</tr></thead>")
    lines.append("<tbody>")
    for first, *cells in rows:
        lines.append(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


def section(title: str, *parts: str) -> str:
    """A section with a heading; nothing where all its parts are empty."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>" if body else ""


def folded(summary: str, body: str) -> str:
    """A part that is closed until the reader opens it; needs no script."""
    return f"<details><summary>{summary}</summary>\n{body}\n</details>"


def percent(share: float) -> str:
    return f"{100 * share:.1f}&#8201;%"


def share_bar(share: float) -> str:
    """A share of 0..1 as a number over a bar of that length."""
    return f'<span class="bar" style="--v:{min(max(share, 0.0), 1.0):.4f}">{100 * share:.1f}</span>'
