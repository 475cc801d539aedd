"""A spot machine's notice reaches Ray once, whatever goes wrong before."""

from datetime import UTC, datetime
from urllib.error import URLError

import pytest
from spot_metadata import serving

from pcd_ray.errors import ClusterError
from pcd_ray.ray_spot_notice import LOOK_EVERY_S, spot_notice, watch

TAKEN = datetime(2026, 11, 25, 8, 22, 0, tzinfo=UTC)


def test_a_notice_is_when_the_machine_goes_and_none_is_none() -> None:
    with serving() as metadata:
        assert spot_notice(metadata.url) is None
        metadata.announce(TAKEN)
        assert spot_notice(metadata.url) == TAKEN


@pytest.mark.parametrize("notice", ["going soon", '{"action": "stop"}', '"soon"', '{"time": 3}'])
def test_an_answer_that_says_no_time_is_no_notice(notice: str) -> None:
    with serving() as metadata:
        metadata.notice = notice
        with pytest.raises(ValueError, match=r"says no time|Expecting value"):
            spot_notice(metadata.url)


def test_a_service_that_is_not_there_is_no_notice() -> None:
    with serving() as metadata:
        url = metadata.url
    with pytest.raises(URLError, match="refused"):
        spot_notice(url)


def test_it_looks_until_there_is_a_notice_and_tells_until_it_is_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = [None, OSError("away"), OSError("away"), KeyError("time"), TAKEN, TAKEN]
    refusals = [ClusterError("ray drain-node ends with 1")]
    waited: list[float] = []
    told: list[datetime] = []

    def look() -> datetime | None:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def tell(taken: datetime) -> None:
        if refusals:
            raise refusals.pop()
        told.append(taken)

    watch(look, tell, wait=waited.append)
    assert told == [TAKEN]
    assert answers == []
    assert waited == [LOOK_EVERY_S] * 5
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(";")[0] for line in said[:-1]] == [
        "no notice can be passed on (OSError: away)",  # said once
        "no notice can be passed on (KeyError: 'time')",
        "no notice can be passed on (ClusterError: ray drain-node ends with 1)",
    ]
    assert said[-1] == "told Ray that this machine will be taken away at 08:22:00 UTC"
