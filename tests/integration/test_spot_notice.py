"""A notice as AWS gives it, from a server of the test, and a real Ray node that it is for."""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from faulty_cluster import FaultyCluster

EVENT_S = 300.0
NOTICE_S = 600.0  # AWS gives 120: a busy machine may take longer to drain
# a node that is drained ends when nothing holds it
HOLDER = """
import sys
import ray
from pcd_ray.ray_nodes import HEAD

class Holder:
    def node(self): return ray.get_runtime_context().get_node_id()

ray.init(address=sys.argv[1], log_to_driver=False)
holder = ray.remote(num_cpus=0, resources={HEAD: 0.001})(Holder).remote()
print(ray.get(holder.node.remote()), flush=True)
sys.stdin.read()
"""


class Metadata(BaseHTTPRequestHandler):
    """Version 2 of the metadata service: first out of order, then without a notice, then with."""

    gone = datetime.now(UTC)
    looks = 0

    def do_PUT(self) -> None:
        known = self.path == "/latest/api/token"
        lives_s = int(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0))
        self._answer(200 if known and lives_s > 0 else 400, "secret")

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") != "secret":
            return self._answer(401, "")
        assert self.path == "/latest/meta-data/spot/instance-action"
        kind = type(self)
        kind.looks += 1
        kind.gone = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=NOTICE_S)
        told = {"action": "terminate", "time": kind.gone.strftime("%Y-%m-%dT%H:%M:%SZ")}
        return self._answer({1: 500, 2: 404}.get(kind.looks, 200), json.dumps(told))

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def metadata() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cluster() -> Iterator[FaultyCluster]:
    """Return a head alone, since this machine is to have one node of it."""
    # a short name: sockets have it in theirs
    with tempfile.TemporaryDirectory(prefix="ray_", ignore_cleanup_errors=True) as name:
        built = FaultyCluster(Path(name))
        yield built
        built.end()


@pytest.fixture
def node(cluster: FaultyCluster) -> Iterator[str]:
    """Return the name of the cluster's node, which is held."""
    command = [sys.executable, "-c", HOLDER, cluster.address]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    yield holder.stdout.readline().strip()
    holder.kill()
    holder.communicate()


def test_on_a_notice_this_machines_node_is_drained_once_until_half_of_the_time(
    cluster: FaultyCluster, node: str, metadata: str
) -> None:
    from ray._raylet import GcsClient

    gcs = GcsClient(address=cluster.address)
    assert gcs.get_draining_nodes() == {}
    watcher = subprocess.run(
        [
            *(sys.executable, "-m", "pcd_ray.ray_spot_notice", f"--address={cluster.address}"),
            *(f"--metadata={metadata}", "--every-s=0.1"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        timeout=EVENT_S,
        env=os.environ | {"http_proxy": "http://127.0.0.1:9"},  # notices come from this machine
    )
    done = time.time()
    print(watcher.stdout)
    assert Metadata.looks == 3
    assert re.findall(r"HTTP Error \d+", watcher.stdout) == ["HTTP Error 500"]
    assert re.findall(r"node (\w+) is drained", watcher.stdout) == [node]
    ((drained, deadline_ms),) = gcs.get_draining_nodes().items()
    assert drained == node
    gone = Metadata.gone.timestamp()
    assert (gone + gone - NOTICE_S) / 2 - 1 < deadline_ms / 1000 < (gone + done) / 2 + 1
