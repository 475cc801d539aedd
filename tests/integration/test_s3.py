"""A whole run in a bucket: packed, trained, stopped, resumed, exported, while the store fails."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import safetensors.torch
import timm
from s3_server import KEY_ID, SECRET, S3Server, s3_server, writing
from tiny_run import BATCH, NUM_IMAGES, STEPS, changed, run_under, write_images, write_teacher

from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder, checkpoint_name, checkpoint_steps, find_checkpoint
from pcd_ray.config import Config
from pcd_ray.data.plan import EpochPlan, SeenAudit
from pcd_ray.data.ray_pack import pack
from pcd_ray.data.shards import verify_shards
from pcd_ray.export import export
from pcd_ray.metric_names import KNN_TOP1
from pcd_ray.ray_events import Event
from pcd_ray.train.ray_launch import TrainResult, train

pytestmark = pytest.mark.usefixtures("ray_session")

BUCKET, EPOCH_STEPS = "lab", NUM_IMAGES // BATCH
OUTAGE_S = 7.0  # Arrow's own client would give up after 6


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as served:
        served.client().create_bucket(Bucket=BUCKET)
        yield served


def prepared(server: S3Server, local: Path) -> Config:
    """Put images and a teacher into the bucket; return a run on them that keeps the best."""
    write_images(local / "train", NUM_IMAGES, seed=0)
    write_images(local / "test", 12, seed=1)
    write_teacher(local / "teacher.safetensors")
    root = f"s3://{BUCKET}/{server.query}"
    for path in local.rglob("*.*"):
        storage.write_bytes(storage.join(root, *path.relative_to(local).parts), path.read_bytes())
    few = {"num_workers": 1, "keep_last": 1, "keep_best": 1, "max_failures": 0}
    return changed(run_under(root), train=few)


def stop_with_ctrl_c(event: Event) -> None:
    if event.kind == "metrics" and event.step == EPOCH_STEPS + 3:
        os.kill(os.getpid(), signal.SIGINT)


def plant_what_does_not_count(folder: RunFolder) -> dict[str, bytes]:
    """Leave newer checkpoints as interrupted and damaged writes do; return the good state."""
    good = find_checkpoint(folder.uri).uri
    files = [storage.name_of(storage.split_query(file.uri)[0]) for file in storage.list_files(good)]
    mark, state = sorted(files)
    read = {name: storage.read_bytes(storage.join(good, name)) for name in files}
    half = {state: read[state]}
    cut = read | {mark: read[mark][:40]}
    changed_state = read | {state: read[state][:-9] + b"truncated"}
    for step, files in ((19, changed_state), (20, cut), (21, half)):
        for name, data in files.items():
            uri = storage.join(folder.checkpoints, checkpoint_name(step), name)
            storage.write_bytes(uri, data)
    return read


class Outage:
    """Lets the store refuse all writes once training says a step, until a while after the first."""

    def __init__(self, server: S3Server) -> None:
        self.server = server
        self.refused = 0
        self._began = False
        self._over = threading.Timer(OUTAGE_S, self._end)

    def listen(self, event: Event) -> None:
        if event.kind == "metrics" and not self._began:
            self._began = True
            self.server.fail(float("inf"), "busy", self._writing)

    def _writing(self, environ: dict[str, Any]) -> bool:
        if writing(environ) and not self._over.ident:  # under the server's lock
            self._over.start()
        return writing(environ)

    def _end(self) -> None:
        self.refused = self.server.failed
        self.server.to_fail = 0


@pytest.mark.slow
def test_pack_train_stop_resume_export_in_a_bucket_that_fails_now_and_then(
    server: S3Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = prepared(server, tmp_path)
    folder = RunFolder.of(config)

    server.fail(5, "dropped")
    packed = pack(config.data, seed=config.run.seed)
    assert (packed.num_images, packed.num_bad, server.failed) == (NUM_IMAGES, 0, 5)
    assert verify_shards(config.data.shards).num_images == NUM_IMAGES

    with pytest.raises(KeyboardInterrupt):
        train(config, listener=stop_with_ctrl_c)
    kept = checkpoint_steps(folder)
    assert EPOCH_STEPS in kept, "the only one that was scored"
    assert kept[-1] < STEPS
    plant_what_does_not_count(folder)
    assert find_checkpoint(folder.uri).about["step"] == kept[-1]

    capfd.readouterr()
    outage = Outage(server)
    result = train(config, listener=outage.listen)
    assert outage.refused > 0
    said = capfd.readouterr().err
    assert f"resumed at step {kept[-1]} of {STEPS}" in said
    for step in (19, 20):
        assert f"passed over {folder.checkpoints.partition('?')[0]}/step_{step:08d}" in said
    check_the_end(config, result)
    check_exports(folder, result)
    check_no_credentials(server, said)


def check_the_end(config: Config, result: TrainResult) -> None:
    """All planned steps, each image once per epoch, the newest and the best stay."""
    folder = RunFolder.of(config)
    newest = find_checkpoint(folder.uri)
    assert newest.state["step"] == result.metrics["step"] == STEPS
    plan = EpochPlan(verify_shards(config.data.shards).plan_sources, config.run.seed)
    audit = SeenAudit(newest.state["audit"])
    assert [audit.verdict(plan, epoch) for epoch in range(2)] == [None, None]
    scores = {line["step"]: line[KNN_TOP1] for line in result.history if KNN_TOP1 in line}
    assert list(scores) == [EPOCH_STEPS, STEPS]
    best = max(scores, key=lambda step: (scores[step], -step))
    assert set(checkpoint_steps(folder)) == {best, STEPS}
    assert find_checkpoint(storage.join(folder.uri, "best")).about["step"] == best


def check_exports(folder: RunFolder, result: TrainResult) -> None:
    path = export(folder.uri).path
    assert storage.parent(path) == folder.file("exported")
    model = timm.create_model("test_resnet", num_classes=0, output_stride=8)
    tensors = safetensors.torch.load(storage.read_bytes(path))
    model.load_state_dict(tensors, strict=True)
    for name, value in result.student().state_dict().items():
        assert value.equal(tensors[name]), name


def check_no_credentials(server: S3Server, said: str) -> None:
    """Nothing in the bucket or in a log holds the key or the secret; retries are said there."""
    client = server.client()
    stored = {
        item["Key"]: client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        for item in page["Contents"]
    }
    assert any(key.endswith("report.html") for key in stored)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    logged = {str(path): path.read_bytes() for path in logs.rglob("*") if path.is_file()}
    assert any(
        b"cannot be written" in text and b"trying again in" in text for text in logged.values()
    )
    for name, data in (stored | logged | {"stderr": said.encode()}).items():
        assert SECRET.encode() not in data, name
        assert KEY_ID.encode() not in data, name
