"""What the stage ``interpret`` found, as the report shows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import IntegrityError
from headrace.storage import read_json, verify_folder

Content = dict[str, Any]

_FILES = ("importances", "shap", "attention", "dependence")


@dataclass(frozen=True)
class Interpretation:
    """The files of ``interpret``, parsed: see ``stages/interpret.py``."""

    importances: Content
    shap: Content
    attention: Content
    dependence: Content

    def most(self, target: str, count: int) -> list[str]:
        """Return the columns whose shuffling costs the target's best single model most."""
        model = self.dependence["targets"][target]["model"]
        found = self.importances["models"][model].get(target, {})
        single = {name: one for name, one in found.items() if name not in self.groups}
        ranked = sorted(single, key=lambda name: (-(single[name]["value"] or 0), name))
        return ranked[:count]

    @property
    def groups(self) -> dict[str, list[str]]:
        """The columns that were shuffled together, by the name of the group."""
        groups: dict[str, list[str]] = self.importances["groups"]
        return groups


def read_interpretation(folder: Path) -> Interpretation:
    """Read what ``interpret`` wrote.

    Raises:
        IntegrityError: if it is missing, damaged or of another format.
    """
    if not folder.is_dir():
        raise IntegrityError(f"{folder} does not exist; run `headrace repro` to make it")
    verify_folder(folder)
    content = {name: read_json(folder / f"{name}.json") for name in _FILES}
    other = [name for name, one in content.items() if one.get("format") != 1]
    if other:
        raise IntegrityError(
            f"{folder}: {', '.join(other)} have another format than 1; run `headrace repro`"
        )
    return Interpretation(**content)
