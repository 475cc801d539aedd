"""A process beside Ray: it finds its machine's node, which notices are for, and can be stopped."""

import os
import signal
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


STOPPED = """
import signal, sys
from pcd_ray.ray_connect import join_ray

join_ray(sys.argv[1])
try:
    signal.raise_signal(signal.SIGTERM)
except SystemExit as stop:
    sys.exit(100 + stop.code)
"""


def test_sigterm_unwinds_a_driver_without_a_word_of_rays_core(ray_session: None) -> None:
    """The core's own handler would end it with SIGABRT 3 s later, in the midst of its clean-up."""
    del ray_session
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, address], capture_output=True, text=True, timeout=120
    )
    assert "SIGTERM received" not in done.stderr
    assert done.returncode == 100 + signal.SIGTERM, done.stderr
