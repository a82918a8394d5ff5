import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from fastft.errors import ConfigError, DataError, OutputError
from fastft.record import write_records
from reports import build_report
from reports.markdown import code_block, escape

HOSTILE = "<script>alert('x')</script> | $x$ `code` \n# [a](https://example.org) ![b](c)"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what the page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], "unclosed tags"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def report(records, saved, tmp_path):
    return build_report([saved(records(("peft", "eager", "triton"), 3))], tmp_path / "out")


def test_report_files(report, tmp_path):
    assert report.html == tmp_path / "out" / "report.html"
    names = ["speed", "memory", "loss", "step-time", "accuracy"]
    assert [path.name for path in report.figures] == [f"embedded-{name}.svg" for name in names]
    written = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {report.html, report.markdown, *report.figures}
    assert report.headline.startswith("embedded: triton is 1.8")
    assert [one.arm for one in report.comparisons] == ["eager", "triton"]


def test_html_is_well_formed_and_needs_nothing_from_outside(report):
    text = report.html.read_text()
    page = Page(text)
    assert page.tags.count("svg") == 5
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "http://" not in text
    assert "https://" not in text
    references = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert references
    assert all(value.startswith("#") for value in references)
    assert {value[1:] for value in references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids)), "figures share a page, so ids must differ"
    clips = re.findall(r"url\(#([^)]*)\)", text)
    assert clips
    assert set(clips) <= set(page.ids)
    assert "prefers-color-scheme: dark" in text
    assert "#1d2126" not in text.split("</style>")[1], "a figure kept a fixed ink colour"


KERNEL = {
    "what": "activate triton F=8960", "device": "GPU <b>",
    "bytes": 4.2e8, "gigabytes_per_second": 4200.0, "share": 0.93, "target_share": 0.85,
}  # fmt: skip


def test_micro_benchmarks_beside_the_records_become_a_table(records, saved, tmp_path):
    slow = {**KERNEL, "what": "rotate triton", "share": 0.5}
    file = saved(records()).with_name("kernels.json")
    file.write_text(json.dumps({"benchmarks": [{"extra_info": facts} for facts in (KERNEL, slow)]}))
    made = build_report([file.parent], tmp_path / "page")
    text = made.markdown.read_text()
    assert "## Kernels on GPU &lt;b&gt;" in text
    assert "| activate triton F=8960 | 100.0 | 4,200 | 93 % |" in text
    assert 'class="warn">50 %<small>under 85 %</small>' in made.html.read_text()
    assert "kernels.json" in text.rpartition("## Sources")[2]


@pytest.mark.parametrize("text", ["", "[]", '{"benchmarks": [{"extra_info": {}}]}', '{"benchmarks": [{}]}'])
def test_other_files_of_that_name_are_refused(text, records, saved, tmp_path):
    file = saved(records()).with_name("kernels.json")
    file.write_text(text)
    with pytest.raises(DataError, match=r"cannot read .*kernels\.json"):
        build_report([file.parent], tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_figures_are_svg_files_with_text(report):
    for path in report.figures:
        root = ElementTree.fromstring(path.read_text())
        assert root.tag.endswith("svg")
        texts = {element.text for element in root.iter() if element.tag.endswith("text")}
        assert {"peft", "eager", "triton"} <= texts
        assert "<metadata" not in path.read_text()


def test_markdown_links_its_figures_and_has_whole_tables(report):
    text = report.markdown.read_text()
    linked = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert [report.markdown.parent / name for name in linked] == list(report.figures)
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 6
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_same_records_same_bytes(records, saved, tmp_path):
    found = records(repetitions=3)
    first = build_report([saved(found)], tmp_path / "a")
    second = build_report([saved(found[::-1], "records.jsonl")], tmp_path / "b")
    figures = zip(first.figures, second.figures, strict=True)
    pairs = [(first.markdown, second.markdown), (first.html, second.html), *figures]
    for one, other in pairs:
        # The order of the lines is part of the file's hash and of nothing else.
        strip = lambda path: re.sub(r"\b[0-9a-f]{64}\b", "", path.read_text())  # noqa: E731
        assert strip(one) == strip(other)
    again = build_report([saved(found[::-1], "records.jsonl")], tmp_path / "c")
    assert again.markdown.read_bytes() == second.markdown.read_bytes()
    assert again.html.read_bytes() == second.html.read_bytes()


def test_hostile_strings_stay_text(records, record, saved, tmp_path):
    found = [
        *records(repetitions=3, scenario=HOSTILE, command=f"fastft bench '{HOSTILE}' ```", device={HOSTILE: HOSTILE}),
        *(record(HOSTILE, i, scenario=HOSTILE, backend=HOSTILE, ledger={HOSTILE: 2}) for i in range(3)),
        *(record(r"a$\frac$", i, scenario=HOSTILE) for i in range(3)),  # no formula that matplotlib could parse
        *(record("triton", i, scenario=HOSTILE, status="failed", error=HOSTILE) for i in range(3)),
    ]
    report = build_report([saved(found)], tmp_path / "out", title=HOSTILE)
    page = Page(report.html.read_text())
    assert "script" not in page.tags
    assert "<script>alert" in page.text  # shown, not run
    assert not any(name.startswith("on") for name, _ in page.attributes)
    markdown = report.markdown.read_text()
    outside = re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside
    assert "https://" not in outside
    assert not re.search(r"(?<!\\)\]\((?!figures/)", outside)
    for table in re.findall(r"(?:^\|.*\n)+", outside, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    for path in report.figures:
        assert path.parent == tmp_path / "out" / "figures"
        ElementTree.fromstring(path.read_text())


@pytest.mark.parametrize("value", ["a|b", "`x`", "<b>", "*a*", "_a_", "a\nb", "[x](y)", "~~a~~", "\\", "# a"])
def test_markdown_escape_leaves_no_live_syntax(value):
    shown = escape(value)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)[|`*\[\]~#]", shown)
    assert "<" not in shown
    assert not re.search(r"(?<![\\\w])_\w", shown)


def test_code_fence_is_longer_than_what_it_holds():
    assert code_block(("a ```` b",)).startswith("`````console\n")


def test_values_that_are_not_finite_do_not_break_the_report(record, records, saved, tmp_path):
    path = saved([*records(("peft",), 3), *(record("eager", i, loss=[987654.25] * 12) for i in range(3))])
    path.write_text(path.read_text().replace("987654.25", "NaN"))
    report = build_report([path], tmp_path / "out")
    assert "no ratio for eager" in report.headline
    assert "not finite" in report.html.read_text()


def test_unequal_work_is_loud_and_has_no_ratio(records, record, saved, tmp_path):
    found = [*records(("peft",), 3), *(record("eager", i, batch_sha256=["0" * 64] * 12) for i in range(3))]
    report = build_report([saved(found)], tmp_path / "out")
    text = Page(report.html.read_text()).text
    assert "no ratio" in text
    assert "unequal work: repetition 0 (seed 100) saw different batches from step 1 on" in text
    assert not re.search(r"\d×(?! ?(light|full|\d| decoder))", report.markdown.read_text().split("## How to read")[0])


def test_several_files_and_scenarios(records, saved, tmp_path):
    saved(records(repetitions=2, scenario="A b"), "one.jsonl")
    path = saved(records(repetitions=2, scenario="a-b"), "two.jsonl")
    report = build_report([path.parent, path], tmp_path / "out")
    assert len(report.figures) == len(set(report.figures)) == 10
    assert report.headline.count("tokens/s") == 2
    page = Page(report.html.read_text())
    assert len(page.ids) == len(set(page.ids))
    assert "8 records" in page.text  # the file that was named twice counts once


def test_a_full_folder_is_refused_and_overwriting_spares_foreign_files(records, saved, tmp_path):
    path, out = saved(records(repetitions=2)), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        build_report([path], out)
    assert [entry.name for entry in out.iterdir()] == ["notes.txt"]
    build_report([path], out, overwrite=True, title="first")
    report = build_report([path], out, overwrite=True, title="second")
    assert (out / "notes.txt").read_text() == "mine"
    assert report.markdown.read_text().startswith("# second\n")
    with pytest.raises(OutputError, match="is a file"):
        build_report([path], out / "notes.txt", overwrite=True)


def test_bad_input(records, saved, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no records"):
        build_report([tmp_path / "nothing.jsonl"], out)
    with pytest.raises(DataError, match="no records"):
        build_report([], out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no records"):
        build_report([tmp_path / "empty"], out)
    bad = tmp_path / "bad.jsonl"
    for content in (b"{", b'{"schema_version": 99}', b'{"schema_version": 1}', b"\xff\xfe\x00", b"[]", b"\n"):
        bad.write_bytes(content)
        with pytest.raises(DataError):
            build_report([bad], out)
    with pytest.raises(ConfigError, match="did you mean 'eager'"):
        build_report([saved(records(repetitions=1))], out, baseline="eagr")
    assert not out.exists(), "nothing may be written before everything is known to be good"


def test_matplotlib_is_left_as_it_was(records, saved, tmp_path):
    before = dict(matplotlib.rcParams)
    build_report([saved(records(repetitions=1))], tmp_path / "out")
    assert dict(matplotlib.rcParams) == before


def test_works_without_torch(records, tmp_path):
    write_records(tmp_path / "records.jsonl", records(repetitions=3))
    code = """
import sys
from pathlib import Path

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "peft", "trl", "triton", "datasets", "accelerate"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
from reports import build_report
print(build_report([Path(sys.argv[1])], Path(sys.argv[2])).headline)
assert "torch" not in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "records.jsonl"), str(tmp_path / "out")],
        cwd=root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("embedded: eager is 1.4")
