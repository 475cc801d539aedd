import hashlib
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from published import ROWS, save, small
from stored_run import TEACHER, store_run
from stored_shards import write_images, write_shards
from torch import nn

from pcd_ray.distill.backbones import build_backbone
from pcd_ray.distill.weights import save_teacher
from pcd_ray.errors import CheckpointError, PcdError, ShardError, WeightsError
from pcd_ray.export import export
from pcd_ray.inspection import inspect, is_weights


def test_images(tmp_path: Path) -> None:
    folder = write_images(tmp_path)
    total = sum(path.stat().st_size for path in tmp_path.rglob("*.*"))
    found = inspect(folder).summary()
    formats = {"png": 2, "jpg": 1}
    assert found == {
        "kind": "images",
        "images": 3,
        "bytes": total,
        "classes": 2,
        "formats": formats,
    }


def test_classes_are_those_of_the_folders_in_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / split)
    found = inspect(str(tmp_path)).facts
    nested = inspect(str(tmp_path / "train")).facts
    assert (found["images"], found["classes"]) == (2 * nested["images"], nested["classes"])
    assert found["notes"].endswith("train, val; the 2 classes are the folders in them")


def test_shards_are_verified_to_the_byte(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    found = inspect(folder, verify=True).summary()
    assert (found["kind"], found["images"], found["shards"], found["classes"]) == (
        "shards",
        3,
        1,
        2,
    )
    assert found["sources"] == [{"uri": str(tmp_path / "images"), "images": 3, "weight": 1.0}]
    (file,) = Path(folder).glob("shard-*.parquet")
    assert found["bytes"] == file.stat().st_size
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ShardError, match="has changed since it was packed"):
        inspect(folder, verify=True)
    assert inspect(folder).facts["images"] == 3  # sizes are as they were: a look costs no reading
    file.write_bytes(data[:-1])
    with pytest.raises(ShardError, match="bytes, the manifest says"):
        inspect(folder)


def test_weights_of_timm(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    path = tmp_path / "body.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    found = inspect(str(path)).summary()
    assert (found["kind"], found["output_width"]) == ("weights", None)
    assert found["method"] == "not said: a bare backbone"
    assert found["tensors"] == len(model.state_dict())
    assert str(found["network"]).startswith("not known: its names (bn1, conv1, ")
    assert str(found["network"]).endswith("the names of a timm network")
    assert str(found["head"]).startswith("none: it is the backbone alone")
    assert found["licence"] == "unknown"
    assert found["mean"] == found["std"] == "what timm says of the network"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://b/x.safetensors?endpoint_override=host:9000", True),
        ("/a/B.PTH", True),
        ("s3://b/images?x=.pth", False),
    ],
)
def test_weights_are_known_by_their_name_alone(uri: str, expected: bool) -> None:
    assert is_weights(uri) is expected


def test_a_teacher_of_ours(tmp_path: Path) -> None:
    path = str(tmp_path / "teacher.safetensors")
    head = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 6))
    save_teacher(path, build_backbone("test_resnet"), head, activation="gelu", licence="MIT")
    found = inspect(path).summary()
    assert (found["method"], found["network"]) == ("pcd_ray", "test_resnet")
    assert (found["licence"], found["output_width"]) == ("MIT", 6)
    assert found["head"] == ["Linear 64-16", "GELU", "Linear 16-6"]


def test_a_teacher_as_published(tmp_path: Path) -> None:
    row = small(ROWS["DINO ViT-S"])
    uri = save(row.published().content, tmp_path / "dino_full_checkpoint.pth")
    found = inspect(uri).summary()
    assert (found["method"], found["licence"], found["output_width"]) == ("DINO", "Apache-2.0", 8)
    assert found["network"] == "vit_tiny_patch16_224 (img_size=224, dynamic_img_size=True)"
    assert found["head"] == ["Linear 192-64", "GELU", "Linear 64-64", "GELU", "Linear 64-8"]
    assert (found["mean"], found["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert found["file_sha256"] == hashlib.sha256(Path(uri).read_bytes()).hexdigest()
    beside = {"student", "optimizer", "epoch", "args", "dino_loss", "fp16_scaler"}
    assert set(found["unused"]) == {"head.last_layer."} | beside


def test_a_run_its_checkpoint_and_what_it_exported(tmp_path: Path) -> None:
    folder, student = store_run(tmp_path, 3, 12)
    run = inspect(folder.uri).summary()
    assert (run["kind"], run["step"], run["checkpoints"]) == ("run", 12, [3, 12])
    identity = {"tensors_sha256" if k == "sha256" else k: v for k, v in TEACHER.items()}
    assert (run["student"], run["teacher"]) == ("test_resnet", identity)
    assert "tensors_sha256" in identity
    assert (run["loss"], run["queue_filled_pct"]) == ("pixel", [0])
    one = inspect(folder.file("checkpoints", "step_00000003")).summary()
    assert (one["kind"], one["step"], one["checkpoints"]) == ("checkpoint", 3, [3])
    exported = inspect(export(folder.uri).path).summary()
    assert (exported["kind"], exported["network"]) == ("weights", "test_resnet")
    assert exported["licence"] == TEACHER["licence"]
    body = student.backbone.body.state_dict()
    assert exported["parameters"] == sum(value.numel() for value in body.values())


def test_a_student_that_was_trained_in_part_says_up_to_where(tmp_path: Path) -> None:
    folder, _ = store_run(
        tmp_path, 3, student={"backbone": "mobilenetv3_small_050", "output_stride": 16}
    )
    found = inspect(export(folder.uri).path).facts
    assert re.fullmatch(r"mobilenetv3_small_050( \(.*\))?, up to stage \d", found["network"])


def test_a_run_without_a_queue(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 3, loss={"kind": "mse"})
    found = inspect(folder.uri).summary()
    assert (found["loss"], found["queue_filled_pct"]) == ("mse", [])


def test_a_damaged_checkpoint_is_not_called_whole(tmp_path: Path) -> None:
    folder, _ = store_run(tmp_path, 3)
    uri = folder.file("checkpoints", "step_00000003")
    (state,) = Path(uri).glob("state-*.pt")
    state.write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="its hash differs"):
        inspect(uri)
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        inspect(folder.uri)


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("missing", None, PcdError, "there is no such file or folder; check the path"),
        ("empty.pth", b"", WeightsError, "is empty"),
        ("junk.safetensors", b"x" * 100, WeightsError, "junk.safetensors is no weights file"),
        ("notes.jpg", b"text", PcdError, "notes.jpg is a file of no kind"),
        ("notes.md", b"text", PcdError, "notes.md is a file of no kind"),
        ("folder/notes.md", b"text", ShardError, "holds no image"),
    ],
)
def test_what_is_nothing_of_ours_is_refused_in_words(
    name: str, content: bytes | None, kind: type[PcdError], message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=message):
        inspect(str(tmp_path / name.partition("/")[0]))


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (open, (str(tmp_path / "ran"),))

    torch.save({"weights": Trap()}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="not unpickled freely"):
        inspect(str(tmp_path / "a.pth"))
    assert not (tmp_path / "ran").exists()


def test_a_run_that_has_not_stored_yet_is_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: new}")
    found = inspect(str(tmp_path)).summary()
    assert found["kind"] == "run"
    assert "none yet" in found["checkpoints"]
