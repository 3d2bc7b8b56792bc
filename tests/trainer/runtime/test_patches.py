"""Every library source that we patch around is one that somebody has looked at; patches are taken back."""

import ast
import hashlib
import inspect
import sys
from contextlib import AbstractContextManager
from importlib import import_module, metadata
from operator import attrgetter
from typing import Any

import pytest
import torch
from accelerate.utils import is_lomo_available

from finetune_trainer.runtime import patches
from finetune_trainer.runtime.patches import PATCHES, Patch


def source_of(target: str) -> str:
    """The source of a function, or of the assignment of a setting: "module:qualified.name"."""
    name, _, path = target.partition(":")
    module = import_module(name)
    found = attrgetter(path)(module)
    if inspect.isroutine(found):
        return inspect.getsource(found)
    text = inspect.getsource(module)
    body: list[ast.stmt] = ast.parse(text).body
    *classes, setting = path.split(".")
    for each in classes:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == each)
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(each, ast.Name) and each.id == setting for each in targets):
            return ast.get_source_segment(text, node) or ""
    raise LookupError(f"{target} is set nowhere in its module")


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_the_source_that_is_patched_is_one_that_was_looked_at(patch: Patch) -> None:
    library = patch.name.partition(":")[0]
    for target, known in patch.sources.items():
        found = hashlib.sha256(source_of(target).encode()).hexdigest()
        assert found in known, (
            f"{target} of {library} {metadata.version(library)} is not the source that our patch was written against."
            f" {patch.check} Then enter {found} in finetune_trainer.runtime.patches.PATCHES."
        )


@pytest.mark.parametrize(
    ("block", "target"),
    [
        (patches.without_gpu_sync(), "bitsandbytes.optim.optimizer:sync_gpu"),
        (patches.packed_sequences_known(), "transformers.masking_utils:find_packed_sequence_indices"),
    ],
    ids=["without_gpu_sync", "packed_sequences_known"],
)
def test_a_patch_ends_with_its_block_also_after_an_error(block: AbstractContextManager[None], target: str) -> None:
    name, _, path = target.partition(":")
    module: Any = import_module(name)
    original = attrgetter(path)(module)
    with pytest.raises(RuntimeError, match="in the block"), block:
        assert attrgetter(path)(module) is not original
        raise RuntimeError("in the block")
    assert attrgetter(path)(module) is original


def test_a_forward_that_was_swapped_is_restored_and_hooks_run_with_both() -> None:
    import torch

    module, called = torch.nn.Linear(2, 2), []
    module.register_forward_hook(lambda *_: called.append(1))
    x = torch.ones(1, 2)
    expected = module(x)
    patches.swap_forward(module, lambda x: x + 1)
    assert torch.equal(module(x), x + 1)
    patches.restore_forward(module)
    assert torch.equal(module(x), expected)
    assert len(called) == 3


def test_a_class_mixed_in_keeps_name_and_state() -> None:
    class Loud:
        def say(self) -> str:
            return super().say().upper()  # type: ignore[misc]

    class Plain:
        def __init__(self, word: str) -> None:
            self.word = word

        def say(self) -> str:
            return self.word

    one, other = Plain("one"), Plain("other")
    patches.mix_into(one, Loud)
    assert (one.say(), type(one).__name__, isinstance(one, Plain)) == ("ONE", "Plain", True)
    assert other.say() == "other"


def test_only_gradients_of_what_trains_are_reset() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False) for _ in range(2)])
    for each in model.parameters():
        each.grad = torch.ones(1, 1)
    patches.swap_zero_grad(model, torch.nn.ParameterList([model[0].weight]))
    model.zero_grad()
    assert model[0].weight.grad is None and model[1].weight.grad is not None


def test_nobody_looks_for_lomo_in_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lomo_optim", raising=False)
    patches.forget_lomo()
    monkeypatch.setattr(sys, "meta_path", [])
    assert not is_lomo_available()
