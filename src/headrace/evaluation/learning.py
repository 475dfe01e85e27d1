"""How the members learnt, as a section of the report: the curves their summaries hold.

Held back are rows of train that stopped the learning; test rows have no part in it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from headrace.evaluation.curves import spans_decades
from headrace.evaluation.page import Chart, Section, Table
from headrace.storage import read_json

Curves: TypeAlias = list[dict[str, Any]]  # see training.curves.curves_json


def read_summary(folder: Path) -> Any:
    """Return the summary of the model in ``folder``, which the caller has verified."""
    return read_json(folder / "model.json")["summary"]  # see models.protocol, which is not below


def learning_section(summaries: Mapping[str, Any]) -> Section | None:
    """Return the section, or None where no model kept its curves; ``summaries`` by model."""
    fits = {model: dict(_fits(summary, model)) for model, summary in summaries.items()}
    known = {model: found for model, found in fits.items() if found}
    if not known:
        return None
    without = [model for model in summaries if model not in known]
    text = [
        "Each line is the loss or metric on rows of train that were held back from learning; "
        "dotted, the same while learning. The marked step is the one whose weights or trees were "
        "kept. Where the held-back line turns up and the dotted one goes on down, more steps only "
        "learn the rows by heart."
    ]
    if without:
        text.append(f"No curves: {', '.join(without)}, which learn in one go or without a check.")
    rows = [
        (model, fit, curve["title"], curve["step"], curve["kept"], curve["at"][-1], _kept(curve))
        for model, found in known.items()
        for fit, curves in found.items()
        for curve in curves
    ]
    headings = ("model", "fit", "of what", "step", "kept", "last", "held back, at the kept step")
    return Section(
        "learning",
        "Learning curves",
        tuple(text),
        (Table("Where learning stopped", headings, tuple(rows)),),
        tuple(_chart(model, found) for model, found in known.items()),
    )


def _fits(summary: Any, name: str) -> Iterator[tuple[str, Curves]]:
    """Yield the curves of each fit; the summary of a bag holds those of its members by name."""
    if not isinstance(summary, Mapping):
        return
    if summary.get("curves"):
        yield name, summary["curves"]
    for key, part in summary.items():
        if key != "curves":
            yield from _fits(part, key)


def _chart(model: str, fits: Mapping[str, Curves]) -> Chart:
    traces: list[dict[str, Any]] = []
    choices: dict[str, Any] = {}
    for number, (fit, curves) in enumerate(fits.items()):
        for curve in curves:
            shared = {"type": "scatter", "choice": curve["title"], "tone": number}
            hover = f"{curve['step']} %{{x}}: %{{y:.5g}}<extra>%{{fullData.name}}</extra>"
            lines = {"held back": curve["held_back"], "while learning": curve["learnt"]}
            for part, values in lines.items():
                if values is None:
                    continue
                traces.append(
                    shared
                    | {"mode": "lines", "x": curve["at"], "y": values, "hovertemplate": hover}
                    | {"name": f"{fit}, {part}", "line": {"dash": _DASH[part]}}
                    | {"showlegend": part == "held back" or len(fits) == 1}
                )
            traces.append(
                shared
                | {"mode": "markers", "x": [curve["kept"]], "y": [_kept(curve)]}
                | {"name": f"{fit}, kept", "showlegend": False, "hovertemplate": hover}
                | {"marker": {"size": 9, "symbol": "circle-open", "line": {"width": 2}}}
            )
            axis: dict[str, Any] = {"title": {"text": curve["title"]}}
            if spans_decades(np.array([v for t in _drawn(fits, curve["title"]) for v in t])):
                axis["type"] = "log"
            choices[curve["title"]] = {
                "xaxis": {"title": {"text": f"{curve['step']} (from 1)"}},
                "yaxis": axis,
            }
    said = "; ".join(
        f"{fit}: {curve['title']} {_kept(curve):.4g} at {curve['step']} {curve['kept']}"
        for fit, curves in fits.items()
        for curve in curves
        if _kept(curve) is not None
    )
    return Chart(
        model,
        f"Learning of {model}",
        f"Solid: held back; dotted: while learning. Kept: {said}.",
        tuple(traces),
        {"xaxis": {}, "yaxis": {}, "choices": choices},
    )


_DASH = {"held back": "solid", "while learning": "dot"}


def _drawn(fits: Mapping[str, Curves], title: str) -> Iterator[list[float]]:
    for curves in fits.values():
        for curve in curves:
            if curve["title"] == title:
                for values in (curve["held_back"], curve["learnt"] or ()):
                    yield [value for value in values if value is not None]


def _kept(curve: Mapping[str, Any]) -> float | None:
    value: float | None = curve["held_back"][curve["at"].index(curve["kept"])]
    return value
