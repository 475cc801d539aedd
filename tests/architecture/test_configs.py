"""Each file in configs/ is a lab note that loads."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pcd_ray.config import config_from_file, config_to_values

ROOT = Path(__file__).parents[2]
CONFIGS = [*sorted((ROOT / "configs").glob("*.yaml")), ROOT / "pcd_ray" / "demo.yaml"]


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_loads_and_each_option_in_it_is_read(path: Path) -> None:
    loaded = config_to_values(config_from_file(str(path)))
    written = yaml.safe_load(path.read_text())
    assert written, "it sets something"
    for section, options in written.items():
        for option, value in options.items():
            assert _holds(loaded[section][option], value), f"{section}.{option}"


def _holds(loaded: Any, written: Any) -> bool:
    """Say whether a value was taken as written, whatever stands beside it by default."""
    if isinstance(written, dict) and isinstance(loaded, dict):
        return all(_holds(loaded[key], value) for key, value in written.items())
    return bool(loaded == written)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_its_header_says_what_it_costs_and_what_to_expect(path: Path) -> None:
    lines = path.read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert lines[: len(header)] == header, "comments come first"
    keys = ["# Run:", "# Cost:", "# Expect:"]
    notes = [line for line in header if line.startswith(tuple(keys))]
    assert [next(key for key in keys if line.startswith(key)) for line in notes] == keys
    assert all(line.partition(":")[2].strip() for line in notes), "each says something"
    assert not header[0].startswith(tuple(keys)), "the first line says what the run is"
    assert path.name in notes[0], "the command names this file"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_holds_no_absolute_path(path: Path) -> None:
    assert re.findall(r"(?:^|[\s\"'=(\[,])(?:file://)?[/~][\w.]\S*", path.read_text()) == []
