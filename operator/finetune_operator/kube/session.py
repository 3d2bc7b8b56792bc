"""One way into the API server for Kopf and for us: kubernetes.aio's configuration, our headers, our counters."""

import time
import urllib.request
from collections.abc import Callable
from typing import Any

import aiohttp
import kopf
from aiohttp.streams import AsyncStreamIterator
from kubernetes.aio import config
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.api_client import ApiClient
from yarl import URL

from finetune_operator.core.objects.raw import Raw
from finetune_operator.observability.metrics import Metrics


def resource_of(path: str) -> str:
    """The plural, with its subresource, that a URL path addresses: 'jobs', 'finetunejobs/status'."""
    parts = path.strip("/").split("/")
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    if len(rest) > 2 and rest[0] == "namespaces":
        rest = rest[2:]
    return "/".join((rest[0], rest[2])) if len(rest) > 2 else rest[0] if rest else "discovery"


def namespace_of(path: str) -> str:
    """The namespace in a URL path; empty where there is none."""
    parts = path.split("/")
    return parts[parts.index("namespaces") + 1] if "namespaces" in parts[:-1] else ""


def verb_of(method: str, url_path: str, is_watch: bool) -> str:
    if is_watch:
        return "watch"
    if method != "GET":
        return {"POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}.get(method, method.lower())
    parts = url_path.strip("/").split("/")
    named = parts[2:] if parts[0] == "api" else parts[3:]
    return "get" if len(named) in (2, 4, 5) else "list"


#: How long credentials are used before they are asked for again; asking is slow, and tokens rotate by the hour.
CREDENTIALS_SECONDS = 10.0


class Freshness:
    """When each watch last showed a sign of life: an event, or the bookmark the server sends every minute."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], float] = {}

    def note(self, url: URL) -> None:
        """A sign of life from the watch at `url`."""
        about = url.query.get("fieldSelector", "").rpartition("=")[2]
        self._seen[resource_of(url.path) + (f"/{about}" if about else ""), namespace_of(url.path)] = time.monotonic()

    def forget(self, namespace: str) -> None:
        """The watches of a namespace that may not be seen any more are not late."""
        self._seen = {watch: seen for watch, seen in self._seen.items() if watch[1] != namespace}

    def ages(self) -> dict[tuple[str, str], float]:
        """Seconds since the last sign, by resource and namespace (empty: all)."""
        now = time.monotonic()
        return {watch: now - seen for watch, seen in self._seen.items()}


class Reach:
    """Since when the API server answers every request; an outage of its own is no fault of ours."""

    def __init__(self) -> None:
        self._since: float | None = None

    def answered(self, code: int) -> None:
        """One answer came in."""
        if code >= 500 or code == 429:
            self._since = None
        elif self._since is None:
            self._since = time.monotonic()

    def failed(self) -> None:
        """One did not."""
        self._since = None

    def seconds(self) -> float:
        """How long it has answered without a break; 0 while it does not."""
        return 0.0 if self._since is None else time.monotonic() - self._since


class Events:
    """The body of a watch, line by line: `note` is told of every sign of life, and lines that `skip` are left out.

    Half of all events are echoes of our own writes, and Kopf takes longer over an event than we do over the whole job.
    """

    def __init__(self, content: aiohttp.StreamReader, note: Callable[[], None], skip: Callable[[bytes], bool]) -> None:
        self._content = content
        self._note, self._skip = note, skip
        self._rest = b""

    def __getattr__(self, name: str) -> object:
        return getattr(self._content, name)

    def iter_chunked(self, size: int) -> AsyncStreamIterator[bytes]:
        return AsyncStreamIterator(lambda: self._read(size))

    async def _read(self, size: int) -> bytes:
        """Some whole lines, or what is left at the end."""
        while chunk := await self._content.read(size):
            self._note()
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            if kept := [line for line in lines if not self._skip(line)]:
                return b"\n".join([*kept, b""])
        rest, self._rest = self._rest, b""
        return rest


#: What a server says in a watch that is too old for it.
_EXPIRED = b'{"type":"ERROR","object":{"kind":"Status","status":"Failure","reason":"Expired","code":410}}\n'


class Expired:
    """The body of a watch that was answered 410, as if the server had said so in the watch. Kopf then lists anew; at
    the status it would give up, and all its other watches with it."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content, self._left = content, _EXPIRED

    def __getattr__(self, name: str) -> object:
        return getattr(self._content, name)

    def iter_chunked(self, size: int) -> AsyncStreamIterator[bytes]:
        return AsyncStreamIterator(self._read)

    async def _read(self) -> bytes:
        said, self._left = self._left, b""
        return said


_VERSION = b'"resourceVersion":"'


def version_in(line: bytes) -> int:
    """The resource version in a line of JSON without reading it all; 0 where there is none. Quotes within strings are
    escaped, so no text of a user's can look like the key."""
    begin = line.find(_VERSION) + len(_VERSION)
    found = line[begin : line.find(b'"', begin)]
    return int(found) if begin >= len(_VERSION) and found.isdigit() else 0


class Connection:
    """The configuration, and sessions made from it. Each session authenticates every request afresh, so that
    rotating tokens stay good, and counts it. `on_date` hears the server's clock, `on_list` of Kopf's lists. What
    `is_echo` and `is_known` say that we know already is left out of watches and of Kopf's lists."""

    def __init__(self, configuration: Configuration, metrics: Metrics) -> None:
        self.configuration = configuration
        self.freshness, self.reach = Freshness(), Reach()
        self.on_date: Callable[[str], None] = lambda date: None
        self.on_list: Callable[[str, str], None] = lambda resource, namespace: None
        self.is_echo: Callable[[str, int], bool] = lambda resource, version: False
        self.is_known: Callable[[str, Raw], bool] = lambda resource, obj: False
        self._metrics = metrics
        self._credentials: dict[str, str] = {}
        self._credentials_due = 0.0
        self._trace = aiohttp.TraceConfig()
        self._trace.on_request_start.append(self._authenticate)
        self._trace.on_request_end.append(self._count)
        self._trace.on_request_exception.append(self._count_failure)
        # Looking for proxies and .netrc takes two threads a request, so it is done only where there is a proxy.
        options = {"response_class": self._response_class(), "trust_env": bool(urllib.request.getproxies())}
        if configuration.proxy:
            options["proxy"] = configuration.proxy
        configuration.client_session_kwargs = options
        configuration.connection_pool_maxsize = 64

    @classmethod
    async def load(cls, metrics: Metrics) -> "Connection":
        """From the pod's service account, or from the kubeconfig. Raises ConfigException where there is neither."""
        configuration = Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            await config.load_kube_config(client_configuration=configuration)
        return cls(configuration, metrics)

    def session(self, *more: aiohttp.TraceConfig) -> aiohttp.ClientSession:
        """A session of one's own; close it when done."""
        self.configuration.trace_configs = [self._trace, *more]
        made: aiohttp.ClientSession = ApiClient(self.configuration).rest_client._create_pool_manager()
        return made

    def kopf_login(self) -> kopf.AiohttpSession:
        """The credentials that Kopf asks for: a session like ours that also tells of lists. Kopf closes it."""
        lists = aiohttp.TraceConfig()
        lists.on_request_end.append(self._note_list)
        return kopf.AiohttpSession(aiohttp_session=self.session(lists), server=self.configuration.host)

    async def _authenticate(
        self, session: aiohttp.ClientSession, context: object, params: aiohttp.TraceRequestStartParams
    ) -> None:
        if time.monotonic() >= self._credentials_due:
            self._credentials_due = time.monotonic() + CREDENTIALS_SECONDS
            settings = (await self.configuration.auth_settings()).values()
            self._credentials = {s["key"]: s["value"] for s in settings if s["in"] == "header" and s["value"]}
        params.headers.update(self._credentials)

    async def _count(
        self, session: aiohttp.ClientSession, context: object, params: aiohttp.TraceRequestEndParams
    ) -> None:
        answer = params.response
        self._metrics.api_call(*self._names(params), str(answer.status))
        self.reach.answered(answer.status)
        if date := answer.headers.get("Date"):
            self.on_date(date)

    async def _count_failure(
        self, session: aiohttp.ClientSession, context: object, params: aiohttp.TraceRequestExceptionParams
    ) -> None:
        self._metrics.api_call(*self._names(params), "error")
        self.reach.failed()

    async def _note_list(
        self, session: aiohttp.ClientSession, context: object, params: aiohttp.TraceRequestEndParams
    ) -> None:
        url = params.url
        if params.response.status == 200 and "watch" not in url.query and "continue" not in url.query:
            self.on_list(resource_of(url.path), namespace_of(url.path))

    @staticmethod
    def _names(params: aiohttp.TraceRequestEndParams | aiohttp.TraceRequestExceptionParams) -> tuple[str, str]:
        path = params.url.path
        return verb_of(params.method, path, "watch" in params.url.query), resource_of(path)

    def _response_class(self) -> type[aiohttp.ClientResponse]:
        connection = self

        class Response(aiohttp.ClientResponse):
            """A response that, when it is a watch, is read through Events. Kopf alone reads lists by `json`; it would
            start a task for each object, which is most of the memory a restart takes."""

            async def start(self, server: object) -> aiohttp.ClientResponse:
                await super().start(server)  # type: ignore[arg-type]
                if "watch" in self.url.query and self.status == 410:
                    self.status, self.content = 200, Expired(self.content)  # type: ignore[assignment]
                elif "watch" in self.url.query and self.status == 200:
                    url, resource = self.url, resource_of(self.url.path)
                    connection.freshness.note(url)
                    self.content = Events(  # type: ignore[assignment]
                        self.content,
                        lambda: connection.freshness.note(url),
                        lambda line: connection.is_echo(resource, version_in(line)),
                    )
                return self

            async def json(self, **options: Any) -> Any:
                found = await super().json(**options)
                if isinstance(found, dict) and isinstance(items := found.get("items"), list):
                    resource = resource_of(self.url.path)
                    found["items"] = [obj for obj in items if not connection.is_known(resource, obj)]
                return found

        return Response
