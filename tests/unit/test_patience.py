import pytest

from pcd_ray.patience import may_pass

AWAY = "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7, Couldn't connect"


@pytest.mark.parametrize(
    "where",
    [
        "key 'SIGNATURE/NOT_FOUND.parquet' in bucket 'VALIDATION-data'",
        "key 'it's_SIGNATURE' in bucket 'bucket'",
        'path "bucket/INVALID_images"',
        "s3://VALIDATION/PERMISSION_DENIED",
    ],
)
def test_a_name_is_no_reason_to_give_up_and_a_refusal_beside_it_is(where: str) -> None:
    assert may_pass(OSError(f"When reading information for {where}: {AWAY}"), remote=True)
    for refused in (
        f"When reading information for {where}: AWS Error ACCESS_DENIED during GetObject operation",
        f"It couldn't be read: AWS Error SIGNATURE_DOES_NOT_MATCH, that's it, for {where}",
        f"google::cloud::Status(NOT_FOUND: No such object for {where})",
    ):
        assert not may_pass(OSError(refused), remote=True), refused
