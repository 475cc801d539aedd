"""`pcd-ray eval` on real Ray: one command, one page, and nothing judged twice."""

import json
from pathlib import Path

import pytest
import safetensors.torch
from stored_run import store_run
from tiny_run import write_images

from pcd_ray.cli import main
from pcd_ray.evaluate.ray_eval import config_for, evaluate
from pcd_ray.evaluate.students import open_rows

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


def test_one_command_gives_a_table_a_page_and_parts(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "knn", run, "--compare", "untrained", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [row["student"] for row in summary["table"]] == ["stored", "untrained"]
    assert summary["scores"]["knn_top1"]["stored"]["count"] == 1
    assert list(summary["scores"]) == ["knn_top1", "knn_k1", "knn_k10", "knn_k20"]
    assert json.loads(Path(run, "eval/knn/summary.json").read_text()) == summary
    page = Path(run, "eval/knn/report.html").read_text()
    assert "stored" in page
    assert page.count("data:image/png") >= 3, "maps, similarity, receptive fields"
    assert Path(run, "eval/knn/figures/attention_stored.png").exists(), "the run has a neck"
    parts = {path: path.stat().st_mtime_ns for path in Path(run, "eval/parts").rglob("*.*")}
    assert main(["eval", "knn", run, "--compare", "untrained"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["student", "knn_top1", "knn_k1", "knn_k10", "knn_k20"]
    assert {path: path.stat().st_mtime_ns for path in parts} == parts, "nothing was done twice"


def test_the_probe_uses_the_features_of_knn(run: str) -> None:
    config = config_for([run])
    before = {path: path.stat().st_mtime_ns for path in Path(run, "eval/parts").rglob("*.parquet")}
    assert before, "kNN came first"
    result = evaluate("linear", [run], config)
    assert result.rows["stored"][0].about["features_computed"] == 0
    after = {path: path.stat().st_mtime_ns for path in Path(run, "eval/parts").rglob("*.parquet")}
    assert after == before


def test_a_network_that_has_diverged_costs_its_own_row_alone(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for([run])
    network = open_rows([run], config)[0].networks[0]
    # finite weights whose features are not: what a diverged training leaves
    huge = {k: v * 1e30 if v.is_floating_point() else v for k, v in network.weights.items()}
    file = str(tmp_path / "diverged.safetensors")
    safetensors.torch.save_file({k: v.contiguous() for k, v in huge.items()}, file)
    out = f"eval.out={tmp_path}/out"
    words = ["eval", "knn", run, f"{file}@{network.timm_name}", out]
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "not judged: diverged, seed 0" in error
    assert "infinite or NaN" in error
    summary = json.loads((tmp_path / "out/knn/summary.json").read_text())
    assert [row["student"] for row in summary["table"]] == ["stored"]
    assert "infinite or NaN" in summary["failures"]["diverged, seed 0"]
