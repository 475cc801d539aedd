"""State dicts are found in any container, under any prefix of tools."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from published import ROWS, save, small
from torch import Tensor

from pcd_ray.config import TeacherConfig
from pcd_ray.distill.build_teacher import load_teacher
from pcd_ray.distill.networks import Network
from pcd_ray.distill.teacher_parts import TeacherParts, take_apart
from pcd_ray.distill.weights import WeightsFile, read_weights
from pcd_ray.errors import WeightsError

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def resnet() -> State:
    torch.manual_seed(0)
    return dict(timm.create_model("resnet18", num_classes=0).state_dict())


def parts_of(state: State) -> TeacherParts:
    return take_apart(WeightsFile("memory.pth", state, {}, ""))


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


# prefixes

PREFIXES = [
    "_orig_mod.",
    "module.",
    "model.",
    "student.",
    "net.",
    "backbone.",
    "encoder.",
    "_fsdp_wrapped_module.",
    "anything.",
    "module._orig_mod.model.",
    "_orig_mod.module.",
    "model.module._orig_mod.",
    "model.model.",
    "module.student.backbone._orig_mod.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_tools_are_removed_and_said(prefix: str, resnet: State) -> None:
    parts = parts_of(under(prefix, resnet))
    assert parts.network == Network("resnet18")
    assert parts.backbone.keys() == resnet.keys()
    assert parts.notes == (f"removed {prefix} from its keys",)


@pytest.mark.parametrize("prefix", ["model.", "module._orig_mod.model.", "anything."])
def test_they_are_removed_from_networks_that_teacher_arch_names(
    prefix: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    for arch in ("mobilenetv3_small_050", "densenet121"):  # all of whose keys have a prefix too
        state = dict(timm.create_model(arch, num_classes=0).state_dict())
        path = save(under(prefix, state), tmp_path / "weights.pth")
        loaded = load_teacher(TeacherConfig(arch=arch, weights=path, head="none"))
        body = loaded.backbone.body.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in body.items())
        assert loaded.notes == (f"removed {prefix} from its keys",)


def test_what_a_network_calls_its_only_part_is_no_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    arch, kwargs = "qwen3_vit_88m", {"depth": 1}
    state = dict(timm.create_model(arch, num_classes=0, **kwargs).state_dict())
    assert all(key.startswith("encoder.") for key in state)
    path = save(state, tmp_path / "weights.pth")
    loaded = load_teacher(TeacherConfig(arch=arch, kwargs=kwargs, weights=path, head="none"))
    assert loaded.backbone.body.state_dict().keys() == state.keys()


def test_wrappers_within_a_network_are_removed(resnet: State) -> None:
    wrapped = {
        key.replace("layer1.0.", "layer1.0._fsdp_wrapped_module.").replace(
            "layer2.1.", "layer2._orig_mod.1._checkpoint_wrapped_module."
        ): value
        for key, value in resnet.items()
    }
    assert parts_of(wrapped).backbone.keys() == resnet.keys()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "module._orig_mod.", "student.module."])
@pytest.mark.parametrize("name", [n for n in ROWS if n not in ("Barlow Twins R50", "VICReg R50")])
def test_a_published_layout_under_a_prefix_is_the_same_teacher(name: str, prefix: str) -> None:
    content = small(ROWS[name]).published().content
    entry = next((e for e in ("state_dict", "teacher", "model") if e in content), None)
    state = dict(content[entry] if entry else content)
    plain, wrapped = parts_of(state), parts_of(under(prefix, state))
    assert wrapped.layout == plain.layout
    assert wrapped.network == plain.network
    assert wrapped.backbone.keys() == plain.backbone.keys()
    assert str(wrapped.head) == str(plain.head)
    assert wrapped.predictor == plain.predictor


def test_losses_and_classifiers_beside_a_network_are_left_out_and_named(resnet: State) -> None:
    beside = {"criterion.weight": torch.ones(3), "head.fc.weight": torch.ones(3, 512)}
    parts = parts_of(under("model.", resnet) | beside)
    assert parts.network == Network("resnet18")
    assert set(parts.unused) == {"criterion.", "head."}


def test_keys_that_nothing_explains_are_refused(resnet: State) -> None:
    cases = {
        r"1 keys with and without _orig_mod\.: conv1\.weight": {
            **under("_orig_mod.", resnet),
            "conv1.weight": torch.ones(1),
        },
        r"a network under model\.\* and 1 keys beside it: stray\.weight": {
            **under("model.", resnet),
            "stray.weight": torch.ones(1),
        },
        r"2 networks: student\.\* \(120 tensors\), teacher\.\* \(120 tensors\); save the": {
            **under("student.", resnet),
            **under("teacher.", resnet),
        },
        r"2 networks: model\.\* \(120 tensors\), ema_model\.\*": {
            **under("module.model.", resnet),
            **under("module.ema_model.", resnet),
        },
    }
    for message, state in cases.items():
        with pytest.raises(WeightsError, match=message) as refused:
            parts_of(state)
        assert "teacher.arch" not in str(refused.value)


def test_counters_that_tools_add_are_no_part_of_the_network(resnet: State, tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(timm.create_model("resnet18", num_classes=0))
    assert "n_averaged" in averaged.state_dict()
    counted = {**under("model.", resnet), "total_ops": torch.zeros(1)}
    counted["model.layer1.total_params"] = torch.zeros(1)
    for state in (averaged.state_dict(), counted):
        parts = take_apart(opened(state, tmp_path))
        assert parts.network == Network("resnet18")
        assert parts.backbone.keys() == resnet.keys()


# containers


def opened(content: Any, folder: Path) -> WeightsFile:
    return read_weights(save(content, folder / "weights.pth"))


@pytest.mark.parametrize(
    "entry",
    [
        "state_dict",
        "model_state_dict",
        "net",
        "network",
        "weights",
        "params",
        "params_ema",
        "ema_state_dict",
        "student",
        "teacher",
        "anything",
    ],
)
def test_the_only_state_dict_is_opened_whatever_its_name(
    entry: str, resnet: State, tmp_path: Path
) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "named": {"conv1.weight": torch.ones(3)}}
    content = {"epoch": 1, entry: resnet, "classes": ["cat"], "optimizer": optimizer}
    file = opened(content, tmp_path)
    assert file.tensors.keys() == resnet.keys()
    assert file.entry == entry
    assert set(file.beside) == {"epoch", "classes", "optimizer"}
    assert take_apart(file).notes == (f"opened its entry {entry}",)


def test_nested_and_mixed_containers_are_opened(resnet: State, tmp_path: Path) -> None:
    nested = opened({"checkpoint": {"model": resnet, "step": 3}, "epoch": 1}, tmp_path)
    assert (nested.entry, nested.beside) == ("checkpoint.model", ("epoch", "step"))
    mixed = opened({**resnet, "epoch": 3, "classes": ["cat"]}, tmp_path)
    assert (mixed.entry, mixed.beside) == ("", ("epoch", "classes"))
    pair = opened((resnet, 3), tmp_path)
    assert pair.tensors.keys() == resnet.keys()


def test_arrays_of_numpy_are_said_to_need_conversion(resnet: State, tmp_path: Path) -> None:
    arrays = {key: value.numpy() for key, value in resnet.items()}
    with pytest.raises(WeightsError, match=r"not torch tensors: conv1\.weight.*torch\.from_numpy"):
        opened(arrays, tmp_path)


def test_a_lightning_checkpoint_is_a_teacher(resnet: State, tmp_path: Path) -> None:
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": under("model.", resnet),
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "loops": {"fit_loop": {"epoch_loop.state_dict": {}}},
    }
    path = save(content, tmp_path / "last.ckpt")
    loaded = load_teacher(TeacherConfig(weights=path, head="none"))
    assert loaded.identity.arch == "resnet18"
    assert loaded.notes == ("opened its entry state_dict", "removed model. from its keys")


@pytest.mark.parametrize("names", [("model", "ema"), ("student", "teacher"), ("net", "net_ema")])
def test_several_state_dicts_are_listed_with_the_way_out(
    names: tuple[str, str], resnet: State, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match="2 state dicts") as refused:
        opened(dict.fromkeys(names, resnet), tmp_path)
    for name in names:
        assert f"{name} (120 entries)" in str(refused.value)
    path = str(tmp_path / "weights.pth")
    assert f"torch.load({path!r}, map_location='cpu')['{names[0]}']" in str(refused.value)


def test_of_several_a_published_layout_decides(tmp_path: Path) -> None:
    dino = small(ROWS["DINO R50"]).published().content
    assert {"student", "teacher"} <= dino.keys()
    assert opened(dino, tmp_path).entry == "teacher"
    mmpretrain = small(ROWS["mmpretrain BYOL R50"]).published().content
    both = {**mmpretrain, "ema_state_dict": mmpretrain["state_dict"]}
    assert opened(both, tmp_path).entry == "state_dict"
