"""What the adapters of several trials find is added to their base: our kernel, run by Triton's interpreter."""

import pytest
import torch

from support.trainer.triton import interpreted


@pytest.mark.parametrize("sizes", [(130,), (37, 93), (0, 64, 0, 66), (1, 1, 128)])
def test_sum_and_gradients_are_those_of_torch(sizes: tuple[int, ...]) -> None:
    add = interpreted("lora").add_grouped_product
    torch.manual_seed(0)
    rank, columns, places = 16, 200, len(sizes)
    base = torch.randn(130, columns, requires_grad=True)
    z = torch.randn(130, 3 * rank).split(rank, -1)[1].requires_grad_()
    b = torch.randn(places, columns, rank, requires_grad=True)
    place = torch.repeat_interleave(torch.arange(places), torch.tensor(sizes))
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    slope = torch.randn(130, columns)
    expected = base + torch.einsum("tr,tcr->tc", z, b[place])
    found, expected = (
        (result.detach(), *torch.autograd.grad(result, (base, z, b), slope))
        for result in (add(base, z, b, place, ends), expected)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_what_is_infinite_at_one_place_stays_there() -> None:
    add = interpreted("lora").add_grouped_product
    base, z, b = torch.ones(8, 32), torch.ones(8, 16), torch.ones(2, 32, 16)
    b[0], z[:3] = torch.nan, torch.inf
    place, ends = torch.tensor([0] * 3 + [1] * 5), torch.tensor([3, 8], dtype=torch.int32)
    assert torch.equal(add(base, z, b, place, ends)[3:], torch.full((5, 32), 17.0))


def test_the_check_at_start_passes_and_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    module = interpreted("lora")
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.half)  # which the interpreter computes
    assert module.grouped_self_check(torch.device("cpu")) is None
    plain = module.add_grouped_product
    monkeypatch.setattr(module, "add_grouped_product", lambda *inputs: plain(*inputs) * 1.1)
    assert str(module.grouped_self_check(torch.device("cpu"))).startswith("differs from torch's by ")
