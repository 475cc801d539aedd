"""Ray stays at the rim: only files named ``ray_*.py`` know it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pcd_ray

PACKAGE = Path(pcd_ray.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    """Return a module's dotted name."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path) -> set[str]:
    """Return the dotted names that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _new_process(code: str) -> str:
    """Return what a fresh interpreter prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_only_ray_modules_import_ray(path: Path) -> None:
    imported = _imported(path)
    direct = any(name.partition(".")[0] == "ray" for name in imported)
    through_ours = any(".ray_" in name for name in imported if name.startswith("pcd_ray."))
    if path.name.startswith("ray_"):
        assert direct or through_ours, "its name says that it works on Ray"
    else:
        assert not direct, "rename it to ray_*.py, or leave Ray to such a file"


def test_importing_any_other_module_does_not_import_ray() -> None:
    others = [_name(path) for path in MODULES if not path.name.startswith(("ray_", "__main__"))]
    code = f"""
import importlib, sys
for name in {others!r}:
    importlib.import_module(name)
    if "ray" in sys.modules:
        print(name, "imports ray")
        break
"""
    assert _new_process(code) == ""


def test_the_package_itself_imports_nothing_heavy() -> None:
    code = "import sys, pcd_ray; print(sorted({'ray', 'torch', 'numpy'} & set(sys.modules)))"
    assert _new_process(code) == "[]"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_no_process_takes_all_cores_of_its_machine(path: Path) -> None:
    """Other trials and jobs run beside it: its share says how many threads it has."""
    assert "cpu_count" not in path.read_text()
