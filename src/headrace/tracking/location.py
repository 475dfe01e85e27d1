"""Where MLflow's store is, whether it can be used, and what it needs when the project has moved.

By default the store is in the project folder: ``mlflow.db`` (SQLite) and ``mlruns/`` (artifacts).
``MLFLOW_TRACKING_URI`` names another one, and then nothing is written locally.

- Several processes that start on a fresh SQLite file break it for good (tried: 8 of 8). So the file
  is made under a lock, beside its final name, and renamed when whole.
- MLflow stores absolute artifact locations. A project folder that was moved or copied has its four
  columns rewritten before anything reads them; what points elsewhere is left alone.
- Against a server that is down MLflow blocks for four minutes per call. Here a server is asked for
  its health first, and every call is bounded to seconds; what could not be sent stays pending.
"""

import contextlib
import fcntl
import os
import sqlite3
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit, urlunsplit

from headrace.errors import ConfigError, DependencyError, HeadraceError
from headrace.storage import digest_bytes, sweep

if TYPE_CHECKING:
    from mlflow import MlflowClient

URI_VARIABLE = "MLFLOW_TRACKING_URI"
DATABASE = "mlflow.db"
ARTIFACTS = "mlruns"

_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
_BOUNDS = {  # MLflow reads these at every call; what the user has set stands
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
_CONNECT_S = 3.0
_LOCK_S = 2.0


@dataclass(frozen=True)
class Store:
    """One MLflow store: its URI, and the project folder if it lies there."""

    uri: str
    project: Path | None

    @property
    def name(self) -> str:
        """The URI without user and password, for messages."""
        return redact(self.uri)

    @property
    def digest(self) -> str:
        """A name for the store that gives no secret away."""
        return digest_bytes(self.uri.encode())[:16]

    @property
    def database(self) -> Path | None:
        """The SQLite file of a store in the project folder."""
        return self.project / DATABASE if self.project else None

    def artifact_location(self, experiment: str) -> str | None:
        """Where a new experiment keeps its files; None leaves it to the server."""
        return (self.project / ARTIFACTS / experiment).as_uri() if self.project else None


def find_store(project: Path) -> Store:
    """Return the store that ``MLFLOW_TRACKING_URI`` names, else the one in the project folder.

    Raises:
        ConfigError: if the project's path cannot stand in a database URI.
    """
    if uri := os.environ.get(URI_VARIABLE, "").strip():
        return Store(uri, None)
    root = project.resolve()
    if "?" in str(root):  # SQLAlchemy reads a query there, and the database would lie elsewhere
        raise ConfigError(
            f"{root} has a question mark in its name, which MLflow's database URI cannot hold; "
            f"rename the folder, or set {URI_VARIABLE}"
        )
    return Store(f"sqlite:///{root / DATABASE}", root)


def prepare_store(store: Store) -> None:
    """Make the project's store if there is none, and repair it if the folder has moved.

    Nothing is done for a store elsewhere.

    Raises:
        DependencyError: if the database is locked by another process.
        ConfigError: if it is no MLflow database.
    """
    if store.project is None or store.database is None:
        return
    with _lock(store.project):
        if not store.database.is_file():
            _create(store.database, (store.project / ARTIFACTS).as_uri())
    repair_location(store.project)


def repair_location(project: Path) -> int:
    """Point a moved project's MLflow history at its files again; return the rows rewritten.

    Costs a millisecond when nothing has moved. The old place is read from the database itself: the
    artifact location of its default experiment, which is ``PROJECT/mlruns/0``.

    Raises:
        DependencyError: if the database is locked by another process.
        ConfigError: if it is no MLflow database.
    """
    project = project.resolve()
    database = project / DATABASE
    if not database.is_file():
        return 0
    with _opened(database) as connection:
        old = _stored_root(connection)
        if old is None or old == project.as_uri():
            return 0
        connection.execute("BEGIN IMMEDIATE")
        rewritten = 0
        for table, column in _LOCATIONS:
            # The bare path beside the URI: older MLflow versions store it so.
            for prefix, target in ((old, project.as_uri()), (_path(old), project.as_posix())):
                rewritten += connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                    f" WHERE substr({column}, 1, ?) = ?",
                    (target + "/", len(prefix) + 2, len(prefix) + 1, prefix + "/"),
                ).rowcount
        connection.execute("COMMIT")
    return rewritten


def connect(store: Store) -> "MlflowClient":
    """Return a client of ``store``, quiet and bounded in time.

    Raises:
        DependencyError: if the server does not answer, or the database is locked.
        ConfigError: if the database belongs to another version of MLflow.
    """
    bound_calls()
    if store.uri.startswith(("http://", "https://")):
        _require_answer(store)
    with quiet():
        from mlflow import MlflowClient

        silence_loggers()
        prepare_store(store)
        if store.database:
            _require_writable(store.database)
            _require_version(store.database)
        with told_plainly(store):
            return MlflowClient(tracking_uri=store.uri, registry_uri=store.uri)


def bound_calls() -> None:
    """Keep MLflow from blocking for minutes and from writing to the terminal."""
    for name, value in _BOUNDS.items():
        os.environ.setdefault(name, value)


def silence_loggers() -> None:
    """Raise the level of MLflow's and Alembic's loggers, which it sets itself on import."""
    import logging

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings of MLflow's own code off the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def as_current(store: Store) -> Iterator[None]:
    """Make ``store`` MLflow's current one for a while.

    MLflow's registry on a database looks a model up in the current store, whatever store its own
    client was made for.
    """
    from mlflow.tracking._tracking_service.utils import _use_tracking_uri

    before = os.environ.get(URI_VARIABLE)
    try:
        with _use_tracking_uri(store.uri):  # sets the variable too, and at the end unsets it
            yield
    finally:
        if before is not None:
            os.environ[URI_VARIABLE] = before


@contextlib.contextmanager
def told_plainly(store: Store) -> Iterator[None]:
    """Turn what MLflow, its HTTP library and its database raise into one of our errors."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except HeadraceError:
        raise
    except (MlflowException, SQLAlchemyError, OSError) as error:
        text = str(error).replace(store.uri, store.name).strip()
        first = text.splitlines()[0][:300] if text else type(error).__name__
        raise DependencyError(
            f"MLflow at {store.name} does not take what it is sent ({first}); nothing is lost, "
            f"it stays in the journal: run `headrace sync` when MLflow works again"
        ) from error


def redact(uri: str) -> str:
    """Return ``uri`` without user and password.

    >>> redact("https://me:secret@mlflow.example/a")
    'https://mlflow.example/a'
    """
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def runs_url(base: str, experiment_id: str) -> str:
    """Return the link that shows an experiment's runs; without the query MLflow hides them.

    >>> runs_url("http://127.0.0.1:5000/", "1")
    'http://127.0.0.1:5000/#/experiments/1/runs?compareRunsMode=CHART&workflowType=machine_learning'
    """
    query = "compareRunsMode=CHART&workflowType=machine_learning"
    return f"{base.rstrip('/')}/#/experiments/{quote(experiment_id)}/runs?{query}"


def _create(database: Path, artifact_root: str) -> None:
    with quiet():
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        silence_loggers()
        sweep(database.parent)
        private = database.with_name(f".new-{database.name}.{os.getpid()}")
        store = SqlAlchemyStore(f"sqlite:///{private}", artifact_root)  # type: ignore[no-untyped-call]
        store.engine.dispose()
        private.replace(database)


@contextlib.contextmanager
def _lock(project: Path) -> Iterator[None]:
    path = project / ".headrace" / "mlflow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(database, timeout=_LOCK_S, isolation_level=None)
    try:
        yield connection
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            raise DependencyError(
                f"{database} is locked by another process (an MLflow server, a database browser?); "
                f"nothing is lost, the journal has it: close that process and run `headrace sync`"
            ) from error
        raise ConfigError(_not_a_store(database, error)) from error
    except sqlite3.DatabaseError as error:
        raise ConfigError(_not_a_store(database, error)) from error
    finally:
        connection.close()


def _not_a_store(database: Path, error: sqlite3.Error) -> str:
    return (
        f"{database} is no MLflow database ({error}); move it away and run `headrace sync`, "
        f"which builds it again from the journal"
    )


def _require_writable(database: Path) -> None:
    with _opened(database) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")


def _require_version(database: Path) -> None:
    from alembic.script.revision import ResolutionError
    from mlflow import __version__
    from mlflow.store.db import utils as mlflow_database

    with _opened(database) as connection:
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    found = row[0] if row else ""
    latest = mlflow_database._get_latest_schema_revision()  # type: ignore[no-untyped-call]
    if found == latest:
        return
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    try:
        config = mlflow_database._get_alembic_config(db_url="")  # type: ignore[no-untyped-call]
        ScriptDirectory.from_config(config).get_revision(found)
    except (ResolutionError, CommandError) as error:
        raise ConfigError(
            f"{database} was written by a newer MLflow than the installed {__version__} (schema "
            f"{found}); install a newer mlflow, or move the file away and run `headrace sync`, "
            f"which builds it again from the journal"
        ) from error
    raise ConfigError(
        f"{database} was written by an older MLflow than the installed {__version__}; back it up "
        f"and run `mlflow db upgrade sqlite:///{database}`"
    )


def _require_answer(store: Store) -> None:
    import requests

    is_open = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() == "true"
    problem: Any = None
    try:
        url = store.uri.rstrip("/") + "/health"
        answer = requests.get(url, timeout=(_CONNECT_S, _CONNECT_S), verify=not is_open)
        if answer.status_code < 500 and answer.status_code != 429:
            return
        problem = f"HTTP {answer.status_code}"
    except requests.RequestException as error:
        problem = type(error).__name__
    raise DependencyError(
        f"the MLflow server at {store.name} does not answer ({problem}); nothing is lost, it stays "
        f"in the journal: start the server or unset {URI_VARIABLE}, then run `headrace sync`"
    )


def _stored_root(connection: sqlite3.Connection) -> str | None:
    row = connection.execute(
        "SELECT artifact_location FROM experiments WHERE experiment_id = 0"
    ).fetchone()
    suffix = f"/{ARTIFACTS}/0"
    if row is None or not str(row[0]).startswith("file://") or not str(row[0]).endswith(suffix):
        return None
    return str(row[0]).removesuffix(suffix)


def _path(uri: str) -> str:
    from urllib.request import url2pathname

    return url2pathname(urlsplit(uri).path)
