"""Records → report: tables, figures, Markdown and HTML, on any machine and without torch."""

from reports.build import Report, build_report

__all__ = ["Report", "build_report"]
