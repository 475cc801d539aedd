"""Real Ray: whole runs, and runs that are stopped, killed, changed or misled."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from processes import wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import NUM_IMAGES, STEPS, changed, prepare, write_images, write_teacher

from pcd_ray import metric_names as names
from pcd_ray.checkpoint import (
    Checkpoint,
    RunFolder,
    checkpoint_name,
    checkpoint_steps,
    find_checkpoint,
)
from pcd_ray.cli import main
from pcd_ray.config import Config, to_yaml
from pcd_ray.data.plan import EpochPlan, SeenAudit
from pcd_ray.data.shards import open_shards
from pcd_ray.errors import CheckpointError, PcdError, ShardError
from pcd_ray.export import export
from pcd_ray.train.ray_launch import TrainResult, dry_run, train

pytestmark = pytest.mark.usefixtures("ray_session")

EVENT_S = 300.0  # for one event: on a busy machine Ray's processes get little of it


@dataclass(frozen=True, slots=True)
class Reference:
    """The run that nobody disturbed, and what it said."""

    config: Config
    result: TrainResult
    console: str

    @property
    def root(self) -> Path:
        return Path(self.config.run.root).parent


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Config:
    del ray_session
    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(prepared: Config) -> Reference:
    config = changed(prepared, eval={"pictures": True})
    result, console = trained(config)
    return Reference(config, result, console)


def trained(config: Config) -> tuple[TrainResult, str]:
    """Train; return the result and what was said."""
    with contextlib.redirect_stderr(io.StringIO()) as console:
        result = train(config)
    return result, console.getvalue()


def of_name(config: Config, name: str, **sections: dict[str, Any]) -> Config:
    """Return the same run under another name, with other values where given."""
    run = {"name": name} | sections.pop("run", {})
    return changed(config, run=run, **sections)


def newest(config: Config) -> Checkpoint:
    return find_checkpoint(RunFolder.of(config).uri)


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_each_image_once(stored: Checkpoint) -> None:
    plan = EpochPlan(open_shards(stored.config.data.shards).plan_sources, stored.config.run.seed)
    audit = SeenAudit(stored.state["audit"])
    assert plan.images_per_epoch == NUM_IMAGES
    assert [audit.verdict(plan, epoch) for epoch in range(2)] == [None, None]


def test_a_run_leaves_everything_in_its_folder(reference: Reference) -> None:
    folder = Path(reference.result.path)
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "references.json", "report.html"):
        assert (folder / name).stat().st_size > 0, name
    pictures = {path.name for path in (folder / "figures").iterdir()}
    assert {"loss_curve.png", "pca_maps.png", "views.png"} <= pictures
    assert {"similarity.png", "receptive_fields.png", "attention_student.png"} <= pictures
    assert (folder / "config.yaml").read_text() == to_yaml(reference.config)
    assert not (folder / "failure.json").exists()
    assert not list(folder.glob("*_head.safetensors")), "its teacher has a head of its own"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == json.loads(json.dumps(reference.result.summary()))
    assert (summary["step"], summary["plan"]["steps"]) == (STEPS, STEPS)
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_metrics_are_logged_at_their_steps_and_can_be_read(reference: Reference) -> None:
    text = (Path(reference.result.path) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines == reference.result.history
    losses = {line["step"]: line[names.LOSS] for line in lines if names.LOSS in line}
    assert list(losses) == list(range(2, STEPS + 1, 2))
    assert losses[STEPS] < losses[2] - 0.5
    scores = {line["step"]: line[names.KNN_TOP1] for line in lines if names.KNN_TOP1 in line}
    assert list(scores) == [STEPS // 2, STEPS]
    events = EventAccumulator(str(Path(reference.result.path) / "tensorboard")).Reload()
    read = {event.step: event.value for event in events.Scalars(names.LOSS)}
    assert read == pytest.approx(losses)


def test_the_newest_checkpoints_are_kept_and_say_what_they_are(reference: Reference) -> None:
    assert checkpoint_steps(RunFolder.of(reference.config)) == [20, STEPS]
    stored = newest(reference.config)
    assert (stored.about["step"], stored.about["epoch"]) == (STEPS, 2.0)
    assert stored.about["teacher"]["licence"] == "MIT"
    assert stored.about["data_sha256"] == open_shards(reference.config.data.shards).content_hash
    assert stored.config == reference.config
    assert stored.state["queues"][0]["num_pushed"] == 2 * NUM_IMAGES


def test_each_image_is_read_once_per_epoch_and_said_so(reference: Reference) -> None:
    assert_each_image_once(newest(reference.config))
    for epoch in (1, 2):
        assert f"epoch {epoch} read: {NUM_IMAGES} images, each once" in reference.console


def test_teacher_and_untrained_student_are_measured_for_comparison(reference: Reference) -> None:
    found = json.loads((Path(reference.result.path) / "references.json").read_text())
    scores = reference.result.metrics["knn_top1"]
    assert set(scores) == {"untrained", "student", "teacher"}
    for network in ("untrained", "teacher"):
        # two ranks, other sizes of batches: a vote may fall otherwise, one of twelve
        assert found[names.KNN_TOP1][network] == pytest.approx(scores[network], abs=100 / 12 + 0.1)
    last = [line for line in reference.result.history if names.KNN_TOP1 in line][-1]
    assert last[names.KNN_TOP1] == pytest.approx(scores["student"], abs=100 / 12 + 0.1)


def test_a_run_without_a_queue_goes_the_same_way_and_says_nothing_of_one(
    prepared: Config,
) -> None:
    quick = {"epochs": 1, "num_workers": 1, "checkpoint_every_steps": 0, "global_batch_size": 8}
    config = of_name(prepared, "mse", loss={"kind": "mse"}, train=quick, eval={"every_epochs": 0})
    result, console = trained(config)
    assert "queue" not in console
    lines = [line for line in result.history if names.LOSS in line]
    assert not any(names.QUEUE_FILL in line or names.QUEUE_TOP1 in line for line in lines)
    assert lines[-1][names.LOSS] < lines[0][names.LOSS] < 4
    stored = newest(config)
    assert stored.state["queues"] == [None]
    # the last of 6 steps of 8 reads on into a second epoch of the 44 images, which is none
    assert (stored.about["epoch"], lines[-1]["epoch"]) == (1.0, 1.0)
    assert " epoch 1.00 |" in console
    assert (result.metrics["plan"]["chance_loss"], result.metrics["plan"]["notes"]) == (2.0, {})


def test_the_student_is_there_for_timm(reference: Reference) -> None:
    path = export(reference.result.path).path
    model = timm.create_model("test_resnet", num_classes=0, output_stride=8)
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), reference.result.student()(images))


def test_the_same_command_again_takes_no_step_and_says_the_same(reference: Reference) -> None:
    before = content_of(Path(RunFolder.of(reference.config).checkpoints))
    again, console = trained(reference.config)
    assert again.summary() == reference.result.summary()
    assert again.history == reference.result.history
    assert "step " not in console
    assert content_of(Path(RunFolder.of(reference.config).checkpoints)) == before


def test_changes_that_matter_are_refused_by_name_until_they_are_allowed(
    reference: Reference,
) -> None:
    loss = {"temperature": 0.3}
    with pytest.raises(CheckpointError, match=r"at step 22 .*\n  loss.temperature: 0.2 -> 0.3\n"):
        train(changed(reference.config, loss=loss))
    with pytest.raises(CheckpointError, match=r"\n  loss\.kind: 'pixel' -> 'image'\n"):
        dry_run(changed(reference.config, loss={"kind": "image"}))
    with pytest.raises(CheckpointError, match=r"run\.seed: 0 -> 5"):
        dry_run(changed(reference.config, run={"seed": 5}))
    allowed = changed(reference.config, loss=loss, run={"allow_changes": True})
    assert dry_run(allowed).steps == STEPS


def test_another_teacher_or_other_images_under_an_old_name_are_refused(
    reference: Reference, tmp_path: Path
) -> None:
    other = {"weights": write_teacher(tmp_path / "teacher.safetensors", seed=1)}
    with pytest.raises(CheckpointError, match=r"teacher\.weights: the weights of \S+ are others"):
        dry_run(changed(reference.config, teacher=other))
    moved = shutil.copy(reference.config.teacher.weights, tmp_path / "moved.safetensors")
    assert dry_run(changed(reference.config, teacher={"weights": str(moved)})).steps == STEPS
    sources = [{"uri": write_images(tmp_path / "images", 6, seed=2), "weight": 1.0}]
    data = {"sources": sources, "shards": str(tmp_path / "shards")}
    assert main(["pack", f"data.sources={tmp_path}/images", f"data.shards={tmp_path}/shards"]) == 0
    with pytest.raises(CheckpointError, match=r"data\.shards: the packed images at \S+ are others"):
        dry_run(changed(reference.config, data=data))


def resumed_at(console: str) -> list[int]:
    return [int(step) for step in re.findall(rf"resumed at step (\d+) of {STEPS}", console)]


def start_command(config: Config, folder: Path) -> "subprocess.Popen[str]":
    """Start ``pcd-ray train`` with a Ray of its own."""
    file = folder / "config.yaml"
    file.write_text(to_yaml(config))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "pcd_ray", "train", str(file), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )


OUR_LINE = re.compile(
    r"(plan|note|warning|kNN top-1): |step \d+/\d+ epoch |epoch \d+ read: |fitting the |stopped; "
    r"|  \w.*: .* so far|  \w.*: [\d,]+ of [\d,]+ "  # progress, where a part takes long
)


def wait_for_a_checkpoint(command: "subprocess.Popen[str]", config: Config) -> None:
    """Wait until a run has stored step 4.

    Raises:
        AssertionError: it has ended before.
    """
    mark = Path(RunFolder.of(config).checkpoints) / checkpoint_name(4) / "checkpoint.json"
    wait_for(lambda: mark.exists() or command.poll() is not None, timeout_s=EVENT_S)
    assert command.poll() is None, command.communicate()


def test_ctrl_c_stops_a_run_in_words_and_the_same_command_can_go_on(
    prepared: Config, tmp_path: Path
) -> None:
    config = of_name(prepared, "interrupted", train={"epochs": 200})
    command = start_command(config, tmp_path)
    try:
        wait_for_a_checkpoint(command, config)
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=EVENT_S)
    finally:
        command.kill()
    assert command.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "stopped; the same command goes on from the last checkpoint"
    foreign = [line for line in err.splitlines() if not OUR_LINE.match(line)]
    assert foreign == []  # no traceback, and nothing that Ray says
    assert newest(config).about["step"] >= 4


def half_way(reference: Reference, name: str, **sections: dict[str, Any]) -> Config:
    """Return a run that lies on storage as the reference lay at step 20."""
    config = of_name(changed(reference.config, eval={"pictures": False}), name, **sections)
    source = Path(RunFolder.of(reference.config).checkpoints) / "step_00000020"
    shutil.copytree(source, Path(RunFolder.of(config).checkpoints) / source.name)
    return config


def test_references_are_measured_again_when_the_sets_have_changed(
    reference: Reference, tmp_path: Path
) -> None:
    test = write_images(tmp_path / "test", 9, seed=3)
    config = half_way(reference, "references", eval={"knn_test": test, "knn_k": 3})
    old = Path(reference.result.path) / "references.json"
    new = Path(shutil.copy(old, RunFolder.of(config).uri))
    result, console = trained(config)
    assert "kNN top-1: teacher" in console
    found = json.loads(new.read_text())
    assert found["measured_on"]["knn_test"] == test
    for network in ("untrained", "teacher"):  # of the untrained student, though it is at step 20
        judged = result.metrics["knn_top1"][network]
        assert found[names.KNN_TOP1][network] == pytest.approx(judged, abs=100 / 9 + 0.1)


def test_a_loss_that_is_not_finite_ends_the_run_at_once_and_keeps_what_was(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = half_way(reference, "nan", optim={"base_lr": 1e30}, run={"allow_changes": True})
    before = content_of(Path(RunFolder.of(config).checkpoints) / "step_00000020")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert main(["train", str(file)]) == 2
    err = capsys.readouterr().err
    assert re.search(
        r"error: the loss is not finite at step 21 with learning rate \S+; .*base_lr", err
    )
    assert "Traceback" not in err
    assert len(resumed_at(err)) == 1  # it was not tried again
    assert content_of(Path(RunFolder.of(config).checkpoints) / "step_00000020") == before
    assert checkpoint_steps(RunFolder.of(config)) == [20]


def test_workers_compare_the_options_of_the_checkpoint_that_they_load(
    reference: Reference,
) -> None:
    """Between the driver's look and theirs, another one has written into the folder."""
    config = half_way(reference, "written_into")
    mark = Path(RunFolder.of(config).checkpoints) / "step_00000020" / "checkpoint.json"

    def write(*_: Any, **__: Any) -> int:
        about = json.loads(mark.read_text())
        about["config"]["run"]["seed"] = 5
        mark.write_text(json.dumps(about))
        return 0

    with pytest.raises(CheckpointError, match=r"a run at step 20 .*\n  run\.seed: 5 -> 0\n"):
        train(config, build=write)
    assert checkpoint_steps(RunFolder.of(config)) == [20]


def test_an_image_that_is_damaged_after_packing_is_named(
    reference: Reference, tmp_path: Path
) -> None:
    shards = shutil.copytree(reference.config.data.shards, tmp_path / "shards")
    last = open_shards(str(shards)).index.slice(NUM_IMAGES - 1).to_pylist()[0]
    with open(last["uri"], "r+b") as file:
        file.seek(last["offset"])
        file.write(bytes(last["size"]))
    config = of_name(
        reference.config,
        "damaged",
        data={"shards": str(shards)},
        eval={"every_epochs": 0},
        train={"max_failures": 0},
    )
    with pytest.raises(ShardError, match=rf"image '{last['key']}' in \S+: not an image; mend it"):
        train(config)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a disk of 8 MiB: room for a checkpoint, not for two."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(
    prepared: Config, small_disk: Path
) -> None:
    config = changed(
        prepared,
        run={"root": str(small_disk)},
        eval={"every_epochs": 0},
        train={"max_failures": 0},
    )
    with pytest.raises(PcdError, match=r"No space left on device"):
        train(config)
    assert checkpoint_steps(RunFolder.of(config)) == [4]
    assert newest(config).state["step"] == 4


class BadInput:
    """What a user may get wrong, on a copy of a good command."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.file = folder / "good.yaml"
        self.file.write_text(to_yaml(config))

    def run(self, *words: str, verb: str = "train") -> int:
        return main([verb, str(self.file), *words])


@pytest.fixture
def bad(reference: Reference, tmp_path: Path) -> BadInput:
    return BadInput(reference.config, tmp_path)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("error: ")
    return err


def test_bad_images_are_refused_when_they_are_packed(
    bad: BadInput, capsys: pytest.CaptureFixture[str]
) -> None:
    images = bad.folder / "images"
    images.mkdir()
    shards = f"data.shards={bad.folder}/new"
    for source, text in [("nowhere", "no such folder"), ("images", "holds no image")]:
        assert bad.run(f"data.sources={bad.folder}/{source}", shards, verb="pack") == 2
        assert re.search(rf"data\.sources: \S*{source}: .*{text}", error_of(capsys))
    good = next(Path(bad.config.data.sources[0].uri).rglob("*.jpg")).read_bytes()
    for name, content, settings, text in [
        ("text.jpg", b"no picture", "data.max_pixels=5000", "text.jpg: not an image"),
        ("cut.jpg", good[: len(good) // 2], "data.max_pixels=5000", "cut.jpg: truncated"),
        ("huge.jpg", good, "data.max_pixels=1000", "1,920 pixels exceed data.max_pixels=1,000"),
    ]:
        (images / name).write_bytes(content)
        source = f"data.sources={images}"
        assert bad.run(source, shards, settings, verb="pack") == 2
        err = error_of(capsys)
        assert text in err
        assert "1 of 1 images are unreadable" in err
        assert "mend or remove them, or raise the limit" in err
        (images / name).unlink()
        shutil.rmtree(bad.folder / "new")


def leftover_keys(bad: BadInput) -> str:
    """timm's weights with a head of which nobody says what it is."""
    body = timm.create_model("test_resnet", num_classes=0).state_dict()
    path = bad.folder / "leftover.safetensors"
    safetensors.torch.save_file(body | {"projector.0.weight": torch.ones(4, 96)}, path)
    return str(path)


def head_of_nan(bad: BadInput) -> str:
    """A teacher whose head can obey no law."""
    path = bad.folder / "nan.safetensors"
    with safetensors.safe_open(bad.config.teacher.weights, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(bad.config.teacher.weights)
    tensors["head.0.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    return str(path)


def text_file(bad: BadInput) -> str:
    path = bad.folder / "weights.pth"
    path.write_text("these are no weights")
    return str(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data.shards=", "data.shards is empty; give the folder that `pcd-ray pack` wrote"),
        ("data.shards={folder}/none", r"none\S* .*pack"),
        ("teacher.weights={folder}/none.pth", r"none\.pth cannot be read: .*correct the path"),
        ("teacher.weights={text}", r"weights\.pth is .*"),
        (
            "teacher.weights={leftover}",
            r"is no test_resnet file \(.*left over: projector\.0\.weight",
        ),
        ("teacher.weights={nan}", r"head.*nan|nan.*head"),
        ("teacher.arch=resnet10t", r"holds a test_resnet, but .*; set teacher\.arch=test_resnet"),
        ("teacher.arch=no_net", r"'no_net' is no timm model"),
        ("student.backbone=resnett18", r"did you mean resnet18"),
        ("student.mhsa.heads=7", r"student\.mhsa\.heads=7 does not divide .* 96 channels; use one"),
        (
            "teacher.kwargs={{output_stride: 32}}",
            r"teacher's map is 1 x 1 and the student's 4 x 4, .*; set student\.grid=interpolate",
        ),
        ("student.backbone=test_vit", r"output_stride=8, but test_vit has maps of stride 16 alone"),
        ("loss.temprature=1", r"did you mean loss\.temperature\?"),
        ("optim.name=lar", r"did you mean 'lars'\?"),
        ("train.global_batch_size=5", r"train\.global_batch_size=5 does not split .*; use 4 or 6"),
        ("train.num_workers=4", r"num_workers=4 .* the cluster has 2; use train\.num_workers=2"),
        ("train.device=cuda", r"need 2 GPUs, the cluster has 0; use .*train\.device=cpu"),
        (
            "optim.warmup_epochs=9",
            r"optim\.warmup_epochs=9 covers all of train\.epochs=2; use less",
        ),
        ("run.root={file}", r"good\.yaml/\S+ cannot be .*a file is where a folder is needed"),
        ("eval.knn_test={folder}/none", r"none: there is no such folder"),
    ],
)
def test_a_bad_input_is_one_message_with_its_fix_and_costs_nothing(
    words: str, message: str, bad: BadInput, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = Path(RunFolder.of(bad.config).uri)
    before = content_of(stored)
    made = {"text": text_file, "leftover": leftover_keys, "nan": head_of_nan}
    values = {name: make(bad) for name, make in made.items() if f"{{{name}}}" in words}
    given = words.format(folder=bad.folder, file=bad.file, **values)
    fresh = "train.num_workers=2" if words.startswith("train.num") else "run.name=new"
    assert bad.run(fresh, given) == 2
    assert re.search(message, error_of(capsys), re.IGNORECASE)
    assert content_of(stored) == before


def test_a_dry_run_says_what_would_happen_and_trains_nothing(
    bad: BadInput, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content_of(bad.folder)
    cache = "teacher.cache.views=1"
    assert bad.run("run.name=dry", f"run.root={bad.folder}/new/runs", cache, "--dry-run") == 0
    assert bad.run("run.name=dry", "train.num_workers=4", "--dry-run") == 2
    capsys.readouterr()
    assert bad.run("run.name=dry", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"], plan["images"], plan["batch_size_per_worker"]) == (STEPS, NUM_IMAGES, 2)
    assert plan["queue_fill_steps"] == 8
    assert plan["eval_read"]["eval.knn_test"] == "all 12 images"
    assert plan["law_error"] < 1e-9
    assert content_of(bad.folder) == before
    assert not (bad.folder / "new").exists()
    assert not (Path(bad.config.run.root) / "dry").exists()
