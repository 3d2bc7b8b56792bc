"""Connections to a registry and to where it leads, through the proxies of HTTPS_PROXY, HTTP_PROXY and NO_PROXY."""

import ssl
from typing import Any, Final
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from finetune_trainer import redact

_TIMEOUT: Final = urllib3.Timeout(connect=10, read=60)


class Pools:
    """Pools of connections: one for direct ones, and one for each proxy."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._options: dict[str, Any] = {"retries": False, "timeout": _TIMEOUT, "ssl_context": tls}
        self._pools: dict[str, urllib3.PoolManager] = {}

    def request(self, method: str, url: str, **options: Any) -> urllib3.BaseHTTPResponse:
        """Send a request as urllib3's PoolManager does."""
        proxy = proxy_for(url)
        if proxy not in self._pools:
            self._pools[proxy] = self._through(proxy) if proxy else urllib3.PoolManager(**self._options)
        return self._pools[proxy].request(method, url, **options)

    def _through(self, proxy: str) -> urllib3.ProxyManager:
        login = urlsplit(proxy)
        headers = None
        if login.username is not None:
            password = unquote(login.password or "")
            redact.remember(password)
            headers = urllib3.make_headers(proxy_basic_auth=f"{unquote(login.username)}:{password}")
        return urllib3.ProxyManager(proxy, proxy_headers=headers, **self._options)


def proxy_for(url: str) -> str:
    """Return the URL of the proxy for `url`, '' for none, by the rules of Python's standard library."""
    parts = urlsplit(url)
    proxies = getproxies()
    named = proxies.get(parts.scheme) or proxies.get("all") or ""
    if not named or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return ""
    return named if "://" in named else f"http://{named}"
