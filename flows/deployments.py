"""The served deployment: the flow on a cron schedule, one run at a time.

The flow is named by its module, so a run finds it whatever its working directory is. A run that
comes due while another goes on waits for it (``global_limit``), and a run started by hand holds the
folder's lock, so it is waited for too.
"""

import sys
from pathlib import Path

from prefect.schedules import Cron
from prefect.types.entrypoint import EntrypointType

from flows.pipeline import pipeline


def serve(project: Path, *, name: str, cron: str, timezone: str) -> None:
    """Serve the flow for ``project`` as deployment ``name`` until this process is stopped."""
    pipeline.serve(
        name=name,
        schedule=Cron(cron, timezone=timezone),
        parameters={"project": str(project)},
        global_limit=1,
        print_starting_message=False,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


if __name__ == "__main__":
    serve(Path(sys.argv[1]), name=sys.argv[2], cron=sys.argv[3], timezone=sys.argv[4])
