"""Plain data, YAML files and overrides to a checked Config, and back."""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from pcd_ray.config.problems import problem
from pcd_ray.config.schema import Config, takes_text
from pcd_ray.config.yaml_text import dump_yaml, load_yaml
from pcd_ray.errors import ConfigError
from pcd_ray.uris import SecretInUriError, refuse_secrets


def config_from_values(values: dict[str, Any]) -> Config:
    """Return a checked Config from plain nested data.

    Raises:
        ConfigError: all problems at once, each with its dotted path and the nearest known name.
    """
    _refuse_secrets(values)
    try:
        checked: Config = _adapter(Config).validate_python(_with_source_mappings(values))
        return checked
    except ValidationError as error:
        problems = sorted({problem(dict(item)) for item in error.errors()})
        raise ConfigError("\n".join(problems)) from error


def config_to_values(config: Any) -> dict[str, Any]:
    """Return a Config (or a section of it) as plain nested data, ready for YAML and JSON."""
    plain: dict[str, Any] = _adapter(type(config)).dump_python(  # type: ignore[arg-type]
        config, mode="json"
    )
    return plain


def config_from_file(path: str, overrides: Sequence[str] = ()) -> Config:
    """Return a Config from a YAML file (``""`` for none) and ``dotted.key=value`` overrides.

    Raises:
        ConfigError: the file is missing or no YAML mapping, or an option is wrong.
    """
    values: Any = {}
    if path:
        try:
            with open(path, encoding="utf-8-sig") as file:
                values = parse_yaml(file.read()) or {}
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}); give a YAML file"
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: holds {type(values).__name__}; give a mapping of sections")
    for override in overrides:
        _apply(values, override)
    return config_from_values(values)


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """Return a Config with ``dotted.key=value`` overrides applied.

    Raises:
        ConfigError: an option is wrong.
    """
    values = config_to_values(config)
    for override in overrides:
        _apply(values, override)
    return config_from_values(values)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a Config in which options, by their dotted names, have these values.

    Raises:
        ConfigError: an option is wrong.
    """
    nested = config_to_values(config)
    for name, value in values.items():
        _set(nested, name, value, story=f"{name}={value!r}")
    return config_from_values(nested)


def config_from_argv(argv: Sequence[str]) -> Config:
    """Return a Config from ``[script, CONFIG.yaml, dotted.key=value, ...]``."""
    words = list(argv[1:])
    path = words.pop(0) if words and not is_override(words[0]) else ""
    return config_from_file(path, words)


def is_override(word: str) -> bool:
    """Say whether a word is ``dotted.key=value``; a file's or folder's name may hold ``=`` too."""
    name, equals, _ = word.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", name):
        return False
    section, dot, _ = name.partition(".")
    known = bool(dot) and section in (item.name for item in dataclasses.fields(Config))
    return not os.path.exists(word) and (known or not word.endswith((".yaml", ".yml")))


def parse_yaml(text: str, name: str = "") -> Any:
    """Return what a YAML text says as plain data; options that take text have it as written.

    Args:
        text: a configuration, or the value of an option.
        name: the option's dotted name; empty: a configuration.

    Raises:
        yaml.YAMLError: it is not YAML, nests too deep, or gives a key twice.
    """
    return load_yaml(text, name=name, takes_text=takes_text)


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML, defaults included."""
    return dump_yaml(config_to_values(config))


@functools.cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    """Return what checks and dumps a section; it takes far longer to build than to use."""
    return TypeAdapter(kind)


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override!r} is no override; write dotted.key=value")
    _set(values, name, _value(name, text), story=repr(override))


def _value(name: str, text: str) -> Any:
    """Return the value of an override: the text itself where the option takes text, else YAML.

    ``data.sources`` takes one URI, as text, or what stands in brackets: a list, or a mapping.
    """
    listed = name == "data.sources" and text.strip()[:1] + text.strip()[-1:] in ("[]", "{}")
    if text == "" or (takes_text(name) and not listed):
        return text
    try:
        return parse_yaml(text, name)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}={text!r}: {error}") from error


def _set(values: dict[str, Any], name: str, value: Any, *, story: str) -> None:
    """Set a dotted name in nested data."""
    *sections, last = name.split(".")
    place = values
    for section in sections:
        inner = place.setdefault(section, {})
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{story}: {section} is {inner!r}, not a section")
        place = inner
    place[last] = value


def _refuse_secrets(values: Any, name: str = "") -> None:
    """Refuse URIs that carry credentials, but for a sweep's database, which is stored without."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            _refuse_secrets(value, f"{name}.{key}".lstrip("."))
    elif isinstance(values, list | tuple):
        for value in values:
            _refuse_secrets(value, name)
    elif isinstance(values, str) and name != "tune.storage":
        try:
            refuse_secrets(values)
        except SecretInUriError as error:
            raise ConfigError(f"{name}: {error}") from None


def _with_source_mappings(values: dict[str, Any]) -> dict[str, Any]:
    """Let ``data.sources`` be one URI or a list of URIs as well as of mappings."""
    data = values.get("data")
    if not isinstance(data, dict) or "sources" not in data:
        return values
    sources = data["sources"]
    listed = sources if isinstance(sources, list | tuple) else [sources]
    mapped = [{"uri": item} if isinstance(item, str) else item for item in listed]
    return {**values, "data": {**data, "sources": mapped}}
