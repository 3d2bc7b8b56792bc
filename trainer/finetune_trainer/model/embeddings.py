"""Embeddings and head, where they train whole, and their rows for tokens that the data adds."""

from dataclasses import dataclass
from typing import Any, Final

import structlog

from finetune_api.spec_training import Lora
from finetune_trainer.errors import ConfigInvalid, type_and_reason

log = structlog.get_logger(__name__)
_FIELD: Final = "spec.dataset.addTokens"


@dataclass(frozen=True)
class NewTokens:
    """Tokens that the tokenizer has and the base model was not trained on.

    Attributes:
        ids: Their ids.
        known: How many tokens there were before; a table of embeddings may have more rows.
        size: How many there are now.
    """

    ids: tuple[int, ...] = ()
    known: int = 0
    size: int = 0


def trained_whole(model: Any, lora: Lora) -> tuple[list[str] | None, bool]:
    """Return what PEFT is to train whole (modules_to_save), and whether it is to keep the head tied to the embeddings.

    PEFT ties what has the names of Llama; of other tied models both tables are trained, each for itself.

    Args:
        model: A causal language model, perhaps without memory.
        lora: spec.lora.
    """
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    given = list(lora.modules_to_save or ())
    if not lora.embeddings:
        return given or None, False
    names = {module: name for name, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise ConfigInvalid("spec.lora.embeddings: this model has no head that can be trained")
    tied = head.weight is table.weight and names[table].rpartition(".")[2] in EMBEDDING_LAYER_NAMES
    found = [names[table], *([] if tied else [names[head]])]
    return list(dict.fromkeys((*given, *found))), tied


def check_trained(model: Any, saved: list[str] | None) -> None:
    """Refuse new tokens whose embeddings do not train, and warn where the model cannot learn to say them.

    Args:
        model: A causal language model before PEFT.
        saved: Names of what trains whole.

    Raises:
        ConfigInvalid: When the embeddings are not among `saved`.
    """
    names = {module: name for name, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not _among(names[table], saved):
        raise ConfigInvalid(
            f"{_FIELD}: the embeddings of this model are {names[table]}, which spec.lora.modulesToSave does not hold:"
            " add it, or set spec.lora.embeddings: true"
        )
    if head is not None and not _among(names[head], saved) and head.weight is not table.weight:
        log.warning(f"{_FIELD}: {names[head]} is not trained, so that the model does not learn to say the new tokens")


def _among(name: str, saved: list[str] | None) -> bool:
    return any(name.endswith(each) for each in saved or ())  # PEFT's rule


def grow(model: Any, new: NewTokens) -> None:
    """Give `model` an embedding, and a row of its head, for each new token: the mean of those of all others.

    A table that has rows to spare keeps its size. On the meta device there are only shapes.

    Raises:
        ConfigInvalid: When the embeddings of such a model cannot be resized.
    """
    import torch

    if not new.ids:
        return
    if max(new.ids) >= model.get_input_embeddings().weight.shape[0]:
        try:
            model.resize_token_embeddings(new.size, mean_resizing=False)
        except Exception as error:  # each model has its own code for it
            kind = model.config.model_type
            raise ConfigInvalid(
                f"{_FIELD}: the embeddings of models of type {kind} cannot be resized: {type_and_reason(error)}"
            ) from None
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if table.device.type == "meta":
        return
    tables = [each for each in (table, getattr(head, "weight", None), getattr(head, "bias", None)) if each is not None]
    with torch.no_grad():
        means = {id(each): each[: new.known].float().mean(0) for each in tables}
        for table in tables:
            table[list(new.ids)] = means[id(table)].to(table.dtype)
    log.info(f"{_FIELD}: {len(new.ids)} embeddings are new; each begins as the mean of the {new.known} others")
