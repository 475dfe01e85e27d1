"""What every kind of model can do, and the list of kinds.

A kind is one module with a params section and two functions, ``fit`` and ``load``, and one entry in
``KINDS``. To add one:

1. write ``models/NAME.py`` with ``NameParams(Section)``, ``fit(views, params, *, checkpoints,
   resources, recorder) -> FittedModel`` and ``load(folder, description) -> FittedModel``;
2. add ``"NAME": Kind("headrace.models.NAME", "NameParams")`` below.

``fit`` learns every target of the contract from the rows that its ``TrainViews`` allows, and from
no others: early stopping is judged on an inner part of train, or the length of training is given.
The stage ``train`` calls it once per fold and makes a bag of the fitted models; a kind knows
nothing of that. A fitted model reads either encoded batches (networks, linear models) or rows of
the reduced table (trees), and says which. Modules are imported when a kind is used, so listing
kinds loads neither torch nor catboost.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.data.draws import bootstrap_counts, is_sampled
from headrace.errors import ConfigError, IntegrityError, nearest
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
    "tabnet": Kind("headrace.models.tabnet", "TabnetParams"),
    "factorization": Kind("headrace.models.factorization", "FactorizationParams", can_share=True),
}
# Kinds that are fed by what other models say. Each is made by a stage of its own, with a section
# of its own, and is no entry of ``models``.
SECOND_LEVEL: Mapping[str, Kind] = {
    "embedding_catboost": Kind("headrace.models.embedding_catboost", "EmbeddingCatboostParams"),
}


class FitParams(Section):
    """What the section of every kind that stops early says about the rows it is fitted on."""

    # folds: a model per fold, fitted on the other folds, predicts the rows of its own; valid and
    # test rows get the mean of all and of one more, fitted on all folds. bootstrap: the same, each
    # model on a bootstrap sample. none: one model, and no predictions of train rows.
    bag: Literal["folds", "bootstrap", "none"] = "folds"
    # Where early stopping looks. valid: the protocol of published tables; such a model has seen
    # the labels of valid rows, so it cannot be stacked or chosen by them.
    stop_rows: Literal["inner", "valid"] = "inner"

    @property
    def needs_stop_rows(self) -> bool:
        """Whether even a fit whose length is known has to look at rows it does not learn from."""
        return False


@dataclass(frozen=True)
class StopRows:
    """The rows on which early stopping is judged; their labels set no weights.

    ``fold``: all rows of this fold. ``share``: this share of the rows of all folds, by a hash of
    their id and ``seed``. ``valid``: the valid split. ``none``: no rows; a fit is as long as
    ``TrainViews.tuned`` says.
    """

    kind: Literal["fold", "share", "valid", "none"]
    fold: int = -1
    share: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class TrainViews:
    """What a fit may look at: the train rows of some folds, encoded or as a table.

    A kind that does not stop early learns from all rows of ``folds``; the others from those that
    are not ``stop`` rows. ``draw`` is the seed of a bootstrap sample of the rows learnt from; None
    for each of them once. ``tuned`` is what the stop rows of other fits settled, where this one has
    none: see ``FittedModel.tuned``.
    """

    table: Path  # data/reduce
    encoded: Path  # data/encode
    cache: Path
    contract: Contract
    folds: tuple[int, ...]
    stop: StopRows
    draw: int | None = None
    tuned: Mapping[str, float] = field(default_factory=dict)

    def is_allowed(self, fold: npt.NDArray[np.int8]) -> npt.NDArray[np.bool_]:
        """Return which train rows may be used at all, by their fold."""
        allowed: npt.NDArray[np.bool_] = np.isin(fold, self.folds)
        return allowed

    def is_stop(
        self, fold: npt.NDArray[np.int8], row_id: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Return which train rows early stopping is judged on; none where it looks at valid."""
        is_stop = np.zeros(len(fold), bool)
        if self.stop.kind == "fold":
            is_stop = self.is_allowed(fold) & (fold == self.stop.fold)
        elif self.stop.kind == "share":
            drawn = is_sampled(row_id, self.stop.share, seed=self.stop.seed)
            is_stop = self.is_allowed(fold) & drawn
        return is_stop

    def is_learnt(
        self, fold: npt.NDArray[np.int8], row_id: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Return which train rows set the weights of a model that stops early."""
        is_learnt: npt.NDArray[np.bool_] = self.is_allowed(fold) & ~self.is_stop(fold, row_id)
        if self.draw is not None:
            is_learnt &= self.counts(row_id) > 0
        return is_learnt

    def counts(self, row_id: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how often each row counts among those learnt from: 1, or its bootstrap draws."""
        if self.draw is None:
            return np.ones(len(row_id), np.int64)
        return bootstrap_counts(row_id, seed=self.draw)

    @property
    def described(self) -> dict[str, Any]:
        """The rows in JSON values: what a checkpoint must agree with."""
        return {
            "folds": list(self.folds),
            "stop": asdict(self.stop),
            "draw": self.draw,
            "tuned": dict(self.tuned),
        }


class FittedModel(Protocol):
    """A model that has learnt every target of its contract."""

    kind: str

    @property
    def inputs(self) -> Literal["encoded", "table"]:
        """What ``predict`` reads."""

    @property
    def summary(self) -> Mapping[str, Any]:
        """What a person asks first (best iteration, loss, importances), as JSON values."""

    @property
    def tuned(self) -> Mapping[str, float]:
        """What its stop rows settled (how many epochs or trees), by a name of the kind's own."""

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
        able = [one for one in KINDS if hasattr(kind_module(one), "open_learner")]
        raise ConfigError(
            f"{name} does not train from encoded shards step by step; models that do: "
            f"{', '.join(able)}"
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
    members = getattr(model, "members", None)
    write_json(
        folder / MODEL_JSON,
        {
            "format": 2,
            "kind": model.kind,
            "members": None if members is None else list(members),
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
    known = {**KINDS, **SECOND_LEVEL}
    if found != 2 or description.get("kind") not in known:
        raise IntegrityError(
            f"{folder / MODEL_JSON} has format {found!r} and kind "
            f"{description.get('kind') if isinstance(description, dict) else None!r}; this "
            f"headrace reads format 2 of the kinds {', '.join(known)}; run `headrace upgrade`, "
            f"then `headrace repro`"
        )
    kind = cast(KindModule, import_module(known[description["kind"]].module))
    native = folder / NATIVE
    if description["members"] is None:
        return kind.load(native, description)
    from headrace.models.bagging import BaggedModel

    summaries = description["summary"]
    return BaggedModel(
        {
            name: kind.load(native / name, {**description, "summary": summaries[name]})
            for name in description["members"]
        }
    )


def _kind(name: str) -> Kind:
    if name in SECOND_LEVEL:
        raise ConfigError(
            f"{name!r} is no entry of `models` but a stage of its own: take it out there, write a "
            f"section `{name}: {{}}` in params.yaml, and run `headrace upgrade`"
        )
    if name not in KINDS:
        hint = nearest(name, KINDS) or f"; known: {', '.join(KINDS)}"
        raise ConfigError(f"{name!r} is not a kind of model{hint}")
    return KINDS[name]
