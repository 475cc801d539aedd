"""What is committed reads the same on any machine."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("pcd_ray", "jobs", "configs", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".yaml", ".txt", ".html", ".css", ".ipynb")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_ascii_and_knows_no_machine(path: Path) -> None:
    text = path.read_bytes()
    assert re.findall(rb"[^\x00-\x7f]+", text) == []
    assert re.findall(rb"(?<![\w.])/(?:root|home|work|Users|mnt)\b\S*", text) == []


def test_no_two_test_files_share_a_name() -> None:
    """Pytest imports them by their bare names: a second one stops the whole collection."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
