"""The page of a sweep: every trial that is over leads to a page of its own."""

import json
from pathlib import Path

from optuna.trial import TrialState
from studies import opened_study
from tiny import tiny_config

from pcd_ray.checkpoint import RunFolder
from pcd_ray.tune.ray_search import COST, EPOCH, FINISHED, SCORE, StudySearch, reason_file
from pcd_ray.tune.records import records_of
from pcd_ray.tune.space import open_space
from pcd_ray.tune.sweep_report import write_sweep_report

SPACE = {"loss.temperature": {"log": [0.03, 0.5]}, "student.mhsa.depth": {"choice": [0, 1, 2]}}


def test_stopped_and_failed_trials_have_pages_too(tmp_path: Path) -> None:
    config = tiny_config(run={"root": str(tmp_path), "name": "s"}, tune={"space": SPACE})
    folder, space = RunFolder.of(config), open_space(config)
    opened = opened_study(config)
    search = StudySearch(opened, space, config, folder.file("trials"))
    for trial_id in "abcde":
        search.suggest(trial_id)
    for trial_id, score in (("a", 20.0), ("b", 50.0)):
        search.on_trial_complete(trial_id, {SCORE: score, EPOCH: 2, FINISHED: True, COST: 1.0})
    search.on_trial_complete("c", {SCORE: 12.5, EPOCH: 1})
    own = tmp_path / "s" / "trials" / "trial_0002"
    own.mkdir(parents=True)
    lines = [{"step": n, "epoch": n / 2, "train/loss": 4.0 - n} for n in (1, 2)]
    (own / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (own / "config.yaml").write_text("loss: {temperature: 0.1}\n")
    reason = Path(reason_file(folder.file("trials"), 3))
    reason.parent.mkdir()
    reason.write_text("the loss is not finite at step 7")
    search.on_trial_complete("d", error=True)
    states = [trial.state for trial in opened.trials()]
    assert states[2:] == [TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING]

    page = Path(write_sweep_report(folder, config, opened, records_of(opened))).read_text()
    for number in range(4):
        assert f'href="trials/trial_{number:04d}/report.html"' in page
    assert "trial_0004/report.html" not in page
    for words in ("35.0", "told from 10 finished trials on; 2 have finished"):  # median of 20, 50
        assert words in page
    stopped = (own / "report.html").read_text()
    assert "was stopped after 1 of 2 epochs" in stopped
    assert "12.5" in stopped
    assert "<figure>" in stopped
    assert "temperature: 0.1" in stopped
    failed = (tmp_path / "s" / "trials" / "trial_0003" / "report.html").read_text()
    assert "the loss is not finite at step 7" in failed
    assert not (tmp_path / "s" / "trials" / "trial_0000").exists(), "finished ones have their own"


def test_a_trial_whose_lines_hold_nothing_to_draw_has_a_page(tmp_path: Path) -> None:
    config = tiny_config(run={"root": str(tmp_path), "name": "s"}, tune={"space": SPACE})
    folder, space = RunFolder.of(config), open_space(config)
    opened = opened_study(config)
    search = StudySearch(opened, space, config, folder.file("trials"))
    search.suggest("a")
    own = tmp_path / "s" / "trials" / "trial_0000"
    own.mkdir(parents=True)
    (own / "metrics.jsonl").write_text('{"step": 1, "epoch": 1.0, "other": 2.0}\n')
    search.on_trial_complete("a", {SCORE: 1.0, EPOCH: 1})
    write_sweep_report(folder, config, opened, records_of(opened))
    assert "stopped early" in (own / "report.html").read_text()
