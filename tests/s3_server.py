"""A real S3 server in this process, moto's, that can be told to fail now and then."""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

KEY_ID, SECRET = "TESTKEYOFNOBODY", "a-secret-that-nobody-may-write-down"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY_ID,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REGION": "us-east-1",
}
"""What processes need that ask the server."""
_ERRORS = {
    "busy": ("503 Slow Down", "SlowDown"),
    "broken": ("500 Internal Server Error", "InternalError"),
    "denied": ("403 Forbidden", "AccessDenied"),
    "expired": ("400 Bad Request", "ExpiredToken"),
    "key": ("403 Forbidden", "InvalidAccessKeyId"),
    "secret": ("403 Forbidden", "SignatureDoesNotMatch"),
    "region": ("301 Moved Permanently", "PermanentRedirect"),
    "region in signature": ("400 Bad Request", "AuthorizationHeaderMalformed"),
    "quota": ("403 Forbidden", "QuotaExceeded"),
}


def any_request(environ: dict[str, Any]) -> bool:
    del environ
    return True


def writing(environ: dict[str, Any]) -> bool:
    return environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE")


@dataclass
class S3Server:
    """The server as a WSGI application in front of moto's; buckets are made by `make_bucket`."""

    app: Callable[..., Iterable[bytes]]
    port: int = 0
    requests: list[str] = field(default_factory=list)
    """``METHOD /bucket/key`` of each request."""
    to_fail: float = 0
    """How many of the next requests that `which` takes fail."""
    failure: str = "busy"
    """One of `_ERRORS`, or ``dropped``: the connection ends without a word."""
    which: Callable[[dict[str, Any]], bool] = any_request
    failed: int = 0
    """How many have failed."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
            fails = self.to_fail > 0 and self.which(environ)
            if fails:
                self.to_fail -= 1
                self.failed += 1
        if not fails:
            return self.app(environ, start)
        if self.failure == "dropped":
            with contextlib.suppress(OSError):
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            start("503 Gone", [])
            return []
        status, code = _ERRORS[self.failure]
        text = f"<Error><Code>{code}</Code><Message>as the test asked for</Message></Error>"
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))])
        return [text.encode()]

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def query(self) -> str:
        """What makes a URI one of this server."""
        return f"?endpoint_override={self.host}&scheme=http"

    def fail(
        self,
        count: float,
        failure: str = "busy",
        which: Callable[[dict[str, Any]], bool] = any_request,
    ) -> None:
        """Let the next ``count`` of some requests fail."""
        self.to_fail, self.failure, self.which, self.failed = count, failure, which, 0
        self.requests.clear()

    def client(self) -> Any:
        """Return a boto3 client, another than what is tested."""
        import boto3

        return boto3.client("s3", endpoint_url=f"http://{self.host}", region_name="us-east-1")


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Serve S3 on a port of this machine, and let this process know the credentials."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    served = S3Server(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, served, threaded=True)
    served.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in ENVIRONMENT.items():
            patched.setenv(name, value)
        patched.delenv("AWS_SESSION_TOKEN", raising=False)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
