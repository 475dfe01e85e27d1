"""The model registry: one version per package, made once however often it is asked for.

A version is keyed by the digest of its package (tag ``headrace.package``), so registering the same
package again finds it, and a call that was cut off is taken up where it stopped. The alias
``challenger`` then names it. No other alias is touched: promotion is a decision of its own.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from headrace.tracking.location import Store, as_current, quiet, told_plainly

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient

CHALLENGER = "challenger"
PACKAGE_TAG = "headrace.package"


@dataclass(frozen=True)
class Candidate:
    """What is to be registered: the package, how MLflow runs it, and what it may say about it."""

    name: str
    digest: str
    folder: Path
    code_file: Path  # what MLflow executes to load the package
    code_folder: Path  # the library that file imports, copied beside it
    requirements: Sequence[str]
    input_columns: Mapping[str, str]  # name -> type, as MLflow calls it
    output_columns: Mapping[str, str]
    example: "pd.DataFrame"
    tags: Mapping[str, str]
    description: str = ""


@dataclass(frozen=True)
class Registered:
    """The version a package has in the registry."""

    name: str
    version: str
    is_new: bool

    @property
    def uri(self) -> str:
        """What ``mlflow.pyfunc.load_model`` takes."""
        return f"models:/{self.name}/{self.version}"


def register(
    client: "MlflowClient",
    store: Store,
    candidate: Candidate,
    *,
    experiment_id: str,
    run: str | None,
) -> Registered:
    """Give ``candidate`` a version, logged with MLflow run ``run``, and the alias ``challenger``.

    Raises:
        DependencyError: if MLflow cannot be reached or refuses.
    """
    with quiet(), told_plainly(store), as_current(store):
        version = _find_version(client, candidate)
        is_new = version is None
        if version is None:
            model_id = _logged_model(client, candidate, experiment_id, run)
            version = _create_version(client, candidate, model_id, run)
        client.set_registered_model_alias(candidate.name, CHALLENGER, version)
    return Registered(candidate.name, version, is_new)


def _find_version(client: "MlflowClient", candidate: Candidate) -> str | None:
    wanted = f"name = '{candidate.name}' and tag.`{PACKAGE_TAG}` = '{candidate.digest}'"
    found = client.search_model_versions(wanted)
    return min((str(one.version) for one in found), key=int, default=None)


def _create_version(
    client: "MlflowClient", candidate: Candidate, model_id: str, run: str | None
) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(candidate.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.create_model_version(
        candidate.name,
        source=f"models:/{model_id}",
        run_id=run,
        tags={PACKAGE_TAG: candidate.digest, **candidate.tags},
        description=candidate.description or None,
        model_id=model_id,
    )
    return str(created.version)


def _logged_model(
    client: "MlflowClient", candidate: Candidate, experiment_id: str, run: str | None
) -> str:
    """Return the id of the MLflow model that holds the package; what a cut left is removed."""
    wanted = f"tags.`{PACKAGE_TAG}` = '{candidate.digest}'"
    for found in client.search_logged_models([experiment_id], wanted):
        if found.status == "READY":
            return str(found.model_id)
        client.delete_logged_model(found.model_id)
    created = client.create_logged_model(
        experiment_id,
        name=candidate.name.replace(".", "-"),  # MLflow allows dots in versions only
        source_run_id=run,
        tags={PACKAGE_TAG: candidate.digest, **candidate.tags},
    )
    model_id = str(created.model_id)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        _save(candidate, folder, model_id, run)
        client.log_model_artifacts(model_id, str(folder))
    client.finalize_logged_model(model_id, "READY")
    if run:
        from mlflow.entities import LoggedModelOutput

        client.log_outputs(run, [LoggedModelOutput(model_id, step=0)])
    return model_id


def _save(candidate: Candidate, folder: Path, model_id: str, run: str | None) -> None:
    import mlflow.pyfunc
    from mlflow.models import Model

    mlflow.pyfunc.save_model(
        path=str(folder),
        python_model=str(candidate.code_file),
        artifacts={"package": str(candidate.folder)},
        code_paths=[str(candidate.code_folder)],
        pip_requirements=list(candidate.requirements),
        signature=_signature(candidate),
        input_example=candidate.example,
        mlflow_model=Model(model_id=model_id, model_uuid=model_id, run_id=run),
        metadata={"inputs": dict(candidate.input_columns), "package": candidate.digest},
    )
    for cache in list(folder.rglob("__pycache__")):
        shutil.rmtree(cache, ignore_errors=True)


def _signature(candidate: Candidate) -> Any:
    """Names of all columns, and types where MLflow's check allows what a person may send.

    MLflow refuses a whole number where a float is declared, and a float where a whole number is
    (which is what pandas makes of one beside a null). The package checks types itself and says
    better what is wrong, so numbers are declared as any type; the model's metadata names them.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, ColSpec, Schema

    anything = AnyType()  # type: ignore[no-untyped-call]

    def spec(name: str, kind: str, *, is_checked: bool) -> ColSpec:
        return ColSpec(kind if is_checked else anything, name)

    return ModelSignature(
        Schema([spec(n, k, is_checked=k == "string") for n, k in candidate.input_columns.items()]),
        Schema([spec(n, k, is_checked=True) for n, k in candidate.output_columns.items()]),
    )
