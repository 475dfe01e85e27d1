"""The file MLflow runs to load a registered model: it opens the package and hands rows to it.

MLflow executes this file from its own copy (models from code, no pickle) and calls the argument of
``load_context`` by its name, which must stay ``context``.
"""

from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd  # MLflow looks at the type hints of ``predict``, so they must exist
from mlflow.models import set_model

from headrace.models.package import Package, load_package


class ServedPackage(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined, misc]
    """A model package as MLflow's generic model: raw rows in, predictions of all targets out."""

    _package: Package

    def load_context(self, context: Any) -> None:
        """Open the package; its digests are checked."""
        self._package = load_package(Path(context.artifacts["package"]))

    def predict(
        self,
        context: Any,  # noqa: ARG002 -- the signature is MLflow's
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> pd.DataFrame:
        """Predict raw rows, in their order; see ``Package.predict`` for the columns."""
        return self._package.predict(model_input).to_pandas()


set_model(ServedPackage())
