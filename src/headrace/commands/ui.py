"""``headrace ui``: both UIs on this machine, on this project's histories, until Ctrl-C.

Where the environment names a team's server, that one's link is printed and none is started here.
"""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from rich.console import Console

from headrace.commands.servers import (
    MLFLOW_PORT,
    PREFECT_PORT,
    ask,
    mlflow_server,
    prefect_server,
    require_port,
)
from headrace.commands.supervise import Child, Group, stop_on_signals
from headrace.errors import DependencyError, Stopped
from headrace.project import Project
from headrace.tracking.location import find_store, prepare_store, runs_url

_LOOK_S = 0.5


@dataclass(frozen=True)
class Links:
    """Where the UIs are."""

    prefect: str
    mlflow: str


def ui(
    project: Project,
    *,
    prefect_port: int = PREFECT_PORT,
    mlflow_port: int = MLFLOW_PORT,
    console: Console,
    on_ready: Callable[[Links], None] = lambda _: None,
) -> None:
    """Serve both UIs until Ctrl-C or SIGTERM, which is how this ends well.

    Raises:
        DependencyError: if a port is taken, or a server does not start or ends by itself.
    """
    store = find_store(project.root)
    is_remote = store.uri.startswith(("http://", "https://"))
    prefect_api = os.environ.get("PREFECT_API_URL")
    if not prefect_api:
        require_port(prefect_port, "Prefect", option="--prefect-port")
    if not is_remote:
        require_port(mlflow_port, "MLflow", option="--mlflow-port")
        prepare_store(store)
    logs = project.logs / f"ui-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    group = Group()
    children: dict[str, Child] = {}
    try:
        with stop_on_signals("stopped"), ExitStack() as stack:
            console.print("starting the servers (about 15 s)", highlight=False)
            if prefect_api:
                prefect = prefect_api.rstrip("/").removesuffix("/api")
            else:
                one = stack.enter_context(
                    prefect_server(project, group, port=prefect_port, log=logs / "prefect.log")
                )
                prefect, children["Prefect"] = one.url, one.child
            if is_remote:
                base = store.name
            else:
                two = stack.enter_context(
                    mlflow_server(
                        project, group, port=mlflow_port, log=logs / "mlflow.log", uri=store.uri
                    )
                )
                base, children["MLflow"] = two.url, two.child
            links = Links(prefect, _runs_link(base))
            console.print(f"MLflow   {links.mlflow}", markup=False, soft_wrap=True)
            console.print(f"Prefect  {links.prefect}", markup=False, soft_wrap=True)
            console.print("Ctrl-C stops both", highlight=False)
            on_ready(links)
            _wait(children)
    except Stopped:
        console.print("stopped", highlight=False)


def _wait(children: dict[str, Child]) -> None:
    while True:
        for name, child in children.items():
            code = child.wait(_LOOK_S)
            if code is not None:
                raise DependencyError(
                    f"the {name} server ended by itself with exit code {code}; see {child.log}"
                )
        if not children:
            time.sleep(_LOOK_S)


def _runs_link(base: str) -> str:
    """The link that shows the runs: of the one experiment with runs, or the list of all."""
    found = ask(
        f"{base}/api/2.0/mlflow/experiments/search",
        {"max_results": 100, "order_by": ["last_update_time DESC"]},
    )
    experiments = [one for one in (found or {}).get("experiments", []) if one["name"] != "Default"]
    return runs_url(base, experiments[0]["experiment_id"]) if experiments else base
