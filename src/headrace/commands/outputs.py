"""Where a command writes its figures when ``--json FILE`` asks for it."""

import os
from pathlib import Path

from headrace.errors import ConfigError


def json_target(path: Path | None) -> Path | None:
    """Return the absolute path of ``--json``, before a long measurement is made for it.

    Raises:
        ConfigError: if it names something other than a file, or its folder is missing or closed to
            writing.
    """
    if path is None:
        return None
    target = path.resolve()
    if target.is_dir():
        raise ConfigError(f"--json {path} is a folder; name a file in it, such as {path}/out.json")
    if target.exists() and not target.is_file():
        raise ConfigError(f"--json {path} is no regular file; name one")
    if not target.parent.is_dir():
        raise ConfigError(
            f"--json {path}: the folder {target.parent} does not exist; make it first"
        )
    if not os.access(target.parent, os.W_OK):
        raise ConfigError(f"--json {path}: the folder {target.parent} cannot be written to")
    return target
