"""A cluster that starts as a head without CPUs, grows for a run, and shrinks again.

Simulated: Ray's fake multi-node provider (`simulated_cloud`) starts each node as further Ray
processes on this machine, and GPUs are numbers. Real: Ray's autoscaler, its scheduling by labels,
and a run of our own, which therefore trains on CPUs of the nodes that are labelled for training.
The autoscaler (v1) counts resources and ignores labels when it decides what is missing, so that a
worker, which takes a node of 3 CPUs whole, must not fit on a node of 2.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from processes import end_session, of_session, parent_of, wait_for
from tiny_run import BATCH, NUM_IMAGES, changed, prepare_unpacked

from pcd_ray.config import to_yaml

pytestmark = pytest.mark.slow

EVENT_S = 300.0
HEAD_ALONE = {"head": 1}
_STARTED = "This command will now block forever"
_ATTEMPTS = 5
_LOG_CHARS = 3000
HEAD_TYPE = "ray.head.default"  # the fake provider knows no other
_COMMANDS = [
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
]
DRIVER = """
import json, sys, time
from pathlib import Path
from pcd_ray.cli import main
for name, *words in json.loads(sys.argv[1]):
    begun = time.time()
    code = main(words)
    came = {"name": name, "code": code, "begun": begun, "ended": time.time()}
    print(json.dumps(came), flush=True)
"""


@dataclass
class Cluster:
    """The cluster's processes, as /proc shows them."""

    session: int
    address: str
    home: Path
    folder: Path
    """Where Ray keeps its logs."""
    counts: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    """When the nodes changed, and how many of each pool there were from then on."""
    work: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often a kind of work was seen on a pool."""

    def look(self) -> None:
        processes = of_session(self.session)
        pools = {pid: _pool(words) for pid, words in processes.items() if _is_node(words)}
        counts = dict(Counter(pools.values()))
        if not self.counts or self.counts[-1][1] != counts:
            self.counts.append((time.time(), counts))
        for pid, words in processes.items():
            title = words[0]
            if title.startswith("ray::"):
                pool = pools.get(parent_of(pid))  # none: of a worker, or it has ended since
                if pool:
                    self.work[title.removeprefix("ray::"), pool] += 1

    def nodes(self) -> dict[str, int]:
        return self.counts[-1][1]

    def history(self) -> list[str]:
        """Return the nodes over time, a line for each change."""
        begun = self.counts[0][0]
        return [f"{when - begun:6.1f} s  {counts}" for when, counts in self.counts]

    def wait_until_alone(self) -> None:
        """Wait until the head is the only node.

        Raises:
            AssertionError: it does not come to that; it says which nodes there were, and when.
        """
        try:
            wait_for(lambda: self.nodes() == HEAD_ALONE, timeout_s=EVENT_S)
        except TimeoutError as error:
            story = [str(error), *self.history(), self.autoscaler_log()]
            raise AssertionError("\n".join(story)) from None

    def autoscaler_log(self) -> str:
        """Return the end of what the autoscaler saw, without its lines of rules and blanks."""
        (log,) = self.folder.glob("session_2*/logs/monitor.log")
        lines = [line for line in log.read_text().splitlines() if line.strip(" -")]
        return "\n".join(lines)[-_LOG_CHARS:]

    def nodes_between(self, begun: float, ended: float) -> list[dict[str, int]]:
        """Return the nodes when something began and after each change until it ended."""
        before = [counts for when, counts in self.counts if when <= begun][-1:]
        return before + [counts for when, counts in self.counts if begun < when <= ended]


def _is_node(words: list[str]) -> bool:
    return words[0].endswith("/raylet/raylet")


def _pool(words: list[str]) -> str:
    """Return the pool of a node by its labels; the head has none."""
    labels = next((w for w in words if w.startswith("--labels")), "")
    found = re.search(r"\bpool\W+(data|train)\b", labels)
    return found[1] if found else "head"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _launcher(address: str) -> dict[str, Any]:
    """Return what ``ray up`` would have left on the head."""
    store = 100_000_000
    return {
        "cluster_name": "test",
        "max_workers": 3,
        "idle_timeout_minutes": 0.75,  # on a busy machine a process takes long to start on a node
        "upscaling_speed": 10,
        "provider": {
            "type": "external",
            "module": "simulated_cloud.SimulatedCloud",
            "gcs_address": address,
            "use_node_id_as_ip": True,  # all nodes have one address
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "data": {
                "resources": {"CPU": 2, "object_store_memory": store},
                "labels": {"pool": "data"},
                "node_config": {},
                "max_workers": 1,
            },
            "train": {
                "resources": {"CPU": 3, "GPU": 1, "object_store_memory": store},
                "labels": {"pool": "train"},
                "node_config": {},
                "max_workers": 2,
            },
        },
        "head_node_type": HEAD_TYPE,
        "auth": {},
        **{name: [] for name in _COMMANDS},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
    }


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    port = _free_port()
    host = subprocess.run(
        [sys.executable, "-c", "import ray; print(ray.util.get_node_ip_address())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    address = f"{host}:{port}"
    home = tmp_path / "home"
    home.mkdir()
    launcher = home / "ray_bootstrap_config.yaml"  # JSON, as Ray writes it
    launcher.write_text(json.dumps(_launcher(address)))
    with tempfile.TemporaryDirectory(prefix="ray_", ignore_cleanup_errors=True) as folder:
        command = f"""start --head --block --num-cpus=0 --port={port} --node-ip-address={host}
            --ray-client-server-port={_free_port()} --dashboard-agent-listen-port={_free_port()}
            --include-dashboard=false --disable-usage-stats --object-store-memory=100000000
            --autoscaling-config={launcher} --temp-dir={folder}"""
        environment = _environment(home) | {
            "RAY_FAKE_CLUSTER": "1",
            # of the provider
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]]),
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        }
        head = _head(command.split(), tmp_path / "head.log", environment)
        found = Cluster(head.pid, address, home, Path(folder))
        over = threading.Event()
        watcher = threading.Thread(target=_watch, args=(found, over))
        watcher.start()
        try:
            yield found
        finally:
            over.set()
            watcher.join()
            end_session(head.pid)
            head.wait()
            print(*found.history(), sep="\n")


def _head(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start the head; again where the machine is too busy for Ray's own limit of 30 s."""
    for _ in range(_ATTEMPTS):
        with log.open("w") as file:
            head = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", *command],
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
            )
        try:
            wait_for(
                lambda process=head: _STARTED in log.read_text() or process.poll() is not None,
                timeout_s=EVENT_S,
            )
        except BaseException:
            end_session(head.pid)
            raise
        if head.poll() is None:
            return head
        end_session(head.pid)
    raise AssertionError(log.read_text())


def _environment(home: Path) -> dict[str, str]:
    return os.environ | {"HOME": str(home), "RAY_AUTH_MODE": "disabled"}


def _watch(cluster: Cluster, over: threading.Event) -> None:
    while not over.wait(0.1):
        cluster.look()


def _driven(cluster: Cluster, folder: Path, steps: list[list[str]]) -> dict[str, Any]:
    """Run verbs in one driver on the head, to its end; return what came of each, and its output."""
    out, err = folder / "out.txt", folder / "err.txt"
    with out.open("w") as stdout, err.open("w") as stderr:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(steps)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=folder,
            env=_environment(cluster.home) | {"RAY_ADDRESS": cluster.address},
            start_new_session=True,
        )
    try:
        driver.wait(timeout=2 * EVENT_S)
    finally:
        end_session(driver.pid)
        driver.wait()
        print(out.read_text(), err.read_text(), sep="\n")
    told = [json.loads(x) for x in out.read_text().splitlines() if x.startswith('{"name"')]
    came = {step["name"]: step for step in told}
    return {**came, "out": out.read_text(), "err": err.read_text()}


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # the watcher's
def test_a_cluster_grows_for_a_run_and_shrinks_again(cluster: Cluster, tmp_path: Path) -> None:
    config = changed(
        prepare_unpacked(tmp_path),
        data={"node_labels": {"pool": "data"}},
        train={"epochs": 1, "device": "auto", "node_labels": {"pool": "train"}},
        eval={"pictures": False},
    )
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    run = "run.yaml"
    steps = [
        ["pack", "pack", run],
        ["never", "train", run, "train.num_workers=4", "train.global_batch_size=8"],
        ["plan", "train", run, "--dry-run", "--json"],
        ["train", "train", run, "train.device=cpu"],
    ]
    _check(cluster, tmp_path, _driven(cluster, tmp_path, steps))
    # nothing that a job leaves behind keeps nodes up
    cluster.wait_until_alone()


def _check(cluster: Cluster, tmp_path: Path, did: dict[str, Any]) -> None:
    assert {name: did[name]["code"] for name in ("pack", "never", "plan", "train")} == {
        "pack": 0,
        "never": 2,
        "plan": 0,
        "train": 0,
    }
    # what can never be met is refused at once, in numbers
    assert (
        "train.num_workers=4 with train.device=cuda need 4 GPUs on nodes with pool=train, the "
        "cluster has 2; use train.num_workers=2; that is all that the autoscaler may bring"
    ) in did["err"]
    # a dry run knows the GPUs that there will be, and brings none of them
    plan = json.loads(did["out"][did["out"].index("{\n") : did["out"].rindex("\n}\n") + 2])
    assert plan["device"] == "cuda"
    assert (
        "2 workers of 1 GPU and 1 CPUs on nodes with pool=train"
        in (plan["notes"]["run.wait_for_nodes_s"])
    )
    for name in ("never", "plan"):
        seen = cluster.nodes_between(did[name]["begun"], did[name]["ended"])
        assert all("train" not in counts for counts in seen)
    # packing brings the node of Ray Data alone, training those of the workers
    packing = cluster.nodes_between(did["pack"]["begun"], did["pack"]["ended"])
    assert packing[0] == HEAD_ALONE
    assert packing[-1] == {"head": 1, "data": 1}
    training = cluster.nodes_between(did["train"]["begun"], did["train"]["ended"])
    assert {"head": 1, "data": 1, "train": 2} in training
    assert (
        "waiting for nodes that the autoscaler will bring: room for 0 of 1 data task"
        in (did["err"])
    )
    assert "room for 0 of 2 workers of 3 CPUs on nodes with pool=train" in did["err"]
    summary = json.loads((tmp_path / "runs" / "reference" / "summary.json").read_text())
    assert summary["step"] == NUM_IMAGES // BATCH
    assert "not_judged" not in summary
    # each kind of work has been on its own nodes, and on no others
    places = {
        kind: {pool for (title, pool) in cluster.work if kind in title}
        for kind in ("MapBatches", "RayTrainWorker", "_judge", "TrainController", "_Mailbox")
    }
    assert places == {
        "MapBatches": {"data"},
        "RayTrainWorker": {"train"},
        "_judge": {"train"},
        "TrainController": {"head"},
        "_Mailbox": {"head"},
    }
