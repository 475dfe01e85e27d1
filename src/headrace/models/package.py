"""The published model: one folder that takes raw rows and gives predictions for every target.

It holds the data contract, the encoder, the members that at least one target uses, and their
blends, all in native formats (JSON, safetensors, .cbm); nothing in it is a pickle. Its bytes are a
function of the stages before it, so its digest names the model.

Predicting checks the rows against the contract, narrows their types, encodes them once, asks each
member once and blends what they say as the stage ``stack`` did. Rows keep their order and number.
A category that train rows did not have is "unknown" to the models, a null is missing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationError

from headrace.data.incoming import InputColumn, conform, from_pandas
from headrace.errors import IntegrityError
from headrace.evaluation.blend import Blend
from headrace.evaluation.rules import DECISIONS, Rule, decisions_of
from headrace.models.protocol import FittedModel, Values, load_model
from headrace.params import Section
from headrace.schema import Contract, Target, read_contract
from headrace.storage import folder_digest, read_json, verify_folder

if TYPE_CHECKING:
    import pandas as pd

    from headrace.data.encoder import Encoder

PACKAGE = "package.json"
ENCODER_FOLDER = "encoder"
MODELS_FOLDER = "models"
EXAMPLE = "input_example.json"
REQUIREMENTS = "requirements.txt"


class Mixture(Section):
    """How one target is predicted: the model chosen for it, and how its members are blended."""

    chosen: str
    blend: Blend


class Description(Section):
    """The content of package.json."""

    format: Literal[3] = 3
    name: str
    contract: str  # digest of contract.json
    inputs: Annotated[tuple[InputColumn, ...], Field(strict=False)]
    targets: dict[str, Mixture]

    @property
    def members(self) -> tuple[str, ...]:
        """Names of all members that some target uses, sorted."""
        return tuple(sorted({name for one in self.targets.values() for name in one.blend.members}))


@dataclass(frozen=True)
class Package:
    """A loaded package; see ``load_package``."""

    folder: Path
    digest: str
    description: Description
    contract: Contract
    encoder: "Encoder"
    models: Mapping[str, FittedModel]
    rules: Mapping[str, Rule]  # per target: from its prediction to a decision

    @property
    def inputs(self) -> tuple[InputColumn, ...]:
        """The columns that rows must have."""
        return self.description.inputs

    @property
    def output_schema(self) -> pa.Schema:
        """Columns of the predictions: see ``predict``."""
        return output_schema(self.contract.targets, self.rules)

    def predict(self, rows: "pa.Table | pa.RecordBatch | pd.DataFrame") -> pa.Table:
        """Predict every target for ``rows``, in their order.

        A regression has one column named like the target, and its conformal interval as
        ``TARGET_low`` and ``TARGET_high``. A classification has the label under the target's name
        and the model's probabilities as ``TARGET_probability_LABEL``: of the second label in a
        binary task, of every label otherwise; calibrated ones as ``TARGET_calibrated_LABEL``, and
        the conformal set as ``TARGET_set``, a JSON list of labels. What ``decide`` did not settle
        has no column. The label is what decisions.json says: in a binary task the second from its
        threshold on, else the most probable or least costly one.

        Raises:
            SchemaError: if a column is missing or has another type; all of them are named.
        """
        if isinstance(rows, pa.RecordBatch):
            rows = pa.Table.from_batches([rows])
        elif not isinstance(rows, pa.Table):
            rows = from_pandas(rows, self.inputs)
        inputs = conform(rows, self.inputs)
        if inputs.num_rows == 0:
            return self.output_schema.empty_table()
        told = self._ask_members(inputs)
        columns: list[pa.Array] = []
        for target in self.contract.targets:
            blend = self.description.targets[target.name].blend
            values = blend.of({name: told[name][target.name] for name in blend.members})
            columns += _columns(values, target, self.rules[target.name])
        return pa.Table.from_arrays(columns, schema=self.output_schema)

    def _ask_members(self, inputs: pa.Table) -> dict[str, Values]:
        needs_encoding = any(model.inputs == "encoded" for model in self.models.values())
        encoded = self.encoder.transform(inputs) if needs_encoding else None
        return {
            name: model.predict(
                encoded if model.inputs == "encoded" and encoded is not None else inputs
            )
            for name, model in self.models.items()
        }


def load_package(folder: Path) -> Package:
    """Check every byte of a package and load it.

    Raises:
        IntegrityError: if the folder is missing, unfinished, damaged or of another format.
    """
    if not folder.is_dir():
        raise IntegrityError(
            f"{folder} does not exist; run `headrace repro` to publish a model, "
            f"or name its folder with --model"
        )
    verify_folder(folder)
    return assemble(folder, digest=folder_digest(folder))


def assemble(folder: Path, *, digest: str) -> Package:
    """Load a package whose bytes are known to be right.

    Raises:
        IntegrityError: if a file is missing, of another format, or of another contract.
    """
    from headrace.data.encoder import Encoder

    description = read_description(folder)
    contract = read_contract(folder)
    if contract.digest != description.contract:
        raise IntegrityError(
            f"{folder / PACKAGE} was written for another contract; run `headrace repro`"
        )
    rules = read_rules(folder, description)
    models = {name: load_model(folder / MODELS_FOLDER / name) for name in description.members}
    encoder = Encoder.load(folder / ENCODER_FOLDER)
    return Package(folder, digest, description, contract, encoder, models, rules)


def read_description(folder: Path) -> Description:
    """Read package.json of a package without loading its models.

    Raises:
        IntegrityError: if it is missing, damaged or of a format this version does not read.
    """
    path = folder / PACKAGE
    content = read_json(path)
    if isinstance(content, dict) and content.get("format") != 3:
        raise IntegrityError(
            f"{path} has package format {content.get('format')}; this headrace reads format 3: "
            f"run `headrace upgrade`, then `headrace repro`"
        )
    try:
        return Description.model_validate(content)
    except ValidationError as error:
        raise IntegrityError(f"{path} does not describe a model package ({error})") from error


def read_rules(folder: Path, description: Description) -> Mapping[str, Rule]:
    """Read the rules of a package's targets.

    Raises:
        IntegrityError: if they are missing, or of other targets or models.
    """
    chosen = {name: one.chosen for name, one in description.targets.items()}
    return decisions_of(folder / DECISIONS, chosen).rules


def output_schema(targets: Sequence[Target], rules: Mapping[str, Rule]) -> pa.Schema:
    """Return the columns that predictions of ``targets`` have, decided by ``rules``."""
    fields = []
    for target in targets:
        rule, name = rules[target.name], target.name
        if target.task == "regression":
            bounds = (f"{name}_low", f"{name}_high") if rule.conformal else ()
            fields += [pa.field(column, pa.float64()) for column in (name, *bounds)]
            continue
        fields.append(pa.field(name, pa.string()))
        shown = target.labels[1:] if target.task == "binary" else target.labels
        kinds = ("probability", "calibrated") if rule.calibration else ("probability",)
        fields += [
            pa.field(f"{name}_{kind}_{label}", pa.float64()) for kind in kinds for label in shown
        ]
        if rule.conformal:
            fields.append(pa.field(f"{name}_set", pa.string()))
    return pa.schema(fields)


def read_example(folder: Path, inputs: Sequence[InputColumn]) -> pa.Table:
    """Return the rows of a package's input example, as raw rows."""
    content = read_json(folder / EXAMPLE)
    columns = {
        column.name: _example_values([row[j] for row in content["data"]], column.type)
        for j, column in enumerate(inputs)
    }
    return pa.table(columns)


def _example_values(values: list[Any], kind: pa.DataType) -> pa.Array:
    # Arrow would take whole numbers for int64, which the upper half of uint64 exceeds.
    return pa.array(values, kind) if pa.types.is_integer(kind) else pa.array(values).cast(kind)


def _columns(values: Any, target: Target, rule: Rule) -> list[pa.Array]:
    """Return the columns of one target in the order of ``output_schema``."""
    if target.task == "regression":
        told = [values, *(rule.conformal.interval(values) if rule.conformal else ())]
        return [pa.array(column) for column in told]
    calibrated = rule.calibrated(values)
    label = pa.array(target.labels, pa.string()).take(pa.array(rule.classes(calibrated)))
    columns = [label, *_shares(values)]
    if rule.calibration:
        columns += _shares(calibrated)
    if rule.conformal:
        columns.append(_sets(rule.conformal.classes(calibrated), target))
    return columns


def _shares(values: Any) -> list[pa.Array]:
    columns = values[:, None] if values.ndim == 1 else values
    return [pa.array(np.ascontiguousarray(column)) for column in columns.T]


def _sets(is_in: Any, target: Target) -> pa.Array:
    """Return each row's set as a JSON list of labels; there are few different ones."""
    different, of_row = np.unique(is_in, axis=0, return_inverse=True)
    texts = [
        json.dumps(
            [label for label, is_one in zip(target.labels, row, strict=True) if is_one],
            ensure_ascii=False,
        )
        for row in different
    ]
    return pa.array(texts, pa.string()).take(pa.array(of_row.reshape(-1)))
