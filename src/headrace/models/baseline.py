"""Kind ``baseline``: what a model has to beat.

``prior`` predicts the weighted mean of a target, or the share of each class: it reads only labels.
``linear`` is a ridge or logistic regression on the encoded inputs, fitted by L-BFGS over streamed
passes of the shards: memory stays at one slice of rows. A missing number counts as the mean with
an indicator beside it; a category is one-hot, but as a look-up in a column of coefficients, so its
number of labels costs nothing and the penalty keeps rare ones near 0.

Neither stops early, so both learn from all folds they are given.

Legend of axes: B rows, N numeric inputs, D = 2 N (numbers, then indicators), C categories, L all
codes of all categories, O outputs of one target.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, ValidationError

from headrace.errors import IntegrityError, SchemaError
from headrace.models.protocol import TrainViews, Values
from headrace.params import Resources, Section
from headrace.record import Recorder
from headrace.schema import Target
from headrace.storage import read_json, write_file, write_json

if TYPE_CHECKING:
    from headrace.data.encoder import EncodedBatch
    from headrace.data.shards import Shards

Floats: TypeAlias = npt.NDArray[np.float64]

_CONFIG = "baseline.json"
_COEFFICIENTS = "coefficients.safetensors"
_SLICE_ROWS = 65_536
_SQUASH = 10.0  # standard deviations beyond which a number counts no further


class BaselineParams(Section):
    """Section ``train.baseline`` of params.yaml: which simple model stands for "knowing little"."""

    kind: Literal["prior", "linear"] = "prior"
    penalty: Annotated[float, Field(gt=0)] = 1.0e-4  # linear: times half the squared coefficients
    max_passes: Annotated[int, Field(ge=1)] = 100  # linear: over the rows, per target


class _Config(Section):
    """The content of baseline.json."""

    format: Literal[1] = 1
    kind: Literal["prior", "linear"]
    targets: Annotated[tuple[Target, ...], Field(strict=False)]
    priors: Annotated[
        tuple[Annotated[tuple[float, ...], Field(strict=False)], ...], Field(strict=False)
    ]
    scales: Annotated[tuple[float, ...], Field(strict=False)]  # of regression targets, else 1
    num_numeric: int
    cardinalities: Annotated[tuple[int, ...], Field(strict=False)]
    passes: Annotated[tuple[int, ...], Field(strict=False)] = ()


@dataclass(frozen=True)
class _Coefficients:
    """One target's linear model: ``bias_O``, ``dense_DO``, and ``sparse_LO`` for all codes."""

    bias_O: Floats
    dense_DO: Floats
    sparse_LO: Floats

    def flat(self) -> Floats:
        return np.concatenate([self.bias_O, self.dense_DO.ravel(), self.sparse_LO.ravel()])


class BaselineModel:
    """Priors, and for ``linear`` the coefficients of every target."""

    kind = "baseline"
    inputs: Literal["encoded"] = "encoded"

    def __init__(self, config: _Config, coefficients: Sequence[_Coefficients]) -> None:
        self._config = config
        self._coefficients = tuple(coefficients)

    @property
    def tuned(self) -> Mapping[str, float]:
        """Nothing: it does not stop early."""
        return {}

    @property
    def summary(self) -> Mapping[str, Any]:
        """The kind, and per target the mean or the shares of the classes."""
        config = self._config
        priors = {t.name: list(p) for t, p in zip(config.targets, config.priors, strict=True)}
        told: dict[str, Any] = {"kind": config.kind, "priors": priors}
        if config.kind == "linear":
            names = [target.name for target in config.targets]
            told["passes"] = dict(zip(names, config.passes, strict=True))
        return told

    def predict(self, rows: "EncodedBatch | pa.Table") -> Values:
        """Return per target the value, P(labels[1]) or the class probabilities of each row.

        Raises:
            SchemaError: if the rows are not encoded, or by another encoder.
        """
        if isinstance(rows, pa.Table):
            raise SchemaError("a baseline reads encoded rows; pass them through its encoder first")
        config = self._config
        if config.kind == "prior":
            return {
                target.name: _prior_values(target, prior, len(rows))
                for target, prior in zip(config.targets, config.priors, strict=True)
            }
        _refuse_other_width(rows, config)
        dense_BD, places_BC = _inputs(rows, config.cardinalities)
        values: Values = {}
        for j, target in enumerate(config.targets):
            with _one_blas_thread():
                z_BO = _scores(self._coefficients[j], dense_BD, places_BC)
            if target.task == "regression":
                z_BO = z_BO * config.scales[j] + config.priors[j][0]
            values[target.name] = _to_values(target, z_BO)
        return values

    def save(self, folder: Path) -> None:
        """Write baseline.json and, for ``linear``, coefficients.safetensors."""
        write_json(folder / _CONFIG, self._config.model_dump(mode="json"))
        if self._coefficients:
            from safetensors.numpy import save

            tensors = {
                f"{part}_{j}": np.ascontiguousarray(value)
                for j, c in enumerate(self._coefficients)
                for part, value in (
                    ("bias", c.bias_O),
                    ("dense", c.dense_DO),
                    ("sparse", c.sparse_LO),
                )
            }
            write_file(folder / _COEFFICIENTS, save(tensors))


def fit(
    views: TrainViews,
    params: BaselineParams,
    *,
    checkpoints: Path,  # noqa: ARG001 -- part of the protocol; a fit takes seconds
    resources: Resources,  # noqa: ARG001 -- as above
    recorder: Recorder,
) -> BaselineModel:
    """Learn priors, or a linear model, from all train rows that ``views`` allows."""
    from headrace.data.shards import open_shards

    shards = open_shards(views.encoded, "train", contract_digest=views.contract.digest)
    targets = views.contract.targets
    rows = views.is_allowed(shards.read("fold"))
    moments = [_moments(shards, rows, j, target) for j, target in enumerate(targets)]
    config = _Config(
        kind=params.kind,
        targets=targets,
        priors=tuple(prior for prior, _ in moments),
        scales=tuple(scale for _, scale in moments),
        num_numeric=len(shards.numeric),
        cardinalities=shards.cardinalities,
    )
    recorder.params({"rows_learnt_from": int(rows.sum())})
    if params.kind == "prior":
        return BaselineModel(config, ())
    with _one_blas_thread():
        fitted = [
            _fit_linear(shards, rows, config, j, params, recorder) for j in range(len(targets))
        ]
    passes = tuple(num_passes for _, num_passes in fitted)
    return BaselineModel(
        config.model_copy(update={"passes": passes}), [coefficients for coefficients, _ in fitted]
    )


def load(folder: Path, description: Mapping[str, Any]) -> BaselineModel:  # noqa: ARG001
    """Read back what ``save`` wrote.

    Raises:
        IntegrityError: if a file is missing or not whole.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_tensors

    try:
        config = _Config.model_validate(read_json(folder / _CONFIG))
        if config.kind == "prior":
            return BaselineModel(config, ())
        tensors = load_tensors((folder / _COEFFICIENTS).read_bytes())
        parts = [
            _Coefficients(tensors[f"bias_{j}"], tensors[f"dense_{j}"], tensors[f"sparse_{j}"])
            for j in range(len(config.targets))
        ]
    except (ValidationError, SafetensorError, KeyError, FileNotFoundError) as error:
        raise IntegrityError(
            f"{folder} does not hold a whole baseline ({error}); train the model again"
        ) from error
    return BaselineModel(config, parts)


def _one_blas_thread() -> AbstractContextManager[Any]:
    """Let BLAS, SciPy's too, use one thread for a while: it rounds by the number it divides by."""
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[Any] = threadpool_limits(1, user_api="blas")
    return limits


def _moments(
    shards: "Shards", rows: npt.NDArray[np.bool_], place: int, target: Target
) -> tuple[tuple[float, ...], float]:
    """Return the prior (mean, or share per class) and the spread of one target."""
    y_B = shards.read("targets")[rows, place].astype(np.float64)
    weight_B = shards.read("weight")[rows].astype(np.float64)
    is_known = ~np.isnan(y_B)
    y_B, weight_B = y_B[is_known], weight_B[is_known]
    if target.task == "regression":
        mean = float(np.average(y_B, weights=weight_B))
        std = float(np.sqrt(np.average((y_B - mean) ** 2, weights=weight_B)))
        return (mean,), std or 1.0
    shares = np.bincount(y_B.astype(np.int64), weight_B, minlength=len(target.labels))
    return tuple((shares / shares.sum()).tolist()), 1.0


def _prior_values(target: Target, prior: tuple[float, ...], num_rows: int) -> Floats:
    if target.task == "multiclass":
        return np.tile(np.array(prior), (num_rows, 1))
    return np.full(num_rows, prior[0] if target.task == "regression" else prior[1])


def _fit_linear(
    shards: "Shards",
    rows: npt.NDArray[np.bool_],
    config: _Config,
    place: int,
    params: BaselineParams,
    recorder: Recorder,
) -> tuple[_Coefficients, int]:
    """Minimise the penalised mean loss of one target; return coefficients and passes made."""
    from scipy.optimize import minimize

    target = config.targets[place]
    shapes = _shapes(config, target.num_outputs)
    start = _unflatten(np.zeros(sum(int(np.prod(s)) for s in shapes)), shapes)
    num_passes = 0

    def objective(flat: Floats) -> tuple[float, Floats]:
        nonlocal num_passes
        num_passes += 1
        recorder.progress(num_passes, params.max_passes, unit="passes", detail=target.name)
        coefficients = _unflatten(flat, shapes)
        loss, gradient = _pass(shards, rows, config, place, coefficients)
        penalised = np.concatenate([np.zeros(target.num_outputs), flat[target.num_outputs :]])
        return (
            loss + 0.5 * params.penalty * float(penalised @ penalised),
            gradient.flat() + params.penalty * penalised,
        )

    found = minimize(
        objective,
        start.flat(),
        jac=True,
        method="L-BFGS-B",
        options={"maxfun": params.max_passes, "maxiter": params.max_passes},
    )
    recorder.metrics({f"train_loss_{target.name}": float(found.fun)})
    if not found.success:
        recorder.warn(
            f"baseline, target {target.name!r}: not converged after {num_passes} passes; raise "
            f"`train.baseline.max_passes` or `train.baseline.penalty`"
        )
    return _unflatten(found.x, shapes), num_passes


def _pass(
    shards: "Shards",
    rows: npt.NDArray[np.bool_],
    config: _Config,
    place: int,
    coefficients: _Coefficients,
) -> tuple[float, _Coefficients]:
    """Return the mean loss of one target over the labelled rows, and its gradient."""
    target = config.targets[place]
    loss, total_weight = 0.0, 0.0
    bias_O = np.zeros_like(coefficients.bias_O)
    dense_DO = np.zeros_like(coefficients.dense_DO)
    sparse_LO = np.zeros_like(coefficients.sparse_LO)
    for batch in _slices(shards, rows):
        is_known = ~np.isnan(batch.targets[:, place])
        batch = batch.where(is_known)
        weight_B = batch.weight.astype(np.float64)
        dense_BD, places_BC = _inputs(batch, config.cardinalities)
        z_BO = _scores(coefficients, dense_BD, places_BC)
        y_B = batch.targets[:, place].astype(np.float64)
        if target.task == "regression":
            y_B = (y_B - config.priors[place][0]) / config.scales[place]
        loss_B, slope_BO = _loss(target, z_BO, y_B)
        slope_BO = slope_BO * weight_B[:, None]
        loss += float(weight_B @ loss_B)
        total_weight += float(weight_B.sum())
        bias_O += slope_BO.sum(axis=0)
        dense_DO += dense_BD.T @ slope_BO
        for c in range(places_BC.shape[1]):
            for o in range(slope_BO.shape[1]):
                sparse_LO[:, o] += np.bincount(
                    places_BC[:, c], slope_BO[:, o], minlength=len(sparse_LO)
                )
    gradient = _Coefficients(
        bias_O / total_weight, dense_DO / total_weight, sparse_LO / total_weight
    )
    return loss / total_weight, gradient


def _slices(shards: "Shards", rows: npt.NDArray[np.bool_]) -> "Iterator[EncodedBatch]":
    for start in range(0, shards.num_rows, _SLICE_ROWS):
        stop = min(shards.num_rows, start + _SLICE_ROWS)
        yield shards.slice(start, stop).where(rows[start:stop])


def _inputs(
    rows: "EncodedBatch", cardinalities: Sequence[int]
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return ``dense_BD`` (numbers, then indicators) and ``places_BC`` among all codes."""
    is_missing_BN = np.isnan(rows.numeric)
    x_BN = np.where(is_missing_BN, 0.0, rows.numeric).astype(np.float64)
    x_BN = np.clip(x_BN, -_SQUASH, _SQUASH)
    offsets_C = np.concatenate([[0], np.cumsum(cardinalities)[:-1]]).astype(np.int64)
    places_BC = rows.codes.astype(np.int64) + offsets_C[: rows.codes.shape[1]]
    return np.concatenate([x_BN, is_missing_BN.astype(np.float64)], axis=1), places_BC


def _scores(
    coefficients: _Coefficients, dense_BD: Floats, places_BC: npt.NDArray[np.int64]
) -> Floats:
    z_BO: Floats = coefficients.bias_O + dense_BD @ coefficients.dense_DO
    for c in range(places_BC.shape[1]):
        z_BO += coefficients.sparse_LO[places_BC[:, c]]
    return z_BO


def _loss(target: Target, z_BO: Floats, y_B: Floats) -> tuple[Floats, Floats]:
    """Return each row's loss and its slope in the scores: half square, or cross-entropy."""
    if target.task == "regression":
        error_B = z_BO[:, 0] - y_B
        return 0.5 * error_B**2, error_B[:, None]
    if target.task == "binary":
        z_B = z_BO[:, 0]
        loss_B: Floats = np.logaddexp(0.0, z_B) - y_B * z_B
        return loss_B, (_to_values(target, z_BO) - y_B)[:, None]
    log_total_B = np.logaddexp.reduce(z_BO, axis=1)
    codes_B = y_B.astype(np.int64)
    every_B = np.arange(len(codes_B))
    slope_BO = np.exp(z_BO - log_total_B[:, None])
    slope_BO[every_B, codes_B] -= 1.0
    return log_total_B - z_BO[every_B, codes_B], slope_BO


def _to_values(target: Target, z_BO: Floats) -> Floats:
    if target.task == "regression":
        return z_BO[:, 0]
    if target.task == "binary":
        value: Floats = np.exp(-np.logaddexp(0.0, -z_BO[:, 0]))
        return value
    share_BO: Floats = np.exp(z_BO - np.logaddexp.reduce(z_BO, axis=1)[:, None])
    shares_BO: Floats = share_BO / share_BO.sum(axis=1, keepdims=True)
    return shares_BO


def _shapes(config: _Config, num_outputs: int) -> tuple[tuple[int, ...], ...]:
    num_codes = sum(config.cardinalities)
    return (num_outputs,), (2 * config.num_numeric, num_outputs), (num_codes, num_outputs)


def _unflatten(flat: Floats, shapes: tuple[tuple[int, ...], ...]) -> _Coefficients:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    parts = np.split(flat, ends[:-1])
    return _Coefficients(*(p.reshape(shape) for p, shape in zip(parts, shapes, strict=True)))


def _refuse_other_width(rows: "EncodedBatch", config: _Config) -> None:
    found = (rows.numeric.shape[1], rows.codes.shape[1])
    expected = (config.num_numeric, len(config.cardinalities))
    if found != expected or (rows.codes.max(axis=0, initial=0) >= config.cardinalities).any():
        raise SchemaError(
            f"the rows have {found[0]} numeric and {found[1]} category inputs, or codes that the "
            f"baseline has not; it was fitted on {expected[0]} and {expected[1]}: encode them with "
            f"the encoder of this model"
        )
