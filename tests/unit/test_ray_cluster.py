import contextlib
import os

import pytest

from pcd_ray.errors import ClusterError
from pcd_ray.ray_cluster import check_outlives_job, connect, environment


def test_the_address_that_takes_jobs_is_not_one_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # by a test before in this process
    with pytest.raises(ClusterError, match=r"submit --address http://127\.0\.0\.1:8265 "):
        connect()


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://AKIA1:hunter2@host:8265", "https://***"),
        ("http://host:8265/?token=hunter2", "http://host:8265/"),
        ("ray://AKIA1:hun/ter2@host:10001", "ray://***"),
        ("AKIA1:hunter2@host:6379", "***"),
    ],
)
def test_a_password_in_an_address_is_not_repeated(
    address: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*, address: str, **_: object) -> None:
        raise ConnectionError(f"cannot reach {address}")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", fails)
    with pytest.raises(ClusterError) as refused:
        connect()
    assert f"RAY_ADDRESS={shown!r} " in str(refused.value)
    for secret in ("AKIA1", "hun", "ter2"):
        assert secret not in str(refused.value)


def test_an_address_without_a_password_is_told_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*, address: str, **_: object) -> None:
        raise ConnectionError(f"cannot reach {address}")

    monkeypatch.setenv("RAY_ADDRESS", "[::1]:6379")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", fails)
    with pytest.raises(ClusterError, match=r"'\[::1\]:6379' does not answer \(cannot reach \["):
        connect()


def test_starting_ray_changes_no_variable_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str | None] = {}

    def fails(**_: object) -> None:
        seen["mode"] = os.environ.get("RAY_AUTH_MODE")
        raise ConnectionError

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", fails)
    before = dict(os.environ)
    with pytest.raises(ClusterError):
        connect()
    assert seen == {"mode": "disabled"}
    assert dict(os.environ) == before


@pytest.mark.parametrize("before", [None, "mine"])
def test_variables_are_set_for_a_call_and_put_back(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PCD_RAY_TEST", raising=False)
    if before:
        monkeypatch.setenv("PCD_RAY_TEST", before)
    with contextlib.suppress(ZeroDivisionError), environment({"PCD_RAY_TEST": "ours"}):
        assert os.environ["PCD_RAY_TEST"] == "ours"
        raise ZeroDivisionError
    assert os.environ.get("PCD_RAY_TEST") == before


def test_nothing_is_stored_where_a_job_has_its_working_folder() -> None:
    check_outlives_job("run.root", "s3://bucket/runs")
    inside = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/runs"
    with pytest.raises(ClusterError, match=r"run\.root=/tmp/ray/.* a place that all nodes share"):
        check_outlives_job("run.root", inside)
