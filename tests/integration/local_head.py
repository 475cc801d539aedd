"""A Ray head as a cluster has it, on this machine alone: token on, dashboard on, jobs submitted."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from processes import wait_for

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
EVENT_S = 300.0
"""Longest wait for a single event; a loaded machine is slow."""


@dataclass(frozen=True, slots=True)
class Head:
    """A running head."""

    pid: int
    """Process of ``ray start``."""
    folder: Path
    """Its temporary folder, Ray's session and its home among them."""
    dashboard: str
    """URL of the dashboard, which takes jobs."""
    environment: dict[str, str]
    """Environment of a client that knows the token."""

    def submit(self, *words: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """Submit a job of jobs/ with the repository as its working folder."""
        options = ["--working-dir", str(ROOT), *([] if wait else ["--no-wait"])]
        return self.job("submit", *options, "--", sys.executable, *words)

    def job(self, *words: str, without: str = "") -> subprocess.CompletedProcess[str]:
        """Run ``ray job ...``; ``without`` leaves one variable out of its environment."""
        environment = {k: v for k, v in self.environment.items() if k != without}
        return subprocess.run(
            [str(RAY), "job", *words],
            env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=2 * EVENT_S,
        )  # fmt: skip

    def status(self, job: str) -> str:
        """Return what the dashboard says of a job: ``RUNNING``, ``STOPPED`` ..."""
        return str(json.loads(self.get(f"/api/jobs/{job}"))["status"])

    def get(self, path: str, *, token: bool = True) -> str:
        """Return what the dashboard answers."""
        held = self.folder / "home" / ".ray" / "auth_token"
        headers = {"Authorization": f"Bearer {held.read_text()}"} if token else {}
        request = urllib.request.Request(self.dashboard + path, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())

    def travelled(self) -> set[str]:
        """Return the top-level names that the last job's working folder was unpacked with."""
        unpacked = self.folder.glob("ray/session_*/runtime_resources/working_dir_files/*/")
        newest = max(unpacked, key=lambda path: path.stat().st_mtime)
        return {path.name for path in newest.iterdir()}


def submitted(output: str) -> str:
    """Return the name of the job that ``ray job submit`` speaks of."""
    return re.findall(r"raysubmit_\w+", output)[0]


@contextmanager
def local_head() -> Iterator[Head]:
    """Start a head of two CPUs and end all its processes."""
    folder = Path(tempfile.mkdtemp(prefix="head_"))
    token = folder / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text(secrets.token_hex(32))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment.pop("PYTHONPATH", None)  # what a job imports must have travelled with it
    environment |= {
        "HOME": str(token.parents[1]),
        "RAY_AUTH_MODE": "token",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",  # 3 by default: too few for a loaded machine
    }
    gcs, dashboard, agent, agent_grpc, client = free_ports(5)
    command = [
        str(RAY), "start", "--head", "--block", "--disable-usage-stats",
        f"--port={gcs}", "--node-ip-address=127.0.0.1", f"--ray-client-server-port={client}",
        f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
        "--num-cpus=2", "--object-store-memory=200000000", f"--temp-dir={folder / 'ray'}",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://127.0.0.1:{dashboard}"
    head = Head(process.pid, folder, url, environment | {"RAY_API_SERVER_ADDRESS": url})
    try:
        wait_for(lambda: answers(head, process), timeout_s=EVENT_S)
        yield head
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def answers(head: Head, process: "subprocess.Popen[bytes]") -> bool:
    """Say whether the dashboard takes jobs."""
    assert process.poll() is None, (head.folder / "head.log").read_text()
    try:
        head.get("/api/jobs/")
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def end(head: "subprocess.Popen[bytes]") -> None:
    """End a head and all that descends from it, by process id: nothing of it is worth keeping."""
    for pid in [head.pid, *children_of(head.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    head.wait()


def children_of(pid: int) -> list[int]:
    """Return all descendants of a process."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                status = (folder / "status").read_text()
            except OSError:  # it has ended
                continue
            parents[int(folder.name)] = int(status.partition("PPid:")[2].split()[0])
    found: list[int] = []
    new = [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens to now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
