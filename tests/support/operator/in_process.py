"""The operator's own code in the test's process, behind a proxy that does harm: killed as one abandons it, and open to
questions that a process of its own would not answer.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kubernetes.aio.client import Configuration

from finetune_operator.kube.session import Connection
from finetune_operator.main import Operator
from finetune_operator.observability.metrics import Metrics
from finetune_operator.reconcile.clock import Clock
from finetune_operator.settings import Settings
from support.server.fault_proxy import ApiProxy

#: How long it takes to end, once it is cancelled. Its watches need two seconds at most.
ENDS_WITHIN_SECONDS = 10.0


@asynccontextmanager
async def living(proxy: ApiProxy, namespace: str, clock: Clock | None = None) -> AsyncIterator[Operator]:
    """An operator behind the proxy; at the end it is abandoned as it stands. AssertionError when it does not end."""
    configuration = Configuration()
    configuration.host = proxy.url
    configuration.api_key = {"BearerToken": f"Bearer {proxy.access.token}"}
    metrics = Metrics()
    settings = Settings(namespaces=(namespace,), request_timeout_seconds=5, kueue="disabled", start_timeout_seconds=600)
    operator = Operator(settings, Connection(configuration, metrics.api_call), metrics, clock)
    me = asyncio.current_task()
    assert me is not None
    work = asyncio.create_task(operator.work())
    # When the operator gives up by itself, so does the test.
    work.add_done_callback(lambda ended: ended.cancelled() or proxy.dead.is_set() or me.cancel(repr(ended.exception())))
    try:
        yield operator
    finally:
        work.cancel()
        await asyncio.wait({work}, timeout=ENDS_WITHIN_SECONDS)
        await operator.session.close()
        assert work.done(), f"it does not end: {[task.get_name() for task in asyncio.all_tasks()]}"
