"""Which class of transformers a base model is, and its modules without their weights."""

import copy
import functools
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.errors import ConfigInvalid, whole_text

#: Settings that may name a kernel on the hub, `owner/name`, for one or for each part of a model.
_IMPLEMENTATIONS: Final = ("attn_implementation", "experts_implementation")
#: Attention implementations that are told where sequences begin, and need no mask.
FOR_SEQUENCES: Final = ("varlen", "flash_attention_2")
#: How transformers' code names a package that has kernels for a function.
_KERNEL: Final = re.compile(r"""use_kernel_func_from_hub_with_fallback\(\s*"\w+",\s*"(\w+)""")

#: How a module's code reads the weight of a layer in it, other than a part of it, or what it is like.
_READ: Final = re.compile(r"self\.(\w+)\.weight\b(?!\[|\.(?:device|shape|size|dtype)\b)")


def read_config(folder: Path, spec: FineTuneJobSpec) -> tuple[Any, Any]:
    """Return transformers' configuration in `folder`, and its model on the meta device.

    Raises:
        ConfigInvalid: When config.json cannot be read, or is no causal language model's.
    """
    from transformers import AutoConfig

    source, trusted = spec.model.source, spec.model.trust_remote_code
    kind = _model_type(folder, source)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("it has an encoder and a decoder")
        return config, layout(config, spec)
    except Exception as error:  # transformers checks little of what it reads, so anything can go wrong
        raise ConfigInvalid(
            f"spec.model.source: {source} (model_type {kind}) is no usable causal language model: {_explained(error)}"
        ) from None


def _named_code(config: Any) -> Iterator[str]:
    """Yield the settings by which transformers fetches code for attention or experts from the hub and runs it."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict):
            yield from _named_code(value)
        for name in value.values() if isinstance(value, dict) else [value]:
            if key.lstrip("_").startswith(_IMPLEMENTATIONS) and isinstance(name, str) and "/" in name:
                yield f"{key}: {name}"


def _model_type(folder: Path, source: str) -> str:
    subject = f"spec.model.source: {source} is no usable causal language model: its config.json"
    try:
        found = json.loads((folder / "config.json").read_text())
        named = next(_named_code(found), None)
    except (ValueError, RecursionError) as error:
        raise ConfigInvalid(f"{subject} is no JSON: {whole_text(error)}") from None
    if named:
        raise ConfigInvalid(f"{subject} names code of another repository, which is never run: {named}")
    kind = found.get("model_type") if isinstance(found, dict) else None
    if not kind:
        raise ConfigInvalid(f"{subject} names no model_type")
    return str(kind)


def _explained(error: Exception) -> str:
    import transformers

    text = whole_text(error)
    if "Unrecognized configuration class" in text:
        return "models of this type are none"
    if "does not recognize this architecture" in text or text.startswith("Unrecognized model"):
        return f"transformers {transformers.__version__} does not know this type"
    return text


def model_class(config: Any) -> Any:
    """Return transformers' Auto class for the model of `config`.

    A multimodal checkpoint is loaded as the class that it names, whole: an adapter's names are those of its weights.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    causal, multimodal = AutoModelForCausalLM._model_mapping, AutoModelForImageTextToText._model_mapping
    kind = type(config)
    if kind not in multimodal:
        return AutoModelForCausalLM
    named = (getattr(config, "architectures", None) or [None])[0]
    whole = named in {each.__name__ for each in _classes(multimodal[kind])}
    return AutoModelForImageTextToText if whole or kind not in causal else AutoModelForCausalLM


def _classes(found: Any) -> tuple[Any, ...]:
    return tuple(found) if isinstance(found, list | tuple) else (found,)


def layout(config: Any, spec: FineTuneJobSpec, attention: str | None = None) -> Any:
    """Return the model of `config` without memory: its modules, on torch's meta device.

    Args:
        config: transformers' configuration.
        spec: The job's spec.
        attention: The attention implementation; None takes transformers' own choice.
    """
    import torch

    options = {} if attention is None else {"attn_implementation": attention}
    own = copy.deepcopy(config)  # a model that grows changes its configuration
    with torch.device("meta"):
        return model_class(config).from_config(own, trust_remote_code=spec.model.trust_remote_code, **options)


def head_dim(config: Any) -> int:
    """Return the width of one attention head of the language model of `config`."""
    text = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def missing_kernels(model: Any) -> list[str]:
    """Return packages whose kernels the model's code would use and that cannot be imported here.

    transformers names them where it defines what it computes instead, with torch alone.
    """
    from transformers.integrations import hub_kernels

    modules = {type(module).__module__ for module in model.modules()}
    sources = (inspect.getsource(sys.modules[name]) for name in modules if name.startswith("transformers.models."))
    named = {package for source in sources for package in _KERNEL.findall(source)}
    return sorted(
        hub_kernels._PACKAGE_TO_DISTRIBUTION.get(each, each.replace("_", "-"))
        for each in named
        if importlib.util.find_spec(each) is None
    )


def language_part(model: Any) -> str:
    """Return the name of the module that is the language model; '' where the whole model is one."""
    config = model.config
    if config.get_text_config(decoder=True) is config:
        return ""
    decoder = model.get_decoder()
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    return names[decoder]


def linear_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield each linear layer of `model`, and GPT-2's Conv1D, which is one with its weight on its side."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return ((name, each) for name, each in model.named_modules() if isinstance(each, torch.nn.Linear | Conv1D))


def read_past(model: Any) -> list[str]:
    """Return the names of linear layers whose weights the code around them reads itself: those cannot be packed."""
    linear = {name for name, _ in linear_modules(model)}
    kinds: set[Any] = {type(module) for module in model.modules()}
    read = {kind: _weights_read(kind) for kind in kinds}
    return [
        name
        for parent, module in model.named_modules()
        for child in read[type(module)]
        if (name := f"{parent}.{child}".lstrip(".")) in linear
    ]


def is_plain_linear(kind: Any) -> bool:
    """Return whether `kind` computes what torch's linear layer does, as its own class or by another name."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if kind in (torch.nn.Linear, Conv1D):
        return True
    with torch.device("cpu"), torch.random.fork_rng([]):
        x, layer = torch.rand(2, 4), torch.nn.Linear(4, 3)
        try:
            other = kind(4, 3)
            other.load_state_dict(layer.state_dict())
            found = other(x)
        except Exception:  # it wants other arguments: a layer of its own kind
            return False
        return isinstance(found, torch.Tensor) and bool(torch.allclose(found, layer(x)))


@functools.cache
def _weights_read(kind: Any) -> list[str]:
    """Return the children of a module of transformers' whose weights its own code reads."""
    if not kind.__module__.startswith("transformers"):
        return []
    return sorted(set(_READ.findall(inspect.getsource(kind))))


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """Return the (input, output) widths of each layer of the language part that can get an adapter, without the head.

    A router that is a linear layer with another answer can get none, nor what the code around it, or a kernel that it
    calls, multiplies itself.
    """
    import torch

    head, within = model.get_output_embeddings(), language_part(model)
    found, read = {}, set(read_past(model))
    for name, module in linear_modules(model):
        is_ours = module is not head and name not in read and (not within or name.startswith(f"{within}."))
        if is_ours and _answers_with_a_tensor(module) and not _in_mamba(model, name):
            inputs, outputs = module.weight.shape[::-1] if isinstance(module, torch.nn.Linear) else module.weight.shape
            found[name] = (int(inputs), int(outputs))
    return found


def _answers_with_a_tensor(module: Any) -> bool:
    import torch

    if type(module).forward is torch.nn.Linear.forward or not isinstance(module, torch.nn.Linear):
        return True
    try:
        with torch.no_grad():
            return isinstance(module(module.weight.new_empty(1, module.in_features)), torch.Tensor)
    except RuntimeError:  # it takes inputs of another shape than its weight's: groups of them
        return False


def _in_mamba(model: Any, name: str) -> bool:
    """Return whether Mamba's kernels read the layer's weight itself, past any adapter on it. PEFT refuses most."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    end = name.rpartition(".")[2]
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, "out_proj" if end == "dt_proj" else end)
    except ValueError:
        return True
    return False
