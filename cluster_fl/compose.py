"""From YAML files and ``key=value`` overrides to one checked configuration."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster_fl import methods
from cluster_fl.config import Config, check, choose
from cluster_fl.errors import UserError

# Keys that say where or how fast a run happens, not what it computes; a begun run may change them.
# (Another kind of device computes other bits: that is checked when a run is resumed.)
INCIDENTAL = ("cluster", "checkpoint", "tracking", "data.root", "data.download")

# A file's sections for `cluster-fl compare` and `sweep`; one run's configuration is what is around them.
COMPARE, SWEEP = "compare", "sweep"

Section = TypeVar("Section")
# A file, or what :func:`read` has read from it.
Source = Path | str | DictConfig


def compose(
    files: Sequence[Source], overrides: Sequence[str] = (), entry: Mapping[str, Any] | None = None
) -> Config:
    """Merges, later over earlier: the schema, the variant's preset, the files in order, the overrides.

    A file's sections ``compare`` and ``sweep`` are left out. What one of their runs changes, already parsed, goes
    between the files and the overrides.

    Raises:
        UserError: a file is missing or no YAML, a key is unknown (with the nearest valid one), a value has
            the wrong type or is out of range.
    """
    layers = [read(file) for file in files]
    for layer in layers:
        for section in (COMPARE, SWEEP):
            layer.pop(section, None)
    layers += [OmegaConf.create(dict(entry or {})), *(_parse(override) for override in overrides)]
    name = _last(layers, "method", Config.method)
    variant = _last(layers, "variant", Config.variant)
    method = methods.get(name)
    choose("variant", variant, ("default", "paper", "released"))
    schema = OmegaConf.structured(Config)
    schema.options = OmegaConf.structured(method.options)
    preset = OmegaConf.create(dict(method.variants.get(variant, {})))
    config = _merge(schema, preset, preset)
    for layer in layers:
        config = _merge(config, layer, layer)
    if config.options is None:
        raise UserError("options", None, f"must hold options of {name}; leave it out for the defaults.")
    result = _to_object(config)
    assert isinstance(result, Config)
    check(result)
    return result


def read_section(
    name: str, schema: type[Section], files: Sequence[Source], overrides: Sequence[str] = ()
) -> Section:
    """The section ``name`` of the files and overrides alone, merged onto a schema of its own.

    Raises:
        UserError: as :func:`compose`, except for ranges, which the caller checks.
    """
    merged = OmegaConf.create({name: OmegaConf.structured(schema)})
    for layer in [read(file) for file in files] + [_parse(override) for override in overrides]:
        if name in layer:
            own = OmegaConf.masked_copy(layer, [name])
            merged = _merge(merged, own, own)
    section = _to_object(merged)[name]
    if not isinstance(section, schema):
        raise UserError(
            name, section, f"must hold options: {', '.join(map(str, OmegaConf.structured(schema)))}."
        )
    return section


def read(source: Source) -> DictConfig:
    """A file's content, which stays as it is whatever becomes of the file; a copy of what was read before.

    Raises:
        UserError: the file is missing or no YAML.
    """
    return source.copy() if isinstance(source, DictConfig) else _read(Path(source))


def to_yaml(config: Config) -> str:
    text: str = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    return text


def fingerprint(config: Config) -> str:
    """Hash of everything that decides the run's bits; where and how fast it runs is not part of it."""
    content = asdict(config)
    for key in (*INCIDENTAL, "run"):
        section, _, leaf = key.partition(".")
        if leaf:
            del content[section][leaf]
        else:
            del content[section]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _last(layers: Sequence[DictConfig], key: str, default: str) -> str:
    for layer in reversed(layers):
        content = OmegaConf.to_container(layer, resolve=False)
        if isinstance(content, dict) and key in content:
            return str(content[key])
    return default


def _read(path: Path) -> DictConfig:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("CONFIG", path, f"cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise UserError("CONFIG", path, f"is not valid YAML{line}.") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError("CONFIG", path, "must hold keys and values.")
    try:
        created = OmegaConf.create(content)
    except OmegaConfBaseException as error:
        raise UserError("CONFIG", path, str(error).splitlines()[0]) from None
    assert isinstance(created, DictConfig)
    return created


def _parse(override: str) -> DictConfig:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError("argument", override, "must be key=value, e.g. rounds=20.")
    if value == "":
        raise UserError(key, "", "needs a value; null unsets an option.")
    try:
        return OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError):
        raise UserError(key, value, "cannot be parsed.") from None


def _merge(base: DictConfig, layer: Any, source: Any) -> DictConfig:
    try:
        merged = OmegaConf.merge(base, _named(base, OmegaConf.to_container(layer)))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise _explain(error, base, OmegaConf.to_container(source)) from None
    assert isinstance(merged, DictConfig)
    return merged


def _named(base: Any, layer: Any) -> Any:
    """The layer with a plain word for a section that has a name read as that name: ``time.policy: fedbuff``."""
    if not isinstance(base, DictConfig):
        return layer
    if isinstance(layer, str) and "name" in base:
        return {"name": layer}
    if isinstance(layer, dict):
        return {key: _named(base.get(key) if key in base else None, value) for key, value in layer.items()}
    return layer


def _explain(error: Exception, base: DictConfig, source: Any) -> UserError:
    """OmegaConf's complaint as one line: key, value, and what would be right."""
    flat = _plain_value_for_options(base, _named(base, source))
    if flat is not None:
        options = ", ".join(map(str, _lookup(base, flat))) or "key: value pairs"
        return UserError(flat, _lookup(source, flat), f"must hold options: {options}.")
    message = str(error).split("\n")[0].rstrip(".") + "."
    key = str(getattr(error, "full_key", None) or "")
    if key.partition(".")[0].partition("[")[0] not in source:  # OmegaConf loses the path inside a list
        return UserError(".".join(_first_path(source)), key or "?", message)
    value, (parent, _, leaf) = _lookup(source, key), key.rpartition(".")
    node = _lookup(base, parent) if parent else base
    valid = [str(k) for k in node] if isinstance(node, DictConfig | Mapping) else []
    if valid and leaf not in valid and "[" not in leaf:
        near = difflib.get_close_matches(leaf, valid, 1, 0.5)
        hint = (
            f"Did you mean {f'{parent}.' if parent else ''}{near[0]}?"
            if near
            else f"Valid: {', '.join(valid)}."
        )
        return UserError(key, value, f"is not an option. {hint}")
    return UserError(key, value, message)


def _plain_value_for_options(base: DictConfig, source: Any, prefix: str = "") -> str | None:
    """The first key to which the user gave a plain value where options belong."""
    for key, value in source.items():
        node = _lookup(base, prefix + str(key))
        if isinstance(node, DictConfig) and not isinstance(value, Mapping):
            return prefix + str(key)
        if isinstance(node, DictConfig) and (
            found := _plain_value_for_options(base, value, f"{prefix}{key}.")
        ):
            return found
    return None


def _first_path(source: Any) -> list[str]:
    if not isinstance(source, Mapping) or not source:
        return []
    key = next(iter(source))
    return [str(key), *_first_path(source[key])]


def _lookup(node: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(node, DictConfig | Mapping) or part not in node:
            return None
        node = node[part]
    return node


def _to_object(config: DictConfig) -> Any:
    try:
        OmegaConf.resolve(config)
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "configuration")
        raise UserError(key, "?", str(error).split("\n")[0]) from None
