"""Read params.yaml once, strictly: one meaning for every scalar, every fault with key and line.

YAML readers disagree on ``1e-6``, ``012``, ``yes`` and on duplicate keys, and DVC, MLflow and we
read the same file. So what is ambiguous is refused here, with the spelling that is not.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from headrace.errors import ConfigError, nearest

_MAX_NODES = 20_000
_AMBIGUOUS = (
    (re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), "write it with a point, like 1.0e-6"),
    (re.compile(r"^[-+]?\d+\.\d*[eE]\d+$"), "write the exponent's sign, like 1.0e+6"),
    (re.compile(r"^[-+]?\.\d+([eE][-+]?\d+)?$"), "write it with a leading zero, like 0.5"),
    (re.compile(r"^[-+]?0[oxb][\da-f_]+$", re.IGNORECASE), "write it as a decimal, or quote it"),
    (re.compile(r"^(yes|no|on|off)$", re.IGNORECASE), "write true or false, or quote it"),
    (re.compile(r"^[-+]?0[\d_]+$"), "write it without the leading zero, or quote it"),
    (re.compile(r"^[-+]?\d[\d_]*_[\d_]*$"), "write it without underscores, or quote it"),
    (re.compile(r"^\d+(:\d+)+$"), "quote it"),
    (re.compile(r"^[-+]?\.(inf|nan)$", re.IGNORECASE), "infinity and NaN are not allowed here"),
)
_PLAIN_TAGS = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")
_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}


class Section(BaseModel):
    """Base of every params section and of every typed record: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


SectionKind = TypeVar("SectionKind", bound=Section)


def parse_bytes(value: object) -> int:
    """Turn ``"2GiB"`` or a whole number into bytes.

    Raises:
        ValueError: if the text is not a number followed by B, KB, KiB, MB, MiB, GB, GiB or TiB.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"{value!r} is not a size in bytes; write for example 2GiB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


class Resources(Section):
    """Section ``resources``: what a run may use. No stage's result depends on it."""

    memory_budget: Bytes = 2 << 30  # summed over all processes of the run, mapped files excluded
    threads: Annotated[int, Field(ge=1, le=1024)] = 2
    workers: Annotated[int, Field(ge=0, le=1024)] = 0  # DataLoader processes; 0 reads in-process


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in ``path``, refusing what two YAML readers would read differently.

    Raises:
        ConfigError: missing file, syntax fault, duplicate key, tag, alias or ambiguous scalar,
            with the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist; run this in a project folder, or `headrace init` to make one"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    try:
        events = sum(1 for _ in yaml.parse(text, Loader=yaml.SafeLoader))
        if events > _MAX_NODES:
            raise ConfigError(f"{path} has {events} YAML nodes; at most {_MAX_NODES} are read")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: expected `section: ...` lines, found a {node.id}")
    _refuse_ambiguity(node, path, key="", seen=set())
    try:
        content: dict[str, Any] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError) as error:  # such as the 31st of September
        raise ConfigError(f"{path}: {_bad_scalar(node)}: {error}") from error
    return content


def parse_section(kind: type[SectionKind], raw: object, *, key: str, path: Path) -> SectionKind:
    """Validate ``raw`` as section ``kind``; ``key`` is its place in ``path``, for messages.

    Raises:
        ConfigError: one message with every fault: key, value, what was expected, nearest name.
    """
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path}: `{key}` must be a section of `name: value` lines, not {raw!r}")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        faults = [describe_fault(fault, kind, key) for fault in error.errors()]
        raise ConfigError(f"{path}: {'; '.join(faults)}") from error


def describe_fault(fault: Any, kind: type[Section], key: str) -> str:
    """Say what is wrong with one value of section ``kind``, which stands at ``key``."""
    names = [str(part) for part in fault["loc"]]
    place = ".".join([key, *names])
    if fault["type"] == "extra_forbidden":
        known = _fields_at(kind, fault["loc"][:-1])
        hint = nearest(names[-1], known) or (f"; known: {', '.join(known)}" if known else "")
        return f"`{place}` is not a known parameter{hint}"
    if fault["type"] == "missing":
        return f"`{place}` is missing"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and isinstance(fault["input"], Mapping):
        return f"`{place}`: {message}"  # a rule between its settings names those that matter
    return f"`{place}` is {fault['input']!r}: {message[0].lower()}{message[1:]}"


def _refuse_ambiguity(node: yaml.Node, path: Path, *, key: str, seen: set[int]) -> None:
    where = f"{path}:{node.start_mark.line + 1}: {f'`{key}` ' if key else ''}"
    if id(node) in seen:
        raise ConfigError(f"{where}uses a YAML alias; write the value out")
    seen.add(id(node))
    if node.tag.removeprefix("tag:yaml.org,2002:") not in _PLAIN_TAGS:
        raise ConfigError(f"{where}uses the YAML tag {node.tag}; remove it")
    if isinstance(node, yaml.MappingNode):
        names: dict[str, int] = {}
        for name_node, value_node in node.value:
            _refuse_ambiguity(name_node, path, key=key, seen=seen)
            name = str(name_node.value)
            if name in names:
                raise ConfigError(
                    f"{path}:{name_node.start_mark.line + 1}: `{name}` is set twice "
                    f"(first on line {names[name]}); keep one"
                )
            names[name] = name_node.start_mark.line + 1
            _refuse_ambiguity(value_node, path, key=f"{key}.{name}" if key else name, seen=seen)
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _refuse_ambiguity(item, path, key=f"{key}[{position}]", seen=seen)
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        for pattern, remedy in _AMBIGUOUS:
            if pattern.match(node.value):
                raise ConfigError(
                    f"{where}has the value {node.value}, which YAML readers understand "
                    f"differently; {remedy}"
                )


def _bad_scalar(node: yaml.Node, key: str = "") -> str:
    """Say which scalar of ``node`` cannot be made into a value, by key and line."""
    for name, child in _children(node):
        place = f"{key}.{name}" if key else name
        if found := _bad_scalar(child, place):
            return found
    if not isinstance(node, yaml.ScalarNode):
        return "" if key else "a key or value cannot be read"
    try:
        yaml.safe_load(f"!!timestamp {node.value!r}" if node.tag.endswith("timestamp") else "x")
    except (yaml.YAMLError, ValueError, TypeError):
        return f"line {node.start_mark.line + 1}: `{key}` is {node.value!r}, which is no date"
    return ""


def _children(node: yaml.Node) -> list[tuple[str, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        return [(str(name.value), value) for name, value in node.value]
    if isinstance(node, yaml.SequenceNode):
        return [(str(position), item) for position, item in enumerate(node.value)]
    return []


def _fields_at(kind: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    current: type[BaseModel] = kind
    for name in loc:
        field = current.model_fields.get(str(name))
        nested = _section_in(field.annotation) if field else None
        if nested is None:
            if isinstance(name, int | str) and field is None:
                continue  # an index into a list or a free key of a mapping
            return []
        current = nested
    return list(current.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        if found := _section_in(part):
            return found
    return None
