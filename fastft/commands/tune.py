"""`fastft tune`: measure this device once and keep the fastest plan that trains the same thing."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastft.commands.flags import KEY_FLAGS, JsonFlag, run_flags
from fastft.commands.gradient_gate import GradientGate
from fastft.config import RunConfig
from fastft.console import Meter, keeping, print_json, print_line, print_table, progress, say
from fastft.errors import ConfigError, PlanError
from fastft.hardware import Device, detect_device
from fastft.models.shapes import SHAPES, ModelShape
from fastft.plan import Evidence, Plan
from fastft.plan_store import PlanStore
from fastft.planning import model_shape, plan_key, tune_command
from fastft.siblings import import_sibling
from fastft.units import age, gib

if TYPE_CHECKING:
    from autotune.explain import UnderCap
    from autotune.phases import Progress
    from autotune.search import DryRun, TuneResult


@run_flags(*KEY_FLAGS)
def tune(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A local folder, a hub name, a shipped shape, or tiny.")
    ] = None,
    model_flag: Annotated[str | None, typer.Option("--model", help="The same as MODEL.", hidden=True)] = None,
    effort: Annotated[
        str, typer.Option(metavar="quick|full|exhaustive", help="How much is tried: minutes, more, or everything.")
    ] = "quick",
    max_minutes: Annotated[
        float | None,
        typer.Option(help="Measure nothing that would end later; on a GPU quick has 5, full 15 by default."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be tried, and its cost.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only say what the plan would be under other memory caps.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Measure again even if there is a plan.")] = False,
    as_json: JsonFlag = False,
    **run: Any,
) -> None:
    """Measure this device; keep the fastest plan for a model.

    Every later run with the same model, adapter, batch and length follows the plan; a second call returns it from
    the cache.  The plan changes how training is computed, never what is trained: before it is kept, its gradients
    are compared with those of stock PEFT.
    """
    config = RunConfig.load(model=_one_model(model, model_flag), **run)
    if max_minutes is not None and not max_minutes > 0:
        raise ConfigError("--max-minutes is not valid", got=max_minutes, allowed="more than 0", fix="leave it out")
    device, store = detect_device(config.device), PlanStore()
    shape = model_shape(config, store.cache)
    if dry_run:
        _list_candidates(config, effort, store, shape, device, as_json)
        return
    if explain:
        _explain(config, store, shape, device, as_json)
        return
    with progress() as meter:
        result = tune_verified(
            config, meter, effort=effort, max_minutes=max_minutes, force=force, store=store, shape=shape, device=device
        )
    plan, path = result.plan, store.path(result.plan.key)
    if as_json:
        print_json({"cached": result.cached, "id": plan.id, "path": str(path), "plan": plan.model_dump()})
        return
    print_line(f"plan {plan.id}: {plan.choices.summary()}")
    evidence = plan.evidence
    origin = f"from the cache, {plan.origin} {age(evidence.created_at)}" if result.cached else (
        f"tuned in {evidence.seconds:,.0f} s, {_measurements(evidence)}"
    )  # fmt: skip
    print_line("; ".join([origin, *_speeds(plan)]))
    if evidence.out_of_time:
        print_line("the time was over before everything was tried; --force and more --max-minutes go on")
    print_line(f"kept in {path}; `fastft train` with the same model and settings follows it")


def tune_verified(
    config: RunConfig,
    meter: Meter,
    *,
    effort: str = "quick",
    max_minutes: float | None = None,
    force: bool = False,
    store: PlanStore | None = None,
    shape: ModelShape | None = None,
    device: Device | None = None,
) -> "TuneResult":
    """`autotune.search.tune` with a meter, and with the bench's parity gate on what wins.

    Raises:
        FastftError: as `autotune.search.tune`.
    """
    store, device = store or PlanStore(), device or detect_device(config.device)
    shape = shape or model_shape(config, store.cache)
    key = plan_key(config, shape, device)
    meter.update(f"tuning {config.model} on {device.name}")
    kept = "what was measured is kept, and the same command goes on from there"
    with keeping(kept), GradientGate(config, key, meter) as gate:

        def on_progress(progress: "Progress") -> None:
            if device.kind == "cuda" and progress.phase != "waiting":
                gate.begin()  # while the device is busy; on a CPU it would disturb what is measured
            _show(progress, meter)

        result: TuneResult = import_sibling("autotune.search").tune(
            config, effort=effort, max_minutes=max_minutes, force=force, store=store, shape=shape, device=device,
            on_progress=on_progress, verify_plan=gate.agrees,
        )  # fmt: skip
    return result


def _one_model(model: str | None, flag: str | None) -> str:
    if (model is None) == (flag is None):
        raise ConfigError(
            "tune needs one model", got="none" if model is None else f"{model} and --model {flag}",
            allowed=["tiny", *SHAPES, "a local folder", "a hub name (owner/name)"],
            fix="write it like `fastft tune tiny`",
        )  # fmt: skip
    return model or flag or ""


def _list_candidates(
    config: RunConfig, effort: str, store: PlanStore, shape: ModelShape, device: Device, as_json: bool
) -> None:
    dry: DryRun = import_sibling("autotune.search").dry_run(
        config, effort=effort, store=store, shape=shape, device=device
    )
    if as_json:
        print_json(asdict(dry) | {"candidates": [choices.model_dump() for choices in dry.candidates]})
        return
    for number, choices in enumerate(dry.candidates, 1):
        print_line(f"{number:3}. {choices.summary()}{' (the default)' if number == 1 else ''}")
    basis = "as earlier ones took here" if dry.probe_seconds_measured else "assumed, none was measured here yet"
    kernels = f", and {dry.kernel_seconds:.0f} s for launches of kernels" if dry.kernel_seconds else ""
    most = "any number of" if dry.probes is None else f"at most {dry.probes}"
    print_line(f"{len(dry.candidates)} uniform candidates on {device.name}, fewer where one rules out others")
    print_line(
        f"{most} measurements, mixed placements, refinements and repetitions included, of {dry.probe_seconds:.0f} s "
        f"each ({basis}){kernels}"
    )
    ends = "when all was tried" if dry.minutes is None else f"after {_duration(60 * dry.minutes)} at most"
    print_line(f"it ends {ends}; nothing was measured now")


def _explain(config: RunConfig, store: PlanStore, shape: ModelShape, device: Device, as_json: bool) -> None:
    """What the plan would be under other caps."""
    plan = store.load(plan_key(config, shape, device))
    if plan is None:
        raise PlanError("there is no plan to explain", got="none for this run", fix=f"tune it: {tune_command(config)}")
    ladder: list[UnderCap] = import_sibling("autotune.explain").explain(plan, config, shape, device)
    if as_json:
        print_json([asdict(rung) | {"choices": rung.choices.model_dump()} for rung in ladder])
        return
    print_line(f"plan {plan.id}: {plan.choices.summary()}")
    rows = [
        (
            gib(rung.cap_bytes),
            f"{rung.tokens_per_second:,.0f}",
            gib(rung.peak_bytes),
            rung.basis,
            rung.choices.summary(),
        )
        for rung in ladder
    ]
    print_table(("from a cap of", "tokens/s", "peak", "basis", "choices"), rows)
    if any(rung.basis == "predicted" for rung in ladder):
        say("predicted: solved from what layers cost in the plan's trials; tuning under that --memory-cap measures it")


def _show(progress: "Progress", meter: Meter) -> None:
    """One event of the tuner on the meter."""
    if progress.phase == "waiting":
        meter.line("another tuning runs on this device; waiting for it to end")
        return
    if progress.phase == "kernels":
        meter.update(f"comparing launches of {progress.total} kernels", progress.index, progress.total)
    if progress.choices is None:
        return
    rate = progress.best.tokens_per_second if progress.best is not None else None
    best = f"; best so far {rate:,.0f} tokens/s" if rate is not None else ""
    left = f", {_duration(progress.eta_seconds)} left" if progress.eta_seconds else ""
    done = progress.index - (progress.trial is None)
    number = f"{progress.phase}, {progress.index} of up to {progress.total}"
    text = f"{number}{left}: {progress.choices.summary()}{best}"
    meter.update(text, done, progress.total)
    trial = progress.trial
    if trial is None:
        return
    outcome = trial.verdict.replace("_", " ")
    if trial.verdict == "ok":
        outcome = f"{trial.tokens_per_second or 0:,.0f} tokens/s"
        if trial.peak_bytes is not None:
            outcome += f", peak {gib(trial.peak_bytes)}"
    elif trial.detail:
        outcome += f": {trial.detail.splitlines()[0][:160]}"
    meter.line(f"{number}: {trial.choices.summary()}: {outcome}")


def _measurements(evidence: Evidence) -> str:
    """`7 measurements`, and how many of other tunings were of use."""
    reused = sum(trial.reused for trial in evidence.trials)
    count = f"{len(evidence.trials) - reused} measurements"
    return f"{count}, {reused} more from tuning under other memory caps" if reused else count


def _speeds(plan: Plan) -> list[str]:
    best, default = plan.evidence.best_tokens_per_second, plan.evidence.default_tokens_per_second
    if best is None:
        return []
    words = [f"{best:,.0f} tokens/s"]
    if default is not None:
        stood = plan.evidence.trials and plan.evidence.trials[0].choices == plan.choices
        words[0] += ", which is what the default does" if stood else f", {best / default:.2f}× the default"
    peaks = [t.peak_bytes for t in plan.evidence.trials if t.choices == plan.choices and t.peak_bytes is not None]
    return [*words, f"peak {gib(max(peaks))}"] if peaks else words


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
