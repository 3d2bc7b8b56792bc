"""The entry of the command, before the command is there."""

import sys
from types import ModuleType

import pytest

from finetune_cli import __main__ as entry
from finetune_cli.errors import Exit


class _Interrupted(ModuleType):
    def __getattr__(self, name: str) -> object:
        raise KeyboardInterrupt


def test_ctrl_c_during_the_imports_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "finetune_cli.app", _Interrupted("finetune_cli.app"))
    assert entry.main() == Exit.INTERRUPTED
