import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from stored_run import TEACHER, seen_student, store_run, store_student
from tiny import images, tiny_config
from torch import Tensor

from pcd_ray.checkpoint import load_checkpoint
from pcd_ray.config import Config, ExportConfig, config_from_values
from pcd_ray.errors import CheckpointError
from pcd_ray.export import export, student_of
from pcd_ray.storage import StorageError

NARROW = {"channels": [8, 16, 24, 32], "output_stride": 16}


def metadata_of(path: str) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata())


def features_as_timm_users_get_them(path: str, views: Tensor) -> Tensor:
    """Load the file by what it says of itself alone."""
    about = metadata_of(path)
    kwargs = json.loads(about["timm_kwargs"])
    model = timm.create_model(about["timm_name"], num_classes=0, **kwargs)
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    mean, std = (torch.tensor(json.loads(about[key])).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return model.eval().forward_features((views.movedim(3, 1) / 255 - mean) / std)


@pytest.mark.parametrize(
    ("backbone", "kwargs"),
    [
        ("test_resnet", {}),
        ("test_convnext", {}),
        ("resnet18", NARROW),
        ("eva02_tiny_patch14_224", {"img_size": 64, "patch_size": 16, "depth": 2}),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_file_gives_the_checkpoints_features_in_timm(
    backbone: str, kwargs: dict[str, Any], channels_last: bool, tmp_path: Path
) -> None:
    folder, student = store_run(
        tmp_path,
        7,
        student={"backbone": backbone, "kwargs": kwargs},
        train={"channels_last": channels_last, "global_batch_size": 8},
    )
    result = export(folder.uri)
    assert result.path == folder.file("exported", f"{backbone}.safetensors")
    views = images(1, 3, 64)
    with torch.no_grad():
        expected = student.backbone(views)
    # float32: normalisation is computed in another order, and other kernels for other layouts
    found = features_as_timm_users_get_them(result.path, views)
    if found.ndim == 3:  # a transformer's tokens, the class token first
        found = found[:, 1:].mT.unflatten(2, expected.shape[2:])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    own = student.backbone.body.state_dict()
    weights = safetensors.torch.load_file(result.path)
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[key], own[key]) for key in own)
    loaded: dict[str, torch.nn.Module] = {}
    exec(result.snippet(), loaded)  # as the command prints it
    model = loaded["model"].state_dict()
    assert all(torch.equal(model[key], own[key]) for key in own)


def test_weights_with_channels_innermost_are_laid_out_for_everyone(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 1, train={"channels_last": True, "global_batch_size": 8})
    stored = load_checkpoint(folder.file("checkpoints", "step_00000001")).state["student"]
    assert not all(value.is_contiguous() for value in stored.values())
    weights = safetensors.torch.load_file(export(folder.uri).path)
    assert all(value.is_contiguous() for value in weights.values())


def test_the_file_says_where_it_comes_from(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 3, 12)
    result = export(folder.uri)
    about = metadata_of(result.path)
    assert about == result.metadata
    stored = load_checkpoint(folder.file("checkpoints", "step_00000012"))
    assert (about["step"], result.step) == ("12", 12)
    assert about["checkpoint_sha256"] == stored.about["state_sha256"]
    assert about["data_sha256"] == "d" * 64
    for key, value in TEACHER.items():
        if key != "head":
            assert about["teacher" if key == "source" else f"teacher_{key}"] == value
    assert json.loads(about["metrics"]) == {"train/loss": 1.5}
    assert config_from_values(json.loads(about["config"])) == stored.config != Config()
    assert about["format"] == "pt"
    summary = json.loads(Path(folder.file("exported", "summary.json")).read_text())
    assert summary == result.summary()
    assert summary["parameters"] == sum(
        p.numel() for p in timm.create_model("test_resnet", num_classes=0).parameters()
    )


def test_how_to_load_it_says_what_is_special(tmp_path: Path) -> None:
    student = {"backbone": "mobilenetv3_small_050", "output_stride": 16}
    folder, _ = store_run(tmp_path, 3, student=student)
    result = export(folder.uri)
    lines = replace(result, path="s3://bucket/a b.safetensors").snippet().splitlines()
    assert lines[2] == "model.load_state_dict(safetensors.torch.load_file('a b.safetensors'))"
    tap = result.metadata["timm_tap"]
    assert lines[3].startswith(f"# trained up to stage {tap}: model.forward_intermediates(images")
    overview = result.overview()
    assert overview.pop("load") == result.snippet()
    assert overview == {k: v for k, v in result.summary().items() if k != "metadata"}


def test_an_older_step_and_a_place_can_be_chosen(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 3, 12)
    place = str(tmp_path / "here" / "mine.safetensors")
    result = export(folder.file("checkpoints", "step_00000003"), ExportConfig(path=place))
    assert (result.path, result.step, result.neck_path) == (place, 3, "")
    assert (tmp_path / "here" / "summary.json").exists()
    assert not (Path(folder.uri) / "exported").exists()


def test_without_being_told_it_does_what_the_runs_options_say(tmp_path: Path) -> None:
    place = str(tmp_path / "here" / "mine.safetensors")
    folder, _ = store_run(tmp_path, 3, export={"path": place})
    assert export(folder.uri).path == place
    assert export(folder.uri, ExportConfig()).path != place


def test_a_summary_of_another_file_or_verb_is_left_alone(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path / "runs", 2)
    for name in ("a.safetensors", "b.safetensors", "a.safetensors"):
        export(folder.uri, ExportConfig(path=str(tmp_path / name)))
    written = {p.name: json.loads(p.read_text())["path"] for p in tmp_path.glob("*.json")}
    assert written == {
        "summary.json": str(tmp_path / "a.safetensors"),
        "b.summary.json": str(tmp_path / "b.safetensors"),
    }
    judged = Path(folder.file("summary.json"))
    judged.write_text(json.dumps({"path": folder.uri, "step": 2}))
    export(folder.uri, ExportConfig(path=folder.file("s.safetensors")))
    assert json.loads(judged.read_text())["path"] == folder.uri


@pytest.mark.parametrize(("judged_step", "carried"), [(4, True), (2, False)])
def test_scores_of_the_exported_step_travel_with_it(
    judged_step: int, carried: bool, tmp_path: Path
) -> None:
    folder, _ = store_run(tmp_path, 2, 4)
    scores = {"knn_top1": {"untrained": 1.0, "student": 2.5, "teacher": 3.0}}
    summary = {"step": judged_step, **scores, "plan": {"steps": 4}}
    Path(folder.file("summary.json")).write_text(json.dumps(summary))
    metrics = json.loads(metadata_of(export(folder.uri).path)["metrics"])
    assert metrics == {"train/loss": 1.5} | ({"knn_top1": 2.5} if carried else {})


def test_a_checkpoint_taken_out_of_its_run_exports_into_itself(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 3)
    alone = (Path(folder.checkpoints) / "step_00000003").rename(tmp_path / "alone")
    assert export(str(alone)).path == str(alone / "exported" / "test_resnet.safetensors")


def test_a_relative_place_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_run(tmp_path, 3)
    monkeypatch.chdir(tmp_path)
    result = export("stored", ExportConfig(path="a.safetensors"))
    assert result.path == str(tmp_path / "a.safetensors")
    assert (tmp_path / "summary.json").exists()


def test_the_neck_goes_into_a_file_of_its_own(tmp_path: Path) -> None:
    folder, student = store_run(tmp_path, 3)
    result = export(folder.uri, ExportConfig(keep_neck=True))
    assert result.neck_path == folder.file("exported", "test_resnet_mhsa.safetensors")
    weights = safetensors.torch.load_file(result.neck_path)
    own = student.neck.state_dict()
    assert weights.keys() == own.keys() != set()
    assert all(torch.equal(weights[key], own[key]) for key in own)
    assert metadata_of(result.neck_path) == result.metadata


def test_a_checkpoint_becomes_a_timm_model_in_eval_mode(tmp_path: Path) -> None:
    folder, student = store_run(tmp_path, 3, student={"backbone": "resnet18", "kwargs": NARROW})
    model = student_of(load_checkpoint(folder.file("checkpoints", "step_00000003")))
    assert not model.training
    normalised = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pooled = student.backbone.body.forward_features(normalised).mean((2, 3))
        torch.testing.assert_close(model(normalised), pooled)


def test_the_moving_average_is_exported_where_there_is_one_and_the_student_on_request(
    tmp_path: Path,
) -> None:
    config = tiny_config(run={"root": str(tmp_path), "name": "stored"})
    student, average = seen_student(config), seen_student(config)
    with torch.no_grad():
        average.backbone.body.conv1[0].weight.mul_(2)
    folder = store_student(config, student, 4, average=average)
    judged = {"step": 4, "knn_top1": {"untrained": 1.0, "student": 2.5, "teacher": 3.0}}
    Path(folder.file("summary.json")).write_text(json.dumps(judged))
    for kind, expected, name in (
        ("auto", average, "ema"),
        ("ema", average, "ema"),
        ("raw", student, "raw"),
    ):
        place = str(tmp_path / f"{kind}.safetensors")
        result = export(folder.uri, ExportConfig(path=place, weights=kind, keep_neck=True))
        assert result.weights == result.metadata["weights"] == name
        weights = safetensors.torch.load_file(place)
        own = expected.backbone.body.state_dict()
        assert all(torch.equal(weights[key], own[key]) for key in own)
        # scores are those of the weights that were judged
        assert ("knn_top1" in json.loads(result.metadata["metrics"])) == (name == "ema")
    stored = load_checkpoint(folder.file("checkpoints", "step_00000004"))
    first = next(iter(average.backbone.body.state_dict().items()))
    assert torch.equal(student_of(stored).state_dict()[first[0]], first[1])


def test_a_moving_average_that_was_not_kept_cannot_be_exported(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 3)
    assert export(folder.uri).weights == "raw"
    with pytest.raises(
        CheckpointError, match=r"export.weights=ema, but .* no moving average; take"
    ):
        export(folder.uri, ExportConfig(weights="ema"))


def test_without_a_checkpoint_or_room_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        export(str(tmp_path / "none"))
    folder, _ = store_run(tmp_path, 3)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        export(folder.uri, ExportConfig(path=str(tmp_path / "file" / "a.safetensors")))
