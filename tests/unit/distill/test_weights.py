import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from tiny import images
from torch import Tensor, nn

from pcd_ray.config import TeacherConfig
from pcd_ray.distill.backbones import build_backbone
from pcd_ray.distill.build_teacher import load_teacher
from pcd_ray.distill.heads import MlpShape, linear_widths
from pcd_ray.distill.teacher_parts import take_apart
from pcd_ray.distill.weights import (
    METADATA_KEY,
    WeightsFile,
    load_backbone,
    read_weights,
    save_teacher,
    tensors_sha256,
)
from pcd_ray.errors import WeightsError
from pcd_ray.storage import StorageError


def in_memory(tensors: dict[str, Tensor]) -> WeightsFile:
    return WeightsFile("memory.pth", tensors, {}, "")


# MoCo v3, as published


def test_a_published_mocov3_file_is_read_whole(
    mocov3_file: Path, mocov3_tensors: dict[str, Tensor]
) -> None:
    loaded = load_teacher(TeacherConfig(weights=str(mocov3_file)))
    assert loaded.head is not None
    assert linear_widths(loaded.head) == [(2048, 4096), (4096, 256)]
    assert loaded.predictor == MlpShape((4096, 256), final_norm=False)
    assert (loaded.identity.licence, loaded.identity.head) == ("CC-BY-NC-4.0", "published")
    assert (loaded.identity.arch, loaded.identity.source) == ("resnet50", "r-50-1000ep.pth.tar")

    prefix = "module.momentum_encoder."
    momentum = {
        k.removeprefix(prefix): v for k, v in mocov3_tensors.items() if k.startswith(prefix)
    }
    resnet = timm.create_model("resnet50", num_classes=0, global_pool="").eval()
    resnet.load_state_dict({k: v for k, v in momentum.items() if not k.startswith("fc.")})
    batch = images(0, 2, 64)
    own = (batch.permute(0, 3, 1, 2) / 255 - imagenet(0)) / imagenet(1)
    with torch.no_grad():
        features = loaded.backbone(batch)
        torch.testing.assert_close(features, resnet(own), rtol=1e-4, atol=1e-4)
        pooled = torch.randn(3, 2048)
        hidden = pooled @ momentum["fc.0.weight"].T
        for key, act in (("fc.1", True), ("fc.4", False)):
            mean, var = momentum[f"{key}.running_mean"], momentum[f"{key}.running_var"]
            hidden = (hidden - mean) / (var + 1e-5).sqrt()
            if act:
                hidden = hidden * momentum[f"{key}.weight"] + momentum[f"{key}.bias"]
                hidden = hidden.relu() @ momentum["fc.3.weight"].T
        torch.testing.assert_close(loaded.head(pooled), hidden, rtol=1e-4, atol=1e-4)


def imagenet(index: int) -> Tensor:
    """ImageNet's mean (0) or standard deviation (1)."""
    return torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]][index]).view(3, 1, 1)


def test_nothing_of_a_mocov3_file_is_left_over(mocov3_tensors: dict[str, Tensor]) -> None:
    parts = take_apart(in_memory(mocov3_tensors))
    assert parts.layout == "MoCo v3"
    assert parts.head is not None
    used = len(parts.backbone) + len(parts.head.state_dict())
    unused = [k for k in mocov3_tensors if k.startswith(tuple(parts.unused))]
    assert used + len(unused) == len(mocov3_tensors)
    assert set(parts.unused) == {"module.base_encoder.", "module.predictor."}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("module.momentum_encoder.fc.5.scale", "head layer 5 with .* is no Linear"),
        ("module.momentum_encoder.fc.3.extra", r'Unexpected key\(s\) in state_dict: "3.extra"'),
        ("module.queue", "1 keys belong to no part of MoCo v3: queue;"),
        ("queue_ptr", "1 keys belong to no part of MoCo v3: queue_ptr"),
    ],
)
def test_a_key_that_mocov3_does_not_have_is_refused(
    mocov3_tensors: dict[str, Tensor], key: str, message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        take_apart(in_memory({**mocov3_tensors, key: torch.ones(3)}))


def test_an_encoder_without_its_head_is_refused(mocov3_tensors: dict[str, Tensor]) -> None:
    bare = {k: v for k, v in mocov3_tensors.items() if ".fc." not in k}
    with pytest.raises(WeightsError, match=r"backbone but no head .*give .*r-50-1000ep\.pth\.tar"):
        take_apart(in_memory(bare))


# timm's own names


@pytest.fixture
def resnet_state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return dict(timm.create_model("test_resnet", num_classes=10).state_dict())


@pytest.mark.parametrize("container", ["safetensors", "pth", "state_dict"])
def test_a_timm_file_with_its_classifier_loads(
    container: str, resnet_state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / f"weights.{container}"
    if container == "safetensors":
        safetensors.torch.save_file(resnet_state, path)
    else:
        torch.save(resnet_state if container == "pth" else {"state_dict": resnet_state}, path)
    loaded = load_teacher(TeacherConfig(arch="test_resnet", weights=str(path), head="none"))
    own = loaded.backbone.body.state_dict()
    assert "fc.weight" not in own
    assert all(torch.equal(value, resnet_state[key]) for key, value in own.items())
    assert (loaded.head, loaded.predictor, loaded.identity.licence) == (None, None, "unknown")


def test_missing_left_over_and_misshapen_keys_are_named(resnet_state: dict[str, Tensor]) -> None:
    backbone = build_backbone("test_resnet")
    before = tensors_sha256(backbone)
    wrong = dict(resnet_state)
    del wrong["layer1.0.conv1.weight"]
    wrong["layer9.conv.weight"] = torch.ones(1)
    wrong["bn1.weight"] = torch.ones(7)
    with pytest.raises(WeightsError) as refused:
        load_backbone(backbone, wrong, uri="some.pth")
    message = str(refused.value)
    assert "some.pth is no test_resnet file" in message
    assert "1 keys missing: layer1.0.conv1.weight" in message
    assert "1 keys left over: layer9.conv.weight" in message
    assert "1 shapes: bn1.weight (7,) instead of (" in message
    assert tensors_sha256(backbone) == before


def test_long_lists_of_keys_are_cut(resnet_state: dict[str, Tensor]) -> None:
    needed = [key for key in resnet_state if not key.endswith("num_batches_tracked")]
    with pytest.raises(WeightsError, match=rf"\({len(needed) - 2 - 6} more\)"):
        load_backbone(build_backbone("test_resnet"), {}, uri="some.pth")


def test_real_imagenet_weights_load_strictly(mobilenet_file: Path) -> None:
    config = TeacherConfig(
        arch="mobilenetv2_100", weights=str(mobilenet_file), kwargs={"pad_type": "same"}
    )
    loaded = load_teacher(config)
    tensors = read_weights(str(mobilenet_file)).tensors
    own = loaded.backbone.body.state_dict()
    assert set(tensors) - set(own) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(value, tensors[key]) for key, value in own.items())
    assert loaded.identity.head == "pca"  # no head was published


def test_a_file_of_other_names_is_no_reason_to_change_the_architecture(tmp_path: Path) -> None:
    path = str(tmp_path / "weights.pth")
    torch.save({"a.weight": torch.ones(3), "b.weight": torch.ones(3)}, path)
    with pytest.raises(WeightsError, match=r"none of the \d+ tensors .* a.weight, b.weight") as no:
        load_teacher(TeacherConfig(arch="test_resnet", weights=path))
    assert "teacher.arch" not in str(no.value)


# our own layout


def test_a_teacher_of_our_own_comes_back_with_head_activation_and_normalisation(
    tmp_path: Path,
) -> None:
    torch.manual_seed(2)
    backbone = build_backbone("test_resnet", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    head = nn.Sequential(nn.Linear(96, 32), nn.GELU(), nn.Linear(32, 16)).eval()
    uri = str(tmp_path / "teacher.safetensors")
    save_teacher(uri, backbone, head, activation="gelu", licence="MIT")
    loaded = load_teacher(TeacherConfig(arch="test_resnet", weights=uri))
    assert (loaded.identity.licence, loaded.identity.head) == ("MIT", "published")
    assert loaded.head is not None
    batch = images(3, 2, 64)
    with torch.no_grad():
        expected = backbone(batch)
        torch.testing.assert_close(loaded.backbone(batch), expected, rtol=1e-5, atol=1e-5)
        pooled = expected.mean((2, 3))
        assert torch.equal(loaded.head(pooled), head(pooled))
    with pytest.raises(WeightsError, match=r"holds a test_resnet, but teacher\.arch=resnet18"):
        load_teacher(TeacherConfig(arch="resnet18", weights=uri))


def test_a_stray_key_in_our_own_layout_is_refused() -> None:
    tensors = {"backbone.conv.weight": torch.ones(1), "neck.weight": torch.ones(1)}
    file = WeightsFile("own.safetensors", tensors, {METADATA_KEY: {}}, "")
    with pytest.raises(WeightsError, match=r"'neck.weight' is neither backbone\.\* nor head\.\*"):
        take_apart(file)


# files that are no weights


class Attack:
    """Unpickled freely, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(
    container: str, tmp_path: Path
) -> None:
    target = tmp_path / "executed"
    path = tmp_path / "attack.pth"
    content = {"state_dict": {"conv1.weight": torch.ones(1)}, "extra": Attack(target)}
    if container == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(Attack(target)))
    with pytest.raises(WeightsError, match="is not unpickled freely"):
        read_weights(str(path))
    assert not target.exists()
    pickle.loads(pickle.dumps(Attack(target)))
    assert target.exists()  # the attack is a real one


CALLED: list[object] = []


def exclude_bias_and_norm(*arguments: object) -> None:
    """Leave a trace of having been called."""
    CALLED.append(arguments)


class Calls:
    """Unpickled, it calls the function of ``__main__`` that published optimisers only name."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exclude_bias_and_norm, ("argument",)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_old_checkpoints_hold_besides_tensors_is_left_out_and_never_called(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exclude_bias_and_norm, "__module__", "__main__")
    script = sys.modules["__main__"]
    monkeypatch.setattr(script, "exclude_bias_and_norm", exclude_bias_and_norm, raising=False)
    CALLED.clear()
    numbers = [np.float64(0.5), np.float32(1), np.int64(3), np.bool_(1), np.arange(4.0)]
    content = {
        "state_dict": {"conv.weight": torch.ones(2)},
        "args": argparse.Namespace(lr=np.float64(0.1), nested=argparse.Namespace(out=Path("a"))),
        "best_acc1": numbers,
        "optimizer": {"param_groups": [{"weight_decay_filter": exclude_bias_and_norm}]},
        "attack": Calls(),
    }
    path = tmp_path / "old.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    allowed = set(torch.serialization.get_safe_globals())
    file = read_weights(str(path))
    assert torch.equal(file.tensors["conv.weight"], torch.ones(2))
    assert file.beside == ("args", "best_acc1", "optimizer", "attack")
    assert CALLED == []
    assert set(torch.serialization.get_safe_globals()) == allowed  # allowed for one reading alone
    torch.load(path, weights_only=False)
    assert CALLED == [("argument",)]  # the call is a real one


def test_numpys_name_of_before_its_second_version_is_known(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    content = {"state_dict": WEIGHTS, "acc": np.float64(0.5), "array": np.arange(3)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert b"numpy._core.multiarray" in data
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_weights(str(path)).beside == ("acc", "array")


class Runs:
    """Unpickled, it calls a function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> object:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_names_of_methods_are_left_out_and_not_looked_up(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "curves.pth"
    content = {"state_dict": WEIGHTS, "curves": Runs(getattr, "text", "no_such_method")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert read_weights(str(path)).beside == ("curves",)
    with pytest.raises(AttributeError):
        torch.load(path, weights_only=False)  # the look-up is a real one


@pytest.mark.parametrize("zipped", [True, False])
def test_what_no_weights_need_is_named_and_refused(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "attack.pth"
    for function, name in (
        (os.system, "posix.system"),
        (eval, "eval"),
        (argparse.ArgumentParser, "argparse.ArgumentParser"),
        (np.load, "numpy.load"),
        (functools.partial, "functools.partial"),
    ):
        content = {"state_dict": WEIGHTS, "args": argparse.Namespace(x=Runs(function, "0"))}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(WeightsError, match=rf"names {name}, which no weights need"):
            read_weights(str(path))


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def zipped_text() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    return buffer.getvalue()


WEIGHTS = {"conv.weight": torch.ones(100, 100)}
NO_WEIGHTS = {
    "empty": (b"", "is empty"),
    "text": (b"these are no weights\n" * 50, "is no weights file; give a .safetensors"),
    "html": (b"\n<!DOCTYPE html><html>404</html>", "is a web page and no weights"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "run `git lfs pull`",
    ),
    "binary": (bytes(range(256)) * 20, "is no weights file; give a .safetensors"),
    "one byte": (b"\x80", "is a pickle of no plain tensors, or a truncated one"),
    "truncated torch": (saved(WEIGHTS)[:-3000], r"is truncated at [\d,]+ bytes; fetch the file"),
    "torn torch": (saved(WEIGHTS)[:100], "is truncated at 100 bytes"),
    "TorchScript": (scripted(), "is a TorchScript program, which is not run here"),
    "another zip": (zipped_text(), "a zip of something else"),
    "truncated safetensors": (safetensors.torch.save(WEIGHTS)[:-9], "damaged safetensors"),
    "torn safetensors": (safetensors.torch.save(WEIGHTS)[:40], "damaged safetensors"),
    "tensor": (saved(torch.ones(3)), "holds a Tensor, not a state dict"),
    "list": (saved([torch.ones(3)]), "holds a list, not a state dict"),
    "numbers": (saved({"epoch": 3, "lr": 0.1}), "not torch tensors: epoch, lr"),
    "arguments": (saved({"args": argparse.Namespace(lr=1)}), "not torch tensors: args"),
    "arguments among weights": (
        saved({"a": torch.ones(1), "b": np.float64(1)}),
        "not torch tensors: b",
    ),
    "mixed": (saved({"state_dict": {"a": torch.ones(1), "b": 3}}), "not torch tensors: b"),
    "no tensors": (saved({"state_dict": {}}), "not a state dict"),
    "no tensors, safely": (safetensors.torch.save({}), "holds no tensors"),
    "foreign metadata": (
        safetensors.torch.save(WEIGHTS, metadata={METADATA_KEY: "not json"}),
        "is no JSON mapping",
    ),
    "odd metadata": (
        safetensors.torch.save(WEIGHTS, metadata={METADATA_KEY: json.dumps([1])}),
        "is no JSON mapping",
    ),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_a_file_that_is_no_weights_is_refused_in_words(name: str, tmp_path: Path) -> None:
    data, message = NO_WEIGHTS[name]
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=message) as refused:
        read_weights(str(path))
    assert str(path) in str(refused.value)


def test_any_damage_to_a_torch_file_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    legacy = io.BytesIO()
    torch.save(WEIGHTS, legacy, _use_new_zipfile_serialization=False)
    random = torch.Generator().manual_seed(0)
    for data in (saved(WEIGHTS), legacy.getvalue()):
        for _ in range(60):
            damaged = bytearray(data)
            start = int(torch.randint(0, 400, (), generator=random))
            noise = torch.randint(0, 256, (8,), generator=random, dtype=torch.uint8)
            damaged[start : start + 8] = bytes(noise.tolist())
            path.write_bytes(bytes(damaged))
            with contextlib.suppress(WeightsError):  # any other error fails this test
                assert read_weights(str(path)).tensors


def mapped(path: str) -> list[range]:
    """The addresses at which this process has a file in its memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    bounds = [line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith(path)]
    return [range(int(start, 16), int(end, 16)) for start, end in bounds]


def test_a_teacher_that_sets_its_parameters_one_by_one_is_read(tmp_path: Path) -> None:
    """As timm's ConViT does: no value of its own is needed, all come from the file."""
    small = {"depth": 1, "local_up_to_layer": 1, "embed_dim": 8}
    state = dict(timm.create_model("convit_tiny", num_classes=0, **small).state_dict())
    safetensors.torch.save_file(state, tmp_path / "convit.safetensors")
    weights = str(tmp_path / "convit.safetensors")
    loaded = load_teacher(
        TeacherConfig(arch="convit_tiny", weights=weights, kwargs=small, head="none")
    )
    body = loaded.backbone.body.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in body.items())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped")
@pytest.mark.parametrize("kind", ["safetensors", "pth", "nested.pth"])
def test_a_teacher_shares_the_memory_of_its_file(
    kind: str, resnet_state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        safetensors.torch.save_file(resnet_state, path)
    else:
        torch.save({"model": resnet_state} if "nested" in kind else resnet_state, path)
    loaded = load_teacher(TeacherConfig(arch="test_resnet", weights=str(path), head="none"))
    body = loaded.backbone.body.state_dict()
    places = mapped(str(path))
    outside = [key for key, v in body.items() if not any(v.data_ptr() in each for each in places)]
    assert outside == []
    assert all(torch.equal(value, resnet_state[key]) for key, value in body.items())
    for value in body.values():
        value.zero_()  # the copy of this process alone
    again = read_weights(str(path)).tensors
    assert all(torch.equal(value, resnet_state[key]) for key, value in again.items())


def test_half_precision_weights_become_those_of_the_network(
    resnet_state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = str(tmp_path / "half.pth")
    half = {k: v.half() if v.is_floating_point() else v for k, v in resnet_state.items()}
    torch.save(half, path)
    loaded = load_teacher(TeacherConfig(arch="test_resnet", weights=path, head="none"))
    for key, value in loaded.backbone.body.state_dict().items():
        assert value.dtype == resnet_state[key].dtype
        assert torch.equal(value, half[key].to(value.dtype))


def test_a_compressed_zip_is_read_as_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with (
        zipfile.ZipFile(io.BytesIO(saved(WEIGHTS))) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert torch.equal(read_weights(str(path)).tensors["conv.weight"], WEIGHTS["conv.weight"])


def test_the_hash_is_of_the_files_bytes(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(saved(WEIGHTS))
    assert read_weights(str(path)).sha256 == hashlib.sha256(saved(WEIGHTS)).hexdigest()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere\.pth cannot be read"):
        read_weights(str(tmp_path / "nowhere.pth"))


# identity


def test_the_hash_sees_every_weight_statistic_and_count() -> None:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    hashes = {tensors_sha256(module)}
    for value in module.state_dict().values():
        value.view(-1)[0] += 1
        hashes.add(tensors_sha256(module))
    assert len(hashes) == 1 + len(module.state_dict())


def test_the_hash_sees_the_names() -> None:
    layer = nn.Linear(3, 4)
    one, other = (nn.ModuleDict({name: layer}) for name in ("head", "neck"))
    assert tensors_sha256(one) != tensors_sha256(other)


def test_the_hash_does_not_depend_on_the_layout_in_memory() -> None:
    module = nn.Conv2d(3, 4, 3)
    before = tensors_sha256(module)
    assert tensors_sha256(module.to(memory_format=torch.channels_last)) == before
