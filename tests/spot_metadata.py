"""A machine's metadata service as AWS has it, on this one."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "a-token"


class SpotMetadata:
    """What the service knows; ``notice`` is empty where the machine stays."""

    url = ""
    notice = ""

    def announce(self, taken: datetime) -> None:
        """Say when the machine goes."""
        self.notice = json.dumps({"action": "terminate", "time": f"{taken:%Y-%m-%dT%H:%M:%SZ}"})

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if (method, path) == ("PUT", "/latest/api/token"):
            right = headers.get("x-aws-ec2-metadata-token-ttl-seconds", "").isdigit()
            return (200, TOKEN) if right else (400, "")
        if headers.get("x-aws-ec2-metadata-token") != TOKEN:
            return 401, ""
        if path != "/latest/meta-data/spot/instance-action" or not self.notice:
            return 404, ""
        return 200, self.notice


@contextmanager
def serving() -> Iterator[SpotMetadata]:
    """Serve it at ``url`` until the end of the block."""
    known = SpotMetadata()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, text = known.answer(self.command, self.path, headers)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_PUT(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        known.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield known
        finally:
            server.shutdown()
            thread.join()
