"""Which target of the Makefile runs a test, told by where the test lies and what it uses; and which tests begin.

Every test has one level: `unit` (`make test-fast`), `scenario` (whole trainer runs and other long ones) or `e2e` (on a
Kubernetes API).
A test marked `nightly` is left to `make test-nightly`. A level marked on the test itself wins over its folder.
"""

from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
UNIT, SCENARIO, E2E = LEVELS = ("unit", "scenario", "e2e")
_E2E_FOLDERS = {"chaos", "integration"}
_API_SERVERS = {"cluster", "every_cluster", "either_cluster"}
_SCENARIOS = "scenarios"
#: How the names of tests elsewhere begin that take as long as a scenario.
LONG_ELSEWHERE = (
    "chart/test_dashboards_drawn.py",
    "chart/test_install.py",
    "chart/test_scripts.py",
    "images/test_audit.py",
    "images/test_build_script.py",
    "models/test_families.py",
    "operator/core/sweep/test_properties.py",
    "operator/core/test_fuzz.py",
    "operator/core/test_policy_in_force.py",
    "operator/core/test_properties.py",
    "trainer/checkpoints/test_remote.py",
    "trainer/engine/kernels/test_attention.py",
    "trainer/engine/test_attention.py",
    "trainer/engine/test_compilation.py",
    "trainer/engine/test_dequantize.py",
    "trainer/engine/test_fp8.py",
    "trainer/engine/test_fsdp.py",
    "trainer/model/test_grouped_experts.py",
    "trainer/stores/s3/test_store.py",
    "trainer/stores/test_faulty_stores.py",
    "trainer/stores/test_fetch.py",
    "trainer/stores/test_stores.py",
    "trainer/stores/test_transfer_memory.py",
)
#: How the names of long tests begin, the longest first: a run on several workers ends no sooner than the test that
#: began last.
LONGEST_FIRST = (
    "docs/test_commands.py::test_the_quickstart",
    "docs/test_commands.py::test_the_readme",
    "integration/test_end_to_end.py",
    "trainer/scenarios/test_distributed.py",
    "trainer/scenarios/test_resume.py",
    "trainer/scenarios/test_variants.py",
    "integration/test_command_line.py",
    "trainer/scenarios/test_stop.py",
    "trainer/scenarios/test_recovery.py",
    "trainer/scenarios/test_kills.py",
    "trainer/scenarios/test_remote.py",
)


def level_of(name: str, fixtures: set[str]) -> str:
    """The level of the test of that name (`folder/file.py::test`, below tests/) that uses `fixtures`."""
    folders = Path(name.partition("::")[0]).parts
    if folders[0] in _E2E_FOLDERS or fixtures & _API_SERVERS:
        return E2E
    return SCENARIO if _SCENARIOS in folders or name.startswith(LONG_ELSEWHERE) else UNIT


def deal(names: Sequence[str], hands: int) -> list[int]:
    """Order tests so that each of `hands` equal, consecutive parts begins with long ones.

    pytest-xdist's worksteal gives every worker one such part to begin with, and moves tests from the end of a part.
    Tests that share a line of LONGEST_FIRST stay together, for they share fixtures.
    """
    groups: dict[int, list[int]] = {}
    short: list[int] = []
    for index, name in enumerate(names):
        rank = next((rank for rank, start in enumerate(LONGEST_FIRST) if name.startswith(start)), None)
        (short if rank is None else groups.setdefault(rank, [])).append(index)
    long = [groups[rank] for rank in sorted(groups)]
    order: list[int] = []
    for hand in range(hands):
        order += [index for group in long[hand::hands] for index in group]
        room = max(0, len(names) * (hand + 1) // hands - len(order))
        order += short[:room]
        del short[:room]
    return order


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None, None, None]:
    """Mark every test before `-m` chooses among them, and order what it has chosen."""
    for item in items:
        if not any(item.get_closest_marker(level) for level in LEVELS):
            item.add_marker(level_of(_name(item), set(getattr(item, "fixturenames", ()))))
    yield
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = [items[index] for index in deal([_name(item) for item in items], workers)]


def _name(item: pytest.Item) -> str:
    return item.nodeid.removeprefix(f"{TESTS.name}/")
