"""`fastft plan`: look at the plans in the cache and those that are shipped, share them, clean up."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastft.commands.flags import JsonFlag
from fastft.commands.reasons import reasons, shown, shown_launch
from fastft.config import RunConfig
from fastft.console import print_json, print_line, print_table, say
from fastft.errors import BackendError, ConfigError, PlanError
from fastft.hardware import detect_device
from fastft.models.shapes import SHAPES
from fastft.plan import Plan, PlanKey
from fastft.plan_store import PlanStore, find_plan, read_foreign_plan
from fastft.planning import describe_verification, plan_key
from fastft.plans.shipped import MAY_DIFFER, ShippedPlans
from fastft.plans.verification import Verification, Verifications
from fastft.units import age, gib

HERE = "this machine"

PlanArgument = Annotated[str, typer.Argument(metavar="ID", help="A plan's id or the beginning of it.")]
PLAN_OR_FILE = "A plan's id, the beginning of it, or a plan file."
ForceFlag = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def list_(as_json: JsonFlag = False) -> None:
    """List the plans in the cache, the newest first, then those that are shipped."""
    store, shipped = PlanStore(), ShippedPlans()
    plans = _plans()
    differing = {plan.id: _misses(plan) for plan in plans}
    verified = {plan.id: _verification(plan) for plan in plans}
    if as_json:
        print_json([
            {"id": plan.id, "model": plan.model_name, "origin": plan.origin, "created_at": plan.evidence.created_at,
             "choices": plan.choices.model_dump(), "tokens_per_second": plan.evidence.best_tokens_per_second,
             "device": plan.key.device, "differs_here": differing[plan.id],
             "path": str(shipped.path(plan) if plan.origin == "shipped" else store.path(plan.key)),
             "verification": None if (known := verified[plan.id]) is None else known.model_dump()}
            for plan in plans
        ])  # fmt: skip
        return
    if not plans:
        say(f"no plans in {store.folder}; `fastft tune MODEL` makes one")
        return
    rows = [
        [plan.id, plan.model_name or "?", f"{plan.origin} {age(plan.evidence.created_at)}",
         f"{plan.evidence.best_tokens_per_second or 0:,.0f}", plan.choices.summary(),
         f"no: {', '.join(differing[plan.id])}" if differing[plan.id] else
         f"yes, {describe_verification(verified[plan.id])}" if plan.origin == "shipped" else "yes"]
        for plan in plans
    ]  # fmt: skip
    print_table(["ID", "MODEL", "ORIGIN", "TOKENS/S", "CHOICES", "FITS HERE"], rows)


def show(id: Annotated[str, typer.Argument(metavar="ID", help=PLAN_OR_FILE)], as_json: JsonFlag = False) -> None:
    """Show a plan: for what it holds, its choices and what decided each, everything that was tried."""
    plan = _find(id)
    if as_json:
        print_json({"id": plan.id, **plan.model_dump()})
        return
    evidence = plan.evidence
    print_line(f"plan {plan.id}: {plan.choices.summary()}")
    origin = "made" if _is_file(id) else plan.origin
    print_line(f"{origin} {age(evidence.created_at)} ({evidence.created_at or 'no date'}) by {evidence.command or '?'}")
    if plan.origin == "shipped" and not _misses(plan):
        known = _verification(plan)
        print_line(describe_verification(known) + (f": {known.detail}" if known is not None else ""))
    print_line("")
    print_table(["  FIELD", "VALUE"], [[f"  {name}", _shown(value)] for name, value in _flat(plan.key).items()])
    print_line("")
    print_table(["  CHOICE", "VALUE", "BECAUSE"], [[f"  {name}", *rest] for name, *rest in reasons(plan)])
    print_line("")
    rows = [
        [f"  {trial.choices.summary()}", trial.verdict.replace("_", " "),
         "" if trial.tokens_per_second is None else f"{trial.tokens_per_second:,.0f}",
         "" if trial.peak_bytes is None else gib(trial.peak_bytes)]
        for trial in evidence.trials
    ]  # fmt: skip
    print_table(["  TRIED", "VERDICT", "TOKENS/S", "PEAK"], rows)
    if evidence.kernels:
        print_line("")
        kernels = [
            [f"  {trial.bucket} {shown_launch(trial.launch)}", trial.verdict.replace("_", " "),
             f"{min(trial.microseconds):,.1f}" if trial.microseconds else ""]
            for trial in evidence.kernels
        ]  # fmt: skip
        print_table(["  LAUNCH TRIED", "VERDICT", "µS"], kernels)


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help=PLAN_OR_FILE)],
    second: Annotated[
        str | None, typer.Argument(metavar="B", help="Another one; without it, this machine as it is now.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Name the fields in which two plans differ.

    With one plan, name those in which it differs from this machine: why it does not hold here.
    """
    plan = _find(first)
    other = None if second is None else _find(second)
    differences = _differences(plan.key, other.key if other else _key_here(plan.key))
    if other is not None:
        mine, theirs = plan.choices.model_dump(), other.choices.model_dump()
        differences += [(f"choices.{name}", mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]]
    if as_json:
        print_json({name: [mine, theirs] for name, mine, theirs in differences})
        return
    right = HERE if other is None else other.id
    if not differences:
        say(f"plan {plan.id} holds here" if other is None else "the two plans are for the same and choose the same")
        return
    print_table(["FIELD", plan.id, right], [[name, _shown(mine), _shown(theirs)] for name, mine, theirs in differences])


def export(
    id: PlanArgument,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to write.")],
    force: ForceFlag = False,
) -> None:
    """Write a plan to a file, to be imported elsewhere."""
    plan = find_plan(_plans(), id)
    PlanStore().export(plan, path, force=force)
    print_line(f"plan {plan.id} written to {path}")


def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A plan file.")],
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Check a plan file and keep it, labelled imported."""
    store = PlanStore()
    plan = store.import_file(path, force=force)
    differing = _differences(plan.key, _key_here(plan.key))
    if as_json:
        kept = str(store.path(plan.key))
        print_json({"id": plan.id, "path": kept, "differs_here": [name for name, *_ in differing]})
        return
    print_line(f"plan {plan.id} imported: {plan.choices.summary()}")
    if differing:
        names = ", ".join(name for name, *_ in differing)
        say(f"warning: it does not hold on this machine, which differs in {names}; see fastft plan diff {plan.id[:8]}")


def verify(as_json: JsonFlag = False) -> None:
    """Check every file in the cache, and those that are shipped: schema, checksum, name."""
    store = PlanStore()
    checked = [*store.verify(), *ShippedPlans().verify()]
    if as_json:
        print_json({str(path): problem for path, problem in checked})
    else:
        for path, problem in checked:
            print_line(f"{'ok ' if problem is None else 'bad'} {path}" + (f": {problem}" if problem else ""))
        if not checked:
            say(f"no plans in {store.folder}")
    bad = [path for path, problem in checked if problem is not None]
    if bad:
        raise PlanError(f"{len(bad)} of {len(checked)} plans are bad", fix="tune again; a run uses no bad file")


def prune(
    older_than: Annotated[float | None, typer.Option(metavar="DAYS", help="Remove plans older than this.")] = None,
    stale: Annotated[
        bool, typer.Option("--stale", help="Remove plans of this device made with other software or kernels.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove plans that are old or outdated from the cache."""
    if older_than is None and not stale:
        raise ConfigError("prune needs to know what to remove", got="neither", allowed=["--older-than DAYS", "--stale"],
                          fix="name one")  # fmt: skip
    if older_than is not None and older_than < 0:
        raise ConfigError("--older-than is not valid", got=older_than, allowed="0 and more days", fix="correct it")
    removed = PlanStore().prune(older_than, stale=_outdated if stale else None)
    if as_json:
        print_json([plan.id for plan in removed])
        return
    for plan in removed:
        print_line(f"removed {plan.id}: {plan.model_name or '?'}, {plan.origin} {age(plan.evidence.created_at)}")
    say(f"{len(removed)} plans removed")


def _find(name: str) -> Plan:
    """A plan by its id, or a plan file."""
    return read_foreign_plan(Path(name)) if _is_file(name) else find_plan(_plans(), name)


def _is_file(name: str) -> bool:
    """Whether a file is meant, not an id."""
    return Path(name).suffix == ".json" or Path(name).is_file()


def _plans() -> list[Plan]:
    """Those of the cache, then the shipped ones; an id stands for the first that has it."""
    plans = [*PlanStore().entries(), *ShippedPlans().entries()]
    return list({plan.id: plan for plan in reversed(plans)}.values())[::-1]


def _misses(plan: Plan) -> list[str]:
    """The fields for which a plan is not followed on this machine."""
    here = _key_here(plan.key)
    if plan.origin == "shipped" and set(plan.key.difference(here)) <= MAY_DIFFER:
        return []
    return [name for name, *_ in _differences(plan.key, here)]


def _verification(plan: Plan) -> Verification | None:
    """What is known on this machine about a shipped plan."""
    return Verifications().load(_key_here(plan.key), plan) if plan.origin == "shipped" else None


def _key_here(key: PlanKey) -> PlanKey:
    """`key` with what belongs to the machine replaced by this machine's: device, software, kernels."""
    kind = "cpu" if key.compute_capability is None else "cuda"
    try:
        device = detect_device(kind)
    except BackendError:
        device = detect_device()
    mine = plan_key(RunConfig(), SHAPES["toy-llama"], device)  # of which only the machine's fields are taken
    machine = ("device", "compute_capability", "multiprocessors", "device_memory_bytes", "versions", "kernels_sha256",
               "world_size", "search_space")  # fmt: skip
    return key.model_copy(update={name: getattr(mine, name) for name in machine})


def _outdated(plan: Plan) -> bool:
    """Whether a plan is for this device, but for software or kernels that are not here any more."""
    names = {name.partition(".")[0] for name, *_ in _differences(plan.key, _key_here(plan.key))}
    return bool(names) and names <= {"versions", "kernels_sha256", "search_space"}


def _differences(mine: PlanKey, theirs: PlanKey) -> list[tuple[str, Any, Any]]:
    """(field, mine, theirs) of every differing field, nested ones by their path."""
    left, right = _flat(mine), _flat(theirs)
    names = dict.fromkeys((*left, *right))
    return [(name, left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)]


def _flat(key: PlanKey) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in key.model_dump().items():
        flat |= {f"{name}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 2**30:
        return gib(value)
    return shown(value)
