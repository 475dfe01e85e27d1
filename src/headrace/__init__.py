"""headrace: an orchestrated pipeline for models on tables that do not fit in memory."""

import os
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "batches",
    "frame",
    "model",
    "predictions",
    "reduce_frame",
    "stream",
    "table",
]

# Telemetry of every tool is off unless the user says otherwise; set before any of them is imported.
for _name, _value in {
    "DO_NOT_TRACK": "true",  # mlflow compares with "true", "1" would not do
    "DVC_NO_ANALYTICS": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}.items():
    os.environ.setdefault(_name, _value)

_PUBLIC: dict[str, str] = {
    "batches": "headrace.access",
    "frame": "headrace.access",
    "model": "headrace.access",
    "predictions": "headrace.access",
    "reduce_frame": "headrace.data.frames",
    "stream": "headrace.access",
    "table": "headrace.access",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that ``import headrace`` stays light."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
