"""Names that stand in files stay inside their folder; URIs carry no credentials."""

import pytest

from pcd_ray.uris import OutsideError, SecretInUriError, inside, refuse_secrets

FOLDERS = ("/data/shards", "s3://bucket/shards?endpoint_override=h:1&scheme=http")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_name_inside_is_joined(folder: str) -> None:
    base, mark, query = folder.partition("?")
    for name, path in (
        ("a.jpg", "a.jpg"),
        ("a b/100%.jpg", "a b/100%.jpg"),
        ("./x/../a.jpg", "a.jpg"),
        ("..a/...", "..a/..."),
        ("12:30.jpg", "12:30.jpg"),
    ):
        assert inside(folder, name) == f"{base}/{path}{mark}{query}"


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a.jpg",
        "x/../../a.jpg",
        "..\\a.jpg",
        "/etc/passwd",
        "\\\\host\\a.jpg",
        "C:\\a.jpg",
        "~/a.jpg",
        "file:///etc/passwd",
        "s3://other/a.jpg",
        "a\0.jpg",
        None,
        7,
    ],
)
def test_a_name_that_leads_out_is_refused_in_words(folder: str, name: object) -> None:
    with pytest.raises(OutsideError, match=r"is no place inside .*shards.*do not trust the file"):
        inside(folder, name)


def test_a_query_cannot_be_smuggled_in_by_a_name() -> None:
    with pytest.raises(OutsideError):
        inside("s3://bucket/shards", "a.jpg?endpoint_override=elsewhere")
    assert inside("/data", "what?.jpg") == "/data/what?.jpg"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA1:hunter2@bucket/runs",
        "s3://AKIA1:hun/ter2@bucket/runs",
        "s3://AKIA1:/hunter2@bucket/runs",
        "s3://AKIA1:12/hunter2@bucket/runs",
        "s3://AKIA1:hunter2?AKIA1@bucket/runs",
        "s3://AKIA1:hunter2@hunter2/hunter2?x@bucket/runs",
        "s3:///AKIA1:hun/ter2@bucket/runs",
        "gs://AKIA1@bucket/runs",
        "gs://anonymous:hunter2@bucket/runs",
        "hdfs://AKIA1:hun/ter2@host:8020/runs",
        "hdfs://AKIA1:hun?ter2@host:8020/runs",
        "https://AKIA1:hunter2@host:8020/runs",
    ],
)
def test_what_stands_before_a_bucket_or_a_host_is_refused_and_none_of_it_repeated(uri: str) -> None:
    with pytest.raises(SecretInUriError) as refused:
        refuse_secrets(uri)
    message = str(refused.value)
    assert f"a URI of {uri.partition('://')[0]}://*** carries a key" in message
    for secret in ("AKIA1", "hun", "ter2", "12"):
        assert secret not in message


@pytest.mark.parametrize(
    "query",
    [
        "accesskey=hunter2",
        "access_key=hunter2",
        "AWSAccessKeyId=hunter2&Signature=hunter2",
        "secret_key_id=hunter2",
        "sessionToken=hunter2",
        "X-Amz-Credential=hunter2",
        "endpoint_override=http://user:hunter2@host",
        "endpoint_override=user:hunter2@host:9000",
        "scheme=http&endpoint_override=http%3A%2F%2Fuser%3Ahun%2Fter2%40host",
    ],
)
def test_a_secret_in_a_query_is_refused_and_not_repeated(query: str) -> None:
    with pytest.raises(
        SecretInUriError, match=r"a URI of s3://bucket/a@b carries a key"
    ) as refused:
        refuse_secrets(f"s3://bucket/a@b?{query}")
    assert "hunter2" not in str(refused.value)
    assert "ter2" not in str(refused.value)


@pytest.mark.parametrize(
    "uri",
    [
        "runs@1",
        "/data/12:30@x/a",
        "file:///data/user:word@x/a",
        "s3://bucket/a@b",
        "s3://bucket/time_12:30@x",
        "s3://bucket",
        "gs://anonymous@bucket/a@b:c",
        "hdfs://host:8020/a:b@c",
        "hdfs://[::1]:8020/a",
        "https://host/a@b:c",
        "CC BY (https://host): see there",
        "s3://bucket/a?endpoint_override=http://minio:9000&scheme=http&region=x",
        "s3://bucket/a?tls_ca_file_path=/etc/a@b.pem&allow_bucket_creation=true",
        "gs://bucket/a?project_id=7&retry_limit_seconds=1",
    ],
)
def test_names_with_signs_in_them_are_no_credentials(uri: str) -> None:
    assert refuse_secrets(uri) is None
