"""AWS's notice that a spot machine will be taken away, passed on to Ray.

Runs beside Ray on each node: ``python -m pcd_ray.ray_spot_notice --address=HEAD:6379``. A training
run then stores its step, and the loss counts as a preemption, not as a failure. Ray's launcher
passes no notice on; on Kubernetes Ray itself drains the node of a pod that is told to go.

Source: the instance metadata service, version 2, path ``spot/instance-action`` (EC2 User Guide).
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import ray

from pcd_ray.errors import ClusterError

METADATA_URL = "http://169.254.169.254"
"""Where an EC2 instance asks about itself."""
LOOK_EVERY_S = 5.0
"""As AWS advises; a notice comes two minutes ahead."""
_TIMEOUT_S = 5.0
_REASON = "DRAIN_NODE_REASON_PREEMPTION"


def spot_notice(metadata_url: str = METADATA_URL) -> datetime | None:
    """Return when this machine will be taken away; None: nothing is known of that.

    Raises:
        OSError: the metadata service does not answer, or refuses to.
        ValueError: its answer is no notice.
    """
    token = _ask(f"{metadata_url}/latest/api/token", "PUT", "ttl-seconds", "60")
    try:
        text = _ask(f"{metadata_url}/latest/meta-data/spot/instance-action", "GET", "", token)
    except urllib.error.HTTPError as error:
        if error.code == 404:  # no notice, as on a machine that is not a spot one
            return None
        raise
    try:
        return datetime.fromisoformat(json.loads(text)["time"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{text!r:.80} says no time; a notice of AWS does") from error


def drain(address: str, taken: datetime, *, node_id: str = "") -> None:
    """Tell Ray that a node will be taken away.

    Ray Train starts its workers anew when their time is up, and the old ones must have ended before
    the machine goes: it is told half of the time that is left.

    Args:
        address: of the head, HOST:PORT.
        taken: when.
        node_id: of the node, in hexadecimal digits; empty: this machine's.

    Raises:
        ClusterError: Ray does not take it, or the head does not answer.
    """
    left_s = max(0.0, (taken - datetime.now(UTC)).total_seconds())
    # no public function does this; the command is one for developers, and hidden
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address]
    command += ["--node-id", node_id or own_node(address), "--reason", _REASON]
    command += ["--reason-message", "AWS will take this spot machine"]
    command += ["--deadline-remaining-seconds", f"{left_s / 2:.0f}"]
    if code := subprocess.run(command, check=False).returncode:
        raise ClusterError(f"`ray drain-node --address {address}` ends with exit code {code}")


def own_node(address: str) -> str:
    """Return the id of this machine's node of a cluster.

    `ray drain-node` would start a Ray of its own to look for it.
    """
    ray.init(address=address, log_to_driver=False)
    try:
        return str(ray.get_runtime_context().get_node_id())
    finally:
        ray.shutdown()


def watch(
    look: Callable[[], datetime | None],
    tell: Callable[[datetime], None],
    *,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Look for a notice until there is one and it is told; trouble is said and tried again.

    Args:
        look: as `spot_notice`.
        tell: as `drain`.
        wait: passes seconds.
    """
    trouble = ""
    while True:
        try:
            taken = look()
            if taken is not None:
                tell(taken)
                _say(f"told Ray that this machine will be taken away at {taken:%H:%M:%S} UTC")
                return
            trouble = ""
        except Exception as error:  # Ray's are of many kinds, and nobody else watches
            if trouble != str(error):  # once: it may last for as long as the node does
                _say(f"no notice can be passed on ({type(error).__name__}: {error}); trying again")
            trouble = str(error)
        wait(LOOK_EVERY_S)


def main() -> None:
    """Watch, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", required=True, help="the head, HOST:PORT")
    parser.add_argument("--node-id", default="", help="of which node; else this machine's")
    parser.add_argument("--metadata-url", default=METADATA_URL, help="who gives the notice")
    given = parser.parse_args()
    watch(
        lambda: spot_notice(given.metadata_url),
        lambda taken: drain(given.address, taken, node_id=given.node_id),
    )


def _ask(url: str, method: str, header: str, value: str) -> str:
    name = "-".join(filter(None, ["X-aws-ec2-metadata-token", header]))
    request = urllib.request.Request(url, method=method, headers={name: value})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on no network
    with direct.open(request, timeout=_TIMEOUT_S) as answer:
        return str(answer.read().decode())


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
