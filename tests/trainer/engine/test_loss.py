"""The tiled loss is the cross-entropy of all logits at once."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, MistralConfig

from finetune_trainer.data.batching import Collate
from finetune_trainer.engine import loss
from finetune_trainer.engine.loss import summed_cross_entropy
from finetune_trainer.engine.model_loss import patch_fused_loss

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradient_are_those_of_all_logits(tokens: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "TILE", 8)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=bias).requires_grad_(False)
    hidden = torch.randn(2, 20, 16)
    positions, targets = torch.randperm(40)[:tokens], torch.randint(0, 50, (tokens,))
    found = []
    for ours in (False, True):
        leaf = hidden.clone().requires_grad_()
        if ours:
            total = summed_cross_entropy(leaf, head, positions, targets)
        else:
            total = cross_entropy(head(leaf).flatten(0, 1)[positions], targets, reduction="sum")
        (total * 0.37).backward()
        found.append((total.detach(), leaf.grad))
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_nothing_to_learn_is_a_loss_of_zero_with_gradients_of_zero() -> None:
    head = torch.nn.Linear(16, 50).requires_grad_(False)
    hidden = torch.randn(1, 5, 16, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    total = summed_cross_entropy(hidden, head, none, none)
    total.backward()
    assert total.item() == 0
    assert hidden.grad is not None and not hidden.grad.any()


def test_a_head_that_trains_gets_its_gradient() -> None:
    head = torch.nn.Linear(16, 50)
    head.weight.requires_grad_(False)
    hidden, positions, targets = torch.randn(1, 5, 16), torch.arange(5), torch.randint(0, 50, (5,))
    summed_cross_entropy(hidden, head, positions, targets).backward()
    ours = head.bias.grad
    head.bias.grad = None
    cross_entropy(head(hidden)[0], targets, reduction="sum").backward()
    assert ours is not None
    torch.testing.assert_close(ours, head.bias.grad)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL),
        Gemma2Config(**SMALL, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
        CohereConfig(**SMALL, logit_scale=0.25),
        GraniteConfig(**SMALL, logits_scaling=4.0),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_answers_with_the_loss_that_transformers_computes(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # large logits, which a cap or a scale changes
            parameter.mul_(4)
    model.get_output_embeddings().weight.requires_grad_(False)
    ids = torch.randint(1, 97, (2, 11))
    patch_fused_loss(model)
    theirs = model(input_ids=ids, labels=ids).loss * 20
    positions = torch.cat([torch.arange(10), torch.arange(11, 21)])
    ours = model(input_ids=ids, target_positions=positions, target_ids=ids[:, 1:].flatten())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    watched = model.model.layers[0].mlp.down_proj.weight
    gradients = [torch.autograd.grad(each, watched)[0] for each in (theirs, ours)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert model.generate(input_ids=ids, max_new_tokens=2).shape == (2, 13)


@pytest.mark.parametrize(("attention", "looks"), [("varlen", 0), ("sdpa", 1)])
def test_where_sequences_begin_is_not_looked_for_when_attention_is_told(
    attention: str, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking waits for the GPU. The kernel of varlen is left out."""
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register("varlen", lambda module, query, *args, **kwargs: (query.transpose(1, 2), None))
    AttentionMaskInterface.register("varlen", flash_attention_mask)
    counted: list[int] = []
    find = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: counted.append(1) or find(ids))
    model = AutoModelForCausalLM.from_config(MistralConfig(**SMALL), attn_implementation=attention)
    patch_fused_loss(model)
    batch = Collate(True, 0, rows=2, longest=9)([([1, 2, 3], [1, 2, 3]), ([4, 5], [4, 5])])
    model.train()(**batch)
    assert len(counted) == looks
