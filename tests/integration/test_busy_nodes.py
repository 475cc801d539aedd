"""Nodes that went while caches were built, and nodes that another one's work holds."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_cluster import FaultyCluster
from processes import wait_for
from tiny_run import changed, prepare

from pcd_ray.config import to_yaml

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

EVENT_S = 300.0
# what builds caches: the test takes a node away meanwhile, and another one's work the other node
DRIVER = """
import sys
import ray
from processes import wait_for
from pcd_ray.config import config_from_argv
from pcd_ray.ray_nodes import nodes_now
from pcd_ray.train.ray_launch import train

def build(config, shards, *, share, say):
    say("built")
    wait_for(lambda: len(nodes_now()) == 2, timeout_s=300)
    class Another:
        def hold(self): pass
    other.append(ray.remote(num_cpus=1)(Another).remote())
    ray.get(other[0].hold.remote())
    return 0

def listener(event):
    if "are there but busy" in event.text:
        ray.kill(other[0])

other = []
train(config_from_argv(sys.argv), build=build, listener=listener)
"""


@pytest.fixture
def cluster() -> Iterator[FaultyCluster]:
    # a short name: sockets have it in theirs
    with tempfile.TemporaryDirectory(prefix="ray_", ignore_cleanup_errors=True) as name:
        built = FaultyCluster(Path(name))
        built.tell("add")
        built.tell("add")
        yield built
        built.end()


def test_a_run_says_what_it_waits_for_before_it_begins(
    cluster: FaultyCluster, tmp_path: Path
) -> None:
    config = changed(
        prepare(tmp_path),
        data={"cpus_per_task": 0.4},
        train={"cpus_per_worker": 0.6, "epochs": 1},
        eval={"every_epochs": 0, "knn_train": "", "knn_test": "", "pictures": False},
    )
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tmp_path / "run.yaml")],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=os.environ
            | {
                "RAY_ADDRESS": cluster.address,
                "PYTHONPATH": os.pathsep.join(
                    [str(Path(__file__).parent), os.environ["PYTHONPATH"]]
                ),
            },
        )

    def wait_for_words(words: str) -> str:
        """Return what was said until then."""
        wait_for(lambda: words in log.read_text() or driver.poll() is not None, timeout_s=EVENT_S)
        assert words in log.read_text(), log.read_text()
        return log.read_text().partition(words)[0]

    try:
        assert "waiting for nodes" not in wait_for_words("built")
        cluster.tell("remove")
        wait_for_words("autoscaler will bring: room for 1 of 2 workers of 0.6 CPUs; room for")
        cluster.tell("add")
        busy = "are there but busy: 2 workers of 0.6 CPUs ask for room, free on all nodes are "
        wait_for_words(busy)
        wait_for_words("step 11/11")
        after = log.read_text().partition(busy)[2]
        assert after.startswith("1 of 2 CPUs; ")
        assert "busy" not in after  # not while workers start and train, though nothing is free
    finally:
        driver.kill()
        driver.wait()
        print(log.read_text())
