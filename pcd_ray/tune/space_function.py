"""A search space with conditions: a user's function that asks an Optuna trial for values."""

import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pcd_ray.errors import ConfigError

SpaceFunction = Callable[[Any], Mapping[str, Any] | None]
"""Given an Optuna trial; may return options that it sets without asking."""


def load_function(name: str) -> SpaceFunction:
    """Return the function of ``tune.space_function``.

    Raises:
        ConfigError: the file, the module or the name is not there, or is no function.
    """
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = _imported(place)
        function: SpaceFunction = getattr(module, attribute)
    except Exception as error:
        raise ConfigError(
            f"tune.space_function={name!r} cannot be loaded ({type(error).__name__}: {error}); "
            "give FILE.py:NAME or MODULE:NAME"
        ) from error
    if not callable(function):
        raise ConfigError(f"tune.space_function={name!r} is no function; give one")
    return function


def _imported(name: str) -> Any:
    """Import a module, also from the working folder, which ``pcd-ray`` does not have on its path.

    The folder comes last: what lies there hides no package.
    """
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.reverse()
        sys.path.remove(folder)  # the last one
        sys.path.reverse()


def source_of(function: SpaceFunction) -> str:
    """Return a function's text, by which a changed one is noticed."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return repr(function)


def values_of(function: SpaceFunction, trial: Any) -> dict[str, Any]:
    """Return what a space function asks a trial for and what it adds.

    Raises:
        ConfigError: it fails, or returns no mapping of options' names to plain data.
    """
    try:
        added = function(trial)
    except Exception as error:
        raise ConfigError(
            f"tune.space_function fails with {type(error).__name__}: {error}; mend the function"
        ) from error
    if added is not None and not isinstance(added, Mapping):
        raise ConfigError(f"tune.space_function returns {added!r}; return a mapping, or None")
    for name, value in (added or {}).items():
        if not isinstance(name, str) or not _is_plain(value):
            raise ConfigError(
                f"tune.space_function returns {name!r}: {value!r} ({type(value).__name__}); return "
                "options' names with numbers, words or lists, e.g. float(x) for numpy's"
            )
    return {**trial.params, **(added or {})}


def _is_plain(value: Any) -> bool:
    """Say whether a study can store a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
