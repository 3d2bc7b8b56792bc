"""One way into the API server for Kopf and for us: kubernetes.aio's configuration, our headers, our counters."""

import time
import urllib.request
from collections.abc import Callable

import aiohttp
import kopf
from aiohttp.streams import AsyncStreamIterator
from kubernetes.aio import config
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.api_client import ApiClient
from yarl import URL

from finetune_operator.metrics import Metrics


def resource_of(path: str) -> str:
    """The plural, with its subresource, that a URL path addresses: 'jobs', 'finetunejobs/status'."""
    parts = path.strip("/").split("/")
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    if len(rest) > 2 and rest[0] == "namespaces":
        rest = rest[2:]
    return "/".join((rest[0], rest[2])) if len(rest) > 2 else rest[0] if rest else "discovery"


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
        parts = url.path.split("/")
        namespace = parts[parts.index("namespaces") + 1] if "namespaces" in parts[:-1] else ""
        about = url.query.get("fieldSelector", "").rpartition("=")[2]
        self._seen[resource_of(url.path) + (f"/{about}" if about else ""), namespace] = time.monotonic()

    def ages(self) -> dict[tuple[str, str], float]:
        """Seconds since the last sign, by resource and namespace (empty: all)."""
        now = time.monotonic()
        return {watch: now - seen for watch, seen in self._seen.items()}


class _Noted:
    """The body of a watch that tells `note` of every chunk that comes in."""

    def __init__(self, content: aiohttp.StreamReader, note: Callable[[], None]) -> None:
        self._content = content
        self._note = note

    def __getattr__(self, name: str) -> object:
        return getattr(self._content, name)

    def iter_chunked(self, size: int) -> AsyncStreamIterator[bytes]:
        async def read() -> bytes:
            chunk = await self._content.read(size)
            self._note()
            return chunk

        return AsyncStreamIterator(read)


class Connection:
    """The configuration, and sessions made from it. Each session authenticates every request afresh, so that
    rotating tokens stay good, and counts it."""

    def __init__(self, configuration: Configuration, metrics: Metrics) -> None:
        self.configuration = configuration
        self.freshness = Freshness()
        self._metrics = metrics
        self._credentials: dict[str, str] = {}
        self._credentials_due = 0.0
        trace = aiohttp.TraceConfig()
        trace.on_request_start.append(self._authenticate)
        trace.on_request_end.append(self._count)
        trace.on_request_exception.append(self._count_failure)
        configuration.trace_configs = [trace]
        # Looking for proxies and .netrc takes two threads a request, so it is done only where there is a proxy.
        options = {"response_class": self._response_class(), "trust_env": bool(urllib.request.getproxies())}
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

    def client(self) -> ApiClient:
        """A client of our own; close it when done."""
        return ApiClient(self.configuration)

    def kopf_login(self) -> kopf.AiohttpSession:
        """The credentials that Kopf asks for: a session like ours. Kopf closes it."""
        session = self.client().rest_client._create_pool_manager()
        return kopf.AiohttpSession(aiohttp_session=session, server=self.configuration.host)

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
        self._metrics.api_call(*self._names(params), str(params.response.status))

    async def _count_failure(
        self, session: aiohttp.ClientSession, context: object, params: aiohttp.TraceRequestExceptionParams
    ) -> None:
        self._metrics.api_call(*self._names(params), "error")

    @staticmethod
    def _names(params: aiohttp.TraceRequestEndParams | aiohttp.TraceRequestExceptionParams) -> tuple[str, str]:
        path = params.url.path
        return verb_of(params.method, path, "watch" in params.url.query), resource_of(path)

    def _response_class(self) -> type[aiohttp.ClientResponse]:
        freshness = self.freshness

        class Response(aiohttp.ClientResponse):
            """A response that, when it is a watch, notes every chunk of it."""

            async def start(self, connection: object) -> aiohttp.ClientResponse:
                await super().start(connection)  # type: ignore[arg-type]
                if "watch" in self.url.query and self.status == 200:
                    freshness.note(self.url)
                    self.content = _Noted(self.content, lambda: freshness.note(self.url))  # type: ignore[assignment]
                return self

        return Response
