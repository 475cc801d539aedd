"""Ray's fake multi-node provider, for machines where a node may be slow to start."""

import os
import signal
from contextlib import suppress
from typing import Any

from processes import of_session
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class SimulatedCloud(FakeMultiNodeProvider):
    """Loses no node.

    Ray gives a node 30 s to start. The fake provider forgets one that takes longer, but its
    processes stay: the node joins, works, and is never taken away, since nobody knows of it.
    """

    def _create_node_with_resources_and_labels(self, *args: Any) -> None:
        with self.lock:
            before = _raylets()
            try:
                super()._create_node_with_resources_and_labels(*args)
            except Exception:
                for pid in _raylets() - before:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise  # the autoscaler launches another one


def _raylets() -> set[int]:
    processes = of_session(os.getsid(0))
    return {pid for pid, words in processes.items() if words[0].endswith("/raylet/raylet")}
