"""Kind ``catboost``: gradient-boosted trees on the reduced table, one model per target.

With ``joint`` there is one model for all targets, which must be regressions: a tree's splits are
chosen for all of them together (MultiRMSE), each in units of its own spread.

Categories stay categories: their canonical text, ``__NA__`` where missing (CatBoost refuses a
missing category). Numbers are float32, NaN where missing. Which rows a model learns from and which
it stops on comes from the folds.

Settings are the library's but for one: it combines up to four categories in one statistic, which
takes time and memory with rows and categories. So does this kind on small tables; on others
``max_ctr_complexity`` is 1. On Adult (26k train rows, 8 categories, a bag) four are 102 instead of
51 CPU seconds, out-of-fold log-loss .2806 instead of .2819 and AUC .9273 instead of .9265. On the
example (245k rows, 9 categories, both targets, one fit) they would be 190 instead of 70 seconds and
twice the memory, AUC on test .698 instead of .691, on valid .676 both, where a 95 % interval by
days is .035 wide.

CatBoost holds its whole pool in memory. The bytes are predicted before anything is read; where
they exceed ``pool_budget`` the model learns from a declared sample of rows, chosen by a hash of
their id, which is said and recorded. The limit is a parameter, because the model depends on it.

A saved model carries the time, a random id and the path of the training folder; these are set to
nothing, so that the same rows and parameters give the same file. Snapshots for resuming are kept
in the checkpoint folder. Trees are the same with 1 and 2 threads, so ``threads`` is for speed.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, ValidationError, model_validator

from headrace.data.cache import cached_frame
from headrace.data.draws import is_sampled
from headrace.data.table import Table, open_table
from headrace.errors import (
    ConfigError,
    DataError,
    DependencyError,
    IntegrityError,
    ResourceError,
    SchemaError,
    Stopped,
    nearest,
)
from headrace.memory import format_bytes
from headrace.models.protocol import FitParams, TrainViews, Values
from headrace.params import Bytes, Resources, Section
from headrace.record import Recorder
from headrace.schema import FOLD, ROW_ID, Contract, Target, encode_target, file_stem, label_text
from headrace.storage import canonical_json, digest_bytes, read_json, write_json
from headrace.training.curves import LearningCurves, curves_json

if TYPE_CHECKING:
    import pandas as pd

    from headrace.data.encoder import EncodedBatch

Frame: TypeAlias = "pd.DataFrame"

_CONFIG = "trees.json"
_MISSING = "__NA__"
_GPU_DRIVER = Path("/proc/driver/nvidia/version")
# Peak bytes a row needs, measured on the example (24 numbers, 9 categories, 200k rows): frame,
# raw and quantised pool, and the running statistics of categories, which are most of it.
_BYTES_PER_ROW, _BYTES_PER_NUMBER, _BYTES_PER_CATEGORY = 100, 16, 150
_BYTES_PER_COMBINED_CATEGORY = 350  # where statistics of several categories together are kept
_COMBINED_VALUES = 500_000  # rows x categories up to which such statistics are worth their time
_CURVE_POINTS = 200  # of a learning curve that are recorded, at most
_LOSS = {"regression": "RMSE", "binary": "Logloss", "multiclass": "MultiClass"}
_PARTS = {"learn": "train", "validation": "inner"}  # our names of CatBoost's
_JOINT = "joint"  # the name of the one model of all targets


class CatboostParams(FitParams):
    """Section ``train.catboost`` of params.yaml; what is absent is the library's own choice."""

    key: ClassVar[str] = "train.catboost"  # of the section, for messages

    seed: Annotated[int, Field(ge=0)] = 0
    threads: Annotated[int, Field(ge=1, le=1024)] = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"  # results depend on it; auto: a GPU if present
    joint: bool = False  # one model for all targets, if all are regressions; on the CPU only
    # More trees than the library's 1,000 and more patience: on California housing a model of all
    # train rows comes to an RMSE of .431 with 2,000 trees, .424 with 5,000, and still gains.
    iterations: Annotated[int, Field(ge=1)] = 10_000  # trees at most
    patience: Annotated[int, Field(ge=1)] = 300  # trees without a gain before training ends
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    depth: Annotated[int, Field(ge=1, le=16)] = 6
    l2_leaf_reg: Annotated[float, Field(ge=0)] | None = None
    border_count: Annotated[int, Field(ge=1, le=65_535)] = 254  # splits tried per number
    # Categories combined at most. None: 4 up to 500,000 rows x categories, beyond that 1.
    max_ctr_complexity: Annotated[int, Field(ge=1, le=15)] | None = None
    pool_budget: Bytes = 1 << 30  # predicted bytes beyond which a sample of the rows is learnt from
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 2.0

    @model_validator(mode="after")
    def _device_can_do_it(self) -> Self:
        if self.only_on_cpu and self.device == "cuda":
            raise ValueError(
                f"`{self.only_on_cpu}` is {getattr(self, self.only_on_cpu)}, which works on the "
                f"CPU only, and `device` is 'cuda'; set `device` to cpu or auto"
            )
        return self

    @property
    def only_on_cpu(self) -> str:
        """Name of the setting that a GPU cannot follow; empty if there is none."""
        return "joint" if self.joint else ""

    def feature_weights(
        self,
        features: Sequence[str],  # noqa: ARG002 -- embedding_catboost tells them apart
    ) -> list[float] | None:
        """Return how much the gain of a split counts, by input; None: each the same."""
        return None


class _Config(Section):
    """The content of trees.json: the inputs in their order, and the targets."""

    format: Literal[1] = 1
    features: Annotated[tuple[str, ...], Field(strict=False)]
    categories: Annotated[tuple[str, ...], Field(strict=False)]
    targets: Annotated[tuple[Target, ...], Field(strict=False)]
    threads: int
    # Means of regression targets: CatBoost learns what is above them, for it holds labels as
    # float32, in which 1.7e9 + x is all one number.
    means: dict[str, float] = Field(default_factory=dict)
    # Spreads of the targets of a joint model, whose errors are summed; empty for separate ones.
    spreads: dict[str, float] = Field(default_factory=dict)

    @property
    def groups(self) -> dict[str, tuple[Target, ...]]:
        """The targets that one model learns together, by the name of its file."""
        if self.spreads:
            return {_JOINT: self.targets}
        return {file_stem(target.name): (target,) for target in self.targets}


@dataclass(frozen=True)
class _TrainRows:
    """The rows that a fit may use, in memory: inputs, labels, weights and the purpose of each.

    Shapes: ``labels`` per target (B,) float64, NaN where missing; ``learn`` and ``stop`` (B,)
    masks that do not overlap; ``stop`` None where the number of trees is given.
    """

    inputs: Frame
    labels: Mapping[str, npt.NDArray[np.float64]]
    weight: npt.NDArray[np.float64] | None
    learn: npt.NDArray[np.bool_]
    stop: npt.NDArray[np.bool_] | None


@dataclass(frozen=True)
class ShapValues:
    """What each input adds to the predictions of one target: with ``base_O`` they add up to them.

    In the target's unit, or in log-odds: of labels[1], or one number per class. Shapes:
    ``values_BFO`` (rows, inputs, predicted numbers), ``base_O`` the mean over the rows learnt from.
    Source: Lundberg et al. 2018, "Consistent Individualized Feature Attribution for Tree
    Ensembles".
    """

    columns: tuple[str, ...]
    values_BFO: npt.NDArray[np.float64]
    base_O: npt.NDArray[np.float64]


class CatboostModel:
    """One ensemble of trees per target, or one for all."""

    kind = "catboost"
    inputs: Literal["table"] = "table"

    def __init__(
        self, config: _Config, trees: Mapping[str, Any], summary: Mapping[str, Any]
    ) -> None:
        self._config = config
        self._trees = dict(trees)
        self._summary = dict(summary)

    @property
    def summary(self) -> Mapping[str, Any]:
        """Per target: best iteration, loss on the inner part, importance of each input."""
        return self._summary

    @property
    def tuned(self) -> Mapping[str, float]:
        """The number of trees, by target."""
        return {name: float(told["trees"]) for name, told in self._summary["targets"].items()}

    def predict(self, rows: "EncodedBatch | pa.Table") -> Values:
        """Return per target the value, P(labels[1]) or the class probabilities of each row.

        Raises:
            SchemaError: if the rows lack an input column.
        """
        if not isinstance(rows, pa.Table):
            raise SchemaError("trees read rows of the reduced table, not encoded ones")
        config = self._config
        if rows.num_rows == 0:  # a pool cannot be empty
            return {target.name: _no_values(target) for target in config.targets}
        pool = _rows_pool(rows, config)
        values: Values = {}
        for name, group in config.groups.items():
            values |= _values(self._trees[name], pool, group, config)
        return values

    def shap_values(self, rows: pa.Table) -> dict[str, ShapValues]:
        """Return per target what each input adds to the prediction of each row, at least one row.

        Raises:
            SchemaError: if the rows lack an input column.
        """
        config = self._config
        pool = _rows_pool(rows, config)
        found: dict[str, ShapValues] = {}
        for name, group in config.groups.items():
            found |= _shap_values(self._trees[name], pool, group, config)
        return found

    def save(self, folder: Path) -> None:
        """Write trees.json and one .cbm per model."""
        write_json(folder / _CONFIG, self._config.model_dump(mode="json"))
        for name, trees in self._trees.items():
            _forget_circumstances(trees)
            trees.save_model(str(folder / f"{name}.cbm"), format="cbm")


def fit(
    views: TrainViews,
    params: CatboostParams,
    *,
    checkpoints: Path,
    resources: Resources,
    recorder: Recorder,
) -> CatboostModel:
    """Fit one model per target; stop each on the rows held back and keep its best iteration.

    Raises:
        ConfigError: if one model is wanted for targets that cannot be learnt together.
        ResourceError: if the pool will not fit ``resources.memory_budget``, with the figure needed.
        DataError: if CatBoost refuses the rows.
        Stopped: on a signal; the snapshots stay and the next run goes on from them.
    """
    contract = views.contract
    if params.joint:
        _refuse_unlike_targets(contract.targets, params)
    table = open_table(views.table)
    complexity = ctr_complexity(params, table.num_rows("train"), contract)
    params = params.model_copy(update={"max_ctr_complexity": complexity})
    num_rows = rows_to_learn_from(table.num_rows("train"), contract, params, recorder)
    _refuse_small_memory(num_rows, contract, params, resources)
    rows = _read_rows(table, views, params, num_rows, recorder)
    task_type = "GPU" if not params.only_on_cpu and _is_gpu_used(params) else "CPU"
    recorder.params(
        {
            "device": task_type.lower(),
            "max_ctr_complexity": complexity,
            "rows_learnt_from": int(rows.learn.sum()),
            "rows_held_back": 0 if rows.stop is None else int(rows.stop.sum()),
        }
    )
    scales = _scales(rows, contract.targets)
    config = _Config(
        features=contract.features,
        categories=contract.named("category"),
        targets=contract.targets,
        threads=params.threads,
        means={name: mean for name, (mean, _) in scales.items()},
        spreads={name: spread for name, (_, spread) in scales.items()} if params.joint else {},
    )
    folder = checkpoints / _signature(params, views, num_rows, task_type)
    trees: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    curves: list[dict[str, Any]] = []
    for place, (name, group) in enumerate(config.groups.items()):
        own = folder / f"target-{place}"
        if rows.stop is None:
            num_trees = round(views.tuned[group[0].name])
            params = params.model_copy(update={"iterations": num_trees})
        model = _fit_group(rows, group, config, params, task_type, own, recorder)
        summary |= {target.name: _summary(model, config.features) for target in group}
        curves += _curves(model, _title(group))
        trees[name] = _read_back(model, own / "trees.cbm")
    return CatboostModel(config, trees, {"rows": num_rows, "targets": summary, "curves": curves})


def load(folder: Path, description: Mapping[str, Any]) -> CatboostModel:
    """Read back what ``save`` wrote.

    Raises:
        IntegrityError: if a file is missing or is no CatBoost model.
    """
    from catboost import CatBoostError

    try:
        config = _Config.model_validate(read_json(folder / _CONFIG))
        trees = {name: _read_trees(folder / f"{name}.cbm") for name in config.groups}
    except (ValidationError, CatBoostError) as error:
        raise IntegrityError(
            f"{folder} does not hold whole trees ({error}); train the model again"
        ) from error
    return CatboostModel(config, trees, description.get("summary", {}))


def ctr_complexity(params: CatboostParams, num_rows: int, contract: Contract) -> int:
    """Return ``max_ctr_complexity``, chosen for so many train rows if params leave it open."""
    if params.max_ctr_complexity is not None:
        return params.max_ctr_complexity
    is_small = num_rows * len(contract.named("category")) <= _COMBINED_VALUES
    return 4 if is_small else 1


def predicted_bytes(num_rows: int, contract: Contract, *, max_ctr_complexity: int | None) -> int:
    """Return the bytes CatBoost will hold at its peak for so many rows, rather high than low."""
    is_combined = max_ctr_complexity != 1
    per_category = _BYTES_PER_COMBINED_CATEGORY if is_combined else _BYTES_PER_CATEGORY
    per_row = _BYTES_PER_ROW
    per_row += _BYTES_PER_NUMBER * len(contract.named("numeric"))
    per_row += per_category * len(contract.named("category"))
    return num_rows * per_row


def rows_to_learn_from(
    num_rows: int, contract: Contract, params: CatboostParams, recorder: Recorder
) -> int:
    """Return how many of ``num_rows`` fit ``pool_budget``; fewer than all is said and recorded."""
    needed = predicted_bytes(num_rows, contract, max_ctr_complexity=params.max_ctr_complexity)
    fitting = min(num_rows, int(num_rows * params.pool_budget / max(1, needed)))
    recorder.params({"pool_bytes_predicted": needed, "sample_share": fitting / max(1, num_rows)})
    if fitting < num_rows:
        recorder.warn(
            f"catboost learns from a sample of about {fitting:,} of {num_rows:,} train rows: all "
            f"would need about {format_bytes(needed)}, and `{params.key}.pool_budget` is "
            f"{format_bytes(params.pool_budget)}"
        )
    return fitting


def inputs_of_table(rows: pa.Table, features: Sequence[str], categories: Sequence[str]) -> Frame:
    """Return the input columns as CatBoost wants them: float32, or categories of text.

    Raises:
        SchemaError: if a column is missing.
    """
    import pandas as pd

    _require_columns(rows, features)
    columns: dict[str, Any] = {}
    for name in features:
        values = rows[name].combine_chunks()
        if name in categories:
            coded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
            codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
            columns[name] = _text_categories(codes, label_text(coded.dictionary).to_pylist())
        else:
            columns[name] = _numbers(values)
    return pd.DataFrame(columns, copy=False)


def _require_columns(rows: pa.Table, features: Sequence[str]) -> None:
    missing = [name for name in features if name not in rows.column_names]
    if missing:
        near = nearest(missing[0], rows.column_names)
        raise SchemaError(f"the rows lack the columns {missing}, which the trees read{near}")


def _text_categories(codes: npt.NDArray[Any], texts: Sequence[str | None]) -> "pd.Categorical":
    """Return a column of text categories; code -1 and a null label are the missing category."""
    import pandas as pd

    labels = [_MISSING if text is None else text for text in texts] + [_MISSING]
    place = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    lut = np.array([place[label] for label in labels], np.int32)  # its last entry is for code -1
    return pd.Categorical.from_codes(lut[codes], categories=list(place))


def _numbers(values: pa.Array) -> npt.NDArray[np.float32]:
    """Return float32, NaN where null or not finite."""
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    elif pa.types.is_decimal(values.type) or pa.types.is_null(values.type):
        values = values.cast(pa.float64())
    with np.errstate(over="ignore"):
        numbers = values.to_numpy(zero_copy_only=False).astype(np.float32)
    numbers[~np.isfinite(numbers)] = np.nan
    return cast("npt.NDArray[np.float32]", numbers)


def _read_rows(
    table: Table, views: TrainViews, params: CatboostParams, num_rows: int, recorder: Recorder
) -> _TrainRows:
    contract = views.contract
    weight = contract.weight
    names = [target.name for target in contract.targets]
    columns = [ROW_ID, FOLD, *contract.features, *names, *([weight] if weight else [])]
    total = table.num_rows("train")
    if num_rows < total:
        read = _read_sample(table, columns, share=num_rows / total, seed=params.seed)
    else:
        read = _read_whole(table, columns, views.cache, recorder)
    num_train = read.num_rows
    if views.stop.kind == "valid":
        valid = table.read("valid", columns)
        read = pa.concat_tables([read, valid], promote_options="permissive").unify_dictionaries()
    fold = read[FOLD].fill_null(-1).to_numpy()
    row_id = read[ROW_ID].to_numpy()
    importance = read[weight].cast(pa.float64()).to_numpy() if weight else None
    if views.draw is not None:
        counts = np.where(views.is_learnt(fold, row_id), views.counts(row_id), 1)
        importance = counts * (1.0 if importance is None else importance)
    stop = None
    if views.stop.kind != "none":
        is_valid = np.arange(len(fold)) >= num_train
        stop = is_valid if views.stop.kind == "valid" else views.is_stop(fold, row_id)
    return _TrainRows(
        inputs=inputs_of_table(read, contract.features, contract.named("category")),
        labels={t.name: encode_target(read[t.name], t) for t in contract.targets},
        weight=importance,
        learn=views.is_learnt(fold, row_id),
        stop=stop,
    )


def _read_whole(table: Table, columns: Sequence[str], cache: Path, recorder: Recorder) -> pa.Table:
    frame = cached_frame(table, "train", columns, cache=cache, recorder=recorder)
    return pa.Table.from_pandas(frame, preserve_index=False)


def _read_sample(table: Table, columns: Sequence[str], *, share: float, seed: int) -> pa.Table:
    def kept() -> Iterator[pa.RecordBatch]:
        for batch in table.batches("train", columns):
            keep = is_sampled(batch.column(ROW_ID).to_numpy(), share, seed=seed)
            yield batch.filter(pa.array(keep))

    return pa.Table.from_batches(list(kept())).unify_dictionaries()


def _scales(rows: _TrainRows, targets: Sequence[Target]) -> dict[str, tuple[float, float]]:
    """Return mean and spread of each regression target over the labelled rows learnt from."""
    scales = {}
    for target in targets:
        y = rows.labels[target.name][rows.learn]
        y = y[~np.isnan(y)]
        if target.task == "regression":
            scales[target.name] = (float(y.mean()), float(y.std())) if len(y) else (0.0, 1.0)
    return scales


def _refuse_unlike_targets(targets: Sequence[Target], params: CatboostParams) -> None:
    classes = [target.name for target in targets if target.task != "regression"]
    if classes or len(targets) < 2:
        what = f"{classes} have classes" if classes else f"{targets[0].name!r} is the only target"
        raise ConfigError(
            f"`{params.key}.joint` is true, but {what}; one model learns two or more regressions "
            f"together: leave it out for a model per target"
        )


def _fit_group(
    rows: _TrainRows,
    group: Sequence[Target],
    config: _Config,
    params: CatboostParams,
    task_type: str,
    folder: Path,
    recorder: Recorder,
) -> Any:
    """Fit the trees of one target, or of several together."""
    from catboost import CatBoost, CatBoostError

    labels = np.column_stack([rows.labels[target.name] for target in group])
    is_known = ~np.isnan(labels).all(axis=1)
    loss = _loss(group, is_whole=not np.isnan(labels[is_known]).any())
    curve = _Curve(_title(group), loss, params.iterations, recorder)
    folder.mkdir(parents=True, exist_ok=True)
    stop = None if rows.stop is None else rows.stop & is_known
    settings = _settings(params, group, loss, task_type, folder)
    if stop is not None:
        settings |= {"od_type": "Iter", "od_wait": params.patience, "use_best_model": True}
    if weights := params.feature_weights(config.features):
        settings["feature_weights"] = weights
    model = CatBoost(settings)

    def learn(callbacks: list[_Curve] | None) -> None:
        model.fit(
            _pool(rows, group, rows.learn & is_known, config),
            eval_set=None if stop is None else _pool(rows, group, stop, config),
            callbacks=callbacks,
        )

    try:
        if task_type == "CPU":
            _stoppable(learn, curve)
        else:
            learn(None)  # on a GPU CatBoost calls nobody back
    except KeyboardInterrupt as error:  # what any signal becomes inside CatBoost
        raise Stopped(
            f"training of target {_title(group)!r} was stopped; run again to go on from its "
            f"snapshot"
        ) from error
    except CatBoostError as error:
        raise DataError(f"catboost cannot learn target {_title(group)!r}: {error}") from error
    if curve.error is not None:
        raise curve.error
    return model


def _title(group: Sequence[Target]) -> str:
    return group[0].name if len(group) == 1 else _JOINT


def _loss(group: Sequence[Target], *, is_whole: bool) -> str:
    if len(group) == 1:
        return _LOSS[group[0].task]
    return "MultiRMSE" if is_whole else "MultiRMSEWithMissingValues"


def _stoppable(learn: Callable[["list[_Curve]"], None], curve: "_Curve") -> None:
    """Run ``learn`` in a thread, so that what stops this one stops the training too.

    An exception from a signal handler that strikes inside CatBoost's own callback code is dropped
    there, and training would go on; here it strikes the waiting main thread. The tree in progress
    is finished first.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="catboost") as threads:
        training = threads.submit(learn, [curve])
        try:
            training.result()
        finally:
            curve.is_stopped = True


def _pool(
    rows: _TrainRows, group: Sequence[Target], chosen: npt.NDArray[np.bool_], config: _Config
) -> Any:
    from catboost import Pool

    return Pool(
        rows.inputs[chosen],
        _labels(rows, group, chosen, config),
        cat_features=list(config.categories),
        weight=None if rows.weight is None else rows.weight[chosen],
        thread_count=config.threads,
    )


def _labels(
    rows: _TrainRows, group: Sequence[Target], chosen: npt.NDArray[np.bool_], config: _Config
) -> npt.NDArray[Any]:
    """Return class codes, or values above the mean; of a joint model in units of the spread."""
    if group[0].task != "regression":
        return rows.labels[group[0].name][chosen].astype(np.int64)
    columns = [
        (rows.labels[target.name][chosen] - config.means[target.name])
        / config.spreads.get(target.name, 1.0)
        for target in group
    ]
    return columns[0] if len(group) == 1 else np.column_stack(columns)


def _settings(
    params: CatboostParams, group: Sequence[Target], loss: str, task_type: str, folder: Path
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "loss_function": loss,
        "iterations": params.iterations,
        "learning_rate": params.learning_rate,
        "depth": params.depth,
        "l2_leaf_reg": params.l2_leaf_reg,
        "border_count": params.border_count,
        "max_ctr_complexity": params.max_ctr_complexity,
        "random_seed": params.seed,
        "thread_count": params.threads,
        "task_type": task_type,
        "logging_level": "Silent",
        "train_dir": str(folder),
        "save_snapshot": True,
        "snapshot_file": "snapshot",
        "snapshot_interval": max(1, round(60 * params.checkpoint_minutes)),
    }
    if group[0].task == "multiclass":
        settings["classes_count"] = len(group[0].labels)
    return {name: value for name, value in settings.items() if value is not None}


@dataclass
class _Curve:
    """Tells the recorder how training goes; CatBoost calls it after every tree.

    An exception here would reach the caller as text only, so it is kept and raised afterwards.
    """

    title: str  # of what is learnt
    loss: str
    iterations: int
    recorder: Recorder
    error: Exception | None = field(default=None, init=False)
    is_stopped: bool = field(default=False, init=False)

    def after_iteration(self, info: Any) -> bool:
        """Record a point of the learning curve; return whether to go on."""
        try:
            self._tell(info)
        except Exception as error:  # noqa: BLE001 -- raised again after the fit
            self.error = error
        return self.error is None and not self.is_stopped

    def _tell(self, info: Any) -> None:
        told = {_PARTS[part]: float(by[self.loss][-1]) for part, by in info.metrics.items()}
        part, value = next(reversed(told.items()))
        self.recorder.progress(
            info.iteration,
            self.iterations,
            unit="trees",
            detail=f"{self.title}: {part} {self.loss} {value:.5g}",
        )
        if (info.iteration - 1) % max(1, self.iterations // _CURVE_POINTS) == 0:
            values = {f"{part}_loss_{self.title}": value for part, value in told.items()}
            self.recorder.metrics(
                {key: value for key, value in values.items() if math.isfinite(value)},
                step=info.iteration,
            )


def _values(trees: Any, pool: Any, group: Sequence[Target], config: _Config) -> Values:
    """Return what one model says of the targets it has learnt."""
    target = group[0]
    kind = "RawFormulaVal" if target.task == "regression" else "Probability"
    values = np.asarray(
        trees.predict(pool, prediction_type=kind, thread_count=config.threads), dtype=np.float64
    )
    if target.task == "binary":
        return {target.name: values[:, 1]}
    if target.task == "multiclass":
        return {target.name: values / values.sum(axis=1, keepdims=True)}
    columns = values.reshape(len(values), len(group))
    return {
        target.name: columns[:, place] * config.spreads.get(target.name, 1.0)
        + config.means[target.name]
        for place, target in enumerate(group)
    }


def _rows_pool(rows: pa.Table, config: _Config) -> Any:
    from catboost import Pool

    frame = inputs_of_table(rows, config.features, config.categories)
    return Pool(frame, cat_features=list(config.categories), thread_count=config.threads)


def _shap_values(
    trees: Any, pool: Any, group: Sequence[Target], config: _Config
) -> dict[str, ShapValues]:
    """Return what one model's inputs add, per target it has learnt, in the target's unit."""
    told = trees.get_feature_importance(pool, type="ShapValues", thread_count=config.threads)
    # (B, F + 1) of one predicted number, (B, O, F + 1) of several; the base is the last column.
    told_BOF = np.asarray(told, np.float64).reshape(len(told), -1, len(config.features) + 1)
    found = {}
    for place, target in enumerate(group):
        own_BOF = told_BOF if target.task == "multiclass" else told_BOF[:, [place]]
        own_BOF = own_BOF * config.spreads.get(target.name, 1.0)
        base_O = own_BOF[0, :, -1] + config.means.get(target.name, 0.0)
        values_BFO = own_BOF[:, :, :-1].transpose(0, 2, 1)
        found[target.name] = ShapValues(config.features, values_BFO, base_O)
    return found


def _no_values(target: Target) -> npt.NDArray[np.float64]:
    return np.empty((0, target.num_outputs) if target.task == "multiclass" else 0)


def _summary(trees: Any, features: Sequence[str]) -> dict[str, Any]:
    importances = [float(value) for value in trees.get_feature_importance()]
    found = {
        "trees": int(trees.tree_count_),
        "importances": dict(zip(features, importances, strict=True)),
    }
    if held_back := trees.get_best_score().get("validation"):
        (inner_loss,) = held_back.values()
        found |= {
            "best_iteration": int(trees.get_best_iteration()),
            "inner_loss": float(inner_loss),
        }
    return found


def _curves(trees: Any, title: str) -> list[dict[str, Any]]:
    """Return the loss by tree as JSON values; none where no rows were held back."""
    found = trees.get_evals_result()
    if not found.get("validation"):
        return []
    ((loss, held_back),) = found["validation"].items()
    part = LearningCurves(f"{loss} of {title}", held_back, found["learn"][loss])
    return curves_json([part], step="tree", kept=int(trees.get_best_iteration()) + 1)


def _read_back(trees: Any, path: Path) -> Any:
    """Return what was trained, saved and read.

    A trained model holds on to part of what it learnt from: about 230 bytes a row here, which a bag
    would hold once per fit. And its file is laid out otherwise than that of a model that was read;
    so a model that an earlier run has finished would not be saved as the same bytes.
    """
    trees.save_model(str(path), format="cbm")
    return _read_trees(path)


def _read_trees(path: Path) -> Any:
    from catboost import CatBoost

    trees = CatBoost()
    trees.load_model(str(path), format="cbm")
    return trees


def _forget_circumstances(trees: Any) -> None:
    """Blank what differs between identical runs: time, random id, folder of the training."""
    metadata = trees.get_metadata()
    for key in ("train_finish_time", "model_guid"):
        metadata[key] = ""
    for key in ("params", "output_options"):
        if key in metadata:
            content = json.loads(metadata[key])
            content.pop("train_dir", None)
            content.get("flat_params", {}).pop("train_dir", None)
            metadata[key] = canonical_json(content)


def _is_gpu_used(params: CatboostParams) -> bool:
    from catboost.utils import get_gpu_device_count

    if params.device == "cpu":
        return False
    # Asked only where there is a driver: elsewhere CatBoost prints an error to stderr.
    is_present: bool = _GPU_DRIVER.exists() and get_gpu_device_count() > 0
    if params.device == "cuda" and not is_present:
        raise DependencyError(
            f"`{params.key}.device` is 'cuda', but CatBoost finds no GPU on this machine; set it "
            f"to auto or cpu"
        )
    return is_present


def _refuse_small_memory(
    num_rows: int, contract: Contract, params: CatboostParams, resources: Resources
) -> None:
    needed = predicted_bytes(num_rows, contract, max_ctr_complexity=params.max_ctr_complexity)
    if needed > resources.memory_budget:
        raise ResourceError(
            f"catboost would need about {format_bytes(needed)} for {num_rows:,} train rows, and "
            f"{format_bytes(resources.memory_budget)} of `resources.memory_budget` are left for "
            f"this stage; raise it, or lower `{params.key}.pool_budget` to learn from a sample"
        )


def _signature(params: CatboostParams, views: TrainViews, num_rows: int, task_type: str) -> str:
    """Name the folder of snapshots by all that the trees depend on."""
    chosen = params.model_dump(mode="json", exclude={"checkpoint_minutes", "threads"})
    text = canonical_json(
        {
            "params": chosen,
            "contract": views.contract.digest,
            "rows": {**views.described, "sampled": num_rows},
            "device": task_type,
        }
    )
    return digest_bytes(text.encode())[:16]
