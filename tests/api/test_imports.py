"""No import circle in any package of ours, imports inside functions included."""

from collections.abc import Iterator

import grimp
import pytest

PACKAGES = ("finetune_api", "finetune_operator", "finetune_cli", "finetune_trainer")


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    first, *others = PACKAGES
    return grimp.build_graph(first, *others)


def circles(graph: grimp.ImportGraph) -> Iterator[list[str]]:
    """Yield each circle as a sorted list of its modules: the strongly connected components (Tarjan, 1972)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> Iterator[list[str]]:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            if imported not in index:
                yield from visit(imported)
                lowest[module] = min(lowest[module], lowest[imported])
            elif imported in stack:
                lowest[module] = min(lowest[module], index[imported])
        if lowest[module] == index[module]:
            at = stack.index(module)
            component = sorted(stack[at:])
            del stack[at:]
            if len(component) > 1:
                yield component

    for module in sorted(graph.modules):
        if module not in index:
            yield from visit(module)


def test_circles_are_found():
    graph = grimp.ImportGraph()
    for importer, imported in (("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "e")):
        graph.add_module(importer)
        graph.add_module(imported)
        graph.add_import(importer=importer, imported=imported)
    assert list(circles(graph)) == [["a", "b", "c"]]


def test_no_module_imports_itself_by_a_detour(graph: grimp.ImportGraph):
    assert len(graph.modules) > 100, "the packages were not found"
    assert list(circles(graph)) == []
