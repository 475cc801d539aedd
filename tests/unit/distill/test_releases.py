"""Each published layout, from files with its real names: recognised, whole, the same network."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from published import ROWS, Published, Row, save, settled, small, under
from tiny import images
from torch import Tensor, nn

from pcd_ray.config import TeacherConfig
from pcd_ray.distill.backbones import build_backbone
from pcd_ray.distill.build_teacher import LoadedTeacher, load_teacher
from pcd_ray.distill.heads import MlpShape, linear_widths
from pcd_ray.distill.networks import Network, network_of
from pcd_ray.distill.spatial_adaptor import SpatialAdaptor, check_law
from pcd_ray.distill.teacher_parts import IMAGENET_MEAN, IMAGENET_STD, TeacherParts, take_apart
from pcd_ray.distill.weights import WeightsFile, load_backbone, read_weights, tensors_sha256
from pcd_ray.errors import ConfigError, WeightsError

_CONTAINERS = ("state_dict", "teacher", "model")
_BIG = ("Barlow Twins R50", "VICReg R50")  # 600 MB of head


def weights_of(published: Published) -> dict[str, Tensor]:
    """Return the tensors that hold the weights, out of the container."""
    content = published.content
    entry = next((name for name in _CONTAINERS if name in content), None)
    return dict(content[entry] if entry else content)


def in_memory(tensors: dict[str, Tensor]) -> WeightsFile:
    return WeightsFile("memory.pth", tensors, {}, "")


def load(uri: str, **options: Any) -> LoadedTeacher:
    return load_teacher(TeacherConfig(weights=uri, **options))


def normalised(batch: Tensor) -> Tensor:
    """Return (B, 3, S, S) images as every release wants them."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (batch.permute(0, 3, 1, 2) / 255 - mean) / std


def check_features(loaded: LoadedTeacher, source: nn.Module, size_px: int) -> None:
    batch = images(4, 1, size_px)
    with torch.no_grad():
        expected = source.forward_features(normalised(batch))
        if expected.ndim == 3:  # tokens, the class token first
            grid, token = size_px // 16, expected[:, 0, :, None, None]
            expected = expected[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
            if loaded.backbone.recentred:  # its head was trained on the class token
                expected = expected - expected.mean((2, 3), keepdim=True) + token
        got = loaded.backbone(batch)
    scale = float(expected.abs().max())
    # float32 through up to fifty layers
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * scale)


def check_head(head: nn.Sequential | None, source: nn.Sequential, channels: int) -> None:
    assert head is not None
    assert [type(layer) for layer in head] == [type(layer) for layer in source]
    pooled = torch.randn(4, channels, dtype=torch.float64)
    with torch.no_grad():
        expected = source.double()(pooled)
        got = head.double()(pooled)
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * scale)
    maps = torch.randn(2, channels, 3, 3)
    assert check_law(SpatialAdaptor(head, rule="gate"), maps) < 1e-12


# every release


@pytest.fixture(scope="module", params=ROWS)
def release(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Row, Published, Path]]:
    """A row at a small size, and its file as published."""
    row = small(ROWS[request.param])
    published = row.published()
    path = tmp_path_factory.mktemp("release") / "published.pth.tar"
    save(published.content, path)
    yield row, published, path
    path.unlink()  # a hundred small files are a large one


def test_a_file_as_published_is_read_whole_and_gives_its_features(
    release: tuple[Row, Published, Path],
) -> None:
    row, published, path = release
    loaded = load(str(path), head="published")
    assert loaded.identity.licence == row.licence
    assert (loaded.identity.arch, loaded.identity.head) == (row.arch, "published")
    vit = row.arch.startswith("vit")
    check_features(loaded, published.body, 224 if vit else 64)
    check_head(loaded.head, published.head, int(published.body.num_features))
    norm = vit and "MoCo v3" in row.method
    assert loaded.predictor == (MlpShape(row.predictor, final_norm=norm) if row.predictor else None)


def test_every_key_is_used_or_named_with_its_reason(release: tuple[Row, Published, Path]) -> None:
    row, published, path = release
    file = read_weights(str(path))
    parts = take_apart(file)
    assert parts.layout == row.method
    assert parts.head is not None
    used = len(parts.backbone) + len(parts.head.state_dict())
    unused = [k for k in file.tensors if any(k.startswith(group) for group in parts.unused)]
    assert used + len(unused) == len(file.tensors)
    assert set(file.beside) <= set(parts.unused)
    entries = set(published.content) - set(_CONTAINERS)
    assert set(file.beside) == (entries if len(entries) < len(published.content) else set())
    assert all(parts.unused.values())


def test_a_stray_key_is_never_passed_over(release: tuple[Row, Published, Path]) -> None:
    _, published, _ = release
    tensors = weights_of(published)
    prefix = "module." if all(key.startswith("module.") for key in tensors) else ""
    tensors[f"{prefix}stray.weight"] = torch.ones(3)
    with pytest.raises(WeightsError, match=r"stray\.weight"):
        read_in_memory(tensors)


def read_in_memory(tensors: dict[str, Tensor]) -> None:
    """Take weights apart and load them into what they say, or a ResNet-18, as `build` does."""
    parts = take_apart(in_memory(tensors))
    known = isinstance(parts.network, Network)
    backbone = build_backbone(parts.network.timm_name if known else "resnet18")
    load_backbone(backbone, parts.backbone, uri="memory.pth")


@pytest.mark.parametrize("name", [name for name in ROWS if name not in _BIG])
def test_the_real_sizes_are_told_from_the_shapes(name: str) -> None:
    row = ROWS[name]
    parts = take_apart(in_memory(_at_real_size(row)))
    assert isinstance(parts.network, Network)
    assert parts.network.timm_name == row.arch
    assert parts.network.kwargs.get("num_heads") == dict(row.kwargs).get("num_heads")
    assert parts.head is not None
    channels = {"resnet50": 2048, "vit_small_patch16_224": 384, "vit_base_patch16_224": 768}
    assert linear_widths(parts.head)[0] == (channels[row.arch], row.widths[0])
    assert tuple(out for _, out in linear_widths(parts.head)) == row.widths
    if row.predictor:
        assert parts.predictor is not None
        assert parts.predictor.widths == row.predictor


def _at_real_size(row: Row) -> dict[str, Tensor]:
    """Return a row's weights of which each is one number, repeated without taking room."""
    with torch.device("meta"):
        state = weights_of(row.published())
    return {k: torch.ones((), dtype=v.dtype).expand(v.shape) for k, v in state.items()}


def test_mocov3s_small_vision_transformer_has_twelve_attention_heads(tmp_path: Path) -> None:
    row = small(ROWS["MoCo v3 ViT-S"])
    kwargs = (("num_heads", 12), ("depth", 12))
    published = Row(
        "vit_small_patch16_224", row.widths, row.lay_out, "", "", kwargs, (8,)
    ).published()
    loaded = load(save(published.content, tmp_path / "vit-s-300ep.pth.tar"))
    assert loaded.backbone.body.blocks[0].attn.num_heads == 12
    check_features(loaded, published.body, 224)


# other forms of the same


def test_a_file_of_before_zip_archives_is_the_same_teacher(tmp_path: Path) -> None:
    published = small(ROWS["DINO R50"]).published()  # it holds an argparse.Namespace
    hashes = set()
    for zipped in (True, False):
        path = save(published.content, tmp_path / "full_checkpoint.pth", zipped=zipped)
        loaded = load(path)
        hashes.add(tensors_hash(loaded))
        assert read_weights(path).sha256 == read_weights(path).sha256
    assert len(hashes) == 1


def tensors_hash(loaded: LoadedTeacher) -> str:
    assert loaded.head is not None
    return tensors_sha256(nn.ModuleList([loaded.backbone, loaded.head]))


def test_a_pad_layer_before_a_convolution_of_less_padding_is_ordinary_padding() -> None:
    # so SwAV and VICReg build their ResNet
    body = timm.create_model("resnet18")
    batch = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = body.conv1(batch)
        theirs = nn.functional.conv2d(
            nn.functional.pad(batch, (1, 1, 1, 1)), body.conv1.weight, stride=2, padding=2
        )
    torch.testing.assert_close(theirs, expected)


def test_byols_predictor_is_the_second_half_of_the_online_head() -> None:
    # revisitAIRL puts both into one sequence, with no activation between
    parts = take_apart(in_memory(weights_of(small(ROWS["BYOL R50"]).published())))
    assert parts.head is not None
    assert len(parts.head) == 4
    assert parts.predictor == MlpShape((128, 8))


def test_dinos_smaller_patches_and_dinov2s_registers_are_told() -> None:
    sizes = {
        "vit_small_patch8_224": ({}, 224),
        "vit_base_patch16_224": ({"img_size": 384}, 384),
        "vit_small_patch14_dinov2": ({}, 518),
        "vit_small_patch14_reg4_dinov2": ({}, 518),
    }
    for name, (kwargs, size_px) in sizes.items():
        with torch.device("meta"):
            body = timm.create_model(name, num_classes=0, global_pool="", **kwargs)
        state = {k: torch.ones(()).expand(v.shape) for k, v in body.state_dict().items()}
        expected = Network(name, {"img_size": size_px, "dynamic_img_size": True})
        assert network_of(state) == expected


@pytest.mark.parametrize("size", ["small", "small_plus", "base", "large", "huge_plus", "7b"])
def test_dinov3_is_told_with_and_without_biases_of_its_attention(size: str) -> None:
    name = f"vit_{size}_patch16_dinov3"
    for full in (name, f"{name}_qkvb"):
        if full in timm.list_models():
            with torch.device("meta"):
                state = timm.create_model(full, num_classes=0).state_dict()
            assert network_of(state) == Network(full)
    del state["blocks.1.norm1.weight"]
    fewer = {k: v for k, v in state.items() if not k.startswith("blocks.1.")}
    assert "that is no DINOv3" in str(network_of(fewer))


def test_a_local_dinov3_file_is_a_teacher_without_a_word(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = timm.create_model("vit_small_patch16_dinov3", num_classes=0).eval()
    loaded = load(save(body.state_dict(), tmp_path / "dinov3.pth"))
    assert (loaded.identity.arch, loaded.identity.head) == ("vit_small_patch16_dinov3", "pca")
    batch = images(2, 1, 64)
    with torch.no_grad():
        tokens = body.forward_features(normalised(batch))[:, 5:]  # behind class and registers
        expected = tokens.transpose(1, 2).unflatten(2, (4, 4))
        got = loaded.backbone(batch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_solo_learn_in_parallel_is_not_taken_for_barlow_twins() -> None:
    published = small(ROWS["solo-learn BYOL R50"]).published()
    parts = take_apart(in_memory(under("module.", weights_of(published))))
    assert parts.layout == "solo-learn"
    check_head(parts.head, published.head, int(published.body.num_features))


def test_curves_beside_mmpretrains_weights_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = small(ROWS["mmpretrain BYOL R50"]).published()
    module = types.ModuleType("mmengine.logging.history_buffer")
    name = "HistoryBuffer"  # it stores numbers and, by name, its own methods
    curve = type(name, (), {"mean": lambda _: 0.0, "__module__": module.__name__})
    curve.mean.__qualname__ = f"{name}.mean"
    curve.mean.__module__ = module.__name__
    module.HistoryBuffer = curve
    made = curve()
    made.__dict__ = {"_log_history": np.arange(3.0), "statistics_methods": {"mean": curve.mean}}
    content = {**published.content, "message_hub": {"log_scalars": {"train/loss": made}}}
    with monkeypatch.context() as patched:  # to save, not to load
        for parent in ("mmengine", "mmengine.logging"):
            patched.setitem(sys.modules, parent, types.ModuleType(parent))
        patched.setitem(sys.modules, module.__name__, module)
        path = save(content, tmp_path / "epoch_200.pth")
    loaded = load(path)
    check_head(loaded.head, published.head, int(published.body.num_features))
    assert "message_hub" in read_weights(path).beside


def test_every_common_resnet_is_told() -> None:
    for depth in (18, 34, 50, 101, 152):
        with torch.device("meta"):
            body = timm.create_model(f"resnet{depth}")
        assert network_of(body.state_dict()) == Network(f"resnet{depth}")


# the network, and what teacher.arch says of it


@pytest.fixture(scope="module")
def mocov2_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("mocov2") / "moco_v2_800ep_pretrain.pth.tar"
    return save(small(ROWS["MoCo v2 R50"]).published().content, path)


def test_teacher_arch_may_agree_with_the_file_and_no_more(mocov2_file: str) -> None:
    for arch in ("", "resnet18", "resnet18.a1_in1k"):
        assert load(mocov2_file, arch=arch).identity.arch == "resnet18"
    with pytest.raises(
        WeightsError,
        match=r"holds a resnet18 \(MoCo v2\), but teacher.arch=resnet50; set "
        r"teacher.arch=resnet18, or leave it empty",
    ):
        load(mocov2_file, arch="resnet50")
    with pytest.raises(ConfigError, match="'mocov2_resnet' is no timm model"):
        load(mocov2_file, arch="mocov2_resnet")


def test_neither_network_nor_file_is_an_error_with_both_ways_out() -> None:
    with pytest.raises(ConfigError, match=r"both empty; give a weights file, or the timm name"):
        load_teacher(TeacherConfig())


def _stem(changed: Tensor, key: str = "conv1.weight") -> dict[str, Tensor]:
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    return {**state, key: changed}


def _without(prefix: str) -> dict[str, Tensor]:
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    return {key: value for key, value in state.items() if not key.startswith(prefix)}


def _vit(**kwargs: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        body = timm.create_model("vit_small_patch16_224", num_classes=0, **kwargs)
    return {k: torch.zeros(()).expand(v.shape) for k, v in body.state_dict().items()}


UNKNOWN = {
    "wide": (_stem(torch.ones(128, 3, 7, 7)), "a wide or grouped ResNet .first .* of 128 channels"),
    "no convolution": (_stem(torch.ones(64)), "of no ResNet or vision transformer"),
    "no class token": ({k: v for k, v in _vit().items() if k != "cls_token"}, "no class token"),
    "small images": (_stem(torch.ones(64, 3, 3, 3)), "whose first convolution is 3 x 3"),
    "truncated": (_without("layer4.1."), r"a ResNet of \(2, 2, 2, 1\) basic blocks, which is none"),
    "a layer more": (
        _stem(torch.ones(1), "layer1.0.se.weight"),
        r"of its own \(layer1.0.se.weight",
    ),
    "no positions": (
        {k: v for k, v in _vit().items() if k != "pos_embed"},
        r"its names \(blocks, cls_token",
    ),
    "another depth": (_vit(depth=3), "of width 384 and depth 3, which has no common name"),
    "another patch": (_vit(patch_size=28), "of 28 px patches"),
    "another family": (
        timm.create_model("mobilenetv3_small_050", num_classes=0).state_dict(),
        r"its names \(blocks, bn1, conv_head, conv_stem\) are of no ResNet or vision transf",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_network_that_is_not_told_needs_teacher_arch(name: str, tmp_path: Path) -> None:
    state, message = UNKNOWN[name]
    with pytest.raises(
        WeightsError,
        match=rf"does not say its network: .*{message}.*; set teacher.arch to the timm",
    ):
        load(save({"state_dict": state}, tmp_path / "weights.pth"))


@pytest.mark.parametrize("arch", ["", "vit_small_patch16_224"])
def test_attention_heads_that_no_shape_tells_must_be_given(arch: str, tmp_path: Path) -> None:
    path = save({"state_dict": _vit()}, tmp_path / "weights.pth")
    with pytest.raises(
        WeightsError, match=r"whether it has 3 .* 6 .*; set teacher.arch=vit_small_.*12"
    ):
        load(path, arch=arch)
    for heads in (6, 12):
        loaded = load(path, arch="vit_small_patch16_224", kwargs={"num_heads": heads})
        assert loaded.backbone.body.blocks[0].attn.num_heads == heads


def test_heads_of_a_tiny_one_with_fixed_positions_must_be_given(tmp_path: Path) -> None:
    tiny = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    tiny["pos_embed"][:, 0] = 0  # as MAE-Lite's, which has 12
    path = save({"model": tiny}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="whether it has 3 "):
        load(path)
    loaded = load(path, arch="vit_tiny_patch16_224", kwargs={"num_heads": 12})
    assert loaded.backbone.body.blocks[0].attn.num_heads == 12


def test_keys_with_and_without_the_parallel_prefix_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    mixed = {f"module.{k}": v for k, v in state.items()} | {
        "conv1.weight": torch.zeros(64, 3, 7, 7)
    }
    with pytest.raises(WeightsError, match=r"1 keys with and without module\.: conv1\.weight"):
        load(save({"state_dict": mixed}, tmp_path / "weights.pth"))


def test_files_of_before_batches_were_counted_load(tmp_path: Path) -> None:
    state = settled(timm.create_model("resnet18", num_classes=0)).state_dict()
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    body = load(save(old, tmp_path / "weights.pth")).backbone.body.state_dict()
    assert all(torch.equal(body[key], value) for key, value in old.items())


def test_classifiers_and_masked_training_are_named_as_left_out(tmp_path: Path) -> None:
    state = timm.create_model("resnet18").state_dict()
    assert parts_of(state, tmp_path).unused == {"fc.": "a classifier, which no teacher needs"}
    masked = _vit(depth=12) | {
        "pos_embed": torch.ones(1, 197, 384),
        "mask_token": torch.zeros(1, 1, 384),
        "decoder_pred.weight": torch.zeros(768, 512),
    }
    parts = parts_of(masked, tmp_path)
    assert set(parts.unused) == {"mask_token", "decoder_"}
    assert str(parts.network).startswith("vit_small_patch16_224")


def parts_of(state: dict[str, Tensor], folder: Path) -> TeacherParts:
    return take_apart(read_weights(save({"model": state}, folder / "weights.pth")))


def test_a_headless_file_under_auto_says_which_file_has_the_head(tmp_path: Path) -> None:
    state = settled(timm.create_model("resnet50", num_classes=0)).state_dict()
    path = save(state, tmp_path / "resnet50.pth")
    assert "Barlow Twins: checkpoint.pth" in load(path).headless
    assert load(path, head="pca").headless == "", "it was asked for"


def test_a_tag_says_whose_weights_a_local_file_holds(tmp_path: Path) -> None:
    state = settled(timm.create_model("resnet18")).state_dict()
    path = save(state, tmp_path / "weights.pth")
    assert load(path, arch="resnet18.tv_in1k").identity.licence == "bsd-3-clause"
    assert load(path, arch="resnet18").identity.licence == "unknown"


@pytest.mark.parametrize("place", ["conv1.weight", "bn1.running_var"])
def test_weights_that_are_not_finite_are_refused(place: str, tmp_path: Path) -> None:
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    state[place] = torch.full_like(state[place], torch.nan)
    with pytest.raises(WeightsError, match=rf"weights.pth holds infinite or NaN .* in {place}"):
        load(save(state, tmp_path / "weights.pth"))


def test_teacher_arch_names_what_the_file_leaves_open(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name in ("mobilenetv3_small_050", "test_resnet"):
        state = settled(timm.create_model(name)).state_dict()
        loaded = load(save(state, tmp_path / "weights.pth"), arch=name)
        assert (loaded.identity.arch, loaded.identity.head) == (name, "pca")


def test_an_exported_student_says_its_own_network() -> None:
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    about = {
        "made_by": "pcd_ray 1",
        "timm_name": "test_resnet",
        "timm_kwargs": '{"output_stride": 16, "global_pool": ""}',
        "mean": "[0.1, 0.2, 0.3]",
        "std": "[0.4, 0.5, 0.6]",
        "teacher_licence": "MIT",
    }
    parts = take_apart(WeightsFile("student.safetensors", state, about, ""))
    assert parts.network == Network("test_resnet", {"output_stride": 16})
    assert (parts.mean, parts.std, parts.licence) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "MIT")
    for name in ("timm_kwargs", "mean"):
        for changed in ({**about, name: "no json"}, {k: v for k, v in about.items() if k != name}):
            with pytest.raises(WeightsError, match=r"is not whole .*; export it again"):
                take_apart(WeightsFile("student.safetensors", state, changed, ""))


# bare backbones and files without a head


BARE = {
    "backbone alone": (
        "resnet18",
        {"num_classes": 0},
        "",
        r"the backbone alone, as Barlow Twins, VICReg and DINO publish it .*checkpoint.pth, "
        r"VICReg: resnet50_fullckpt.pth, DINO: dino_resnet50_pretrain_full_checkpoint.pth",
    ),
    "linear evaluation": ("resnet18", {}, "module.", r"ends in a classifier, .*not the linear-"),
    "supervised": ("resnet18", {}, "", r"ends in a classifier, as supervised networks"),
    "vision transformer": (
        "vit_tiny_patch16_224",
        {"num_classes": 0},
        "",
        r"of DINO give the \*_full_checkpoint.pth; DINOv2, DINOv3, MAE and CLIP have no",
    ),
    "mmpretrain's classifier": ("resnet18", {"num_classes": 0}, "backbone.", "teacher.head=pca"),
}


@pytest.mark.parametrize("name", BARE)
def test_a_file_without_a_head_says_which_file_has_it(name: str, tmp_path: Path) -> None:
    arch, kwargs, prefix, message = BARE[name]
    torch.manual_seed(0)
    body = timm.create_model(arch, **kwargs)
    state = under(prefix, body)
    if prefix == "backbone.":
        state["head.fc.weight"] = torch.ones(10, 512)
    uri = save({"state_dict": state}, tmp_path / "resnet50.pth")
    with pytest.raises(WeightsError, match=rf"resnet50.pth holds no head: .*{message}"):
        load(uri, head="published")
    loaded = load(uri)  # auto: principal components instead
    assert (loaded.identity.head, loaded.identity.arch) == ("pca", arch)
    own = loaded.backbone.body.state_dict()
    assert all(torch.equal(value, state[f"{prefix}{key}"]) for key, value in own.items())


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("MoCo v2 R50", "module.encoder_q.fc.", r"no head .*give .*moco_v2_800ep_pretrain.pth.tar"),
        ("MoCo v3 R50", "module.momentum_encoder.fc.", r"no head .*give .*r-50-1000ep.pth.tar"),
        ("BYOL R50", "module.target_encoder.fc.", "no head .*give the checkpoint of the pre-train"),
    ],
)
def test_a_release_that_lacks_its_head_names_the_right_file(
    name: str, head: str, message: str
) -> None:
    tensors = weights_of(small(ROWS[name]).published())
    bare = {key: value for key, value in tensors.items() if not key.startswith(head)}
    with pytest.raises(WeightsError, match=message):
        take_apart(in_memory(bare))


def test_a_decoder_of_masked_images_is_no_head() -> None:
    body = timm.create_model("resnet18", num_classes=0)
    tensors = {**under("backbone.", body), "neck.decoder_embed.weight": torch.ones(3, 3)}
    parts = take_apart(in_memory(tensors))
    assert (parts.head, set(parts.unused)) == (None, {"neck."})


def test_input_statistics_follow_the_release_the_file_and_the_options(
    mocov2_file: str, tmp_path: Path
) -> None:
    def mean(uri: str, **options: Any) -> list[float]:
        return [round(v / 255, 3) for v in load(uri, **options).backbone.mean.flatten().tolist()]

    imagenet, half = list(IMAGENET_MEAN), [0.5, 0.5, 0.5]
    assert mean(mocov2_file) == imagenet
    assert mean(mocov2_file, mean=(0.1, 0.2, 0.3)) == [0.1, 0.2, 0.3]
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"  # timm's own take 0.5
    state = timm.create_model(name).state_dict()
    supervised = save(state, tmp_path / "supervised.pth")
    assert mean(supervised, arch=name) == half
    assert mean(supervised, arch=name.replace("vit", "deit")) == imagenet
    with pytest.raises(WeightsError, match=r"vit_\* \(AugReg's\) .* deit_\* ImageNet's; set tea"):
        load(supervised)
    bare = {key: value for key, value in state.items() if not key.startswith("head.")}
    headless = save(bare, tmp_path / "dino_backbone.pth")
    assert mean(headless) == mean(headless, arch=name) == imagenet
    assert mean(headless, arch=f"{name}.augreg_in21k") == half  # the tag says whose they are
    half_precision = {key: value.half() for key, value in bare.items()}
    safetensors.torch.save_file(half_precision, tmp_path / "half.safetensors")
    assert mean(str(tmp_path / "half.safetensors")) == imagenet
