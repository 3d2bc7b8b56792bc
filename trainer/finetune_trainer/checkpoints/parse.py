"""Whether a checkpoint, every byte of which is there, is one that a run can go on from."""

import dataclasses
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from finetune_api import constants
from finetune_trainer.checkpoints.state import STATE_FILE, TrainingState
from finetune_trainer.errors import type_and_reason
from finetune_trainer.stores.errors import StoreCorrupted

T = TypeVar("T")
_TRAINER_STATE: Final = "trainer_state.json"
_METRICS: Final = Path(constants.METRICS_FILE).name
#: No state is larger, whatever the run: a larger file would only fill the memory.
_MAX_STATE_BYTES: Final = 64 << 20


def require_usable(folder: Path, step: int) -> TrainingState:
    """Return the run's memory of the checkpoint of `step` in `folder`.

    Raises:
        StoreCorrupted: A file is missing or does not parse. The text names it.
    """
    state = _parsed(folder / STATE_FILE, lambda path: TrainingState.load(path.parent))
    if state.step != step:
        raise StoreCorrupted(f"{STATE_FILE} is of step {state.step}, not {step}")
    _parsed(folder / _TRAINER_STATE, lambda path: _require_trainer_state(path, step))
    if (folder / _METRICS).exists():
        _parsed(folder / _METRICS, _require_lines, limit=None)
    for path in _weights(folder):
        _parsed(path, _require_tensors, limit=None)
    for path in sorted(folder.glob("*.pt*")):
        _parsed(path, _require_archive, limit=None)
    return state


def require_fit(folder: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the adapters in `folder` hold the run's `tensors`, by name and shape, and no others.

    Raises:
        StoreCorrupted: The text names the file and the first tensor that differs.
    """
    for path in _weights(folder):
        _parsed(path, lambda path: _require_shapes(path, tensors), limit=None)


def _weights(folder: Path) -> list[Path]:
    return sorted({folder / constants.ADAPTER_WEIGHTS_FILE, *folder.rglob("*.safetensors")})


def _parsed(path: Path, parse: Callable[[Path], T], limit: int | None = _MAX_STATE_BYTES) -> T:
    try:
        if limit is not None and path.stat().st_size > limit:
            raise ValueError(f"larger than {limit >> 20} MiB")
        return parse(path)
    except Exception as error:
        raise StoreCorrupted(f"{path.name} cannot be used: {type_and_reason(error)}") from None


def _require_trainer_state(path: Path, step: int) -> None:
    """Read what transformers will go on from, as it will: it takes no key that it does not know."""
    from transformers.trainer_callback import TrainerState

    state, new = TrainerState.load_from_json(str(path)), TrainerState()
    if state.global_step != step:
        raise ValueError(f"of step {state.global_step}, not {step}")
    for field in dataclasses.fields(new):
        found, usual = getattr(state, field.name), getattr(new, field.name)
        is_number = isinstance(found, int | float) and isinstance(usual, int | float)
        if usual is not None and type(found) is not type(usual) and not is_number:
            raise TypeError(f"{field.name} is {type(found).__name__}, not {type(usual).__name__}")


def _require_lines(path: Path) -> None:
    with path.open("rb") as file:
        for line in file:
            if not isinstance(json.loads(line)["step"], int):
                raise ValueError("a line without a step")


def _require_tensors(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(str(path), "numpy") as file:
        if not list(file.keys()):
            raise ValueError("no tensors")


def _require_shapes(path: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    from safetensors import safe_open

    with safe_open(str(path), "numpy") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, it is no dict
    for name in sorted(found.keys() | tensors.keys()):
        if name not in found:
            raise ValueError(f"no tensor {name}")
        if name not in tensors:
            raise ValueError(f"{name} is no tensor of this run's adapter")
        if found[name] != tensors[name]:
            raise ValueError(f"{name} has shape {list(found[name])}, not {list(tensors[name])}")


def _require_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if not archive.namelist():
            raise ValueError("empty")
