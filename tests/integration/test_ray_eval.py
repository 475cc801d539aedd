"""`pcd-ray eval` on real Ray: one command, one page, and nothing judged twice."""

import json
import os
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from stored_run import store_run
from tiny_run import write_images

from pcd_ray import progress
from pcd_ray.cli import main
from pcd_ray.errors import ClusterError
from pcd_ray.evaluate.ray_eval import config_for, evaluate
from pcd_ray.evaluate.students import open_rows
from pcd_ray.ray_cluster import call_in_tasks
from pcd_ray.ray_shares import WorkerShare

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a stored run that knows its evaluation sets."""
    root = tmp_path_factory.mktemp("eval")
    sets = {
        "knn_train": write_images(root / "train", 24, seed=0),
        "knn_test": write_images(root / "test", 12, seed=1),
        "image_size_px": 32,
    }
    return store_run(root, 3, eval=sets)[0].uri


def parts_of(run: str) -> dict[Path, int]:
    """What is stored for all runs beside this one, and since when."""
    parts = Path(run).parent / "eval" / "parts"
    return {path: path.stat().st_mtime_ns for path in parts.rglob("*.*")}


def test_one_command_gives_a_table_a_page_and_parts(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "knn", run, "--compare", "untrained", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [row["student"] for row in summary["table"]] == ["stored", "untrained"]
    assert summary["scores"]["knn_top1"]["stored"]["measurements"] == 1
    assert list(summary["scores"]) == ["knn_top1", "knn_k1", "knn_k10", "knn_k20"]
    folder = Path(summary["path"])
    assert (folder.parent, folder.name[:4]) == (Path(run, "eval"), "knn-")
    assert summary["report"] == str(folder / "report.html")
    assert json.loads((folder / "summary.json").read_text()) == summary
    page = (folder / "report.html").read_text()
    assert "stored" in page
    assert page.count("data:image/png") >= 3, "maps, similarity, receptive fields"
    assert (folder / "figures/attention_stored.png").exists(), "the run has a neck"
    parts = parts_of(run)
    (folder / "figures" / "attention_other.png").write_bytes(b"of an earlier call")
    assert main(["eval", "knn", run, "--compare", "untrained"]) == 0
    assert not (folder / "figures" / "attention_other.png").exists()
    told = capsys.readouterr()
    table = told.out.splitlines()
    heads = ["student", "knn_top1", "knn_k1", "knn_k10", "knn_k20", "95%", "over"]
    assert table[0].split() == heads
    assert table[1].endswith("12 test images")
    assert told.err.count("note: k = 100, 200: eval.knn_train has 24 images") == 1
    assert {path: path.stat().st_mtime_ns for path in parts} == parts, "nothing was done twice"


def test_the_probe_uses_the_features_of_knn(run: str) -> None:
    config = config_for([run])
    before = {path: time for path, time in parts_of(run).items() if path.suffix == ".parquet"}
    assert before, "kNN came first"
    result = evaluate("linear", [run], config)
    assert result.rows["stored"][0][0].about["features_computed"] == 0
    after = {path: time for path, time in parts_of(run).items() if path.suffix == ".parquet"}
    assert after == before


def test_a_network_that_has_diverged_costs_itself_alone(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for([run])
    network = open_rows([run], config)[0].networks[0]
    # finite weights whose features are not: what a diverged training leaves
    huge = {k: v * 1e30 if v.is_floating_point() else v for k, v in network.weights.items()}
    file = str(tmp_path / "diverged.safetensors")
    safetensors.torch.save_file({k: v.contiguous() for k, v in huge.items()}, file)
    out = f"eval.out={tmp_path}/out"
    diverged = f"{file}@{network.timm_name}"
    words = ["eval", "knn", run, diverged, f"pair:{diverged},{run}", out]
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    names = [f"{row} ({file}), seed 0" for row in ("diverged", "pair")]
    assert f"not judged or drawn: {names[0]}" in error
    assert "infinite or NaN" in error
    (page,) = (tmp_path / "out").glob("knn-*")
    summary = json.loads((page / "summary.json").read_text())
    assert [row["student"] for row in summary["table"]] == ["stored", "pair"]
    assert list(summary["failures"]) == names, "pictures of the others are drawn"
    assert "infinite or NaN" in summary["failures"][names[0]]
    assert (page / "figures" / "pca_maps.png").exists()
    assert (page / "figures" / "attention_pair.png").exists(), "of the run, which is drawn"


def test_what_a_task_dies_of_is_told_in_words() -> None:
    share = WorkerShare("cpu", cpus=0.0, threads=1)

    def die() -> None:
        os._exit(1)

    def fill() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def doubled(value: int) -> int:
        return 2 * value

    with pytest.raises(ClusterError, match="a process that computes was lost"):
        call_in_tasks(die, [()], share=share)
    with pytest.raises(ClusterError, match=r"there was not enough memory \(CUDA out of memory"):
        call_in_tasks(fill, [()], share=share)
    assert call_in_tasks(doubled, [(2,), (1,)], share=share) == [4, 2]


def test_a_task_that_takes_long_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    share = WorkerShare("cpu", cpus=1, threads=1)
    folder = str(tmp_path)

    def step(number: int) -> int:
        """Wait until the driver has logged this step, which the task alone knows of."""
        while not os.path.exists(os.path.join(folder, str(number))):
            time.sleep(0.01)
        return number

    def work() -> list[int]:
        progress.EVERY_S, usual = 0.05, progress.EVERY_S
        try:
            return list(progress.counted(map(step, range(2)), "features", "images", 2))
        finally:
            progress.EVERY_S = usual

    def heard(line: str) -> None:
        lines.append(line)
        for number in range(2):
            if f"features: {number} of 2 images" in line:
                (tmp_path / str(number)).touch()

    lines: list[str] = []
    with progress.sending_to(heard):
        assert call_in_tasks(work, [()], share=share, what="kNN") == [[0, 1]]
    assert all(line.startswith("  kNN: ") for line in lines)
