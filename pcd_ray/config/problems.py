"""What is wrong with an option, in words: its name, its value, the nearest known name."""

import difflib
from typing import Any

from pcd_ray.config.schema import option_names
from pcd_ray.config.yaml_text import in_one_line
from pcd_ray.uris import without_secrets


def problem(item: dict[str, Any]) -> str:
    """Turn one pydantic error into what, the value, the fix."""
    path = ".".join(str(part) for part in item["loc"])
    value = item.get("input")
    if item["type"] == "unexpected_keyword_argument":
        last = str(item["loc"][-1])
        nested = _nested(path, last, value) if "." in last else ""
        return nested or f"{path}: unknown option{nearest_option(path)}"
    if item["type"] == "literal_error":
        allowed = str(item["ctx"]["expected"])
        return f"{path}={value!r} is not one of {allowed}{_nearest(str(value), allowed)}"
    if item["type"] == "value_error":
        story = str(item["ctx"]["error"])
        second = path.startswith("teacher_2") and story.startswith("teacher.")
        return story.replace("teacher.", "teacher_2.") if second else story
    if item["type"] in ("missing", "missing_argument"):
        return f"{path}: missing; give a value"
    if item["type"] == "dataclass_type" and isinstance(item["loc"][-1], int):
        return f"{path}={value!r}: write a mapping of its options, {{name: value}}"
    if item["type"] == "dataclass_type":
        return f"{path}={value!r}: is a section; write its options as {path}.option=value"
    if item["type"] == "string_type":
        return f"{path}={value!r}: is not a string; give one"
    return f"{path}={value!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _nested(path: str, key: str, value: Any) -> str:
    """Say how a dotted key of a file is written nested; empty: it is no option, written so."""
    known = {*option_names(), *_section_names()}
    name = next((name for name in (path, key) if name in known), "")
    if not name:
        return ""
    nested: Any = without_secrets(value) if isinstance(value, str) else value
    for part in reversed(name.split(".")):
        nested = {part: nested}
    return (
        f"{key}: dotted names are for the command line, a file nests them; write "
        f"{in_one_line(nested)}"
    )


def nearest_option(path: str) -> str:
    """Return ``; did you mean NAME?`` for an unknown dotted name, or where to look."""
    depth = path.count(".")
    sections = [name for name in _section_names() if name.count(".") == depth]
    near = difflib.get_close_matches(path, [*option_names(), *sections], n=1, cutoff=0.6)
    if not near:  # the right name in the wrong section is the commonest mistake
        last = path.rpartition(".")[2]
        by_last = {name.rpartition(".")[2]: name for name in option_names()}
        near = [by_last[k] for k in difflib.get_close_matches(last, by_last, n=1, cutoff=0.8)]
    return f"; did you mean {near[0]}?" if near else "; see the options in pcd_ray/config/"


def _section_names() -> list[str]:
    return [name.rpartition(".")[0] for name in option_names()]


def _nearest(value: str, allowed: str) -> str:
    words = [word.strip().strip("'\"") for word in allowed.replace(" or ", ",").split(",")]
    near = difflib.get_close_matches(value, words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
