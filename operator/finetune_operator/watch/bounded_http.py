"""GET from a server that nobody trusts: with a bound on the bytes, on the turns of the event loop, and on the time."""

import asyncio
import http.client
import io
import ipaddress
import socket

#: Bytes of one answer that are read, with its status lines and headers.
MAX_BYTES = 64 * 1024
#: Pause between two reads: who sends byte by byte gets a few turns of the event loop, not one for each byte.
PAUSE_SECONDS = 0.02


class BadAnswer(OSError):
    """The answer is too long, or not the one of an HTTP server."""


class _Received:
    """What http.client takes for a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_: object) -> io.BytesIO:
        return io.BytesIO(self._data)


async def get(ip: str, port: int, path: str, seconds: float) -> bytes:
    """Return the body of an answer with the status 200.

    Args:
        ip: Address of the server. A name is refused, for nothing may be looked up.
        port: Its port.
        path: What to get.
        seconds: The time for all of it.

    Raises:
        BadAnswer: The answer is another, or longer than MAX_BYTES.
        OSError: The connection failed.
        TimeoutError: The server has not closed the connection in time.
    """
    try:
        address = ipaddress.ip_address(ip)
    except ValueError as error:
        raise BadAnswer(str(error)) from None
    host = f"[{ip}]" if address.version == 6 else ip
    request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAccept: application/json\r\nConnection: close\r\n\r\n"
    async with asyncio.timeout(seconds):
        data = await _exchange((ip, port), address.version, request.encode())
    return _body(data)


async def _exchange(address: tuple[str, int], version: int, request: bytes) -> bytes:
    """Send, and read until the server closes: from the socket, for a stream would read whatever it is sent."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET) as connection:
        connection.setblocking(False)
        await loop.sock_connect(connection, address)
        await loop.sock_sendall(connection, request)
        data = b""
        while chunk := await loop.sock_recv(connection, MAX_BYTES + 1 - len(data)):
            data += chunk
            if len(data) > MAX_BYTES:
                raise BadAnswer(f"more than {MAX_BYTES} bytes")
            await asyncio.sleep(PAUSE_SECONDS)
    return data


def _body(data: bytes) -> bytes:
    response = http.client.HTTPResponse(_Received(data))  # type: ignore[arg-type]
    try:
        response.begin()
        body = response.read()
    except (http.client.HTTPException, ValueError, OSError) as error:
        raise BadAnswer(f"no HTTP answer: {type(error).__name__}") from None
    if response.status != http.HTTPStatus.OK:
        raise BadAnswer(f"status {response.status}")
    if not body:
        raise BadAnswer("an empty body")
    return body
