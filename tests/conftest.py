"""Fixtures for all tests; imports no Ray."""

import os
import runpy
from pathlib import Path

import pytest

# before torch is imported: threads of several processes that share cores must not spin
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# tests start hundreds of processes, and what these cost is their imports
START = Path(__file__).parent / "process_start"
runpy.run_path(str(START / "sitecustomize.py"))  # of this process, which has started already
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(START), os.getenv("PYTHONPATH")]))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process compiles the package again

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of photographs and weights that lies beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared folder beside the repository (photographs, weights)")
    return SHARED


@pytest.fixture(scope="session")
def mobilenet_file(shared: Path) -> Path:
    """Real ImageNet weights of timm's mobilenetv2_100, made with ``pad_type=same``."""
    path = shared / "teachers" / "mobilenetv2_100_imagenet.safetensors"
    if not path.is_file():
        pytest.skip(f"needs {path.name} in shared/teachers")
    return path
