"""YAML files with one-level `extends` and `a.b=value` overrides, read into frozen pydantic models.

The models live beside the code that reads them; this file only knows how to fill one. YAML is read by the number rules
of YAML 1.2 (`1e-4` is a number, `no` a string); duplicate keys, tags, anchors and aliases are errors. Every fault
becomes one line with file, line, key, what was expected and the nearest match, all at once, in a `ConfigError`.
"""

import difflib
import hashlib
import json
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from core.errors import ConfigError, shown

MAX_FILE_BYTES = 32_000  # a resolved configuration has 2,000; more would take seconds to parse
MAX_DEPTH = 16

Tree = dict[str, Any]
Origins = dict[str, str]  # dotted key -> "file:line" or "command line"


class Config(BaseModel):
    """Base of every configuration model: frozen, unknown keys refused, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def contradictions(self) -> Iterator[str]:
        """Yield one line per set of keys that cannot hold together; models that have such keys override this."""
        return iter(())

    def changed(self) -> set[str]:
        """Keys that say something else than their defaults."""
        return {key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default}

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "Config":
        lines = list(self.contradictions())
        if lines:
            raise ValueError("\n".join(lines))
        return self


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(model: type[ConfigT], path: Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read `path` (and the one file that it extends), apply `a.b=value` overrides, and build the frozen `model`.

    Raises: ConfigError with one line per fault.
    """
    tree, origins = _read_with_base(path) if path else ({}, {})
    problems: list[str] = []
    for override in overrides:
        _apply_override(tree, origins, override, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    where = shown(path) if path else "command line"
    try:
        return model.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines_of(error, model, origins, where))) from None


def as_overrides(tree: Tree, prefix: str = "") -> list[str]:
    """Plain values as the `a.b=value` texts that `load_config` reads back to them."""
    texts = []
    for key, value in tree.items():
        if isinstance(value, dict) and value and all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in value):
            texts += as_overrides(value, f"{prefix}{key}.")
            continue
        as_it_is = isinstance(value, str) and _override_value(value, "", {}) == value
        texts.append(f"{prefix}{key}={value if as_it_is else json.dumps(value, ensure_ascii=False)}")
    return texts


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML text that `load_config` reads back to the same model."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_scalar` would read as a number although YAML 1.1 would not, such as a folder called 1e-4."""

    def represent_scalar(self, tag: str, value: Any, style: str | None = None) -> yaml.ScalarNode:
        ambiguous = tag.endswith(":str") and re.match(r"[-+.0-9]", value)
        return super().represent_scalar(tag, value, "'" if ambiguous else style)


def config_hash(config: Config) -> str:
    """Twelve hexadecimal digits that identify a resolved configuration."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def differences(old: Tree, new: Tree, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two resolved configuration trees, each as `key: old -> new`."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def read_yaml(path: Path) -> tuple[Tree, Origins]:
    """Parse one YAML file into a tree of plain values and the line of every dotted key. Raises: ConfigError."""
    name = shown(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{name}: larger than {MAX_FILE_BYTES} bytes; expected a small YAML file")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{name}: not UTF-8 text; expected a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}; expected a YAML file, as in configs/") from None
    node = _compose(text, name)
    origins: Origins = {}
    tree = _construct(node, name, "", origins) if node is not None else {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: expected `key: value` lines at the top level")
    return tree, origins


def _read_with_base(path: Path) -> tuple[Tree, Origins]:
    tree, origins = read_yaml(path)
    base_name = tree.pop("extends", None)
    if base_name is None:
        return tree, origins
    if not isinstance(base_name, str) or not base_name.isprintable():
        raise ConfigError(f"{origins['extends']}: extends: expected a file name, got {base_name!r}")
    base, base_origins = read_yaml(path.parent / base_name)
    if "extends" in base:
        raise ConfigError(
            f"{base_origins['extends']}: extends: only one level; {shown(path)} already extends this file"
        )
    return _merged(base, tree), {**base_origins, **origins}


def _merged(base: Tree, top: Tree) -> Tree:
    out = dict(base)
    for key, value in top.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if nested else value
    return out


def _apply_override(tree: Tree, origins: Origins, override: str, problems: list[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        problems.append(f"command line: {shown(override)}: expected key=value, as in epochs=10 or loader.num_workers=2")
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        problems.append(f"command line: {key}: {shown(text)}: not UTF-8 text; rename the file, or give a link to it")
        return
    *groups, leaf = key.split(".")
    branch = tree
    for group in groups:
        branch = branch.setdefault(group, {})
        if not isinstance(branch, dict):
            problems.append(f"command line: {key}: {group} is a single value, not a group of keys")
            return
    inner: Origins = {}
    branch[leaf] = _override_value(text, key, inner)
    origins.update(dict.fromkeys([key, *inner], "command line"))


def _override_value(text: str, key: str, origins: Origins) -> Any:
    """One number, word, quoted text, [list] or {group} as YAML reads it; any other text, such as a path, as it is."""
    try:
        node = _compose(text, "command line")
        block = isinstance(node, yaml.CollectionNode) and not node.flow_style  # `a: b` and `- a` are odd names
        cut = isinstance(node, yaml.ScalarNode) and node.style is None and node.value != text  # `a #1` is no comment
        if node is None or block or cut:
            return text or None
        return _construct(node, "command line", key, origins)
    except ConfigError:
        return text


def _compose(text: str, name: str) -> yaml.Node | None:
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            line = event.start_mark.line + 1 if event.start_mark else 0
            if depth > MAX_DEPTH:
                raise ConfigError(f"{name}:{line}: nested deeper than {MAX_DEPTH} levels")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ConfigError(f"{name}:{line}: YAML anchors and aliases are not read; write the value out")
            if getattr(event, "tag", None):
                raise ConfigError(f"{name}:{line}: YAML tags are not read; write a plain value")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{name}{where}: not YAML: {shown(problem)}") from None


def _construct(node: yaml.Node, name: str, key: str, origins: Origins) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, name)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, name, key, origins) for item in node.value]
    tree: Tree = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        leaf = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if leaf is None or leaf in tree:
            problem = "expected a plain key" if leaf is None else f"{shown(leaf)}: the key is given twice"
            raise ConfigError(f"{name}:{line}: {problem}")
        dotted = f"{key}.{leaf}" if key else leaf
        origins[dotted] = f"{name}:{line}"
        tree[leaf] = _construct(value_node, name, dotted, origins)
    return tree


def _scalar(node: yaml.ScalarNode, name: str) -> str | int | float | bool | None:
    text = node.value
    if node.style is not None:  # quoted or block text stays text
        return text
    if text in {"", "~", "null", "Null", "NULL"}:
        return None
    if text in {"true", "True", "TRUE", "false", "False", "FALSE"}:
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]{1,400}", text):
        return int(text)
    if re.fullmatch(r"0o[0-7]{1,400}|0x[0-9a-fA-F]{1,400}", text):
        return int(text, 0)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        value = float(text)
        if abs(value) == float("inf"):
            raise ConfigError(f"{name}:{node.start_mark.line + 1}: {text[:40]}: too large for a number")
        return value
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        raise ConfigError(f"{name}:{node.start_mark.line + 1}: {text}: expected a finite number")
    return text


def _lines_of(error: ValidationError, model: type[Config], origins: Origins, where: str) -> Iterator[str]:
    told: set[str] = set()
    for item in error.errors():
        location = [part for part in item["loc"] if isinstance(part, str)]
        key = ".".join(location)
        known = {*dotted_keys(model), *origins}  # what was given may lie below keys that are free
        while key and key not in known and item["type"] != "extra_forbidden":
            key = key.rpartition(".")[0]  # drops pydantic's names for the members of a union
        below = (at for name, at in origins.items() if name.startswith(f"{key}."))  # a group that should be a value
        at = origins.get(key) or next(below, where)
        if item["type"] == "extra_forbidden":
            yield f"{at}: {shown(key)}: unknown key{_nearest(key, model)}"
        elif item["type"] == "missing":
            yield f"{where}: {key}: missing; give it in the file or as {key}=VALUE on the command line"
        elif item["type"] == "value_error":
            yield from (f"{at}: {line}" for line in str(item["ctx"]["error"]).splitlines())
        elif key not in told:  # pydantic names a fault once for every type that the key may have
            told.add(key)
            expected = item["msg"].replace("Input should be ", "expected ")
            yield f"{at}: {key}: {expected[0].lower()}{expected[1:]}, got {shown(json.dumps(item['input']))[:100]}"


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a configuration model, groups included, in declaration order: `loader`, `loader.num_workers`, ..."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for option in _union_members(field.annotation):
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from dotted_keys(option, f"{prefix}{name}.")


def _union_members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in {Union, types.UnionType} else (annotation,)


def _nearest(key: str, model: type[Config]) -> str:
    known = list(dotted_keys(model))
    if key in known:
        return "; in a file a group is written as a key of its own, with its keys indented below"
    siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
    by_leaf = {name.rpartition(".")[2]: name for name in (*reversed(known), *siblings)}
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    leaf = difflib.get_close_matches(key.rpartition(".")[2], by_leaf, n=1, cutoff=0.75)
    match = by_leaf[leaf[0]] if leaf else (close[0] if close else None)
    return f"; did you mean '{match}'?" if match else "; the header of each recipe and docs/data.md list the keys"
