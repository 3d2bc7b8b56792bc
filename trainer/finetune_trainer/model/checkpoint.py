"""The files of a base model's weights: each is whole, and holds every tensor that the model needs, in numbers."""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

import structlog
import torch
from safetensors import SafetensorError, safe_open

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.data.tokenizer import LFS_POINTER
from finetune_trainer.errors import ConfigInvalid, whole_text
from finetune_trainer.model.architecture import model_class
from finetune_trainer.model.base import BaseModel
from finetune_trainer.model.finite import is_finite

log = structlog.get_logger(__name__)
_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
#: Names listed of what may be hundreds.
_LISTED: Final = 5
#: Where transformers looks for an adapter that lies beside a base model: nowhere.
NO_ADAPTER: Final = {"subfolder": "no-adapter"}


def check_weights(folder: Path, base: BaseModel, spec: FineTuneJobSpec) -> None:
    """Check that the weights in `folder` are all of the model's, and of its shapes. No model is loaded.

    Of weights that are stored or loaded in bitsandbytes' own way, all values are read besides: they must be finite. All
    others are looked at as they load (weights.load_base_model), for reading them takes as long as loading them.

    A weight that is missing would be random, and training would go on without a word. Tensors that the model has no
    place for are logged: they are not loaded. So is an adapter that lies beside the weights.

    Raises:
        ConfigInvalid: Naming the file, or the tensors.
    """
    if (folder / "adapter_config.json").exists():
        log.warning(f"An adapter lies beside the weights of {spec.model.source}: it is ignored, the base model is used")
    files = _files(folder, spec.model.source)
    for file in files:
        _check_file(file, spec.model.source, base.quantized, values=not finite_while_loading(base, spec))
    if not base.quantized:  # transformers cannot lay out quantized weights without loading them
        check_names(_loading_info(folder, base, spec), spec.model.source)


def finite_while_loading(base: BaseModel, spec: FineTuneJobSpec) -> bool:
    """Return whether load_base_model looks at all values that it loads."""
    return not base.quantized and spec.quantization.bits != 8


def check_values(folder: Path, source: str) -> None:
    """Raise ConfigInvalid, naming file and tensor, if the weights in `folder` hold NaN or infinity."""
    for file in _files(folder, source):
        _check_file(file, source, quantized=True)  # whether they are was asked before


def check_names(info: Mapping[str, Any], source: str, quiet: bool = False) -> None:
    """Check transformers' report of a load: no tensor may be missing, or of another shape.

    Tensors without a place in the model are logged, unless `quiet`.

    Raises:
        ConfigInvalid: Naming the tensors.
    """
    unexpected = info["unexpected_keys"]
    left_over = f"; it holds {_some(unexpected)}, which the model has no place for" if unexpected else ""
    if missing := info["missing_keys"]:
        raise ConfigInvalid(f"spec.model.source: the weights of {source} lack {_some(missing)}{left_over}")
    if mismatched := info["mismatched_keys"]:
        name, found, wanted = sorted(mismatched, key=str)[0]
        more = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
        raise ConfigInvalid(
            f"spec.model.source: the weights of {source} do not fit its config.json: {name} has shape {list(found)},"
            f" the model's has {list(wanted)}{more}"
        )
    if errors := info.get("error_msgs"):
        raise ConfigInvalid(f"spec.model.source: the weights of {source} cannot be read: {'; '.join(errors)[:400]}")
    if unexpected and not quiet:
        log.warning(f"Weights of {source} that this model has no place for are not loaded: {_some(unexpected)}")


def _some(names: Any) -> str:
    """Return the first few of the names, and how many there are."""
    names = sorted(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"


def _files(folder: Path, source: str) -> list[Path]:
    """Return the files that transformers will load. Raises ConfigInvalid."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        there = ", ".join(islice(sorted(path.name for path in folder.glob("*.safetensors")), _LISTED))
        raise ConfigInvalid(
            f"spec.model.source: {source} has neither {_SINGLE} nor {_INDEX}, which names the parts; it has {there}"
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigInvalid(f"spec.model.source: {_INDEX} of {source} is no index of weights") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConfigInvalid(f"spec.model.source: {source} lacks {_some(missing)}, which its {_INDEX} names")
    return [folder / name for name in names]


def _check_file(file: Path, source: str, quantized: bool, values: bool = True) -> None:
    """Raise ConfigInvalid if `file` is cut or damaged, or holds NaN, infinity or, unsaid, quantized numbers.

    Of NaN and infinity alone, all `values` are read; safetensors compares the header with the file's size.
    """
    try:
        for name, tensor in _tensors(file):
            if not quantized and _wants_scales(name, tensor):
                raise ConfigInvalid(
                    f"spec.model.source: {file.name} of {source} has {name} as"
                    f" {str(tensor.dtype).removeprefix('torch.')}, whose numbers mean nothing without scales, and"
                    " config.json has no quantization_config: take the original weights"
                )
            if values and not is_finite(tensor):
                raise ConfigInvalid(f"spec.model.source: {file.name} of {source} has NaN or infinity in {name}")
    except (SafetensorError, OSError) as error:
        with file.open("rb") as opened:
            is_pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
        why = (
            "a Git LFS pointer, not the file it stands for: fetch it with git lfs pull"
            if is_pointer
            else f"cut or damaged ({whole_text(error)}): fetch it again"
        )
        raise ConfigInvalid(f"spec.model.source: {file.name} of {source} is {why}") from None


def _wants_scales(name: str, tensor: torch.Tensor) -> bool:
    """Return whether `tensor` is of a type that only quantized weights have; some models hold masks as integers."""
    if tensor.is_floating_point():
        return tensor.element_size() == 1
    return name.endswith("weight")


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118, it is no dict
            yield name, opened.get_tensor(name)


def _loading_info(folder: Path, base: BaseModel, spec: FineTuneJobSpec) -> dict[str, Any]:
    """Return what transformers says of a load without memory: names and shapes alone, in milliseconds."""
    try:
        _, info = model_class(base.config).from_pretrained(
            folder,
            config=base.config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=spec.model.trust_remote_code,
            device_map={"": "meta"},
            adapter_kwargs=NO_ADAPTER,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever it is, the files are the cause
        raise ConfigInvalid(
            f"spec.model.source: the weights of {spec.model.source} cannot be read: {whole_text(error)}"
        ) from None
    return dict(info)
