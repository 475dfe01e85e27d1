"""``headrace schedule``: the flow, run by the clock, for as long as this command lives.

A Prefect server decides when a run is due: the one that ``PREFECT_API_URL`` names, or one started
here on the project's own database. That a run is really due is asked of the server before we say
so: with a wrong set of packages its scheduler fails silently.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zoneinfo import ZoneInfo, available_timezones

from rich.console import Console

from headrace.commands.pipeline import environment, last_line, read_dag, use_without_git
from headrace.commands.servers import (
    PREFECT_PORT,
    ask,
    prefect_api,
    prefect_environment,
)
from headrace.commands.supervise import Child, Group, stop_on_signals
from headrace.errors import ConfigError, DependencyError, Stopped, nearest
from headrace.project import Project
from headrace.storage import digest_bytes

FLOW = "headrace"
_SERVE_GRACE_S = 40.0  # as long as a flow may take to stop its stages
_DUE_TIMEOUT_S = 120.0
_POLL_S = 0.5


@dataclass(frozen=True)
class Scheduled:
    """A deployment that the server has runs for: its name, the API, when the next run is due."""

    deployment: str
    api: str
    next_run: str


def schedule(
    project: Project,
    *,
    cron: str,
    timezone: str | None,
    port: int = PREFECT_PORT,
    console: Console,
    on_ready: Callable[[Scheduled], None] = lambda _: None,
) -> None:
    """Serve the flow on ``cron`` in ``timezone`` (default: this machine's) until stopped.

    Ctrl-C and SIGTERM are how it ends well: the schedule is paused, a run that goes on is stopped.

    Raises:
        ConfigError: if ``cron`` or ``timezone`` is not one.
        DependencyError: no server, port taken, or the server schedules nothing.
    """
    zone = _zone(timezone)
    require_cron(cron)
    use_without_git(project)
    read_dag(project)
    name = deployment_name(project)
    logs = project.logs / f"schedule-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    group = Group()
    try:
        with (
            stop_on_signals("stopped"),
            prefect_api(project, group, log=logs / "prefect.log", port=port) as (api, held),
        ):
            _pause(api, name)  # drops what came due while nobody served it
            command = ["-P", "-m", "flows.deployments", str(project.root), name, cron, zone]
            with group.start(
                [sys.executable, *command],
                cwd=project.root,
                log=logs / "serve.log",
                env=environment(**prefect_environment(project), PREFECT_API_URL=api),
                grace_s=_SERVE_GRACE_S,
                held=[held] if held is not None else [],
            ) as child:
                _serve(child, api, name, f"`{cron}` ({zone})", console, on_ready)
    except Stopped:
        console.print("the schedule is stopped; `headrace schedule` starts it again", markup=False)


def _serve(
    child: Child,
    api: str,
    name: str,
    times: str,
    console: Console,
    on_ready: Callable[[Scheduled], None],
) -> None:
    found = _wait_for_schedule(child, api, name)
    try:
        for line in (
            f"scheduled: {times}, next run due {found.next_run}",
            f"deployment {FLOW}/{name}; Prefect UI: {api.removesuffix('/api')}",
            "a run whose inputs did not change ends as `Skipped`; Ctrl-C ends the schedule",
        ):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        on_ready(found)
        code = child.wait()
        raise DependencyError(
            f"the schedule ended by itself with exit code {code}: {last_line(child.tail())}; "
            f"see {child.log}"
        )
    finally:
        _pause(api, name)  # Prefect's own runner forgets to, when a signal ends it


def require_cron(cron: str) -> None:
    """Check a cron expression before anything is started.

    Raises:
        ConfigError: naming what is wrong with it.
    """
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        CronSchedule(cron=cron, timezone="UTC")
    except ValidationError as error:
        told = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{cron!r} is not a cron expression ({told}); "
            f'write five fields, like "0 3 * * *" for every day at three'
        ) from error


def deployment_name(project: Project) -> str:
    """A name that no other project folder has on a shared server."""
    place = f"{socket.gethostname()}:{project.root.resolve()}"
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", project.root.resolve().name) or "project"
    return f"{plain}-{digest_bytes(place.encode())[:6]}"


def local_zone() -> str:
    """The name of this machine's time zone; UTC where it has none."""
    link = Path("/etc/localtime")
    candidates = [os.environ.get("TZ", "")]
    if link.is_symlink():
        candidates.append(str(link.resolve()).partition("zoneinfo/")[2])
    known = available_timezones()
    return next((name for name in candidates if name in known), "UTC")


def _zone(name: str | None) -> str:
    if name is None:
        return local_zone()
    if name not in available_timezones():
        raise ConfigError(
            f"{name!r} is not a time zone{nearest(name, available_timezones())}; "
            f"they look like Europe/Berlin"
        )
    return ZoneInfo(name).key


def _pause(api: str, name: str) -> None:
    """Pause the deployment, if there is one; the server then drops its scheduled runs."""
    if deployment := ask(f"{api}/deployments/name/{FLOW}/{name}"):
        ask(f"{api}/deployments/{deployment['id']}/pause_deployment", {})


def _wait_for_schedule(child: Child, api: str, name: str) -> Scheduled:
    deadline = time.monotonic() + _DUE_TIMEOUT_S
    while time.monotonic() < deadline:
        code = child.wait(_POLL_S)
        if code is not None:
            raise DependencyError(
                f"the schedule could not be served (exit code {code}): {last_line(child.tail())}; "
                f"see {child.log}"
            )
        deployment = ask(f"{api}/deployments/name/{FLOW}/{name}")
        if deployment is None:
            continue
        due = ask(
            f"{api}/flow_runs/filter",
            {
                "deployments": {"id": {"any_": [deployment["id"]]}},
                "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
                "sort": "EXPECTED_START_TIME_ASC",
                "limit": 1,
            },
        )
        if due:
            return Scheduled(name, api, str(due[0]["expected_start_time"]))
    raise DependencyError(
        f"the Prefect server at {api} scheduled no run within {_DUE_TIMEOUT_S:g} s; its packages "
        f"may not fit together: run `headrace doctor`"
    )
