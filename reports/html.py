"""Document → one HTML file: style and figures inside, no script, nothing fetched."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports.figures import BACKEND_COLOURS, OTHER_COLOURS, Figure
from reports.tables import Document

TEMPLATES = Path(__file__).parent / "templates"


def render_html(document: Document) -> str:
    """The page as text; every string of a record is escaped by the template engine."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["inline_svg"] = _inline_svg
    colours = BACKEND_COLOURS | {f"other-{index}": colour for index, colour in enumerate(OTHER_COLOURS)}
    return environment.get_template("report.html.jinja").render(document=document, colours=colours)


def _inline_svg(figure: Figure) -> Markup:
    """The figure unescaped: matplotlib wrote it and escaped the names in it."""
    return Markup(figure.for_html())
