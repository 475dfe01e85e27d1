"""What a TabNet looked at: masks of single rows, and attention beside the prediction.

As figures, which each fit records, and as JSON, from which the report draws.

Attention is correlated with predicted values and probabilities, one for each class, never with
class numbers, whose order means nothing. Where a column's attention is the same in all rows, or the
prediction is, there is no correlation, and the cell stays empty.

Legend of axes: B rows, K columns, S steps, O predicted numbers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.canvas import COLOURS, WIDE, Figure, panels, svg_of
from headrace.models.protocol import Values
from headrace.schema import Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from headrace.models.attention import Explanation

Floats: TypeAlias = npt.NDArray[Any]

_SHOWN_ROWS = 16
_SHOWN_COLUMNS = 15
_SHOWN_OUTPUTS = 12
_CONSTANT = 1e-6  # range of attention below which it is rounding alone


def attention_figures(
    explanation: "Explanation", values: Values, targets: Sequence[Target]
) -> list[Figure]:
    """Return the figures of the explained rows, for which ``values`` were predicted."""
    names, predicted_BO = predicted_numbers(values, targets)
    correlations_SKO = attention_correlations(explanation.masks_SBK, predicted_BO)
    figures = [masks_figure(explanation)]
    if not np.isnan(correlations_SKO).all():
        figures.append(correlations_figure(explanation, names, correlations_SKO))
    return figures


def attention_json(
    explanation: "Explanation", values: Values, targets: Sequence[Target]
) -> dict[str, Any]:
    """Return what the figures show as JSON values; NaN is None.

    Per step the mask of the first rows, by column, and per predicted number the correlations, by
    column and step.
    """
    names, predicted_BO = predicted_numbers(values, targets)
    correlations_SKO = attention_correlations(explanation.masks_SBK, predicted_BO)
    shown = _most_attended(explanation)
    masks_SKB = explanation.masks_SBK[:, :_SHOWN_ROWS, shown].transpose(0, 2, 1)
    return {
        "columns": [explanation.columns[k] for k in shown],
        "shares": explanation.shares(),
        "masks": _lists(masks_SKB),
        "correlations": {
            name: _lists(correlations_SKO[:, shown, o].T)
            for o, name in enumerate(names[:_SHOWN_OUTPUTS])
        },
    }


def _lists(values: Floats) -> list[Any]:
    """Return nested lists of rounded numbers, None for NaN."""
    if values.ndim > 1:
        return [_lists(part) for part in values]
    return [None if np.isnan(value) else round(float(value), 4) for value in values]


def attention_correlations(masks_SBK: Floats, predicted_BO: Floats) -> Floats:
    """Return Pearson's correlation of each step's attention with each predicted number: (S, K, O).

    NaN where attention or prediction is constant.
    """
    mask_SBK = masks_SBK.astype(np.float64)
    is_constant_SK = np.ptp(mask_SBK, axis=1) < _CONSTANT
    is_constant_O = np.ptp(predicted_BO, axis=0) == 0
    mask_SBK = mask_SBK - mask_SBK.mean(axis=1, keepdims=True)
    number_BO = predicted_BO - predicted_BO.mean(axis=0)
    together_SKO = np.einsum("sbk,bo->sko", mask_SBK, number_BO)
    alone_SK, alone_O = np.linalg.norm(mask_SBK, axis=1), np.linalg.norm(number_BO, axis=0)
    is_empty_SKO = is_constant_SK[:, :, None] | is_constant_O
    scale_SKO = np.where(is_empty_SKO, np.nan, alone_SK[:, :, None] * alone_O)
    correlations: Floats = together_SKO / scale_SKO
    return correlations


def predicted_numbers(values: Values, targets: Sequence[Target]) -> tuple[list[str], Floats]:
    """Return names and numbers (B, O) of what is predicted: values, and each class's probability.

    Of two classes only the second one's, for the first one's is its complement.
    """
    names: list[str] = []
    columns: list[Floats] = []
    for target in targets:
        labels = target.labels[1:] if target.task == "binary" else target.labels
        names += [f"P({target.name} = {label})" for label in labels] or [target.name]
        columns.append(values[target.name].reshape(-1, target.num_outputs))
    return names, np.concatenate(columns, axis=1)


def masks_figure(explanation: "Explanation") -> Figure:
    """A panel per step: how attention is shared among columns in the first rows."""
    shown = _most_attended(explanation)
    masks_SBK = explanation.masks_SBK[:, :_SHOWN_ROWS]
    height = 0.9 + 0.2 * len(shown)
    with panels(len(masks_SBK), columns=3, width=WIDE, height=height) as (canvas, axes):
        for step, (ax, mask_BK) in enumerate(zip(axes, masks_SBK, strict=True), start=1):
            _heat(ax, mask_BK.T[shown], [explanation.columns[k] for k in shown])
            ax.set_title(f"step {step}", loc="left")
            ax.set(xticks=[], xlabel="row")
        svg = svg_of(canvas)
    shares = list(explanation.shares().items())[:5]
    said = ", ".join(f"{name} {share:.0%}" for name, share in shares)
    return Figure(
        "attention_masks",
        f"Where each step looked, in {masks_SBK.shape[1]} rows",
        f"The darker, the more of a step's attention. Over all steps and rows: {said}",
        svg,
    )


def correlations_figure(
    explanation: "Explanation", names: Sequence[str], correlations_SKO: Floats
) -> Figure:
    """A panel per predicted number: the correlation of attention with it, by column and step."""
    shown = [k for k in _most_attended(explanation) if not np.isnan(correlations_SKO[:, k]).all()]
    columns = [explanation.columns[k] for k in shown]
    drawn = list(names)[:_SHOWN_OUTPUTS]
    steps = range(1, len(correlations_SKO) + 1)
    height = 0.9 + 0.2 * len(shown)
    with panels(len(drawn), columns=3, width=WIDE, height=height) as (canvas, axes):
        for o, (ax, name) in enumerate(zip(axes, drawn, strict=True)):
            _heat(ax, correlations_SKO[:, shown, o].T, columns, with_numbers=True)
            ax.set_title(name, loc="left")
            ax.set_xticks([step - 1 for step in steps], [str(step) for step in steps])
            ax.set_xlabel("step")
        svg = svg_of(canvas)
    left_out = len(names) - len(drawn)
    said = "Blue: more attention where more is predicted; orange: where less is. " + "; ".join(
        _strongest(name, correlations_SKO[:, shown, o], columns) for o, name in enumerate(drawn)
    )
    return Figure(
        "attention_correlations",
        "Correlation of attention with the prediction",
        said + (f"; not drawn: {left_out} more" if left_out else ""),
        svg,
    )


def _most_attended(explanation: "Explanation") -> list[int]:
    """Return the places of the columns that get most attention, in the order of the table."""
    most = list(explanation.shares())[:_SHOWN_COLUMNS]
    return [k for k, name in enumerate(explanation.columns) if name in most]


def _heat(
    ax: "Axes", values_KX: Floats, columns: Sequence[str], *, with_numbers: bool = False
) -> None:
    """Draw a square per value, darker with its size, in another colour below 0; none for NaN."""
    from matplotlib.patches import Rectangle

    for k, x in np.argwhere(np.nan_to_num(values_KX) != 0).tolist():
        value = float(values_KX[k, x])
        colour = COLOURS[0] if value > 0 else COLOURS[1]
        alpha = min(1.0, abs(value))
        ax.add_patch(Rectangle((x - 0.5, k - 0.5), 1, 1, facecolor=colour, alpha=alpha))
        if with_numbers:
            ax.text(x, k, f"{value:.2f}", ha="center", va="center", fontsize=7)
    num_columns, num_places = values_KX.shape
    ax.set(xlim=(-0.5, num_places - 0.5), ylim=(num_columns - 0.5, -0.5))
    ax.set_yticks(range(num_columns), columns)
    ax.grid(visible=False)


def _strongest(name: str, correlations_SK: Floats, columns: Sequence[str]) -> str:
    """Say where attention goes most closely with one predicted number."""
    if np.isnan(correlations_SK).all():
        return f"{name}: none"
    step, k = np.unravel_index(np.nanargmax(np.abs(correlations_SK)), correlations_SK.shape)
    value = float(correlations_SK[step, k])
    return f"{name}: most with {columns[int(k)]} in step {int(step) + 1} ({value:+.2f})"
