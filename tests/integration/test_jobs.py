"""``ray job submit`` as users run it: on a head of its own, with dashboard and token."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_head import EVENT_S, Head, local_head, submitted
from processes import train_workers, wait_for
from stored_shards import write_shards
from tiny_run import write_images, write_teacher

from pcd_ray.checkpoint import RunFolder, checkpoint_steps, find_checkpoint

pytestmark = pytest.mark.slow

IMAGES, STEPS = 1760, 440  # of one epoch: what is stored before its end is stored by the clock
RUN = """
run: {{root: {root}/runs, name: job}}
data: {{shards: {shards}, images_per_task: 44}}
augment: {{image_size_px: 32}}
teacher: {{arch: test_resnet, weights: {teacher}, kwargs: {{output_stride: 8}}}}
student: {{backbone: test_resnet, output_stride: 8, mhsa: {{heads: 4}}}}
loss: {{queue_size: 32}}
optim: {{name: adamw, base_lr: 0.03, warmup_epochs: 0.1}}
train:
  epochs: 1
  global_batch_size: 4
  device: cpu
  log_every_steps: 20
  checkpoint_every_minutes: 0.001
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with local_head() as running:
        yield running


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The YAML file of a run of 440 steps."""
    path = tmp_path / "job.yaml"
    path.write_text(
        RUN.format(
            root=tmp_path,
            shards=write_shards(tmp_path, write_images(tmp_path / "train", IMAGES, seed=0)),
            teacher=write_teacher(tmp_path / "teacher.safetensors"),
        )
    )
    return path


def log_of(output: str) -> list[str]:
    """Return the lines that a job has written, out of what ``ray job submit`` shows."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Running entrypoint"))
    return lines[start + 1 :]


def test_who_has_no_token_is_refused(head: Head) -> None:
    refused = head.job("list", without="RAY_AUTH_MODE")
    assert refused.returncode != 0
    assert "Authentication required" in refused.stderr
    with pytest.raises(OSError, match="401"):
        head.get("/api/jobs/", token=False)


def test_a_job_with_a_wrong_option_fails_and_says_why_in_its_last_line(
    head: Head, config: Path, tmp_path: Path
) -> None:
    result = tmp_path / "result.json"
    job = head.submit("jobs/train.py", str(config), "loss.temprature=1", "--result", str(result))
    assert job.returncode == 1
    cause = "error: loss.temprature: unknown option; did you mean loss.temperature?"
    log = head.job("logs", submitted(job.stdout)).stdout.splitlines()
    assert [line for line in log if line][-1] == cause
    assert "Traceback" not in job.stdout
    assert json.loads(result.read_text()) == {"exit_code": 2, "error": cause, "summary": {}}
    assert head.travelled() == {"cluster.yaml", "configs", "jobs", "pcd_ray"}


def stopped_half_way(head: Head, folder: RunFolder, *words: str) -> list[str]:
    """Submit a job, stop it once it has a checkpoint; return its log."""
    begun = head.submit(*words, wait=False)
    assert begun.returncode == 0, begun.stderr
    name = submitted(begun.stdout)
    wait_for(
        lambda: bool(checkpoint_steps(folder)) or head.status(name) not in ("PENDING", "RUNNING"),
        timeout_s=EVENT_S,
    )
    stopped = head.job("stop", name)
    assert stopped.returncode == 0, stopped.stderr
    assert head.status(name) == "STOPPED"
    wait_for(lambda: not train_workers(head.pid), timeout_s=EVENT_S)
    return [line for line in head.job("logs", name).stdout.splitlines() if line]


def test_a_stopped_job_leaves_a_checkpoint_and_the_same_job_goes_on_to_the_end(
    head: Head, config: Path, tmp_path: Path
) -> None:
    folder, result = RunFolder(str(tmp_path / "runs" / "job")), tmp_path / "result.json"
    words = ("jobs/train.py", str(config), "--result", str(result))
    log = stopped_half_way(head, folder, *words)
    assert log[-1] == "stopped; the same command goes on from the last checkpoint"
    assert json.loads(result.read_text())["exit_code"] == 130
    at = checkpoint_steps(folder)[-1]
    assert 0 < at < STEPS

    ended = head.submit(*words)
    assert ended.returncode == 0, ended.stdout
    log = log_of(ended.stdout)
    plan = f"plan: {STEPS} steps of 4 images, 1 epochs of 1,760, on 1 cpu workers"
    assert f"{plan}; {at} steps are done" in log
    assert f"resumed at step {at} of {STEPS}" in log
    assert any(line.startswith(f"step {STEPS}/{STEPS} ") and "images/s" in line for line in log)
    assert any(line.split() == ["path", folder.uri] for line in log)
    assert "Traceback" not in ended.stdout
    assert "\r" not in ended.stdout
    outcome = json.loads(result.read_text())
    assert (outcome["exit_code"], outcome["summary"]["path"]) == (0, folder.uri)
    check_end(folder)


def check_end(folder: RunFolder) -> None:
    """Check that a run has reached its last step, with a checkpoint of the size foretold."""
    newest = find_checkpoint(folder.uri)
    assert newest.about["step"] == STEPS
    foretold = json.loads(Path(folder.file("summary.json")).read_text())["plan"]["scale"]
    (state,) = Path(newest.uri).glob("state-*.pt")
    size = state.stat().st_size
    assert size / 2**20 == pytest.approx(foretold["checkpoint_mib"], rel=0.05)
