"""The cluster files are what Ray's launcher and KubeRay read, and safe as written.

KubeRay's schema cannot be had from a package, so its RayJob is checked field by field: every key
that it uses is one that the documentation of ray.io/v1 names, with a value of its type.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pcd_ray.config import config_from_argv

ROOT = Path(__file__).parents[2]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
RAYJOB_FILE = ROOT / "configs" / "kubernetes" / "rayjob.yaml"
RAYJOB = yaml.safe_load(RAYJOB_FILE.read_text())
TYPES = {name: node for name, node in CLUSTER["available_node_types"].items() if name != "head"}
POOLS = {"data", "train"}


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ray's own loader, which knows what ``ray up`` would do with a file."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # read when ray is imported
    from ray.autoscaler._private import util

    return util


def ray_version() -> str:
    """Return the version of Ray that constraints.txt names."""
    return re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]


def test_the_launcher_takes_the_cluster(launcher: Any) -> None:
    prepared = launcher.prepare_config(CLUSTER)
    launcher.validate_config(prepared)
    types = prepared["available_node_types"]
    assert prepared["head_node_type"] == "head"
    assert {name: types[name]["resources"] for name in TYPES} == {
        name: TYPES[name]["resources"] for name in TYPES
    }


def test_the_launcher_would_have_said_so(launcher: Any) -> None:
    for broken in (
        CLUSTER | {"max_worker": 6},
        CLUSTER | {"head_node_type": "heads"},
        CLUSTER | {"available_node_types": {**TYPES, "head": {"node_config": {}, "node": 1}}},
    ):
        with pytest.raises(Exception, match=r"max_worker|heads|resources|node"):
            launcher.validate_config(launcher.prepare_config(broken))


def test_the_head_does_no_work_and_is_never_taken_away() -> None:
    head = CLUSTER["available_node_types"]["head"]
    start = " ".join(CLUSTER["head_start_ray_commands"])
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "--num-cpus=0" in start
    assert "--num-gpus=0" in start
    assert "InstanceMarketOptions" not in head["node_config"]


def test_groups_grow_from_nothing_to_what_the_cluster_allows() -> None:
    most = [node["max_workers"] for node in TYPES.values()]
    assert [node["min_workers"] for node in TYPES.values()] == [0] * len(TYPES)
    assert min(most) >= 0, "the schema lets -1 pass"
    assert CLUSTER["max_workers"] == sum(most)
    assert 0 < CLUSTER["idle_timeout_minutes"] <= 30


def test_labels_say_where_data_and_training_go() -> None:
    assert {node["labels"]["pool"] for node in TYPES.values()} == POOLS
    for node in TYPES.values():
        trains = node["labels"]["pool"] == "train"
        assert (node["resources"].get("GPU", 0) > 0) == trains
    spot = {n for n, node in TYPES.items() if "InstanceMarketOptions" in node["node_config"]}
    assert spot == {"data", "train"}
    fall_back, first = TYPES["train_on_demand"], TYPES["train"]
    assert fall_back["resources"] == first["resources"]
    assert fall_back["node_config"] == {
        key: value for key, value in first["node_config"].items() if key != "InstanceMarketOptions"
    }


def test_nothing_listens_to_the_world_and_every_process_asks_for_the_token() -> None:
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in CLUSTER[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)
    assert re.findall(r"--dashboard-host=(\S+)", " ".join(starts)) == ["127.0.0.1"]
    assert CLUSTER["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "0.0.0.0" not in (ROOT / "cluster.yaml").read_text()
    assert "0.0.0.0" not in RAYJOB_FILE.read_text()


@pytest.mark.usefixtures("launcher")  # which says how ray is to be imported
def test_a_spot_machine_is_drained_on_its_notice() -> None:
    (watcher,) = (x for x in CLUSTER["worker_start_ray_commands"] if "ray_spot_notice" in x)
    assert watcher.startswith("RAY_AUTH_MODE=token ")
    assert "flock -n " in watcher, "one for each machine, also when Ray is started again"
    assert watcher.endswith("&"), "the launcher waits for its commands"
    module = re.findall(r"python -m (\S+) --address=\$RAY_HEAD_IP:6379", watcher)[0]
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    # on Kubernetes Ray does it itself, if the pod lives long enough
    from ray._private import ray_constants

    spec = RAYJOB["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in spec["workerGroupSpecs"]]
    spot = [pod for pod in pods if "spot" in pod.get("nodeSelector", {}).values()]
    assert len(spot) == 1
    (limit,) = spot[0]["containers"][0]["env"]
    assert hasattr(ray_constants, limit["name"])
    assert 30 <= int(limit["value"]) <= spot[0]["terminationGracePeriodSeconds"] - 30


def test_both_files_run_the_ray_that_is_tested() -> None:
    dockerfile = (RAYJOB_FILE.parent / "Dockerfile").read_text()
    images = re.findall(r"rayproject/ray:(\S+?)-py", (ROOT / "cluster.yaml").read_text())
    assert set(images) == {ray_version()}
    assert f"rayproject/ray:{ray_version()}-" in dockerfile
    assert RAYJOB["spec"]["rayClusterSpec"]["rayVersion"] == ray_version()


def test_nodes_install_the_package_with_its_constraints() -> None:
    assert "-c ~/pcd_ray/constraints.txt ~/pcd_ray" in CLUSTER["setup_commands"][0]
    assert CLUSTER["file_mounts"]["~/pcd_ray"] == "."
    copied = re.findall(
        r"^COPY --chown=ray (.*) \S+$",
        (RAYJOB_FILE.parent / "Dockerfile").read_text(),
        re.MULTILINE,
    )
    named = " ".join(copied).split()
    assert {"pyproject.toml", "constraints.txt", "pcd_ray"} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []


# ray.io/v1 as documented: https://docs.ray.io/en/master/cluster/kubernetes/references/api.html
_LABELS = {"pool": str}
_CONTAINER = {
    "name": str,
    "image": str,
    "env": [{"name": str, "value": str}],
    "resources": {
        kind: {"cpu": str, "memory": str, "nvidia.com/gpu": str} for kind in ("requests", "limits")
    },
}
_TEMPLATE = {
    "spec": {
        "serviceAccountName": str,
        "nodeSelector": {"karpenter.sh/capacity-type": str},
        "terminationGracePeriodSeconds": int,
        "containers": [_CONTAINER],
    }
}
_START = {"num-cpus": str, "num-gpus": str}
FIELDS = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "entrypoint": str,
        "submissionMode": str,
        "submitterConfig": {"backoffLimit": int},
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": {
            "rayVersion": str,
            "authOptions": {"mode": str},
            "enableInTreeAutoscaling": bool,
            "autoscalerOptions": {"version": str, "idleTimeoutSeconds": int},
            "headGroupSpec": {
                "serviceType": str,
                "rayStartParams": _START,
                "labels": _LABELS,
                "template": _TEMPLATE,
            },
            "workerGroupSpecs": [
                {
                    "groupName": str,
                    "priority": int,
                    "replicas": int,
                    "minReplicas": int,
                    "maxReplicas": int,
                    "labels": _LABELS,
                    "rayStartParams": _START,
                    "template": _TEMPLATE,
                }
            ],
        },
    },
}


def misfits(value: Any, fields: Any, place: str = "") -> Iterator[str]:
    """Yield the places of a document that the fields do not allow."""
    if isinstance(fields, dict) and isinstance(value, dict):
        for key, item in value.items():
            if key not in fields:
                yield f"{place}.{key}"
            else:
                yield from misfits(item, fields[key], f"{place}.{key}")
    elif isinstance(fields, list) and isinstance(value, list):
        for number, item in enumerate(value):
            yield from misfits(item, fields[0], f"{place}[{number}]")
    elif not (isinstance(fields, type) and type(value) is fields):
        yield place


def test_the_rayjob_has_documented_fields_of_the_right_types() -> None:
    assert list(misfits(RAYJOB, FIELDS)) == []
    wrong = RAYJOB | {"spec": RAYJOB["spec"] | {"backoffLimits": 3, "backoffLimit": "3"}}
    assert list(misfits(wrong, FIELDS)) == [".spec.backoffLimit", ".spec.backoffLimits"]
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    assert RAYJOB["spec"]["submissionMode"] in {"K8sJobMode", "HTTPMode", "SidecarMode"}


def test_the_rayjob_is_the_same_cluster() -> None:
    spec = RAYJOB["spec"]["rayClusterSpec"]
    groups = {group["groupName"].replace("-", "_"): group for group in spec["workerGroupSpecs"]}
    assert set(groups) == set(TYPES)
    assert {name: group["labels"] for name, group in groups.items()} == {
        name: node["labels"] for name, node in TYPES.items()
    }
    assert all(g["minReplicas"] == g["replicas"] == 0 <= g["maxReplicas"] for g in groups.values())
    assert groups["train"]["priority"] > groups["train_on_demand"]["priority"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] == 60 * CLUSTER["idle_timeout_minutes"]


def test_the_rayjob_runs_a_configuration_that_loads_on_the_nodes_that_it_brings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    program, verb, *words = shlex.split(RAYJOB["spec"]["entrypoint"].replace("/opt/pcd_ray/", ""))
    assert (program, verb, words[-2]) == ("pcd-ray", "train", "--result")
    config = config_from_argv([program, *words[:-2]])
    assert config.train.node_labels == TYPES["train"]["labels"]
    assert config.data.node_labels == TYPES["data"]["labels"]
    brought = {nodes.labels["pool"]: nodes for nodes in config.run.autoscaled_nodes}
    groups = {g["groupName"]: g for g in RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    assert set(brought) == POOLS
    for pool, nodes in brought.items():
        limits = groups[pool]["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert nodes.count == groups[pool]["maxReplicas"]
        assert nodes.cpus == float(limits["cpu"])
        assert nodes.gpus == float(limits.get("nvidia.com/gpu", 0))
    assert config.train.max_workers <= brought["train"].count * brought["train"].gpus
