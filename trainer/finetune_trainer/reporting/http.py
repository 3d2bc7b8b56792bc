"""The trainer's small HTTP server: /metrics (Prometheus), /progress (TrainerReport as JSON), /healthz."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import structlog

log = structlog.get_logger(__name__)
#: How long the end of a run waits for one more request.
LAST_CHANCE_SECONDS = 0.5
Page = tuple[str, Callable[[], bytes]]


@contextmanager
def serve(listen: str, pages: dict[str, Page]) -> Iterator[str | None]:
    """Serve `pages` (path -> content type, body) on `listen` ("host:port") while the block runs.

    Yields the address in use. A port that cannot be had is a warning, never the end of a run: yields None.
    """
    host, _, port = listen.rpartition(":")
    audience = _Audience()
    try:
        server = ThreadingHTTPServer((host.strip("[]"), int(port)), _handler(pages, audience))
    except (OSError, ValueError, OverflowError) as error:
        log.warning("Metrics and progress are not served", listen=listen, error=str(error))
        yield None
        return
    server.daemon_threads = True
    # The interval is how long the end of a run waits for the end of the server.
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="http", daemon=True)
    thread.start()
    try:
        yield f"{server.server_address[0]!s}:{server.server_address[1]}"
    finally:
        if audience.asked.is_set():  # whoever has asked may do so again, and hear the last numbers
            audience.ending.set()
            audience.served.wait(LAST_CHANCE_SECONDS)
        server.shutdown()
        server.server_close()
        thread.join()


class _Audience:
    """Whether anybody has asked, whether the end is near, and whether anybody who asked since then was answered."""

    def __init__(self) -> None:
        self.asked, self.ending, self.served = threading.Event(), threading.Event(), threading.Event()


def _handler(pages: dict[str, Page], audience: _Audience) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            page = pages.get(self.path.partition("?")[0])
            if page is None:
                self.send_error(404)
                return
            audience.asked.set()
            last = audience.ending.is_set()
            content_type, body_of = page
            body = body_of()
            with suppress(ConnectionError):  # who asked may have hung up
                self.send_response(200)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            if last:
                audience.served.set()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
            pass

    return Handler
