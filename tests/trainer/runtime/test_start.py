"""What a run computes with is started when it is needed, once."""

import importlib.util
import random
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer import run
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.runtime import start
from finetune_trainer.runtime.device import RuntimeDevice
from finetune_trainer.runtime.start import hidden, start_runtime
from finetune_trainer.settings import Ranks

SPEC = {
    "model": {"source": "hf://org/base"},
    "dataset": {"train": "s3://data/x"},
    "output": {"uri": "s3://data/out"},
    "resources": {"gpusPerNode": 0},
}


def test_importing_it_does_not_import_torch() -> None:
    modules = "finetune_trainer.runtime.start, finetune_trainer.runtime.distributed, finetune_trainer.run"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_where_kernels_are_kept_is_said_before_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch settles on a directory of its own while it is imported: later is too late."""
    began: list[Any] = []
    monkeypatch.setattr(run, "check_trackers", lambda settings: None)
    monkeypatch.setattr(run, "set_compile_cache", began.append)

    def importing(*_: Any) -> None:
        assert began == ["the cache"]
        raise InterruptedError

    monkeypatch.setattr(run, "start_runtime", importing)
    place = SimpleNamespace(compile_cache="the cache", node="")
    ctx: Any = SimpleNamespace(
        spec=None,
        settings=SimpleNamespace(environment=place),
        ranks=Ranks(size=2),
        sharing=SimpleNamespace(once=None),
    )
    with pytest.raises(InterruptedError):
        run.run(ctx)


def test_libraries_do_not_find_trackers_that_they_would_import_and_a_job_that_asks_does(tmp_path: Path) -> None:
    """Weights & Biases is a sixth of what is imported, and most jobs do not report to it."""
    (tmp_path / "a_tracker.py").write_text("")
    sys.path.insert(0, str(tmp_path))
    try:
        with hidden(("a_tracker", "json")):
            assert importlib.util.find_spec("a_tracker") is None
            with pytest.raises(ImportError):
                import a_tracker  # type: ignore[import-not-found]
            assert importlib.util.find_spec("json") is not None, "what is there already stays"
        import a_tracker

        assert a_tracker.__file__ == str(tmp_path / "a_tracker.py")
    finally:
        sys.path.remove(str(tmp_path))


def test_libraries_that_no_run_needs_and_that_do_not_fit_this_torch_end_none(tmp_path: Path) -> None:
    """A torchvision that was built for another torch fails as it is imported: "operator torchvision::nms ..."."""
    needless = ("scipy", "torchaudio", "torchvision")
    for name in needless:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('made for another torch')")
        metadata = tmp_path / f"{name}-9.0.dist-info/METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n")
    script = f"""if True:
        import sys
        sys.path.append({str(tmp_path)!r})
        from finetune_api.spec import FineTuneJobSpec
        from finetune_trainer.runtime.start import start_runtime
        from finetune_trainer.settings import Ranks
        start_runtime(FineTuneJobSpec.model_validate({SPEC}), Ranks())
        from finetune_trainer import steps
        assert not {set(needless)} & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_transformers_has_found_before_is_not_hidden_from_it(tmp_path: Path) -> None:
    """It remembers that SciPy is installed, and imports it later."""
    for path, text in (
        ("scipy/__init__.py", ""),
        ("scipy/optimize.py", "linear_sum_assignment = None"),
        ("scipy-9.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: scipy\nVersion: 9.0\n"),
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    script = f"""if True:
        import sys
        sys.path.append({str(tmp_path)!r})
        from transformers.utils import is_scipy_available
        assert is_scipy_available()
        from finetune_api.spec import FineTuneJobSpec
        from finetune_trainer.runtime.start import start_runtime
        from finetune_trainer.settings import Ranks
        start_runtime(FineTuneJobSpec.model_validate({SPEC}), Ranks())
    """
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("gpus", "compiled", "begun"),
    [(2, "auto", ["hashes"]), (2, "disabled", []), (0, "auto", []), (0, "enabled", ["hashes"])],
)
def test_what_compiles_is_hashed_early_where_the_job_compiles(
    gpus: int, compiled: str, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(start, "hash_compilers", lambda: found.append("hashes"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    settings: Any = {"resources": {"gpusPerNode": gpus}, "training": {"compile": compiled}}
    spec = FineTuneJobSpec.model_validate(SPEC | settings)
    with pytest.raises(ConfigInvalid, match="no GPU is visible") if gpus else nullcontext():
        start_runtime(spec, Ranks(local_rank=1))
    assert found == begun


def test_it_may_be_called_again() -> None:
    spec = FineTuneJobSpec.model_validate(SPEC)
    drawn = []
    for _ in range(2):
        assert start_runtime(spec, Ranks()) == RuntimeDevice("cpu", torch_name="cpu")
        drawn.append((random.random(), float(torch.rand(()))))
    assert drawn[0] == drawn[1]
