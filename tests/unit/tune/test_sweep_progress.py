"""What a sweep says while it runs, and what must not end it."""

import io
from pathlib import Path
from types import SimpleNamespace

from tiny import tiny_config

from pcd_ray.checkpoint import RunFolder
from pcd_ray.tune.driver_mark import DriverMark
from pcd_ray.tune.ray_progress import Progress
from pcd_ray.tune.ray_search import NUMBER, VALUES
from pcd_ray.tune.space import open_space
from pcd_ray.tune.study import open_study

SPACE = {"loss.temperature": {"log": [0.03, 0.5]}}


def test_files_that_cannot_be_written_are_a_warning_while_trials_go_on(tmp_path: Path) -> None:
    config = tiny_config(run={"root": str(tmp_path), "name": "s"}, tune={"space": SPACE})
    opened = open_study(config, open_space(config), RunFolder.of(config), data_sha256="a" * 64)
    opened.study.ask()
    console = io.StringIO()

    def write() -> None:
        raise ZeroDivisionError("no panels")

    progress = Progress(config, opened, DriverMark(opened), write, console)
    trial = SimpleNamespace(config={NUMBER: 0, VALUES: {}}, last_result=None)
    progress.on_trial_complete(0, [], trial)
    progress.on_trial_error(0, [], trial)
    assert console.getvalue().count("could not be written (no panels); trials go on") == 2
