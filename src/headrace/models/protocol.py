"""What every kind of model can do, and the list of kinds.

A kind is one module with a params section and two functions, ``fit`` and ``load``, and one entry in
``KINDS``. To add one:

1. write ``models/NAME.py`` with ``NameParams(Section)``, ``fit(views, params, *, checkpoints,
   resources, recorder) -> FittedModel`` and ``load(folder, description) -> FittedModel``;
2. add ``"NAME": Kind("headrace.models.NAME", "NameParams")`` below.

``fit`` learns every target of the contract from the rows that its ``TrainViews`` allows, and from
no others: early stopping is judged on an inner part of train. A fitted model reads either encoded
batches (networks, linear models) or rows of the reduced table (trees), and says which. Modules are
imported when a kind is used, so listing kinds loads neither torch nor catboost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.errors import ConfigError, DataError, IntegrityError, nearest
from headrace.params import Resources, Section
from headrace.record import Recorder
from headrace.schema import Contract
from headrace.storage import read_json, write_json

if TYPE_CHECKING:
    from headrace.data.encoder import EncodedBatch

MODEL_JSON = "model.json"
NATIVE = "model"  # folder of the native files, beside model.json

Values: TypeAlias = "dict[str, npt.NDArray[np.float64]]"


@dataclass(frozen=True)
class Kind:
    """Where a kind of model lives, and the name of its params section there."""

    module: str
    section: str
    can_share: bool = False  # whether several ranks can fit it together, as torchrun starts them


KINDS: Mapping[str, Kind] = {
    "baseline": Kind("headrace.models.baseline", "BaselineParams"),
    "catboost": Kind("headrace.models.catboost", "CatboostParams"),
    "nn": Kind("headrace.models.nn", "NnParams", can_share=True),
}


@dataclass(frozen=True)
class TrainViews:
    """What a fit may look at: the train rows of some folds, encoded or as a table.

    ``stop_fold`` is one of ``folds``: the inner part on which early stopping is judged. A kind that
    does not stop early learns from all of ``folds``; the others from ``learn_folds``.
    """

    table: Path  # data/reduce
    encoded: Path  # data/encode
    cache: Path
    contract: Contract
    folds: tuple[int, ...]
    stop_fold: int

    @property
    def learn_folds(self) -> tuple[int, ...]:
        """The folds whose labels set the model's weights."""
        return tuple(fold for fold in self.folds if fold != self.stop_fold)


class FittedModel(Protocol):
    """A model that has learnt every target of its contract."""

    kind: str
    inputs: Literal["encoded", "table"]  # what ``predict`` reads

    @property
    def summary(self) -> Mapping[str, Any]:
        """What a person asks first (best iteration, loss, importances), as JSON values."""

    def predict(self, rows: "EncodedBatch | pa.Table") -> Values:
        """Return per target one number per row, or one per row and class.

        Shapes: (B,) the value of a regression or P(labels[1]); (B, K) class probabilities.
        """

    def save(self, folder: Path) -> None:
        """Write the native files into ``folder``, which exists and is private to the caller."""


class KindModule(Protocol):
    """The two functions of a kind's module."""

    def fit(
        self,
        views: TrainViews,
        params: Any,
        *,
        checkpoints: Path,
        resources: Resources,
        recorder: Recorder,
    ) -> FittedModel:
        """Learn every target; resume from ``checkpoints`` if a killed run left some there."""

    def load(self, folder: Path, description: Mapping[str, Any]) -> FittedModel:
        """Read back what ``save`` wrote; ``description`` is the content of model.json."""


class StreamingKind(KindModule, Protocol):
    """The module of a kind whose training loop reads batches from the encoded shards."""

    def open_learner(self, views: TrainViews, params: Any, *, resources: Resources) -> Any:
        """Return what ``fit`` trains, before its first step: a ``training.loop.Learner``.

        It also has ``batch_rows``, ``num_rows`` and ``close()``, which ends its readers.
        """


def kind_module(name: str) -> KindModule:
    """Import the module of the kind called ``name``.

    Raises:
        ConfigError: if there is no such kind, with the nearest name.
    """
    return cast(KindModule, import_module(_kind(name).module))


def streaming_kind(name: str) -> StreamingKind:
    """Import the module of the kind called ``name``, whose loop can be measured.

    Raises:
        ConfigError: if there is no such kind, or it does not train from shards.
    """
    module = kind_module(name)
    if not hasattr(module, "open_learner"):
        raise ConfigError(
            f"{name} does not train from encoded shards step by step; models that do: nn"
        )
    return cast(StreamingKind, module)


def model_section(name: str) -> type[Section]:
    """Return the params section of the kind called ``name``.

    Raises:
        ConfigError: if there is no such kind, with the nearest name.
    """
    kind = _kind(name)
    return cast(type[Section], getattr(import_module(kind.module), kind.section))


def save_model(model: FittedModel, folder: Path, contract: Contract) -> None:
    """Write ``model.json`` and the native files of ``model`` into ``folder``."""
    native = folder / NATIVE
    native.mkdir(parents=True)
    model.save(native)
    write_json(
        folder / MODEL_JSON,
        {
            "format": 1,
            "kind": model.kind,
            "inputs": model.inputs,
            "targets": [target.model_dump(mode="json") for target in contract.targets],
            "contract": contract.digest,
            "summary": dict(model.summary),
        },
    )


def load_model(folder: Path) -> FittedModel:
    """Read a model that ``save_model`` wrote; the caller has verified the folder's digests.

    Raises:
        IntegrityError: if model.json is missing, damaged or of a form this version does not read.
    """
    description = read_json(folder / MODEL_JSON)
    found = description.get("format") if isinstance(description, dict) else None
    if found != 1 or description.get("kind") not in KINDS:
        raise IntegrityError(
            f"{folder / MODEL_JSON} has format {found!r} and kind "
            f"{description.get('kind') if isinstance(description, dict) else None!r}; this "
            f"headrace reads format 1 of the kinds {', '.join(KINDS)}"
        )
    return kind_module(description["kind"]).load(folder / NATIVE, description)


def choose_stop_fold(folds: Sequence[int]) -> int:
    """Return the fold held back for early stopping: the last one, the latest rows of a time split.

    Raises:
        DataError: if there are fewer than two folds, so that nothing would be left to learn from.
    """
    if len(folds) < 2:
        raise DataError(
            f"the train rows have the folds {list(folds)}, but early stopping needs at least two: "
            f"one to stop on and one to learn from; set `extract.split.folds` to 2 or more"
        )
    return max(folds)


def _kind(name: str) -> Kind:
    if name not in KINDS:
        hint = nearest(name, KINDS) or f"; known: {', '.join(KINDS)}"
        raise ConfigError(f"{name!r} is not a kind of model{hint}")
    return KINDS[name]
