"""A failed test on a Kubernetes API shows what each party said: jobs' statuses, pods' output, the operator's log.

A scenario that fails once in a hundred runs is understood from this, or not at all.
"""

from collections.abc import Generator

import pytest
import yaml

from support.node.node import ProcessNode
from support.operator.fixtures import Jobs, StartOperator
from support.operator.process import OperatorProcess

_TAIL = 4000


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.failed:
        for value in getattr(item, "funcargs", {}).values():
            report.sections.extend(_said_by(value))
    return report


def _said_by(fixture: object) -> list[tuple[str, str]]:
    """Return titles and texts; what cannot be asked any more says so and hides nothing of the failure itself."""
    try:
        if isinstance(fixture, Jobs):
            found = fixture.kube.list("FineTuneJob")
            return [(f"status of {j['metadata']['name']}", yaml.safe_dump(j.get("status"), width=200)) for j in found]
        if isinstance(fixture, ProcessNode):
            return [(f"output of pod {name}", text[-_TAIL:]) for name, text in fixture.logs_by_pod().items()]
        operators = fixture.started if isinstance(fixture, StartOperator) else [fixture]
        return [("the operator's log", o.logs()[-_TAIL:]) for o in operators if isinstance(o, OperatorProcess)]
    except Exception as error:
        return [(f"{type(fixture).__name__} does not answer", repr(error))]
