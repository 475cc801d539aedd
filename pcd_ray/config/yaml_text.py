"""YAML as configurations use it: plain data, a tree of little depth, nothing named twice."""

import re
from collections.abc import Callable
from typing import Any

import yaml

_MAX_DEPTH = 24
"""Mappings and lists inside one another; a configuration needs five."""
_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(r"(?=.*[.eE])[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?$")
"""``1e5``, ``3e-2`` and ``-.5`` too, which YAML 1.1 takes for text."""


class _PlainLoader(yaml.SafeLoader):
    """Builds plain data, and refuses what makes a short text a large, deep or ambiguous one."""

    def __init__(self, text: str, path: tuple[str, ...], takes_text: Callable[[str], bool]) -> None:
        super().__init__(text)
        self.path = path
        self.takes_text = takes_text
        self.depth = 0
        self.lines: dict[str, int] = {}
        """Dotted names so far, and the lines that they are given in."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("uses aliases (*name), which are not read: write them out")
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"nests mappings and lists more than {_MAX_DEPTH} deep")
        above = self.path
        if isinstance(index, yaml.ScalarNode):  # the key of this value
            self._note(index, at_top=not above)
        if index is not None:
            self.path = (*above, str(getattr(index, "value", index)))
        node: Any = super().compose_node(parent, index)
        is_key = parent is not None and index is None
        if not is_key and _is_bare(node) and self.takes_text(".".join(self.path)):
            node.tag = f"{_TAG}str"
        self.path = above
        self.depth -= 1
        return node

    def _note(self, key: Any, *, at_top: bool) -> None:
        """Note where a key stands, and refuse one that stands elsewhere already."""
        if key.tag == f"{_TAG}merge":
            raise yaml.YAMLError("uses merge keys (<<), which are not read: write them out")
        name, line = ".".join([*self.path, key.value]), key.start_mark.line + 1
        if name in self.lines:
            first = self.lines[name]
            lines = f"lines {first} and {line}" if first != line else f"line {line}"
            raise yaml.YAMLError(f"{name} is given twice, in {lines}; merge the two")
        for other, other_line in self.lines.items() if at_top else ():
            if other.startswith(f"{name}.") or name.startswith(f"{other}."):
                raise yaml.YAMLError(
                    f"{other} (line {other_line}) and {name} (line {line}) both set "
                    f"{min(name, other)}; write its options once, nested"
                )
        self.lines[name] = line

    def construct_yaml_int(self, node: Any) -> Any:
        """Return a decimal number, leading zeros or not; hexadecimal and the like stay text."""
        plain = node.value.replace("_", "")
        return int(plain) if re.fullmatch(r"[-+]?\d+", plain) else node.value


class _PlainDumper(yaml.SafeDumper):
    """Writes out what occurs twice."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


_PlainLoader.add_constructor(f"{_TAG}int", _PlainLoader.construct_yaml_int)
for _kind in (_PlainLoader, _PlainDumper):  # the dumper quotes what the loader would not read back
    _kind.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


def load_yaml(
    text: str, *, name: str = "", takes_text: Callable[[str], bool] = lambda _: False
) -> Any:
    """Return what a YAML text says, as plain data.

    Args:
        text: the document, or the value of ``name``.
        name: dotted name that the text is the value of; empty: a whole document.
        takes_text: says of a dotted name whether a bare word there is text as it stands, also
            where YAML would read a number, a date or a boolean (``007``, ``on``).

    Raises:
        yaml.YAMLError: it is not YAML, uses aliases or tags, is nested too deep, or gives a key
            twice. The message goes on where the file was named.
    """
    try:
        path = tuple(filter(None, name.split(".")))
        return _PlainLoader(text, path, takes_text).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise yaml.YAMLError(
            f"is not YAML ({line}{error.problem}; check indentation, brackets and quotes)"
        ) from error
    except (yaml.reader.ReaderError, ValueError, OverflowError) as error:
        # characters, numbers and dates that there are not
        raise yaml.YAMLError(f"is not YAML ({' '.join(str(error).split())})") from error


def dump_yaml(values: Any) -> str:
    """Return plain data as YAML, in its own order."""
    return str(yaml.dump(values, Dumper=_PlainDumper, sort_keys=False))


def in_one_line(values: dict[str, Any]) -> str:
    """Return a mapping as it may be written on one line of a file, e.g. ``optim: {base_lr: 1}``."""
    text = yaml.dump(
        values, Dumper=_PlainDumper, sort_keys=False, default_flow_style=True, width=2**16
    )
    return str(text).strip()[1:-1]


def _is_bare(node: Any) -> bool:
    """Say whether a value is a word without quotes, and not ``null``."""
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.tag != f"{_TAG}null"
