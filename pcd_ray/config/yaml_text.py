"""YAML as configurations use it: plain data, a tree of little depth, nothing named twice."""

from typing import Any

import yaml

_MOST_DEPTH = 24
"""Mappings and lists inside one another; a configuration needs five."""


class _PlainLoader(yaml.SafeLoader):
    """Builds plain data alone, and refuses what makes a short text a large or deep one."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read: write out what they stand for")
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            raise yaml.YAMLError(f"mappings and lists lie over {_MOST_DEPTH} deep in one another")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _PlainDumper(yaml.SafeDumper):
    """Writes out what occurs twice."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


def parse_yaml(text: str) -> Any:
    """Return what a YAML text says, as plain data.

    Raises:
        yaml.YAMLError: it is no YAML, uses aliases or tags, or is nested too deep.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (ValueError, OverflowError) as error:  # numbers and dates that there are not
        raise yaml.YAMLError(str(error)) from error


def dump_yaml(values: Any) -> str:
    """Return plain data as YAML, in its own order."""
    return str(yaml.dump(values, Dumper=_PlainDumper, sort_keys=False))
