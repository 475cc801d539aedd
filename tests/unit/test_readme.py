"""What the README shows works, and what it names exists."""

import re
from pathlib import Path

import pytest
import torch
from stored_run import store_run
from tiny import images

from pcd_ray.config import ExportConfig, config_from_file, option_names
from pcd_ray.export import export
from pcd_ray.tune.space import open_space

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(language: str, number: int = 0) -> str:
    """Return one of the README's code blocks in a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return str(found[number])


def test_the_three_lines_load_an_exported_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, student = store_run(tmp_path, 1, student={"backbone": "resnet10t"})
    monkeypatch.chdir(tmp_path)
    path = re.findall(r'load_file\("(.*)"\)', block("python"))[0]
    export(folder.uri, ExportConfig(path=path))

    assert len([line for line in block("python").splitlines() if line]) == 3
    loaded: dict[str, torch.nn.Module] = {}
    exec(block("python"), loaded)

    pixels = images(5, 2, 64)
    x = (pixels.permute(0, 3, 1, 2).float() - student.backbone.mean) / student.backbone.std
    with torch.no_grad():
        expected = student.backbone(pixels).mean((2, 3))
        got = loaded["model"].eval()(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_example_configuration_is_the_run_that_the_commands_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(block("yaml"))
    config = config_from_file(str(path))
    folder = f"{config.run.root}/{config.run.name}"
    assert f"pcd-ray inspect {folder}\n" in README
    assert f"pcd-ray export {folder}\n" in README
    assert f'"{folder}/exported/{config.student.backbone}.safetensors"' in README
    assert f"data.shards={config.data.shards}\n" in README


def test_every_option_it_names_exists() -> None:
    sections = {name.partition(".")[0] for name in option_names()}
    pattern = rf"(?<![\w./])(?:{'|'.join(sections)})(?:\.[a-z_0-9]+)+(?=[`=])"
    named = set(re.findall(pattern, README))
    assert len(named) > 30
    assert named - set(option_names()) == set()


def test_every_file_it_names_is_there() -> None:
    named = set(re.findall(r"(?:pcd_ray|jobs|configs|tests)/[\w/]*\.(?:py|yaml|sh)", README))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_it_is_plain_text() -> None:
    assert README.isascii()
    assert [line for line in README.splitlines() if len(line) > 140] == []


def test_the_sweep_that_the_readme_shows_is_one(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(block("yaml", 1))
    config = config_from_file(str(path))
    assert set(open_space(config).distributions) == set(config.tune.space)
    assert len(config.tune.space) == 3
