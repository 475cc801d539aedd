"""The detector equals torchvision's own; any backbone with the right strides, no other."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import roi_align

from pcd_ray.distill.backbones import build_backbone
from pcd_ray.errors import ConfigError
from pcd_ray.evaluate.detect.detection import BoxHead, DetectionBatch, Detector, detect, taps_of
from pcd_ray.evaluate.finetune.finetune import synchronised

MEAN, STD = (0.48, 0.45, 0.41), (0.23, 0.22, 0.21)
SIZES = ((64, 96), (96, 70))
CLASSES = 3
ROIS = 24


def ours(*, masks: bool = True, box_head: BoxHead = "4conv1fc") -> Detector:
    torch.manual_seed(3)
    backbone = build_backbone("resnet18", mean=MEAN, std=STD)
    detector = Detector(
        backbone, num_classes=CLASSES, masks=masks, box_head=box_head, rois_per_image=ROIS
    )
    return light(detector)


def light(network: Any) -> Any:
    """Fewer regions, for speed; untrained scores are low, and stay."""
    network.rpn._post_nms_top_n = {"training": 100, "testing": 40}
    network.roi_heads.score_thresh = 0.0
    network.roi_heads.detections_per_img = 20
    return network


def torchvisions(detector: Detector, *, masks: bool, box_head: BoxHead) -> nn.Module:
    """torchvision's own network, assembled by itself, with the same weights."""
    levels = {f"layer{stage}": str(stage - 1) for stage in (1, 2, 3, 4)}
    norm = nn.BatchNorm2d
    body = BackboneWithFPN(resnet18(), levels, [64, 128, 256, 512], 256, norm_layer=norm)
    more: dict[str, Any] = {}
    if box_head == "4conv1fc":
        more["box_head"] = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=norm)
    if masks:
        more["mask_head"] = MaskRCNNHeads(256, [256] * 4, 1, norm_layer=norm)
    whole = (MaskRCNN if masks else FasterRCNN)(
        body,
        CLASSES + 1,
        image_mean=MEAN,
        image_std=STD,
        size_divisible=64,
        _skip_resize=True,
        min_size=100,
        max_size=100_000,
        box_batch_size_per_image=ROIS,
        **more,
    )
    weights = {
        (f"backbone.{name}" if name.startswith(("body.", "fpn.")) else name): value
        for name, value in detector.state_dict().items()
    }
    whole.load_state_dict(weights)
    return light(whole)


def pictures(sizes: tuple[tuple[int, int], ...] = SIZES) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(256, (*size, 3), dtype=torch.uint8, generator=random) for size in sizes]


def targets(*, masks: bool = True) -> list[dict[str, Tensor]]:
    boxes = (torch.tensor([[10.0, 12, 50, 60], [52, 5, 90, 40]]), torch.tensor([[4.0, 8, 60, 80]]))
    made = []
    for box, (height, width) in zip(boxes, SIZES, strict=True):
        labels = torch.arange(len(box)) % CLASSES + 1
        bitmaps = torch.zeros(len(box), height, width, dtype=torch.uint8)
        for bitmap, (left, top, right, bottom) in zip(bitmaps, box.int().tolist(), strict=True):
            bitmap[top + 5 : bottom, left : right - 9] = 1
        made.append({"boxes": box, "labels": labels} | ({"masks": bitmaps} if masks else {}))
    return made


@pytest.mark.parametrize(
    ("masks", "box_head"), [(True, "4conv1fc"), (True, "2fc"), (False, "4conv1fc")]
)
def test_losses_and_boxes_are_those_of_torchvisions_own_network(
    masks: bool, box_head: BoxHead
) -> None:
    # in float64 rounding orders no two proposals of an untrained network differently
    detector = ours(masks=masks, box_head=box_head).double()
    other = torchvisions(detector, masks=masks, box_head=box_head).double()
    planes = [image.permute(2, 0, 1).double() / 255 for image in pictures()]

    truth = [each | {"boxes": each["boxes"].double()} for each in targets(masks=masks)]
    torch.manual_seed(7)  # both draw anchors and regions at random
    losses = detector.train()(DetectionBatch(images=pictures(), targets=truth))
    torch.manual_seed(7)
    wanted = other.train()(planes, truth)
    assert losses.keys() == wanted.keys()
    assert ("loss_mask" in losses) == masks
    for name, value in wanted.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=1e-9, msg=name)

    # these forward passes moved the running statistics of both alike
    found = detector.eval()(DetectionBatch(images=pictures()[:1], targets=None))[0]
    other.transform.min_size = (SIZES[0][0],)
    expected = other.eval()(planes[:1])[0]
    assert len(expected["boxes"]) == 20
    torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-6, atol=1e-9)
    assert found["labels"].equal(expected["labels"])


@pytest.mark.parametrize("height", [33, 64, 80, 90, 130])
def test_regions_are_read_where_they_are_whatever_the_padding(height: int) -> None:
    detector = ours().eval()
    with torch.no_grad():
        detect(detector, pictures(((height, 70),)), [(height, 70)])
    box = torch.tensor([[4.0, 6.0, 40.0, 30.0]])  # so small that it is read at stride 4
    maps = {str(level): torch.randn(1, 256, 32 >> level, 32 >> level) for level in range(4)}
    expected = roi_align(maps["0"], [box], 7, spatial_scale=0.25, sampling_ratio=2)
    for pooler, side in (
        (detector.roi_heads.box_roi_pool, 7),
        (detector.roi_heads.mask_roi_pool, 14),
    ):
        found = pooler(maps, [box], [(height, 70)])
        if side == 7:
            assert torch.equal(found, expected)
        assert pooler.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_detections_are_given_in_the_stored_size() -> None:
    detector = ours().eval()
    image = pictures()[0]
    same = detect(detector, [image], [SIZES[0]])[0]
    larger = detect(detector, [image], [(128, 288)])[0]
    torch.testing.assert_close(larger.boxes, same.boxes * torch.tensor([3.0, 2, 3, 2]))
    assert larger.masks is not None
    assert larger.masks.shape[1:] == (128, 288)
    assert int(larger.labels.min()) >= 0
    assert int(larger.labels.max()) < CLASSES


def test_images_without_objects_give_finite_losses_and_a_gradient_to_every_weight() -> None:
    detector = ours().train()
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, *SIZES[0], dtype=torch.uint8),
    }
    losses = detector(DetectionBatch(images=pictures()[:1], targets=[nothing]))
    sum(losses.values()).backward()
    assert all(bool(value.isfinite()) for value in losses.values())
    assert float(losses["loss_mask"].detach()) == 0
    assert [n for n, w in detector.named_parameters() if w.requires_grad and w.grad is None] == []
    assert all(bool(value.isfinite().all()) for value in detector.state_dict().values())


def test_nothing_is_frozen_but_what_no_map_depends_on() -> None:
    detector = ours()
    assert all(weight.requires_grad for weight in detector.parameters())
    mobile = Detector(
        build_backbone("mobilenetv3_small_050"), num_classes=1, masks=False, rois_per_image=8
    )
    frozen = {n.rpartition(".")[0] for n, w in mobile.named_parameters() if not w.requires_grad}
    assert frozen == {"body.conv_head"}


@pytest.mark.parametrize(
    "name",
    ["resnet10t", "convnext_atto", "mobilenetv3_small_050", "efficientnet_b0", "regnetx_002"],
)
def test_backbones_with_stages_give_maps_of_the_four_strides(name: str) -> None:
    backbone = build_backbone(name)
    taps, channels = taps_of(backbone)
    assert len(taps) == len(set(taps)) == 4
    assert backbone.body.training is False
    listed = [stage["num_chs"] for stage in backbone.body.feature_info]
    assert channels == [listed[tap] for tap in taps]


def test_backbones_of_other_strides_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"vit_tiny_patch16_224 has maps of stride 16; a detector"
    ):
        taps_of(build_backbone("vit_tiny_patch16_224"))
    dilated = build_backbone("resnet10t", output_stride=8)
    with pytest.raises(ConfigError, match=r"resnet10t has maps of stride 2, 4, 8; a detector"):
        taps_of(dilated)


def test_weights_of_the_body_have_timms_names() -> None:
    backbone = build_backbone("resnet10t")
    weights = backbone.body.state_dict()
    detector = Detector(backbone, num_classes=1, masks=False)
    held = {n.removeprefix("body.") for n in detector.state_dict() if n.startswith("body.")}
    assert held == weights.keys()


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "mobilenetv3_small_100"])
def test_no_batchnorm_stays_local_when_statistics_are_synchronised(name: str) -> None:
    """In the backbone, timm's own kinds included, in pyramid, box head and mask head."""
    torch.manual_seed(0)
    detector = Detector(build_backbone(name), num_classes=CLASSES, masks=True)
    local = norms_of(detector)
    assert not any(isinstance(norm, nn.SyncBatchNorm) for norm in local.values())
    parts = {".".join(path.split(".")[:2]) for path in local}
    assert parts >= {"fpn.inner_blocks", "roi_heads.box_head", "roi_heads.mask_head"}
    assert any(path.startswith("body.") for path in local)
    found = norms_of(synchronised(detector))
    assert found.keys() == local.keys()
    assert [path for path, norm in found.items() if not isinstance(norm, nn.SyncBatchNorm)] == []


def norms_of(network: nn.Module) -> dict[str, nn.Module]:
    kind = nn.modules.batchnorm._BatchNorm
    return {path: each for path, each in network.named_modules() if isinstance(each, kind)}
