"""What an adapter finds is added to its base: our kernel, run by Triton's interpreter."""

import pytest
import torch

from finetune_trainer.engine.compilation import _lora_kernel_works
from support.trainer.triton import interpreted


@pytest.mark.parametrize("rank", [4, 16, 24])
@pytest.mark.parametrize("columns", [64, 200])
def test_sum_and_gradients_are_those_of_torch(rank: int, columns: int) -> None:
    add_product = interpreted("lora").add_product
    torch.manual_seed(0)
    base = torch.randn(1, 130, columns, requires_grad=True)
    z = torch.randn(1, 130, 3 * rank).split(rank, -1)[1].requires_grad_()  # a part of a product for q, k and v
    b = torch.randn(columns, rank, requires_grad=True)
    slope = torch.randn(1, 130, columns)
    found, expected = (
        (result, *torch.autograd.grad(result, (base, z, b), slope))
        for result in (add_product(base, z, b), base + z @ b.T)
    )
    torch.testing.assert_close(found, expected)


def test_it_sums_in_float32() -> None:
    add_product = interpreted("lora").add_product
    base, z, b = torch.full((1, 1), 1.0), torch.full((1, 16), 1.0), torch.full((1, 16), 2.0**-12)
    half = [each.half() for each in (base, z, b)]
    assert add_product(*half).item() == 1 + 2.0**-8
    torch.library.opcheck(add_product, [each.requires_grad_() for each in (base, z, b)])


def test_the_check_at_start_passes_and_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    module = interpreted("lora")
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.half)  # which the interpreter computes
    assert module.self_check(torch.device("cpu")) is None
    plain = module.add_product
    monkeypatch.setattr(module, "add_product", lambda base, z, b: plain(base, z, b) * 1.1)
    assert str(module.self_check(torch.device("cpu"))).startswith("differs from torch's by 2")
    monkeypatch.setattr(module, "add_product", lambda base, z, b: None)
    assert (
        module.self_check(torch.device("cpu"))
        == "fails here: AttributeError: 'NoneType' object has no attribute 'float'"
    )


@pytest.mark.parametrize("problem", [None, "fails here"])
def test_on_hopper_it_serves_if_it_passes(problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = interpreted("lora")
    monkeypatch.setattr(module, "self_check", lambda device: problem)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _lora_kernel_works(torch.device("cuda:0")) is (problem is None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not _lora_kernel_works(torch.device("cuda:0"))
    assert not _lora_kernel_works(torch.device("cpu"))
