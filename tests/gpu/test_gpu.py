"""CUDA: the fused kernel, a mixed-precision compiled step, NCCL, fine-tuning, features.

Skipped without a device.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.distributed as dist
from detection_folder import write_set
from judged import drawn_network
from networks import branch_of, small_backbone, small_head, small_student
from tiny import images, tiny_config, unit_rows
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pcd_ray import metric_names as names
from pcd_ray.config import Config, DataConfig, DetectConfig
from pcd_ray.distill.build import Method, build_method
from pcd_ray.distill.build_head import fit_pca_head
from pcd_ray.distill.build_teacher import load_teacher
from pcd_ray.distill.feature_queue import FeatureQueue, gather_rows
from pcd_ray.distill.loss import choose_implementation, contrastive_loss
from pcd_ray.distill.step import DistillSettings, ViewBatch
from pcd_ray.distill.teacher import FrozenTeacher
from pcd_ray.distill.weights import tensors_sha256
from pcd_ray.evaluate.detect.detect_settings import detection_task, finetune_settings
from pcd_ray.evaluate.detect.detection import detect
from pcd_ray.evaluate.detect.detection_data import open_detection
from pcd_ray.evaluate.features import pooled_features
from pcd_ray.evaluate.finetune.finetune import finetune_steps, new_state, synchronised
from pcd_ray.evaluate.finetune.finetune import unwrapped as finetuned
from pcd_ray.train.loop import LoopSettings, train_step
from pcd_ray.train.metrics import mean_over_ranks
from pcd_ray.train.optim import Schedule, build_optimizer, set_learning_rate
from pcd_ray.train.state import TrainState, unwrapped, wrap_student

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda", 0)
BATCH = 8


def loss_and_gradient(
    implementation: str, rows: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    student, positive, negatives = rows
    student = student.clone().requires_grad_()
    loss = contrastive_loss(
        student, positive, negatives, temperature=0.2, implementation=implementation
    )
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("pixels", [50, 1568], ids="P={}".format)
@pytest.mark.parametrize("width", [32, 128, 256], ids="D={}".format)
def test_the_fused_loss_equals_the_plain_one(width: int, pixels: int) -> None:
    assert choose_implementation("auto", width=width, device=CUDA) == "fused"
    rows = tuple(
        unit_rows(seed, count, width, torch.float32).to(CUDA)
        for seed, count in enumerate((pixels, pixels, 4096))
    )
    exact = tuple(values.double() for values in rows)
    loss, gradient = loss_and_gradient("plain", exact)
    fused_loss, fused_gradient = loss_and_gradient("fused", rows)
    # a kernel that multiplies in TF32 (10 bits of mantissa) is off by up to 1e-3
    torch.testing.assert_close(fused_loss.double(), loss, rtol=1e-3, atol=0)
    assert float((fused_gradient - gradient).abs().max() / gradient.abs().max()) < 5e-3


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "test_resnet.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), path)
    return path


def built(weights: Path, **train: object) -> tuple[Config, Method, TrainState]:
    """Return a tiny run at its first step, on the device."""
    config = tiny_config(
        teacher={"weights": str(weights), "head": "pca", "fit": {"dim": 32}},
        optim={"name": "adamw", "base_lr": 0.01},
        train={"global_batch_size": BATCH, **train},
    )
    loaded = load_teacher(config.teacher)
    head = fit_pca_head(loaded, [images(3, 32, 64)], config.teacher.fit)
    method = build_method(config, [(loaded, head)], device=CUDA)
    if config.train.compile:
        method.branches[0].teacher.compile()
    student = wrap_student(method.student, device=CUDA, compiled=config.train.compile).train()
    optimizer = build_optimizer("adamw", method.student, weight_decay=0.0)
    set_learning_rate(optimizer, 1e-3)
    return config, method, TrainState(student, optimizer, method.branches)


def views() -> ViewBatch:
    pixels = images(4, BATCH, 64).to(CUDA)
    boxes = torch.tensor([0.0, 0.0, 64.0, 64.0, 0.0], device=CUDA).repeat(BATCH, 1)
    return ViewBatch(pixels, pixels, boxes, boxes)


def settings_of(config: Config) -> LoopSettings:
    return LoopSettings(
        schedule=Schedule(1e-3, 0.0, 10, 0.0),
        images_per_epoch=BATCH,
        global_batch_size=BATCH,
        accumulation_steps=1,
        clip_grad_norm=0.0,
        log_every_steps=1,
        seed=config.run.seed,
    )


def losses(weights: Path, steps: int, **train: object) -> tuple[list[float], TrainState, Method]:
    """Take steps on one batch; return the loss before each."""
    config, method, state = built(weights, **train)
    found = [
        train_step(state, views(), settings_of(config), watch=False)[names.LOSS].item()
        for _ in range(steps)
    ]
    return found, state, method


def test_bf16_channels_last_and_compile_train_the_same_student(weights_file: Path) -> None:
    plain, _, _ = losses(weights_file, 6)
    fast, state, method = losses(
        weights_file, 6, precision="bf16", channels_last=True, compile=True
    )
    # bf16 has 8 bits of mantissa; the cosines it blurs by 1% weigh 1 / tau = 5 in the loss
    assert fast[0] == pytest.approx(plain[0], abs=0.1)
    assert fast[-1] < fast[0], "six steps on one batch lower its loss"
    assert tensors_sha256(method.branches[0].teacher) == method.branches[0].identity.sha256
    kept = {value.dtype for value in unwrapped(state.student).parameters()}
    assert kept == {torch.float32}, "autocast computes in bf16, weights stay"
    queue = state.branches[0].queue
    assert queue is not None
    assert queue.num_pushed == 6 * BATCH


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    torch.cuda.set_device(CUDA)
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("nccl")
def test_a_step_under_ddp_on_nccl_is_the_step_without() -> None:
    teacher = FrozenTeacher(
        small_backbone(0, 10, batchnorm=True), small_head(0, 10, 32), rule="gate"
    ).to(CUDA)
    student = small_student(1, width=32).float().to(CUDA)
    wrapped = DistributedDataParallel(
        copy.deepcopy(student),
        device_ids=[CUDA],
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
    distill = DistillSettings(0.2, "fused", "same_view", 0.7)
    for module in (student, wrapped):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        queue = FeatureQueue(21, 32, seed=0, device=CUDA)
        state = TrainState(module, optimizer, [branch_of(teacher, queue, distill)])
        train_step(state, views(), settings_of(Config()), watch=False)
    assert any(p.grad is not None for p in student.parameters())
    for alone, under_ddp in zip(student.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(under_ddp, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("nccl")
def test_nccl_carries_what_ranks_exchange() -> None:
    rows = unit_rows(0, 5, 4, torch.float32).to(CUDA)
    assert torch.equal(gather_rows(rows), rows)
    assert mean_over_ranks({"a": rows[0, 0], "b": rows[1, 1]}) == {
        "a": rows[0, 0].item(),
        "b": rows[1, 1].item(),
    }


DETECT = {
    "steps": 16,
    "global_batch_size": 2,
    "lr_per_16_images": 0.24,
    "min_short_side_px": 64,
    "max_short_side_px": 64,
    "max_long_side_px": 200,
    "rois_per_image": 16,
    "flip_prob": 0.0,
    "log_every_steps": 1,
    "precision": "bf16",
}


@pytest.mark.usefixtures("nccl")
def test_a_detector_is_fine_tuned_in_bf16_with_synchronised_batchnorm(tmp_path: Path) -> None:
    """One rank: statistics are its own, and what is SyncBatchNorm computes as it would of many."""
    data = open_detection(write_set(tmp_path), masks=True)
    options = DetectConfig(data=str(tmp_path), **DETECT)
    task = detection_task(drawn_network(), data, options, limits=DataConfig(), seed=0)
    settings = finetune_settings(options, device="cuda", seed=0)
    assert settings.sync_batchnorm
    state = new_state(task, settings, device=CUDA)
    state.model = synchronised(state.model).to(CUDA)
    assert any(isinstance(each, nn.SyncBatchNorm) for each in state.model.modules())
    losses = [
        sum(done.losses.values())
        for done in finetune_steps(task, settings, state, device=CUDA)
        if done.losses is not None
    ]
    assert len(losses) == 16
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    detector = finetuned(state.model).eval()
    assert {value.dtype for value in detector.parameters()} == {torch.float32}
    image = data.val.images[0]
    (found,) = detect(detector, [task.views.judged(image)], [(image.height, image.width)])
    assert found.boxes.device == torch.device("cpu")
    assert bool(torch.isfinite(found.boxes).all())


def test_features_on_the_device_are_those_of_the_cpu() -> None:
    network = drawn_network()
    pixels = images(5, 6, 64)
    here = pooled_features(network.backbone(), pixels.split(4))
    there = pooled_features(network.backbone().to(CUDA), pixels.split(4))
    assert there.device == torch.device("cpu")
    # convolutions may use TF32 (10 bits of mantissa)
    torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-2 * float(here.abs().max()))
