"""The trainer's HTTP server: /metrics (Prometheus), /progress (TrainerReport as JSON), /healthz."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

import structlog

log = structlog.get_logger(__name__)
#: Seconds that the end of a run waits for a last scrape.
LAST_SCRAPE_SECONDS: Final = 0.5
#: Content type, and the function that returns the body.
Page = tuple[str, Callable[[], bytes]]


@contextmanager
def serve(listen: str, pages: dict[str, Page]) -> Iterator[str | None]:
    """Serve `pages`, by path, on `listen` ("host:port") while the block runs.

    Yields:
        The address in use, or None after a warning if it cannot be listened on: that never ends a run.
    """
    host, _, port = listen.rpartition(":")
    scrapes = _Scrapes()
    try:
        server = ThreadingHTTPServer((host.strip("[]"), int(port)), _handler(pages, scrapes))
    except (OSError, ValueError, OverflowError) as error:
        log.warning("Serving metrics and progress failed; the run goes on without", listen=listen, error=str(error))
        yield None
        return
    server.daemon_threads = True
    # The poll interval bounds how long shutdown() takes.
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="http", daemon=True)
    thread.start()
    try:
        yield f"{server.server_address[0]!s}:{server.server_address[1]}"
    finally:
        if scrapes.seen.is_set():  # whoever scrapes may do so once more, for the last numbers
            scrapes.ending.set()
            scrapes.last_served.wait(LAST_SCRAPE_SECONDS)
        server.shutdown()
        server.server_close()
        thread.join()


class _Scrapes:
    """Whether there was a request, whether the run is ending, and whether a request since then was answered."""

    def __init__(self) -> None:
        self.seen, self.ending, self.last_served = threading.Event(), threading.Event(), threading.Event()


def _handler(pages: dict[str, Page], scrapes: _Scrapes) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            page = pages.get(self.path.partition("?")[0])
            if page is None:
                self.send_error(404)
                return
            scrapes.seen.set()
            last = scrapes.ending.is_set()
            content_type, body_of = page
            body = body_of()
            with suppress(ConnectionError):  # the client may have hung up
                self.send_response(200)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            if last:
                scrapes.last_served.set()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
            pass

    return Handler
