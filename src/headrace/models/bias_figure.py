"""The figure of a factorization: which labels stand highest and lowest by themselves.

A label's effect is the prediction of it beside an unknown partner, less that of two unknown ones:
its bias in the target's own unit, or as a difference in probability. A bias before a sigmoid would
have no unit that a person could use.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.data.encoder import FIRST_LABEL, EncodedBatch, Encoder, open_encoder
from headrace.data.layout import row_layout
from headrace.evaluation.canvas import COLOURS, INK, WIDE, Figure, panels, svg_of
from headrace.models.network import NetworkModel
from headrace.schema import Target, file_stem

_SHOWN = 10  # labels of each end
_LETTERS = 32  # of a label; longer ones are cut

Floats: TypeAlias = npt.NDArray[np.float64]


def bias_figures(
    model: NetworkModel, encoded: Path, columns: Sequence[str], targets: Sequence[Target]
) -> list[Figure]:
    """Return a figure per target, and per class of a multiclass one: a panel per category."""
    encoder = open_encoder(encoded)
    effects = {column: label_effects(model, encoder, column) for column in columns}
    figures = []
    for target in targets:
        names = [""]
        if target.task == "multiclass":
            names = [f"_{label}" for label in target.labels]
        for place, name in enumerate(names):
            ends = {
                column: _ends(_labels(encoder, column), found[target.name][:, place])
                for column, found in effects.items()
            }
            figures.append(_figure(f"{target.name}{name}", ends))
    return figures


def label_effects(model: NetworkModel, encoder: Encoder, column: str) -> dict[str, Floats]:
    """Return per target what each label of ``column`` adds beside an unknown partner: (L, O)."""
    place = [category.name for category in encoder.categories].index(column)
    num_labels = len(_labels(encoder, column))
    layout = row_layout(
        num_targets=0,
        num_numeric=len(encoder.numeric),
        num_codes=len(encoder.categories),
        codes="<u4",
        numeric="<f4",
    )
    packed = np.zeros_like(layout.empty(num_labels + 1))  # code 0, unknown, in every column
    layout.split(packed)["codes"][1:, place] = np.arange(num_labels) + FIRST_LABEL
    told = model.predict(EncodedBatch(packed, layout))
    by_output = {name: values.reshape(num_labels + 1, -1) for name, values in told.items()}
    return {name: values_LO[1:] - values_LO[0] for name, values_LO in by_output.items()}


def _labels(encoder: Encoder, column: str) -> tuple[str, ...]:
    return next(category.labels for category in encoder.categories if category.name == column)


def _ends(labels: Sequence[str], effect_L: Floats) -> list[tuple[str, float]]:
    """Return the highest and the lowest labels, highest first; those never learnt are left out."""
    learnt = np.flatnonzero(effect_L)
    order = learnt[np.argsort(-effect_L[learnt], kind="stable")]
    if len(order) > 2 * _SHOWN:
        order = np.concatenate([order[:_SHOWN], order[-_SHOWN:]])
    return [(labels[place], float(effect_L[place])) for place in order]


def _figure(title: str, ends: Mapping[str, Sequence[tuple[str, float]]]) -> Figure:
    most = max(len(found) for found in ends.values())
    with panels(len(ends), columns=2, width=WIDE, height=0.8 + 0.17 * most) as (fig, axs):
        for ax, (column, found) in zip(axs, ends.items(), strict=True):
            effects = [effect for _, effect in found]
            colours = [COLOURS[0] if effect > 0 else COLOURS[1] for effect in effects]
            ax.barh(range(len(found)), effects, color=colours)
            ax.axvline(0, color=INK, linewidth=0.8)
            ax.set_yticks(range(len(found)), [_short(label) for label, _ in found])
            ax.set_ylim(len(found) - 0.4, -0.6)
            ax.grid(visible=False, axis="y")
            ax.tick_params(axis="y", length=0)
            ax.set_title(column, loc="left")
            ax.set_xlabel("beside an unknown partner, less the mean")
        svg = svg_of(fig)
    said = "; ".join(
        f"{column}: from {found[0][0]} ({found[0][1]:+.2g}) to {found[-1][0]} ({found[-1][1]:+.2g})"
        for column, found in ends.items()
        if found
    )
    return Figure(
        f"biases_{file_stem(title)}",
        f"{title}: highest and lowest biases",
        f"The {_SHOWN} highest and lowest labels of each category. {said}.",
        svg,
    )


def _short(label: str) -> str:
    return label if len(label) <= _LETTERS else f"{label[: _LETTERS - 1]}…"
