"""Sessions to the API server, for Kopf and for us: kubernetes.aio's configuration, our headers, our counters."""

import time
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.api_client import ApiClient

from finetune_api import answers, constants
from finetune_operator.core.objects.raw import Raw
from finetune_operator.kube.errors import unreadable
from finetune_operator.kube.freshness import CREDENTIALS_SECONDS, Freshness, Reachability
from finetune_operator.kube.urls import resource_of, verb_of
from finetune_operator.kube.watch_stream import Events, Expired, show_event

#: Called with (verb, resource, code) after each request; the code is "error" when no answer came.
OnRequest = Callable[[str, str, str], None]


class Connection:
    """Configuration of the API server, and the sessions made from it.

    Each session authenticates every request anew, so that rotated tokens work, and counts it.

    Attributes:
        on_date: Called with the Date header of each answer.
        is_echo: Tells whether a watch event (resource, version) only echoes a write of our own; watches skip it.
        is_known: Tells whether an object (resource, object) is in the cache; parsed lists leave it out.
        on_unreadable: Called with (resource, count) for objects that can be read in parts only, or not at all.
    """

    def __init__(self, configuration: Configuration, on_request: OnRequest) -> None:
        self.configuration = configuration
        self.freshness, self.reachability = Freshness(), Reachability()
        self.on_date: Callable[[str], None] = lambda date: None
        self.is_echo: Callable[[str, int], bool] = lambda resource, version: False
        self.is_known: Callable[[str, Raw], bool] = lambda resource, obj: False
        self.on_unreadable: Callable[[str, int], None] = lambda resource, count: None
        self._on_request = on_request
        self._credentials: dict[str, str] = {}
        self._credentials_due = 0.0
        self._trace = aiohttp.TraceConfig()
        self._trace.on_request_start.append(self._authenticate)
        self._trace.on_request_end.append(self._count)
        self._trace.on_request_exception.append(self._count_failure)
        # trust_env takes two threads per request, so it is on only where there is a proxy.
        options: dict[str, Any] = {
            "response_class": self._response_class(),
            "trust_env": bool(urllib.request.getproxies()),
            "headers": {"User-Agent": f"{constants.FIELD_MANAGER}/{version('finetune-operator')}"},
        }
        if configuration.proxy:
            options["proxy"] = configuration.proxy
        configuration.client_session_kwargs = options
        configuration.connection_pool_maxsize = 64

    @classmethod
    async def load(cls, on_request: OnRequest) -> "Connection":
        """Load the pod's service account or the kubeconfig. Raises ConfigException where there is neither."""
        configuration = Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            await config.load_kube_config(client_configuration=configuration)
        return cls(configuration, on_request)

    def session(self, *more: aiohttp.TraceConfig) -> aiohttp.ClientSession:
        """Open a session; the caller closes it. `more` are further aiohttp traces."""
        self.configuration.trace_configs = [self._trace, *more]
        made: aiohttp.ClientSession = ApiClient(self.configuration).rest_client._create_pool_manager()
        return made

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
        self._on_request(*self._labels(params), str(answer.status))
        self.reachability.record_answer(answer.status)
        if date := answer.headers.get("Date"):
            self.on_date(date)

    async def _count_failure(
        self, session: aiohttp.ClientSession, context: object, params: aiohttp.TraceRequestExceptionParams
    ) -> None:
        self._on_request(*self._labels(params), "error")
        self.reachability.record_failure()

    @staticmethod
    def _labels(params: aiohttp.TraceRequestEndParams | aiohttp.TraceRequestExceptionParams) -> tuple[str, str]:
        path = params.url.path
        return verb_of(params.method, path, "watch" in params.url.query), resource_of(path)

    def _response_class(self) -> type[aiohttp.ClientResponse]:
        connection = self

        class Response(aiohttp.ClientResponse):
            """A response whose watch events pass through Events, and whose parsed lists hold only new objects.

            Only Kopf parses lists with `json`. It starts a task for each object, which would take most of the memory
            of a restart.
            """

            async def start(self, server: object) -> aiohttp.ClientResponse:
                await super().start(server)  # type: ignore[arg-type]
                if "watch" in self.url.query and self.status == 410:
                    self.status, self.content = 200, Expired(self.content)  # type: ignore[assignment]
                elif "watch" in self.url.query and self.status == 200:
                    url, resource = self.url, resource_of(self.url.path)
                    connection.freshness.record(url)
                    self.content = Events(  # type: ignore[assignment]
                        self.content,
                        lambda: connection.freshness.record(url),
                        lambda line: show_event(
                            line,
                            lambda seen: connection.is_echo(resource, seen),
                            lambda: connection.on_unreadable(resource, 1),
                        ),
                    )
                return self

            async def json(self, **options: Any) -> Any:
                resource, data = resource_of(self.url.path), await self.read()
                try:
                    found = answers.read_list(data, lambda obj: not connection.is_known(resource, obj))
                except ValueError:
                    return self._no_list(data)
                if count := len(found.cut) + found.lost:
                    connection.on_unreadable(resource, count)
                return {**found.head, "items": found.items}

            def _no_list(self, data: bytes) -> Any:
                try:
                    return answers.read_object(data)[0]
                except ValueError as error:  # which Kopf would not survive
                    raise aiohttp.ClientConnectionError(str(unreadable(self.url.path, data, error))) from None

        return Response
