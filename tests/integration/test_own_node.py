"""A process beside Ray finds its machine's node, which notices are for."""

import os
import subprocess
import sys

import ray

FIND = "import sys; from pcd_ray.ray_spot_notice import own_node; print(own_node(sys.argv[1]))"


def test_a_process_beside_ray_finds_the_node_of_its_machine(ray_session: None) -> None:
    del ray_session
    address = ray.get_runtime_context().gcs_address
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    found = subprocess.run(
        [sys.executable, "-c", FIND, address],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    assert [node["NodeID"] for node in ray.nodes()] == [found.stdout.strip()]
