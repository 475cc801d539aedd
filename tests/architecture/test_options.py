"""Every option is documented and read; nothing is configured that nobody uses."""

import ast
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pcd_ray import config
from pcd_ray.config import Config, option_names

SECTIONS = Path(config.__file__).parent
PACKAGE = SECTIONS.parent
JOBS = PACKAGE.parent / "jobs"


def _sections(kind: Any = Config, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (class name, dotted section) of every section, e.g. ("LossConfig", "loss")."""
    yield kind.__name__, name
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(item.type):
            yield from _sections(item.type, f"{name}.{item.name}".lstrip("."))


SECTION_OF = dict(_sections())


def _fields(sources: Iterable[str]) -> dict[str, set[str]]:
    """Return what the fields of all classes are annotated with, by name."""
    fields: dict[str, set[str]] = defaultdict(set)
    for source in sources:
        for kind in ast.walk(ast.parse(source)):
            for node in kind.body if isinstance(kind, ast.ClassDef) else ():
                if isinstance(node, ast.AnnAssign):
                    fields[ast.unparse(node.target)].add(ast.unparse(node.annotation))
    return fields


def _reads(source: str, fields: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """Return the (section, name) pairs of attributes that a source reads.

    The section is what stands before the dot, ``config.loss.temperature`` or ``loss.temperature``,
    or what an argument, a variable or a field of any class is annotated with,
    ``(settings: LossConfig)``.
    """
    tree = ast.parse(source)
    annotated: dict[str, set[str]] = defaultdict(set, {k: set(v) for k, v in fields.items()})
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            annotated[node.arg].add(ast.unparse(node.annotation))
        elif isinstance(node, ast.AnnAssign):
            annotated[ast.unparse(node.target)].add(ast.unparse(node.annotation))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = ast.unparse(node.value).rpartition(".")[2]
            found.add((owner, node.attr))
            for kind in annotated[owner] & SECTION_OF.keys():
                found.add((SECTION_OF[kind].rpartition(".")[2], node.attr))
    return found


def test_reads_are_found_by_section_and_by_annotation() -> None:
    source = "def f(settings: OptimConfig):\n  return settings.base_lr, config.loss.temperature"
    assert {("optim", "base_lr"), ("loss", "temperature")} <= _reads(source, {})
    assert ("optim", "base_lr") not in _reads("settings.base_lr", {})
    fields = _fields(["class Loaded:\n  options: OptimConfig"])
    assert ("optim", "base_lr") in _reads("loaded.options.base_lr", fields)


def test_every_option_is_read() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.parent != SECTIONS]
    sources = [path.read_text() for path in [*files, *JOBS.glob("*.py")]]
    fields = _fields(sources)
    reads = set().union(*(_reads(source, fields) for source in sources))
    unread = []
    for name in option_names():
        section, _, option = name.replace("teacher_2", "teacher", 1).rpartition(".")  # read alike
        if (section.rpartition(".")[2], option) not in reads:
            unread.append(name)
    assert unread == []


def _bare_options(kind: ast.ClassDef) -> Iterator[str]:
    """Yield the fields of a class that no docstring follows."""
    for node, following in zip(kind.body, [*kind.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
            continue
        text = following.value if isinstance(following, ast.Expr) else None
        if not (isinstance(text, ast.Constant) and isinstance(text.value, str) and text.value):
            yield f"{kind.name}.{ast.unparse(node.target)}"


def test_every_option_has_a_docstring() -> None:
    classes = [
        node
        for path in SECTIONS.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    ]
    assert {kind.name for kind in classes} >= SECTION_OF.keys()
    assert [name for kind in classes for name in _bare_options(kind)] == []
