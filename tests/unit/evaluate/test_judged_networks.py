"""Networks to judge: the same features as where they come from, whatever they are called by."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from stored_run import store_run
from tiny import images, tiny_config

from pcd_ray.checkpoint import find_checkpoint
from pcd_ray.config import Config, ExportConfig, config_from_values, config_to_values
from pcd_ray.distill.build import build_student
from pcd_ray.errors import ConfigError, PcdError, WeightsError
from pcd_ray.evaluate.students import open_rows, stored_config
from pcd_ray.export import export_checkpoint


@pytest.fixture
def config() -> Config:
    return tiny_config()


def test_run_checkpoint_and_export_are_one_network(tmp_path: Path) -> None:
    folder, student = store_run(tmp_path, 3, 7)
    stored = find_checkpoint(folder.uri)
    file = export_checkpoint(stored, ExportConfig(path=f"{tmp_path}/out.safetensors")).path
    config = stored.config
    specs = [folder.uri, stored.uri, file]
    found = [row.networks[0] for row in open_rows(specs, config)]
    views = images(1, 2, config.augment.image_size_px)
    with torch.no_grad():
        truth = student.backbone(views)
        for network in found:
            assert torch.equal(network.backbone()(views), truth)
    assert len({network.sha256 for network in found}) == 1
    assert len({network.identity for network in found}) == 1
    assert [network.label for network in found] == ["stored", "stored (2)", "out"]
    assert {network.licence for network in found} == {"CC-BY-NC-4.0"}


def test_options_come_from_the_first_run(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 3)
    assert stored_config(["untrained", folder.uri]) == find_checkpoint(folder.uri).config
    assert stored_config(["untrained", "resnet18"]) is None


def test_untrained_is_where_training_begins(config: Config) -> None:
    network = open_rows(["untrained"], config)[0].networks[0]
    views = images(1, 2, config.augment.image_size_px)
    begun = build_student(config, []).backbone.eval()
    with torch.no_grad():
        assert torch.equal(network.backbone()(views), begun(views))
    other = config_from_values({**config_to_values(config), "run": {"seed": 1}})
    assert open_rows(["untrained"], other)[0].networks[0].sha256 != network.sha256


def test_a_finer_map_has_the_same_weights(config: Config) -> None:
    network = open_rows(["untrained"], config)[0].networks[0]
    coarse, fine = network.backbone(), network.backbone(output_stride=8)
    views = images(1, 1, 64)
    with torch.no_grad():
        assert coarse(views).shape[2] * 4 == fine(views).shape[2] == 8
    pairs = zip(coarse.state_dict().values(), fine.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_another_programs_file_needs_its_network_where_keys_do_not_tell(
    config: Config, tmp_path: Path
) -> None:
    network = open_rows(["untrained"], config)[0].networks[0]
    file = str(tmp_path / "foreign.safetensors")
    safetensors.torch.save_file(network.weights, file)
    words = r"foreign.*does not say its network: .*; write \S+foreign.safetensors@TIMM_NAME"
    with pytest.raises(PcdError, match=words):
        open_rows([file], config)
    found = open_rows([f"{file}@{network.timm_name}"], config)[0].networks[0]
    assert found.sha256 == network.sha256


def test_seeds_share_a_row(tmp_path: Path) -> None:
    runs = [store_run(tmp_path / str(seed), 3, run={"seed": seed})[0].uri for seed in range(3)]
    config = find_checkpoint(runs[0]).config
    rows = open_rows([",".join(runs), f"mine:{runs[0]}", runs[1]], config)
    assert [(row.label, len(row.networks)) for row in rows] == [
        ("stored", 3),
        ("mine", 1),
        ("stored (2)", 1),
    ]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet81", "no run, no file and no timm name"),
        ("teacher_2", "there is no teacher_2"),
        (",", "names no network"),
    ],
)
def test_what_is_nothing_is_named(spec: str, words: str, config: Config) -> None:
    with pytest.raises(PcdError, match=words):
        open_rows([spec], config)


def test_a_folder_without_checkpoint_is_no_student(tmp_path: Path, config: Config) -> None:
    with pytest.raises(PcdError, match=r"student .*holds no complete checkpoint"):
        open_rows([str(tmp_path)], config)


def test_untrained_seeds_are_several_initialisations(config: Config) -> None:
    (row,) = open_rows(["untrained@1,untrained@2,untrained@3"], config)
    assert row.label == "untrained"
    assert len({network.sha256 for network in row.networks}) == 3
    own = open_rows(["untrained"], config)[0].networks[0]
    assert open_rows([f"untrained@{config.run.seed}"], config)[0].networks[0].sha256 == own.sha256
    assert [network.source for network in row.networks] == ["seed 1", "seed 2", "seed 3"]


def test_one_network_twice_is_no_row_of_two_trainings(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"untrained and untrained are the same network"):
        open_rows(["A:untrained,untrained"], config)
    with pytest.raises(ConfigError, match=r"untrained@0 are the same network"):
        open_rows(["A:untrained,untrained@0"], config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "{not json",
            r"'config' in its metadata is no JSON object \('\{not json' \.\.\.\); export the",
        ),
        ("[1]", "is no JSON object"),
        ('{"later": {"section": 1}}', "does not suit this version of pcd_ray .*later.*; use the v"),
    ],
)
def test_a_file_of_another_version_is_called_that(
    text: str, words: str, config: Config, tmp_path: Path
) -> None:
    network = open_rows(["untrained"], config)[0].networks[0]
    file = str(tmp_path / "later.safetensors")
    metadata = {"made_by": "pcd_ray 9.9", "config": text}
    safetensors.torch.save_file(network.weights, file, metadata)
    with pytest.raises(WeightsError, match=words):
        open_rows([file], config)
