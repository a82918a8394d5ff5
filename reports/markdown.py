"""Document → Markdown (GitHub's), with the figures as files beside it."""

import re

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reports.html import TEMPLATES
from reports.tables import Cell, Document, Table

FIGURES = "figures"
_SPECIAL = re.compile(r"([\\`*\[\]~|#$!])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


class Markdown(str):
    """Text that is Markdown already, so the template leaves it alone."""


def render_markdown(document: Document) -> str:
    """The report as text.  Whatever the template prints is escaped, unless it is `Markdown`."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=False, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, finalize=escape,
    )  # fmt: skip
    environment.filters |= {"table": table, "code_block": code_block}
    return environment.get_template("report.md.jinja").render(document=document, folder=Markdown(FIGURES))


def escape(text: object) -> str:
    """`text` as one line that Markdown, and the HTML in Markdown, shows as it is.

    >>> print(escape("a|b <script> snake_case _x_"))
    a\\|b &lt;script&gt; snake_case \\_x\\_
    """
    if isinstance(text, Markdown):
        return text
    line = " ".join(str(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _SPECIAL.sub(lambda found: "\\" + found[0], line)
    return line.replace("://", ":&#47;&#47;")  # no address in a record becomes a link


def table(table: Table) -> Markdown:
    """A pipe table; figures are right-aligned."""
    rule = ["---"] + ["---" if table.prose else "---:"] * (len(table.columns) - 1)
    lines = [map(escape, table.columns), rule, *(_row(row) for row in table.rows)]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def code_block(lines: tuple[str, ...]) -> Markdown:
    """A fenced block whose fence is longer than any run of backticks inside."""
    text = "\n".join(lines)
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}console\n{text}\n{fence}")


def _row(row: tuple[Cell, ...]) -> list[str]:
    """The cells; Markdown has no spans, so the columns that one covers stay empty."""
    return [text for cell in row for text in (_cell(cell), *[""] * (cell.columns - 1))]


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.tone == "bad":
        text = f"**{text}**"
    return f"{text} ({escape(cell.detail)})" if cell.detail else text
