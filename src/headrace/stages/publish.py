"""Stage ``publish``: the models that were chosen, in one folder that takes raw rows.

Only members that count in the choice of some target are copied; what ``stack`` chose is what is
published, and test rows are not looked at. The package scores its own input example
before it gets its name, so a package that cannot be loaded is never published.

Nothing here depends on the machine: ``requirements.txt`` repeats the version ranges that headrace
itself declares for the libraries this package's code imports, not the versions installed.
"""

import ast
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from packaging.requirements import Requirement
from pydantic import Field

from headrace.data.encoder import open_encoder
from headrace.data.incoming import InputColumn
from headrace.errors import IntegrityError, SchemaError
from headrace.evaluation.blend import MeanBlend, blend_of
from headrace.evaluation.rules import DECISIONS, Rule, read_decisions
from headrace.evaluation.selection import SELECTION, STACK
from headrace.lineage import code_files
from headrace.models.package import (
    ENCODER_FOLDER,
    EXAMPLE,
    MODELS_FOLDER,
    PACKAGE,
    REQUIREMENTS,
    Description,
    Mixture,
    Package,
    assemble,
    output_schema,
    read_example,
)
from headrace.models.protocol import KINDS, MODEL_JSON, NATIVE, SECOND_LEVEL
from headrace.params import Resources, Section
from headrace.record import Recorder
from headrace.schema import CONTRACT, Contract, read_contract
from headrace.storage import (
    folder_digest,
    new_folder,
    read_json,
    verify_file,
    verify_folder,
    write_file,
    write_json,
)

_PLAN = "plan.json"
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml", "ruamel": "ruamel.yaml"}


class PublishParams(Section):
    """Section ``publish`` of params.yaml: what the model is called, how many rows show its use."""

    # Name in MLflow, of the registered model and of the experiment.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]{0,99}$")] = "headrace"
    example_rows: Annotated[int, Field(ge=1, le=1000)] = 5


@dataclass(frozen=True)
class Published:
    """What the package holds; printable."""

    name: str
    digest: str
    blends: Mapping[str, str]  # target -> its members and how much they count

    def __str__(self) -> str:
        lines = [f"package {self.name}, digest {self.digest[:16]}"]
        lines += [f"{target}: {told}" for target, told in self.blends.items()]
        return "\n".join(lines)


def publish(
    table: Path,
    encoded: Path,
    members: Mapping[str, Path],
    stack: Path,
    decisions: Path,
    out: Path,
    params: PublishParams,
    *,
    resources: Resources,  # noqa: ARG001 -- every stage has it; this one holds one model at a time
    recorder: Recorder,
) -> Published:
    """Write the package of the models that ``stack`` chose, with what ``decide`` settled.

    Raises:
        IntegrityError: if an input is damaged, or a member or the encoder is of another contract.
        SchemaError: if two outputs would have one name.
    """
    contract = read_contract(verify_file(table, CONTRACT).parent)
    mixtures = _mixtures(verify_file(stack, SELECTION), contract, members)
    description = Description(
        name=params.name,
        contract=contract.digest,
        inputs=_inputs(verify_file(table, _PLAN), contract),
        targets=mixtures,
    )
    chosen = {name: one.chosen for name, one in mixtures.items()}
    decided = read_decisions(decisions, chosen)
    _refuse_double_outputs(contract, decided.rules)
    with new_folder(out) as folder:
        _copy_encoder(encoded, folder / ENCODER_FOLDER, contract)
        for name in description.members:
            _copy_member(members[name], folder / MODELS_FOLDER / name, contract)
        write_file(folder / CONTRACT, contract.to_json())
        shutil.copyfile(decisions / DECISIONS, folder / DECISIONS)
        write_json(folder / PACKAGE, description.model_dump(mode="json"))
        write_json(folder / EXAMPLE, _example(table, description.inputs, params.example_rows))
        kinds = {read_json(members[name] / MODEL_JSON)["kind"] for name in description.members}
        write_file(folder / REQUIREMENTS, "".join(f"{r}\n" for r in requirements(kinds)))
        _score_example(assemble(folder, digest=""))
    published = Published(
        params.name, folder_digest(out), {t: str(one.blend) for t, one in mixtures.items()}
    )
    recorder.params({"package": published.digest, "name": params.name})
    recorder.note(_note(published))
    return published


def requirements(kinds: set[str]) -> tuple[str, ...]:
    """Return what must be installed to load a package with these kinds of models, sorted.

    Found by reading the imports of the code that runs then; the version ranges are headrace's own.
    """
    known = {**KINDS, **SECOND_LEVEL}
    modules = ["headrace.models.package", *(known[kind].module for kind in sorted(kinds))]
    imported = {name for path in code_files(*modules) for name in _imported(path)}
    needed = {_DISTRIBUTIONS.get(name, name) for name in imported}
    declared = [Requirement(text) for text in metadata.requires("headrace") or ()]
    found = {
        f"{_normal(one.name)}{one.specifier}"
        for one in declared
        if one.marker is None and _normal(one.name) in {_normal(name) for name in needed}
    }
    return tuple(sorted(found))


def _mixtures(
    selection: Path, contract: Contract, members: Mapping[str, Path]
) -> dict[str, Mixture]:
    chosen = read_json(selection)["targets"]
    mixtures = {}
    for target in contract.targets:
        if target.name not in chosen:
            raise IntegrityError(
                f"{selection} chooses no model for target {target.name!r}; run `headrace repro`"
            )
        entry = chosen[target.name]
        is_stack = entry["chosen"] == STACK
        blend = blend_of(entry["blend"]) if is_stack else MeanBlend(weights={entry["chosen"]: 1.0})
        absent = [name for name in blend.members if name not in members]
        if absent:
            raise IntegrityError(
                f"{selection} chooses {absent} for target {target.name!r}, which are not among "
                f"`models` in params.yaml; run `headrace repro`"
            )
        mixtures[target.name] = Mixture(chosen=entry["chosen"], blend=blend)
    return mixtures


def _inputs(plan: Path, contract: Contract) -> tuple[InputColumn, ...]:
    planned = read_json(plan)["columns"]
    columns = (contract.column(name) for name in contract.features)
    return tuple(
        InputColumn(
            name=column.name,
            role=column.role,
            dtype=planned[column.name]["from"],
            reduced=column.dtype,
        )
        for column in columns
    )


def _refuse_double_outputs(contract: Contract, rules: Mapping[str, Rule]) -> None:
    names = output_schema(contract.targets, rules).names
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise SchemaError(
            f"the predictions would have the columns {doubled} twice; rename a target in the recipe"
        )


def _copy_encoder(encoded: Path, folder: Path, contract: Contract) -> None:
    encoder = open_encoder(encoded)
    _require_contract(encoded, encoder.contract.digest, contract)
    encoder.save(folder)


def _copy_member(source: Path, folder: Path, contract: Contract) -> None:
    verify_folder(source)
    _require_contract(source, read_json(source / MODEL_JSON)["contract"], contract)
    folder.mkdir(parents=True)
    shutil.copyfile(source / MODEL_JSON, folder / MODEL_JSON)
    shutil.copytree(source / NATIVE, folder / NATIVE, copy_function=shutil.copyfile)


def _require_contract(folder: Path, found: str, contract: Contract) -> None:
    if found != contract.digest:
        raise IntegrityError(
            f"{folder} was made for the data contract {found[:12]}, but the table has "
            f"{contract.digest[:12]}; run `headrace repro`"
        )


def _example(table: Path, inputs: Sequence[InputColumn], num_rows: int) -> dict[str, Any]:
    """Return the first train rows as JSON: values the way a raw file would have them."""
    first = sorted((table / "train").glob("*.parquet"))[0]
    verify_file(table, first.relative_to(table).as_posix())
    names = [column.name for column in inputs]
    with pq.ParquetFile(first) as file:
        rows = pa.Table.from_batches([next(file.iter_batches(num_rows, columns=names))])
    columns = [_json_values(rows.column(column.name), column.type) for column in inputs]
    return {"columns": names, "data": [list(row) for row in zip(*columns, strict=True)]}


def _json_values(column: pa.ChunkedArray, kind: pa.DataType) -> list[Any]:
    values = column.combine_chunks()
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(kind):
        numbers = values.cast(pa.float64()).to_pylist()
        return [x if x is not None and math.isfinite(x) else None for x in numbers]
    is_plain = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    return list((values if is_plain else values.cast(pa.string())).to_pylist())


def _score_example(package: Package) -> None:
    example = read_example(package.folder, package.inputs)
    predicted = package.predict(example)
    assert predicted.num_rows == example.num_rows


def _imported(path: Path) -> set[str]:
    if path.suffix != ".py":
        return set()
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _note(published: Published) -> str:
    lines = [
        f"Published package `{published.digest[:16]}`:",
        "",
        "| target | members |",
        "|---|---|",
    ]
    lines += [f"| {target} | {told} |" for target, told in published.blends.items()]
    return "\n".join(lines)
