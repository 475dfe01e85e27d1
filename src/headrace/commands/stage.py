"""Run one stage in this process, as DVC does: ``headrace stage NAME``.

This is the one place where a stage meets the world: it gets its paths, its section, the resources
and a recorder that writes the journal; it is watched for memory; it dies with its parent; and what
stops it ends in one line, an exit code and a failure file (DVC swallows exit codes).

Under torchrun several of these processes run one stage. The first keeps the journal and writes;
the others help it train (``training/distributed.py``) and tell nobody anything.
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from headrace.commands.checkpoints import (
    checkpoint_folder,
    own_folder,
    remove_checkpoints,
    require_resumable,
    stage_entry,
)
from headrace.commands.failure import clear_failure, write_failure
from headrace.commands.scaffold import locked_digest
from headrace.commands.settings import Settings, read_settings
from headrace.commands.supervise import die_with_parent
from headrace.errors import (
    ConfigError,
    HeadraceError,
    ResourceError,
    Stopped,
    explain,
    nearest,
)
from headrace.lineage import code_digest, stage_modules
from headrace.memory import MemoryWatch, format_bytes, held_bytes
from headrace.params import Resources, Section, read_yaml
from headrace.project import CODE_LOCK, EMBEDDING_CATBOOST, Project
from headrace.record import MemoryRecorder, Recorder
from headrace.storage import sweep
from headrace.tracking.journal import open_stage

if TYPE_CHECKING:
    from headrace.training.distributed import Launch, Ranks

PLAIN_STAGES = (
    "raw", "watermark", "extract", "reduce", "encode", "stack", "decide", "interpret", "evaluate",
    "publish",
)  # fmt: skip
SETTINGS = "settings/"  # begins the names of a model's settings among the params of its run
_GRACE_S = 10.0  # native code may take this long to come back to Python; then the process ends


def run_stage(project: Project, stage: str, *, resume: Path | None = None) -> Any:
    """Run ``stage`` of ``project`` to its end and return its result; None on a rank that helped.

    ``resume`` is a checkpoint that a training stage has to start from.

    Raises:
        ConfigError: if there is no such stage, or ``resume`` does not belong to it.
        HeadraceError: whatever the stage refuses; ``Stopped`` on SIGINT or SIGTERM.
    """
    die_with_parent()
    launch = _launch()
    if launch is not None and launch.rank > 0:
        return _assist(project, stage, launch)
    clear_failure(project, stage)
    try:
        return _run(project, stage, launch, resume)
    except BaseException as error:
        message, exit_code = explain(error)
        write_failure(project, stage, exit_code, message)
        raise


def _run(project: Project, stage: str, launch: "Launch | None", resume: Path | None) -> Any:
    settings, section = _settings(project, stage, launch)
    if resume is not None:
        require_resumable(stage, _resumable(settings))
    family = _family(launch)
    resources = _resources(settings.resources, family, launch)
    stopping = _Stopper(project, stage, f"stage {stage}")
    with stopping as stopper, open_stage(project.journal, stage) as journal:
        if stage in settings.members.values():
            journal.params(model_settings(section))
        with _watch(family, settings.resources.memory_budget, stopper) as watch:
            try:
                with _joined(launch):
                    result = call_stage(
                        project, stage, settings, section, resources, journal, resume
                    )
            finally:
                journal.peak_bytes = watch.peak_bytes
        return result


def model_settings(section: Section) -> dict[str, str]:
    """Return the settings of a model as its run records them: what replicates have in common."""
    return {
        f"{SETTINGS}{name}": json.dumps(value)
        for name, value in section.model_dump(mode="json").items()
    }


def _assist(project: Project, stage: str, launch: "Launch") -> None:
    """Help the first rank with ``stage``; what is told here, that one tells too."""
    from headrace.stages.train import assist

    settings, section = _settings(project, stage, launch)
    family = _family(launch)
    resources = _resources(settings.resources, family, launch)
    table, encoded = project.data("reduce"), project.data("encode")
    entry = stage_entry(project, stage, section, [table, encoded])
    with _Stopper(project, stage, f"stage {stage}") as stopper, ExitStack() as stack:
        if launch.local_rank == 0:  # the first of this machine, whose memory it watches
            stack.enter_context(_watch(family, settings.resources.memory_budget, stopper))
        stack.enter_context(_joined(launch))
        assist(
            table,
            encoded,
            section,
            model=stage.partition("@")[2],
            cache=project.cache,
            checkpoints=own_folder(project, stage, entry),  # the first rank looks after it
            resources=resources,
            recorder=MemoryRecorder(),
        )


def _launch() -> "Launch | None":
    if os.environ.get("WORLD_SIZE", "1") == "1":  # torch need not be loaded to know it
        return None
    from headrace.training.distributed import read_launch

    return read_launch(os.environ)


def _joined(launch: "Launch | None") -> "AbstractContextManager[Ranks | None]":
    if launch is None:
        return nullcontext()
    from headrace.training.distributed import joined

    return joined(launch)


def _settings(project: Project, stage: str, launch: "Launch | None") -> tuple[Settings, Section]:
    settings = read_settings(project)
    _require_known(stage, settings)
    if launch is not None:
        _require_shareable(stage, launch)
    require_locked_code(project, stage)
    return settings, settings.section(stage)


def _require_shareable(stage: str, launch: "Launch") -> None:
    from headrace.models.protocol import KINDS

    able = [f"train@{name}" for name, kind in KINDS.items() if kind.can_share]
    if stage not in able:
        raise ConfigError(
            f"stage {stage} was started by torchrun as {launch.size} processes, which only "
            f"{', '.join(able)} can share; run `headrace stage {stage}` instead"
        )


def _family(launch: "Launch | None") -> int:
    """The process whose descendants are the run on this machine: ours, torchrun's, or the flow."""
    is_torchrun = launch is not None and launch.has_agent
    return int(os.environ.get("HEADRACE_RUN_PID", os.getppid() if is_torchrun else os.getpid()))


def _resources(resources: Resources, family: int, launch: "Launch | None") -> Resources:
    left = _what_is_left(resources, held_bytes(family))
    if launch is None:
        return left
    return left.model_copy(update={"memory_budget": left.memory_budget // launch.local_size})


def _watch(family: int, budget: int, stopper: "_Stopper") -> MemoryWatch:
    return MemoryWatch(
        family,
        budget_bytes=budget,
        on_excess=lambda held: stopper.stop_with(_over_budget(stopper.what, held, budget)),
    )


@dataclass(frozen=True)
class Guard:
    """What a command may use, and what became of it so far."""

    resources: Resources
    stopper: "_Stopper"
    watch: MemoryWatch

    @property
    def is_stopping(self) -> bool:
        """Whether the error that is on its way ends the command."""
        return self.stopper.is_stopping


@contextmanager
def guarded(project: Project, name: str, resources: Resources) -> Iterator[Guard]:
    """Watch over a command that fits models, as over a stage: signals and memory end it in order.

    Raises:
        Stopped: on SIGINT or SIGTERM.
        ResourceError: if it holds more than the memory budget.
    """
    left = _what_is_left(resources, held_bytes(os.getpid()))
    stopper = _Stopper(project, name, name)
    with stopper, _watch(os.getpid(), resources.memory_budget, stopper) as watch:
        yield Guard(left, stopper, watch)


def require_locked_code(project: Project, stage: str) -> None:
    """Refuse to run ``stage`` with other code than headrace.lock names, where there is one.

    Raises:
        ConfigError: if the code differs; ``headrace upgrade`` accepts the installed code.
    """
    path = project.root / CODE_LOCK
    if not path.is_file():
        return
    if locked_digest(read_yaml(path), stage) != code_digest(*stage_modules(stage)):
        raise ConfigError(
            f"the installed headrace has other code for stage {stage} than {CODE_LOCK} names; "
            f"run `headrace upgrade` to go on with the installed one"
        )


class _Stopper:
    """Turns SIGINT, SIGTERM and a memory excess into one exception in the main thread."""

    def __init__(self, project: Project, name: str, what: str) -> None:
        self.what = what  # in words
        self.is_stopping = False
        self._project = project
        self._name = name
        self._error: HeadraceError = Stopped(
            f"{what} was stopped; run again to resume: what is finished and checkpoints stay"
        )

    def __enter__(self) -> "_Stopper":
        self._before = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop_with(self, error: HeadraceError) -> None:
        """Stop the stage with ``error`` from any thread; by force if Python is not reached."""
        self._error = error
        os.kill(os.getpid(), signal.SIGTERM)
        timer = threading.Timer(_GRACE_S, self._force)
        timer.daemon = True
        timer.start()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if not self.is_stopping:  # a second signal must not cut the orderly stop short
            self.is_stopping = True
            raise self._error

    def _force(self) -> None:
        write_failure(self._project, self._name, self._error.exit_code, str(self._error))
        os._exit(self._error.exit_code)


def call_stage(
    project: Project,
    stage: str,
    settings: Settings,
    section: Section,
    resources: Resources,
    recorder: Recorder,
    resume: Path | None,
) -> Any:
    """Call the function of ``stage`` with the folders and the section that it takes."""
    from importlib import import_module

    name, _, model = stage.partition("@")
    run = getattr(import_module(f"headrace.stages.{name}"), name)
    out, data = project.data(stage), project.data
    told: dict[str, Any] = {"resources": resources, "recorder": recorder}
    if name == "raw":
        return run(out, section, **told)
    if name == "watermark":
        return run(project.root, out, settings.section("extract"), **told)
    if name == "extract":
        with _scratch(project, stage) as scratch:
            return run(project.root, out, section, scratch=scratch, **told)
    if name == "reduce":
        return run(data("extract"), out, section, **told)
    if name == "encode":
        return run(data("reduce"), out, section, **told)
    table, encoded = data("reduce"), data("encode")
    if name in ("train", EMBEDDING_CATBOOST):
        inputs = [table, encoded] if name == "train" else [table, encoded, data("train@nn")]
        entry = stage_entry(project, stage, section, inputs)
        checkpoints = checkpoint_folder(project, stage, entry, resume=resume, recorder=recorder)
        told |= {"cache": project.cache, "checkpoints": checkpoints}
        if name == "train":
            told["model"] = model
        result = run(*inputs, out, section, **told)
        remove_checkpoints(checkpoints, resume=resume)
        return result
    members = {member: data(maker) for member, maker in settings.members.items()}
    if name == "stack":
        return run(table, members, out, section, **told)
    if name == "decide":
        return run(table, members, data("stack"), out, section, **told)
    if name == "evaluate":
        profile = data("extract") / "profile.json"
        told |= {"root": project.root, "profile": profile, "interpretation": data("interpret")}
        told["decisions"] = data("decide")
        return run(table, members, data("stack"), out, section, **told)
    if name == "interpret":
        return run(table, encoded, members, data("stack"), out, section, **told)
    return run(table, encoded, members, data("stack"), data("decide"), out, section, **told)


def _require_known(stage: str, settings: Settings) -> None:
    known = [*PLAIN_STAGES, *settings.members.values()]
    if stage not in known:
        hint = nearest(stage, known) or f"; known: {', '.join(known)}"
        raise ConfigError(f"{stage!r} is not a stage of this project{hint}")


def _resumable(settings: Settings) -> list[str]:
    """Return the stages that take a checkpoint: those of models trained by our own loop."""
    from headrace.models.protocol import model_section
    from headrace.training.params import TrainingParams

    return [
        f"train@{model}"
        for model in settings.models
        if issubclass(model_section(model), TrainingParams)
    ]


def _what_is_left(resources: Resources, held: int) -> Resources:
    """Give the stage what the rest of the run (flow, server, DVC, this interpreter) leaves."""
    left = resources.memory_budget - held
    if left <= 0:
        raise ResourceError(
            f"`resources.memory_budget` is {format_bytes(resources.memory_budget)}, but the run "
            f"holds {format_bytes(held)} before the stage starts; set at least "
            f"{format_bytes(2 * held)}"
        )
    return resources.model_copy(update={"memory_budget": left})


def _over_budget(what: str, held: int, budget: int) -> ResourceError:
    return ResourceError(
        f"{what} was stopped: the run held {format_bytes(held)}, more than "
        f"`resources.memory_budget` of {format_bytes(budget)} allows; raise it in params.yaml"
    )


@contextmanager
def _scratch(project: Project, stage: str) -> Iterator[Path]:
    sweep(project.scratch)
    folder = project.scratch / f".new-{stage}.{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)  # of a killed stage that had the same pid
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
