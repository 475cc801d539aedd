"""A cluster on one machine, run as a script: standard input says how its nodes come and go.

It prints its address, then an answer to each line it was given: ``done`` to ``add`` and to
``remove`` (the oldest node is gone, ungracefully), that node's id to ``oldest``. The head does no
work, each other node has one CPU. It ends, and all nodes with it, when its input does.
"""

import socket
import subprocess
import sys
from pathlib import Path

STORE_BYTES = 120_000_000


class FaultyCluster:
    """The test's end of the script."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.address = self._answer()

    def tell(self, word: str) -> None:
        """Have a line carried out."""
        assert self._asked(word) == "done"

    def oldest(self) -> str:
        """Return the id of the node that will be removed."""
        return self._asked("oldest")

    def end(self) -> None:
        """End all nodes, the head included."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=300)

    def _asked(self, word: str) -> str:
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the cluster has ended"
        return line


def main(folder: str) -> None:
    from ray.cluster_utils import Cluster

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = Cluster()
    cluster.add_node(
        num_cpus=0,
        object_store_memory=STORE_BYTES,
        gcs_server_port=port,
        include_dashboard=False,
        temp_dir=folder,
    )
    nodes = []
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever Ray prints
    try:
        print(cluster.address, file=answers, flush=True)
        for line in sys.stdin:
            answer = "done"
            match line.strip():
                case "add":
                    nodes.append(cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES))
                case "oldest":
                    answer = nodes[0].node_id
                case "remove":
                    cluster.remove_node(nodes.pop(0), allow_graceful=False)
            print(answer, file=answers, flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
