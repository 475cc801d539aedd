"""One private Ray of two CPUs for all integration tests."""

import os
import tempfile
from collections.abc import Iterator

import pytest
from s3_server import ENVIRONMENT

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported; nothing to protect here
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # each run ends seconds earlier
os.environ["REPORTER_UPDATE_INTERVAL_MS"] = "60000"  # nobody looks at what each process uses
os.environ.update(ENVIRONMENT)  # of a server in the tests' own process; Ray's processes inherit it


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    import ray

    with tempfile.TemporaryDirectory(prefix="ray_", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=300_000_000,
            _temp_dir=folder,
            log_to_driver=False,
            # processes that have loaded torch serve the next test too: a run in 25 s, not 41
            _system_config={
                "num_workers_soft_limit": 16,
                "idle_worker_killing_time_threshold_ms": 300_000,
            },
        )
        try:
            yield
        finally:
            ray.shutdown()
