import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.record import Memory
from reports.comparison import compare
from reports.numbers import byte_unit, clean, interval, number, percent, points, ratio
from reports.statistics import Estimate
from reports.tables import (
    environment_table,
    headline,
    key_figures,
    measured_table,
    plan_table,
    provenance_table,
    quality_table,
    ratio_table,
    slug,
)


def only(records):
    return compare(records, baseline="peft")[0]


def row(table, arm):
    return next(cells for cells in table.rows if cells[0].text == arm)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12345.6, "12,350"), (1234.4, "1,234"), (999.96, "1,000"), (0.71894, "0.7189"), (1.0, "1.000"), (0.0, "0"),
        (-2.5, "−2.500"), (0.000123456, "1.235e−4"), (0.99999e-4, "1.000e−4"), (float("nan"), "not finite"),
        (1.5e9, "1,500,000,000"),
    ],
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


@given(st.floats(1e-6, 1e9))
def test_number_keeps_four_digits(value):
    text = number(value).replace(",", "").replace("−", "-")
    assert float(text) == pytest.approx(value, rel=0.5001e-3)


def test_other_numbers():
    assert ratio(1.4267) == "1.43×"
    assert percent(0.7189) == "71.9 %"
    assert (points(0.0081), points(-0.0081), points(0.0), points(-1e-6)) == ("+0.8", "−0.8", "0.0", "0.0")
    assert points(0.10) == "+10.0"
    assert byte_unit([2**30]) == ("GiB", 2.0**30)
    assert byte_unit([]) == ("MiB", 2.0**20)


def test_interval_in_words():
    assert interval(Estimate(1.4, 1.384, 1.486, 5, 1.0)) == "95 % CI 1.38–1.49"
    assert interval(Estimate(1.02, 1.0204, 1.0236, 5, 1.0)) == "95 % CI 1.02–1.02"
    assert interval(Estimate(1.0, 0.97, 1.04, 5, 1.0)) == "95 % CI 0.970–1.04: ambiguous"
    assert interval(Estimate(0.01, -0.004, 0.019, 5, 0.0)) == "95 % CI −0.4 to +1.9: ambiguous"
    assert interval(Estimate(1.4, None, None, 2, 1.0)) == "too few processes for an interval (2)"
    assert interval(Estimate(1.0, 1.0, 1.0, 5, 1.0)) == "no difference in any process"


def test_clean_makes_one_printable_line():
    assert clean("a\nb\x00c\u2028d\ud800e\u202ef") == "a b c d e f"
    assert clean("x" * 500, 10) == "x" * 9 + "…"


def test_slug_is_a_safe_file_name():
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("<script>") == "script"
    assert slug("训练") == "scenario"
    assert slug("a b", taken=["a-b", "a-b-2"]) == "a-b-3"


def test_measured_values(records):
    table = measured_table(only(records()))
    assert table.columns == ("Arm", "Tokens/s", "Step time, ms", "Peak, GiB", "Above model, GiB")
    name, speed, time, peak, above = row(table, "peft")
    assert name.detail == "n = 5"
    assert 2400 < float(speed.text.replace(",", "")) < 2600
    assert "–" in speed.detail
    assert 380 < float(time.text) < 420
    assert float(peak.text) == pytest.approx((610 + 820) / 1024, rel=0.02)
    assert float(above.text) == pytest.approx(820 / 1024, rel=0.02)


def test_reserved_memory_has_a_column_where_it_was_measured(records):
    memory = Memory(kind="cuda_allocated", model_bytes=2**20, peak_bytes=2**21, peak_reserved_bytes=3 * 2**20)
    table = measured_table(only(records(memory=memory)))
    assert table.columns[-1] == "Reserved, MiB"
    assert [cell.text for cell in row(table, "peft")[3:]] == ["2.000", "1.000", "3.000"]
    assert row(table, "peft")[3].detail == ""  # equal values have no range


def test_missing_memory_and_accuracy_are_dashes(records):
    scenario = only(records(memory=None, accuracy=None))
    assert [cell.text for cell in row(measured_table(scenario), "eager")[3:]] == ["—", "—"]
    assert row(quality_table(scenario), "eager")[1].text == "—"
    assert row(ratio_table(scenario), "eager")[2].text == "not measured"


def test_failed_and_gate_failed_arms_show_the_reason_and_no_number(records, record):
    lost = [record("triton", i, status="failed", error="out of memory") for i in range(2)]
    wrong = [record("triton-light", i, status="gate_failed", error="error 0.3 > 0.1") for i in range(2)]
    scenario = only([*records(repetitions=2), *lost, *wrong])
    for table in (measured_table(scenario), quality_table(scenario), ratio_table(scenario)):
        assert sum(cell.columns for cell in row(table, "triton")) == len(table.columns)
        assert row(table, "triton")[1].detail.endswith("out of memory")
        assert row(table, "triton-light")[1].detail.endswith("error 0.3 > 0.1")
    assert row(measured_table(scenario), "triton")[1].text == "failed"
    assert row(measured_table(scenario), "triton-light")[1].text == "gate failed"
    assert row(ratio_table(scenario), "triton-light")[1].text == "no ratio"
    assert row(provenance_table(scenario), "triton")[3].text == "failed"
    assert row(provenance_table(scenario), "triton")[5].text == "—"


def test_one_process_has_no_interval_and_no_deviation(records):
    scenario = only(records(repetitions=1))
    assert row(ratio_table(scenario), "eager")[1].detail == "too few processes for an interval (1)"
    assert row(quality_table(scenario), "eager")[2].detail == ""
    assert "too few processes for an interval (1)" in headline(scenario)


def test_headline_says_speed_memory_and_accuracy(records):
    text = headline(only(records()))
    assert text.startswith("eager is 1.4")
    assert "× stock PEFT in tokens/s (95 % CI 1." in text
    assert "× its memory above the model, exact match 7" in text
    assert len(key_figures(only(records()))) == 3


def test_headline_without_a_ratio(records, record):
    unequal = [*records(("peft",)), *(record("eager", i, batch_sha256=["0"] * 12) for i in range(5))]
    assert headline(only(unequal)).startswith("no ratio for eager: unequal work")
    assert key_figures(only(unequal)) == ()
    assert headline(only(records(("triton",)))).startswith("triton trains 4,")
    assert headline(only(records(("triton",), status="failed", error="boom"))) == (
        "triton failed: boom; no baseline to compare with"
    )


def test_plan_and_environment(records):
    scenario = only(records(clocks={"sm_mhz": 1905, "power_w": 500.5}))
    plan = row(plan_table(scenario), "eager")
    assert plan[1].text == "eager, 4×2 sequences, placement 3×light + 1×full"
    other = only(records(choices={"micro_batch": 4, "a_later_choice": [1]}))
    assert row(plan_table(other), "eager")[1].text == "a later choice [1], micro batch 4"
    assert plan[2].text == "0123456789abcdef-01234567"
    found = {cells[0].text: cells[1].text for cells in environment_table(scenario).rows}
    assert found["Device"] == "name CPU (2 cores) · memory 8.00 GiB"
    assert found["Seeds"] == "100 / 101 / 102 / 103 / 104"
    assert found["Clocks, eager"] == "power w 500.5 · sm mhz 1,905"
