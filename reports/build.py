"""Records → a folder with `report.html`, `report.md` and the figures of the latter."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastft.errors import DataError
from fastft.files import new_folder, write_atomically
from fastft.record import Record, read_records
from reports.comparison import Comparison, Scenario, compare
from reports.figures import scenario_figures
from reports.html import render_html
from reports.kernels import SHARE, kernel_files, kernel_table
from reports.markdown import FIGURES, render_markdown
from reports.measures import HOW_TO_READ as MEASURES_TERM
from reports.measures import measures_files, measures_tables
from reports.numbers import DASH, clean, plural
from reports.peers import HOW_TO_READ as PEERS_TERM
from reports.peers import peers_files, peers_tables
from reports.regret import HOW_TO_READ as REGRET_TERMS
from reports.regret import regret_files, regret_tables
from reports.results import are_trials, trial_files
from reports.statistics import CONFIDENCE, MIN_PROCESSES, RESAMPLES
from reports.tables import (
    Cell,
    Document,
    ResultTables,
    Section,
    Table,
    commands,
    environment_table,
    headline,
    key_figures,
    measured_table,
    plan_table,
    provenance_table,
    quality_table,
    ratio_table,
    slug,
    tuned_table,
)

_OWN_SLUGS = ("how-to-read", "sources", "plans", "memory-measures", "peers", "kernels")
"""Anchors of the page that no scenario may take."""


@dataclass(frozen=True)
class Report:
    """What was written, and what it says."""

    html: Path
    markdown: Path
    figures: tuple[Path, ...]
    headline: str
    """One sentence a scenario, joined by semicolons; without records, what the results are of."""
    comparisons: tuple[Comparison, ...]


def build_report(
    inputs: Sequence[Path],
    output: Path,
    *,
    title: str | None = None,
    baseline: str = "peft",
    seed: int = 0,
    overwrite: bool = False,
) -> Report:
    """Write the report of all records in `inputs` to the folder `output`.

    Args:
        inputs: JSONL files of records, or folders that hold some at any depth; a `kernels.json` beside them, the
            micro-benchmarks of kernels, becomes a table, and so do a `regret.json`, a `repeats.json`, a
            `measures.json` and a `peers.json`.  A folder that holds one of these needs no records.
        output: a new or empty folder.
        title: the page's title; the names of the scenarios by default.
        baseline: the arm that all others are compared with.
        seed: of the bootstrap.  The same records and seed give the same bytes.
        overwrite: write into a folder that holds something; only files of the report's own names are replaced.

    Raises:
        DataError: no records, or a file that cannot be read as such.
        ConfigError: several arms are there and none of them is the baseline.
        OutputError: `output` holds something, or cannot be written.
    """
    regrets, measures, kernels = regret_files(inputs), measures_files(inputs), kernel_files(inputs)
    peers = peers_files(inputs)
    results = [*regrets, *measures, *peers, *kernels]
    sources = [(file, _read(file)) for file in _files(inputs, results)]
    records = [record for _, found in sources for record in found]
    scenarios = compare(records, baseline=baseline, seed=seed)
    sections = _sections(scenarios, seed)
    against_default = tuned_table(scenarios, seed)
    plan_tables = (*([against_default] if against_default is not None else []), *regret_tables(regrets))
    measures_found, kernels_found = measures_tables(measures), kernel_table(kernels)
    peers_found = peers_tables(peers)
    other_names = [
        *(table.title for table in plan_tables),
        *(f"Memory measures of {table.title}" for table in measures_found),
        *(f"Peers: {table.title}" for table in peers_found),
        *([kernels_found.title] if kernels_found is not None else []),
    ]
    names = [scenario.name for scenario in scenarios] or other_names
    document = Document(
        title=clean(title or f"Benchmark: {', '.join(names)}", 160),
        facts=_facts(records) if records else plural(len(results), "result"),
        sections=sections,
        results=tuple(
            ResultTables(heading, slug(heading), tables)
            for heading, tables in (("Plans", plan_tables), ("Memory measures", measures_found), ("Peers", peers_found))
            if tables
        ),
        kernels=kernels_found,
        how_to_read=(
            *(_how_to_read(seed) if records else []), *(REGRET_TERMS if regrets else []),
            *([MEASURES_TERM] if measures else []), *([PEERS_TERM] if peers else []), *([SHARE] if kernels else []),
        ),
        sources=_sources_table(sources, [*results, *trial_files(results)]),
    )  # fmt: skip
    # Everything is rendered before anything is written: a failure up to here leaves the folder untouched.
    html, markdown = render_html(document), render_markdown(document)

    if overwrite and output.is_dir():
        folder = output
    else:
        folder = new_folder(output, what="report")
    drawn = [(folder / FIGURES / f"{figure.name}.svg", figure) for section in sections for figure in section.figures]
    for path, figure in drawn:
        write_atomically(path, figure.svg)
    write_atomically(folder / "report.md", markdown)
    write_atomically(folder / "report.html", html)
    return Report(
        html=folder / "report.html",
        markdown=folder / "report.md",
        figures=tuple(path for path, _ in drawn),
        headline="; ".join([f"{section.heading}: {section.summary}" for section in sections] or other_names),
        comparisons=tuple(one for scenario in scenarios for one in scenario.comparisons),
    )


def _files(inputs: Sequence[Path], results: Sequence[Path]) -> list[Path]:
    """Every file of records once, in order; a folder with one of the results may have none."""
    if not inputs:
        raise DataError("no records were named", fix="name a .jsonl file or a folder of them")
    files: dict[Path, Path] = {}
    for path in inputs:
        found = [path]
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*.jsonl")) if not are_trials(file)]
            if not found and not any(result.is_relative_to(path) for result in results):
                found = [path]  # which is an error that says so
        for file in found:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _read(file: Path) -> list[Record]:
    try:
        return read_records(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise DataError(f"cannot read {file}", got=reason, fix="check the path, or run the bench again") from error


def _sections(scenarios: Sequence[Scenario], seed: int) -> tuple[Section, ...]:
    sections: list[Section] = []
    for scenario in scenarios:
        name = slug(scenario.name, taken=[*_OWN_SLUGS, *(section.slug for section in sections)])
        tables = [measured_table(scenario), quality_table(scenario), plan_table(scenario)]
        sections.append(
            Section(
                heading=scenario.name,
                slug=name,
                summary=headline(scenario),
                key_figures=key_figures(scenario),
                warnings=scenario.warnings,
                tables=(*([ratio_table(scenario)] if scenario.comparisons else []), *tables),
                figures=scenario_figures(scenario, name, seed=seed),
                environment=environment_table(scenario),
                commands=commands(scenario),
                provenance=provenance_table(scenario),
            )
        )
    return tuple(sections)


def _facts(records: Sequence[Record]) -> str:
    """One line under the title: how much, on what, when."""
    devices = dict.fromkeys(clean(r.device["name"], 60) for r in records if r.device.get("name"))
    dates = sorted({clean(r.started_at[:10], 10) for r in records if r.started_at})
    when = dates[:1] if len(dates) < 2 else [f"{dates[0]} to {dates[-1]}"]
    return " · ".join([plural(len(records), "record"), *devices, *when])


def _sources_table(sources: Sequence[tuple[Path, list[Record]]], others: Sequence[Path]) -> Table:
    rows = []
    for file, count in [*((file, f"{len(found):,}") for file, found in sources), *((file, DASH) for file in others)]:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        rows.append((Cell(clean(file.name)), Cell(count), Cell(digest)))
    return Table("Sources", ("File", "Records", "SHA-256"), tuple(rows), prose=True)


def _how_to_read(seed: int) -> tuple[tuple[str, str], ...]:
    confidence = f"{100 * CONFIDENCE:.0f} %"
    return (
        (
            "Tokens/s",
            "Each process gives one number: the median over its counted steps of tokens (padding not counted) divided "
            "by time. An arm shows the median of its processes, and their range. Warm-up steps do not count.",
        ),
        (
            "Memory",
            "The highest value during the steps. “Above model” is that value less what stood after the model, its "
            "adapters and the optimizer were built: what training itself needs. On a GPU it is what the allocator "
            "handed out, on a CPU the resident set of the process.",
        ),
        (
            "Ratios and intervals",
            f"A ratio is the arm's median over the baseline's, over the repetitions that both finished. The "
            f"{confidence} interval is a percentile bootstrap over processes: {RESAMPLES:,} resamples (seed {seed}) "
            f"draw repetitions with replacement, the same ones for both arms. Steps are never resampled, because the "
            f"steps of one process are not independent. Accuracy is compared by the mean difference, resampled alike. "
            f"Below {MIN_PROCESSES} processes no interval is given.",
        ),
        ("Ambiguous", "The interval contains “no difference”: these records do not show which arm is better."),
        (
            "No ratio",
            "A ratio is shown only if both arms did the same work (equal model, adapter, settings, and the same batch "
            "at every step by hash), no parity gate failed, and losses and gradients were finite.",
        ),
        (
            "Gradient error",
            "The parity gate: the largest ‖g − g_ref‖ / ‖g_ref‖ over all adapter tensors against an fp32 reference; "
            "“stock” is what stock PEFT shows in the same precision. It must stay under the tolerance.",
        ),
        (
            "Largest loss deviation",
            "The largest relative difference from the baseline's loss at any step with the same seed.",
        ),
        ("±", "The standard deviation over seeds."),
    )
