"""Watch for the notice that AWS gives before it takes a spot machine away; drain its Ray node then.

A run stores a checkpoint when a machine of its workers is drained, and the loss costs it one of
``train.max_preemptions``, none of ``train.max_failures``. Run on each machine, beside Ray::

    python -m pcd_ray.ray_spot_notice --address=HEAD:6379

On Kubernetes nothing watches: there Ray drains a node itself when its pod is deleted.
"""

import argparse
import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

import ray

METADATA = "http://169.254.169.254"
"""Where a machine of AWS asks about itself, by version 2 of that service."""
_EVERY_S = 5.0  # as AWS advises
_TIMEOUT_S = 5.0
_log = logging.getLogger("spot_notice")


def notice(metadata: str = METADATA) -> datetime | None:
    """Return when this machine will be taken away; None: nobody has said that it will.

    Raises:
        OSError: nobody answers, or with an error.
        ValueError: the answer is no notice.
    """
    seconds = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    ask = urllib.request.Request(f"{metadata}/latest/api/token", method="PUT", headers=seconds)
    token = {"X-aws-ec2-metadata-token": _answer(ask)}
    ask = urllib.request.Request(f"{metadata}/latest/meta-data/spot/instance-action", headers=token)
    try:
        told = json.loads(_answer(ask))
        return datetime.fromisoformat(told["time"])
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    except (KeyError, TypeError) as error:
        raise ValueError(f"the notice names no time ({error!r})") from error


def drain(address: str, gone: datetime) -> None:
    """Tell Ray that this machine's node will be taken away.

    Ray Train starts its workers anew at the deadline, and must end the old ones before the machine
    goes: it is told half of the time that is left.

    Args:
        address: of the cluster; this machine has one node of it.
        gone: when the machine goes.
    """
    # without a node `ray drain-node` starts a Ray of its own, and drains that
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        node = ray.get_runtime_context().get_node_id()
    finally:
        ray.shutdown()
    left_s = max(0.0, (gone - datetime.now(UTC)).total_seconds())
    words = [
        f"--address={address}",
        f"--node-id={node}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        f"--reason-message=AWS takes this spot machine at {gone.isoformat()}",
        f"--deadline-remaining-seconds={left_s / 2:.0f}",
    ]
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "drain-node", *words], check=True)
    _log.info("node %s is drained: the machine goes in %.0f s", node, left_s)


def watch(address: str, *, metadata: str = METADATA, every_s: float = _EVERY_S) -> None:
    """Return once the node of this machine is drained; whatever fails is said and tried again."""
    said = ""
    while True:
        try:
            gone = notice(metadata)
            if gone is not None:
                drain(address, gone)
                return
        except Exception as error:  # Ray's are of many kinds, and nobody else watches
            if str(error) != said:
                _log.warning("%s; trying again every %g s", error, every_s)
            said = str(error)
        time.sleep(every_s)


def _answer(ask: urllib.request.Request) -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
    with direct.open(ask, timeout=_TIMEOUT_S) as answer:
        return str(answer.read().decode())


def _main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--address", required=True, help="of the cluster, HEAD:6379")
    words.add_argument("--metadata", default=METADATA, help="where notices are asked for")
    words.add_argument("--every-s", type=float, default=_EVERY_S, help="seconds between looks")
    given = words.parse_args()
    watch(given.address, metadata=given.metadata, every_s=given.every_s)


if __name__ == "__main__":
    _main()
