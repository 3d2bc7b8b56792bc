"""4-bit weights are dequantized by our kernel, run by Triton's interpreter: the numbers of bitsandbytes."""

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.flop_counter import FlopCounterMode

from finetune_trainer.engine import dequantize as weights
from support.trainer.triton import interpreted


def _linear(
    kind: str = "nf4", twice: bool = True, block: int = 64, bias: bool = False, inputs: int = 256
) -> Linear4bit:
    """A layer of more than 256 blocks, whose number does not fill a program's tile; fp16, which the interpreter
    computes."""
    torch.manual_seed(0)
    linear = Linear4bit(inputs, 104, bias=bias, compute_dtype=torch.float16, quant_type=kind).half()
    plain = torch.randn(104, inputs, dtype=torch.float16)
    linear.weight.data, state = quantize_4bit(plain, blocksize=block, compress_statistics=twice, quant_type=kind)
    linear.weight.quant_state, linear.weight.bnb_quantized = state, True
    return linear


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("block", [64, 128])
def test_weights_are_bit_equal(kind: str, twice: bool, block: int) -> None:
    dequantize = interpreted("dequantize").dequantize
    linear = _linear(kind, twice, block)
    state = linear.weight.quant_state
    for dtype in (torch.float16, torch.float32):
        state.dtype = dtype
        found = dequantize(linear.weight.data, weights._scales(state), state.code, list(state.shape), dtype)
        assert torch.equal(found, dequantize_4bit(linear.weight.data, state))
    assert weights._try_kernel_on(_linear(kind, twice, block)) is None


def test_rounded_codes_of_a_checkpoint_are_not_read_as_bitsandbytes_does_not() -> None:
    """Models that were quantized while torch made bfloat16 by default have them."""
    interpreted("dequantize")
    linear = _linear()
    linear.weight.quant_state.code = linear.weight.quant_state.code.bfloat16()
    assert weights._try_kernel_on(linear) is not None
    weights._correct_codes([linear])
    assert weights._try_kernel_on(linear) is None


def test_weights_may_be_stored_in_numbers_of_another_type() -> None:
    """bnb_4bit_quant_storage: some checkpoints have bfloat16."""
    interpreted("dequantize")
    linear = _linear()
    linear.weight.data = linear.weight.data.view(-1).view(torch.bfloat16)[:, None]
    assert weights._is_supported(linear)
    assert weights._try_kernel_on(linear) is None


def test_a_layer_that_trains_has_the_product_and_the_gradient_of_bitsandbytes() -> None:
    product = interpreted("dequantize").product
    plain, ours = _linear(), _linear()
    weights.multiply_by_kernel(ours)
    found = []
    for linear in (plain, ours):
        x = torch.randn(2, 5, 256, dtype=torch.float16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        linear(x).square().sum().backward()
        found.append((linear(x).detach(), x.grad))
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)
    state = ours.weight.quant_state
    x = torch.randn(3, 256, dtype=torch.float16).requires_grad_()
    inputs = (ours.weight.data, weights._scales(state), state.code, list(state.shape))
    torch.library.opcheck(torch.ops.finetune.dequantize_4bit, (*inputs, x.dtype))
    torch.library.opcheck(torch.ops.finetune.dequantize_4bit_after, (x.detach(), *inputs, x.dtype))
    with FlopCounterMode(display=False) as counter:
        product(x, *inputs)
    assert counter.get_total_flops() == 2 * 3 * 256 * 104


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_compiled_layers_keep_no_dequantized_weights_for_the_backward_pass(budget: float) -> None:
    interpreted("dequantize")
    first, second = _linear(), _linear(inputs=104 * 8)
    for linear in (first, second):
        weights.multiply_by_kernel(linear)
    made: list[list[str]] = []
    kept: list[tuple[int, ...]] = []

    def seen(graph: Any, _: Any) -> Any:
        made.append([node.target.name() for node in graph.graph.nodes if "dequantize" in str(node.target)])
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        kept.extend(tuple(node.meta["val"].shape) for node in output.args[0] if isinstance(node, torch.fx.Node))
        return graph

    def layer(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = second(torch.nn.functional.silu(first(x)).repeat(1, 8))
        return found

    gradients = []
    backend = aot_autograd(fw_compiler=seen, bw_compiler=seen, partition_fn=min_cut_rematerialization_partition)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        for each in (layer, torch.compile(layer, backend=backend, fullgraph=True)):
            x = torch.randn(300, 256, dtype=torch.float16, generator=torch.Generator().manual_seed(1)).requires_grad_()
            gradients.append(torch.autograd.grad(each(x).float().sum(), x)[0])
    assert torch.equal(*gradients)
    forward, backward = made
    assert forward == ["finetune::dequantize_4bit"] * 2
    assert backward == ["finetune::dequantize_4bit_after"] * 2
    weight_shapes = {(104, 256), (104, 832)}
    assert not {*kept} & (weight_shapes | {shape[::-1] for shape in weight_shapes})


def test_a_layer_that_does_not_train_is_left_to_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = interpreted("dequantize")
    linear = _linear()
    weights.multiply_by_kernel(linear)
    monkeypatch.setattr(module, "_dequantize", None)
    with torch.no_grad():
        linear(torch.randn(2, 256, dtype=torch.float16))


def test_layers_that_compute_otherwise_are_left_alone() -> None:
    assert weights._is_supported(_linear())
    assert not weights._is_supported(_linear(bias=True))
    assert not weights._is_supported(_linear(inputs=196))  # the last block is not whole
    assert not weights._is_supported(torch.nn.Linear(2, 2))
    other = _linear()
    other.compute_dtype = torch.float32
    assert not weights._is_supported(other)
    other = _linear()
    other.weight.quant_state.state2.blocksize = 128
    assert not weights._is_supported(other)


def test_other_numbers_than_those_of_bitsandbytes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = interpreted("dequantize")
    monkeypatch.setattr(module, "dequantize", lambda packed, scales, code, shape, dtype: torch.zeros(shape))
    assert weights._try_kernel_on(_linear()) == "it computes other weights than bitsandbytes on this GPU"
