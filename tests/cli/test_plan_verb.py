"""`fastft plan`: list, show, diff, export, import, verify, prune."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastft.hardware import kernels_sha256
from fastft.plan import KernelTrial, Plan
from fastft.plan_store import PlanStore
from fastft.plans.shipped import ShippedPlans
from fastft.plans.verification import Verifications, rejected

Cli = Callable[..., Any]


def on_another_machine(plan: Plan) -> Plan:
    """`plan` as if tuned on a GPU with an older torch."""
    key = plan.key.model_copy(
        update={
            "device": "Other GPU", "compute_capability": "8.0", "multiprocessors": 108,
            "versions": {**plan.key.versions, "torch": "2.11.0"},
        }
    )  # fmt: skip
    return plan.model_copy(update={"key": key})


def outdated(plan: Plan) -> Plan:
    """`plan` as if tuned here with other kernels."""
    return plan.model_copy(update={"key": plan.key.model_copy(update={"kernels_sha256": "0" * 64})})


def test_the_list_says_what_fits_here(cli: Cli, saved_plan: Plan, store: PlanStore) -> None:
    store.save(old := outdated(saved_plan))
    header, *lines = cli("plan", "list").stdout.splitlines()
    assert header.split() == ["ID", "MODEL", "ORIGIN", "TOKENS/S", "CHOICES", "FITS", "HERE"]
    by_id = {line.split()[0]: line for line in lines}
    assert by_id[saved_plan.id].endswith("yes")
    assert "toy-llama  tuned 3 days ago  2,000 " in by_id[saved_plan.id]
    assert by_id[old.id].endswith("no: kernels_sha256")
    answer = json.loads(cli("plan", "list", "--json").stdout)
    assert {plan["id"]: plan["differs_here"] for plan in answer} == {saved_plan.id: [], old.id: ["kernels_sha256"]}


def test_an_empty_list_says_how_to_begin(cli: Cli, store: PlanStore) -> None:
    result = cli("plan", "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"no plans in {store.folder}; `fastft tune MODEL` makes one\n"
    assert json.loads(cli("plan", "list", "--json").stdout) == []


def test_show_by_the_beginning_of_the_id(cli: Cli, saved_plan: Plan) -> None:
    text = cli("plan", "show", saved_plan.id[:6]).stdout
    assert text.startswith(f"plan {saved_plan.id}: eager, 2×2 sequences, placement 2×full + 1×keep\n")
    lines = [line.split() for line in text.splitlines()]
    assert ["lora_rank", "16"] in lines
    assert ["model_shape.layers", "3"] in lines
    assert ["CHOICE", "VALUE", "BECAUSE"] in lines
    because = ["2,000", "tokens/s;", "3×light:", "1,000", "tokens/s"]
    assert ["placement", "2×full,", "keep", *because] in lines
    assert any(line[-4:] == ["ok", "2,000", "0.50", "GiB"] for line in lines)
    answer = json.loads(cli("plan", "show", saved_plan.id, "--json").stdout)
    assert answer.pop("id") == saved_plan.id
    assert Plan.model_validate(answer) == saved_plan


TRIED = KernelTrial(bucket="add/64x16/16bit/256", launch=[32, 128, 4, 4096, 3], verdict="ok", microseconds=[2.5, 1.25])


def with_launches(plan: Plan, kernels: dict[str, list[int]]) -> Plan:
    evidence = plan.evidence.model_copy(update={"kernels": [TRIED]})
    return plan.model_copy(
        update={"choices": plan.choices.model_copy(update={"kernels": kernels}), "evidence": evidence}
    )


def test_show_lists_launches(cli: Cli, saved_plan: Plan, store: PlanStore) -> None:
    tuned = with_launches(saved_plan, {TRIED.bucket: TRIED.launch})
    store.save(tuned)
    lines = [line.split() for line in cli("plan", "show", tuned.id).stdout.splitlines()]
    assert ["kernels.add/64x16/16bit/256", "32", "128", "4", "4096", "3", "1.2", "µs"] in lines
    assert ["add/64x16/16bit/256", "32", "128", "4", "4096", "3", "ok", "1.2"] in lines


def test_show_reads_a_file_and_keeps_nothing(cli: Cli, saved_plan: Plan, store: PlanStore, work: Path) -> None:
    (work / "theirs.json").write_text(on_another_machine(saved_plan).to_json())
    theirs = on_another_machine(saved_plan)
    what, made, *_ = cli("plan", "show", "theirs.json").stdout.splitlines()
    assert what == f"plan {theirs.id}: {theirs.choices.summary()}"
    assert made.startswith("made "), "not imported"
    assert json.loads(cli("plan", "show", "theirs.json", "--json").stdout)["id"] == theirs.id
    assert store.entries() == [saved_plan]
    missing = cli("plan", "show", "nowhere.json")
    assert (missing.exit_code, missing.stdout) == (6, "")
    assert "cannot read the plan nowhere.json" in missing.stderr


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ({"fly/64x16/16bit/256": [32, 128, 4, 4096, 3]}, "a plan tunes an unknown operation; got 'fly'"),
        ({"add/64/16bit/256": [32, 128, 4, 4096, 3]}, "a plan tunes a kernel by a malformed name"),
        ({"add/64x16/16bit/256": [32, 128, 4, 4096, 99]}, "a plan names an unknown launch for add"),
    ],
)
def test_an_import_refuses_launches_that_it_does_not_know(
    cli: Cli, saved_plan: Plan, store: PlanStore, work: Path, kernels: dict[str, list[int]], message: str
) -> None:
    (work / "theirs.json").write_text(with_launches(saved_plan, kernels).to_json())
    result = cli("plan", "import", "theirs.json")
    assert (result.exit_code, result.stdout) == (6, "")
    assert message in result.stderr
    assert store.entries() == [saved_plan]


def test_diff_names_fields_and_choices(cli: Cli, saved_plan: Plan, make_plan: Callable[..., Plan], work: Path) -> None:
    other = make_plan(rank=8, batch_size=8)
    (work / "other.json").write_text(other.to_json())
    header, *lines = cli("plan", "diff", saved_plan.id, "other.json").stdout.splitlines()
    assert header.split() == ["FIELD", saved_plan.id, other.id]
    assert [line.split() for line in lines] == [
        ["lora_rank", "16", "8"],
        ["global_batch", "4", "8"],
        ["choices.micro_batch", "2", "4"],
    ]
    answer = json.loads(cli("plan", "diff", saved_plan.id, "other.json", "--json").stdout)
    assert answer == {"lora_rank": [16, 8], "global_batch": [4, 8], "choices.micro_batch": [2, 4]}


def test_diff_with_this_machine(cli: Cli, saved_plan: Plan, work: Path) -> None:
    assert cli("plan", "diff", saved_plan.id).stderr == f"plan {saved_plan.id} holds here\n"
    (work / "theirs.json").write_text(on_another_machine(saved_plan).to_json())
    answer = json.loads(cli("plan", "diff", "theirs.json", "--json").stdout)
    assert {"device", "compute_capability", "multiprocessors", "versions.torch"} <= set(answer)
    assert answer["versions.torch"] == ["2.11.0", saved_plan.key.versions["torch"]]
    assert "lora_rank" not in answer


def test_export_and_import(cli: Cli, saved_plan: Plan, store: PlanStore, work: Path) -> None:
    assert (
        cli("plan", "export", saved_plan.id[:8], "ours.json").stdout == f"plan {saved_plan.id} written to ours.json\n"
    )
    store.path(saved_plan.key).unlink()
    result = cli("plan", "import", "ours.json")
    assert result.stdout == f"plan {saved_plan.id} imported: {saved_plan.choices.summary()}\n"
    assert result.stderr == ""
    assert store.entries() == [saved_plan.model_copy(update={"origin": "imported"})]


def test_an_imported_plan_that_does_not_hold_here_is_labelled(
    cli: Cli, make_plan: Callable[..., Plan], work: Path, store: PlanStore
) -> None:
    plan = outdated(make_plan())
    (work / "theirs.json").write_text(plan.to_json())
    result = cli("plan", "import", "theirs.json")
    assert result.exit_code == 0
    assert result.stderr == (
        "warning: it does not hold on this machine, which differs in kernels_sha256; "
        f"see fastft plan diff {plan.id[:8]}\n"
    )
    again = json.loads(cli("plan", "import", "theirs.json", "--force", "--json").stdout)
    assert again == {"id": plan.id, "path": str(store.path(plan.key)), "differs_here": ["kernels_sha256"]}


def test_an_import_does_not_replace_a_tuned_plan(cli: Cli, saved_plan: Plan, store: PlanStore, work: Path) -> None:
    other = saved_plan.model_copy(update={"choices": saved_plan.choices.model_copy(update={"attention": "sdpa"})})
    (work / "other.json").write_text(other.to_json())
    result = cli("plan", "import", "other.json")
    assert result.stderr == (
        f"error: a plan for the same key is here already; got {saved_plan.id}; "
        "fix: export it first, or import with --force\n"
    )
    assert result.exit_code == 7
    assert store.entries() == [saved_plan]
    assert cli("plan", "import", "other.json", "--force").exit_code == 0
    assert store.entries()[0].choices.attention == "sdpa"


def test_verify_names_the_bad_file_and_moves_nothing(cli: Cli, saved_plan: Plan, store: PlanStore) -> None:
    good = store.path(saved_plan.key)
    assert cli("plan", "verify").stdout == f"ok  {good}\n"
    bad = store.folder / "0123456789abcdef.json"
    bad.write_text(good.read_text()[:100])
    result = cli("plan", "verify")
    assert f"bad {bad}: plan {bad} is not JSON; " in result.stdout
    assert f"ok  {good}\n" in result.stdout
    assert result.stderr == "error: 1 of 2 plans are bad; fix: tune again; a run uses no bad file\n"
    assert result.exit_code == 6
    assert bad.exists()
    report = json.loads(cli("plan", "verify", "--json").stdout)
    assert report[str(good)] is None
    assert "is not JSON" in report[str(bad)]


def test_prune_removes_what_is_named_and_no_more(cli: Cli, saved_plan: Plan, store: PlanStore) -> None:
    foreign, old = on_another_machine(saved_plan), outdated(saved_plan)
    store.save(foreign)
    store.save(old)
    assert json.loads(cli("plan", "prune", "--older-than", "4", "--json").stdout) == []
    result = cli("plan", "prune", "--stale")
    assert result.stdout == f"removed {old.id}: toy-llama, tuned 3 days ago\n"
    assert result.stderr == "1 plans removed\n"
    assert {plan.id for plan in store.entries()} == {saved_plan.id, foreign.id}
    removed = json.loads(cli("plan", "prune", "--older-than", "2", "--json").stdout)
    assert set(removed) == {saved_plan.id, foreign.id}
    assert store.entries() == []


@pytest.mark.parametrize("days", ["-1", "soon"])
def test_prune_takes_days(days: str, cli: Cli, saved_plan: Plan, store: PlanStore) -> None:
    assert cli("plan", "prune", "--older-than", days).exit_code == 2
    assert store.entries() == [saved_plan]


# Shipped plans


@pytest.fixture
def shipped_plan(make_plan: Callable[..., Plan], shipped_folder: Path) -> Plan:
    """A plan for this machine, made by other kernels, as if it came with fastft."""
    plan = outdated(make_plan())
    ShippedPlans().path(plan).write_text(plan.to_json())
    return plan.model_copy(update={"origin": "shipped"})


def test_the_list_ends_with_shipped_plans(cli: Cli, shipped_plan: Plan, store: PlanStore) -> None:
    lines = cli("plan", "list").stdout.splitlines()
    assert f"{shipped_plan.id}  toy-llama  shipped 3 days ago" in lines[1]
    assert lines[1].endswith("yes, not verified on this machine yet")
    key = shipped_plan.key.model_copy(update={"kernels_sha256": kernels_sha256()})
    Verifications().save(key, rejected(shipped_plan, "too large"))
    assert cli("plan", "list").stdout.splitlines()[1].endswith("yes, rejected on this machine just now")
    (entry,) = json.loads(cli("plan", "list", "--json").stdout)
    assert (entry["origin"], entry["differs_here"], entry["verification"]["detail"]) == ("shipped", [], "too large")
    assert entry["path"] == str(ShippedPlans().path(shipped_plan))


def test_of_one_id_the_users_plan_counts(cli: Cli, shipped_plan: Plan, store: PlanStore) -> None:
    store.save(shipped_plan.model_copy(update={"origin": "imported"}))
    (entry,) = json.loads(cli("plan", "list", "--json").stdout)
    assert (entry["id"], entry["origin"]) == (shipped_plan.id, "imported")
    assert entry["path"] == str(store.path(shipped_plan.key))


def test_a_shipped_plan_for_another_machine_does_not_fit(
    cli: Cli, make_plan: Callable[..., Plan], shipped_folder: Path
) -> None:
    plan = on_another_machine(make_plan())
    ShippedPlans().path(plan).write_text(plan.to_json())
    (entry,) = json.loads(cli("plan", "list", "--json").stdout)
    assert {"device", "versions.torch"} <= set(entry["differs_here"])


def test_a_shipped_plan_is_shown_compared_and_exported(cli: Cli, shipped_plan: Plan, work: Path) -> None:
    text = cli("plan", "show", shipped_plan.id).stdout
    assert "\nshipped 3 days ago" in text
    assert "\nnot verified on this machine yet\n" in text
    assert set(json.loads(cli("plan", "diff", shipped_plan.id, "--json").stdout)) == {"kernels_sha256"}
    assert cli("plan", "export", shipped_plan.id, "theirs.json").exit_code == 0
    assert Plan.from_json((work / "theirs.json").read_text(), where="theirs.json") == shipped_plan


def test_shipped_plans_are_verified_and_never_pruned(cli: Cli, shipped_plan: Plan) -> None:
    path = ShippedPlans().path(shipped_plan)
    assert cli("plan", "verify").stdout == f"ok  {path}\n"
    assert cli("plan", "prune", "--stale", "--older-than", "0").exit_code == 0
    assert path.exists()
    path.write_text("{")
    result = cli("plan", "verify")
    assert result.stdout.startswith(f"bad {path}: ")
    assert result.exit_code == 6
    assert path.exists()
