"""One way into the API server for Kopf and for us: kubernetes.aio's configuration, our headers, our counters."""

import time
import urllib.request
from collections.abc import Callable
from typing import Any

import aiohttp
import kopf
from kubernetes.aio import config
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.api_client import ApiClient

from finetune_operator.core.objects.raw import Raw
from finetune_operator.kube.freshness import CREDENTIALS_SECONDS, Freshness, Reach
from finetune_operator.kube.urls import namespace_of, resource_of, verb_of
from finetune_operator.kube.watch_stream import Events, Expired, version_in

#: Called with (verb, resource, code) after each request; the code is "error" when no answer came.
OnRequest = Callable[[str, str, str], None]


class Connection:
    """The configuration, and sessions made from it. Each session authenticates every request afresh, so that
    rotating tokens stay good, and counts it. `on_date` hears the server's clock, `on_list` of Kopf's lists. What
    `is_echo` and `is_known` say that we know already is left out of watches and of Kopf's lists."""

    def __init__(self, configuration: Configuration, on_request: OnRequest) -> None:
        self.configuration = configuration
        self.freshness, self.reach = Freshness(), Reach()
        self.on_date: Callable[[str], None] = lambda date: None
        self.on_list: Callable[[str, str], None] = lambda resource, namespace: None
        self.is_echo: Callable[[str, int], bool] = lambda resource, version: False
        self.is_known: Callable[[str, Raw], bool] = lambda resource, obj: False
        self._on_request = on_request
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
    async def load(cls, on_request: OnRequest) -> "Connection":
        """From the pod's service account, or from the kubeconfig. Raises ConfigException where there is neither."""
        configuration = Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            await config.load_kube_config(client_configuration=configuration)
        return cls(configuration, on_request)

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
        self._on_request(*self._names(params), str(answer.status))
        self.reach.answered(answer.status)
        if date := answer.headers.get("Date"):
            self.on_date(date)

    async def _count_failure(
        self, session: aiohttp.ClientSession, context: object, params: aiohttp.TraceRequestExceptionParams
    ) -> None:
        self._on_request(*self._names(params), "error")
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
