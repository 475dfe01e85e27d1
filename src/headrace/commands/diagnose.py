"""``headrace diagnose``: what binds a training step, what to change, and what that brings.

It opens the model as its stage would, trains it for some seconds on the encoded shards, and throws
it away. docs/diagnose.md says what each line means.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from headrace.commands.forecast import RUN_BYTES
from headrace.commands.settings import read_settings
from headrace.commands.views import encoded_views
from headrace.memory import format_bytes
from headrace.models.protocol import streaming_kind
from headrace.project import Project
from headrace.storage import write_json

if TYPE_CHECKING:
    from headrace.training.diagnosis import Diagnosis, Proposal
    from headrace.training.variants import Variant

_SPLIT = "train"
_KEPT = {  # what a change does to the result
    "batch_rows": "changes the weights: compare the metrics before you keep it",
    "threads": "changes the weights' last bits",
    "workers": "leaves the weights as they are",
    "transfer": "leaves the weights as they are",
}


def diagnose(
    project: Project,
    model: str,
    *,
    check: bool,
    steps: bool,
    json: Path | None,
    console: Console,
    seconds: float = 0.3,
) -> None:
    """Measure the training loop of ``model`` and print where its time goes.

    ``check``: run the best proposal. ``steps``: compare other ways to run a step.
    ``seconds``: for one measurement.

    Raises:
        ConfigError: if there is no such model, or it does not train from shards.
        DependencyError: if the device of the model's section is not there.
        IntegrityError: if ``encode`` has not run, or what it wrote is damaged.
    """
    settings = read_settings(project)
    kind = streaming_kind(model)
    params: Any = settings.section(f"train@{model}")
    resources = settings.resources
    views = encoded_views(project.data("reduce"), project.data("encode"), project.cache)

    from headrace.training.device import pick_device, torch_threads
    from headrace.training.diagnosis import Setting
    from headrace.training.diagnosis import diagnose as measure

    device = pick_device(params.device)

    def open_learner(setting: Setting) -> Any:
        changed = {
            "batch_rows": setting.batch_rows,
            "threads": setting.threads,
            "transfer": setting.transfer,
        }
        return kind.open_learner(
            views,
            params.model_copy(update=changed),
            resources=resources.model_copy(update={"workers": setting.workers}),
        )

    found = measure(
        open_learner,
        Setting(params.batch_rows, params.threads, resources.workers, params.transfer),
        params,
        device=device,
        files=[path for path in sorted((views.encoded / _SPLIT).rglob("*")) if path.is_file()],
        budget_bytes=resources.memory_budget,
        around_bytes=RUN_BYTES,
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        check=check,
        seconds=seconds,
        copy=(lambda batch: batch.to(device)) if device.type == "cuda" else None,
        arrives=True,
        travels=(lambda learner: learner.there.choice.mode) if device.type == "cuda" else None,
    )
    print_diagnosis(found, model, console)
    told = as_json(found, model)
    if steps:
        with torch_threads(found.setting.threads):
            told["variants"] = _compare_steps(open_learner(found.setting), device, console)
    if json is not None:
        write_json(json, told)


def print_diagnosis(found: "Diagnosis", model: str, console: Console) -> None:
    """Print the stages as a table, then what binds, what to change, and the memory."""
    setting = found.setting
    console.print(
        f"{model} on {found.device}: {found.num_rows:,} rows in batches of {setting.batch_rows:,}, "
        f"{_count(setting.threads, 'thread')}, {_count(setting.workers, 'worker')}",
        highlight=False,
    )
    console.print(_table(found))
    for line in _sentences(found, model):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def as_json(found: "Diagnosis", model: str) -> dict[str, Any]:
    """Return all figures, the derived ones included, as JSON values; seconds and bytes."""
    told = asdict(found)
    told["model"] = model
    told["binding"] = found.binding.name
    told["seconds"] = found.seconds
    for stage, entry in zip(found.stages, told["stages"], strict=True):
        entry["share"] = stage.seconds / found.seconds
        entry["reach"] = stage.reach
    told["memory"]["most_rows"] = found.memory.most_rows
    if found.check is not None:
        told["check"] |= {"predicted": found.check.predicted, "error": found.check.error}
    return told


def _compare_steps(learner: Any, device: Any, console: Console) -> list[dict[str, Any]]:
    from headrace.training.variants import step_variants

    try:
        batch = next(iter(learner.batches(0, used=0))).to(device)
        found = step_variants(learner, batch)
    finally:
        learner.close()
    for one in found:
        console.print(_variant(one), highlight=False, soft_wrap=True)
    return [asdict(one) for one in found]


def _variant(one: "Variant") -> str:
    parts = [f"{one.rows_per_s:,.0f} rows/s"]
    if one.launches is not None:
        parts.append(f"{one.launches} launches")
    if one.peak_bytes is not None:
        parts.append(f"{format_bytes(one.peak_bytes)} at its peak")
    same = "the same bits" if one.is_equal else f"{one.max_difference:.1g} off at most"
    return f"{one.name} step: {', '.join(parts)}; loss and gradients {same}"


def _table(found: "Diagnosis") -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("stage", no_wrap=True)
    table.add_column("ms a step", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("ceiling", no_wrap=True)
    table.add_column("reaches", justify="right", no_wrap=True)
    table.add_column("")
    for stage in found.stages:
        reach = "" if stage.reach is None else f"{stage.reach:.0%}"
        table.add_row(
            stage.name,
            f"{1e3 * stage.seconds:.3f}",
            f"{stage.seconds / found.seconds:.0%}",
            stage.ceiling,
            reach,
            stage.note,
        )
    rate = f"{(found.setting.batch_rows or 0) / found.seconds:,.0f} rows/s"
    table.add_row("a step", f"{1e3 * found.seconds:.3f}", "100%", "", "", rate)
    return table


def _sentences(found: "Diagnosis", model: str) -> Iterator[str]:
    binding = found.binding
    yield (
        f"binding: {binding.name}, {binding.seconds / found.seconds:.0%} of a step; "
        f"computing twice the rows takes {found.double:.2f} times as long"
    )
    if found.num_kernels is not None:
        yield f"kernels launched: {found.num_kernels} a step"
    if not found.proposals:
        yield "next setting: none; nothing the loop has would bring 5 %"
    for place, proposal in enumerate(found.proposals):
        start = "next setting:" if not place else "or:"
        yield (
            f"{start} {_change(proposal, model)}, predicted {proposal.gain:.2f} times the rows/s "
            f"({_KEPT[proposal.field]})"
        )
    if found.check is not None:
        check = found.check
        error = f"{abs(check.error):.0%} {'high' if check.error > 0 else 'low'}"
        yield (
            f"checked: {check.rate_then:,.0f} rows/s beside {check.rate_now:,.0f}, "
            f"{check.rate_then / check.rate_now:.2f} times; predicted {check.predicted:,.0f}, "
            f"{error}"
        )
    yield from _memory(found)


def _memory(found: "Diagnosis") -> Iterator[str]:
    memory = found.memory
    yield (
        f"memory of a step: {format_bytes(memory.peak_bytes)} at its peak, and "
        f"{format_bytes(memory.state_bytes)} of weights, gradients and optimiser; with "
        f"{memory.tried_rows:,} rows {format_bytes(memory.tried_bytes)}, "
        f"{format_bytes(memory.step.at(memory.tried_rows))} foretold from smaller batches"
    )
    yield (
        f"host: this process holds {format_bytes(memory.held_bytes)}, the rest of a run "
        f"{format_bytes(memory.around_bytes)}; the largest batch that fits "
        f"`resources.memory_budget` of {format_bytes(memory.budget_bytes)} has "
        f"{memory.most_rows:,} rows"
    )
    if memory.device_peak_bytes is not None:
        yield (
            f"device: {format_bytes(memory.device_peak_bytes)} at the peak of a step, "
            f"{format_bytes(memory.device_reserved_bytes or 0)} reserved, of "
            f"{format_bytes(memory.device_total_bytes or 0)}"
        )


def _change(proposal: "Proposal", model: str) -> str:
    value = getattr(proposal.setting, proposal.field)
    section = "resources" if proposal.field == "workers" else f"train.{model}"
    return f"{section}.{proposal.field}: {value}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
