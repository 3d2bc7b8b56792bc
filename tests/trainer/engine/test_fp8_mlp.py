"""The gated MLP in FP8 as one function: the numbers of its modules, where they are what it takes them for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralMLP

from finetune_trainer.engine import fp8, fp8_mlp
from support.trainer.triton import interpreted, interpreted_fp8

HIDDEN, WIDTH = 64, 112


def _mlp(kind: type[MistralMLP] = MistralMLP, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    interpreted("fp8")  # the proof asks it for the widest row
    torch.manual_seed(0)
    mlp = kind(MistralConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, **changes)).to(dtype).requires_grad_(False)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(mlp, name, fp8.Fp8Linear(getattr(mlp, name)))
    return mlp


def _results(function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    x, slope = torch.randn(2, 2, 20, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    leaf = x.requires_grad_()
    y = function(leaf)
    return [y.detach(), *torch.autograd.grad(y, leaf, slope)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_and_gradient_are_those_of_the_modules(dtype: torch.dtype) -> None:
    mlp = _mlp(dtype=torch.float16 if dtype == torch.float16 else torch.bfloat16)
    expected = _results(mlp, dtype)
    assert fp8_mlp.fuse_one(mlp) is None
    assert "forward" in vars(mlp)
    found = _results(mlp, dtype)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(_results_without_gradient(mlp, dtype), expected[0])


def _results_without_gradient(mlp: Any, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(2, 2, 20, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)[0]
    found: torch.Tensor = mlp(x)
    return found


def test_they_are_with_the_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = _mlp(dtype=torch.float16)
    expected = _results(mlp, torch.float16)
    _use_kernels(monkeypatch)
    assert fp8_mlp.fuse_one(mlp) is None
    for ours, theirs in zip(_results(mlp, torch.float16), expected, strict=True):
        assert float((ours - theirs).float().norm() / theirs.float().norm()) < 1e-2


def _use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = interpreted_fp8(monkeypatch)

    def slopes(*tensors: torch.Tensor) -> Any:
        found = kernels.round_gated_slopes(*tensors)
        return found[:2], found[2:]

    monkeypatch.setattr(fp8_mlp, "gated", kernels.round_gated)
    monkeypatch.setattr(fp8_mlp, "gated_slopes", slopes)


class _Scaled(MistralMLP):
    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x) * 0.8) * self.up_proj(x))


class _Limited(MistralMLP):
    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))


class _Swapped(MistralMLP):
    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class _Detached(MistralMLP):
    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)).detach() * self.up_proj(x))


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        (MistralMLP, "gelu"),
        (MistralMLP, "gelu_pytorch_tanh"),
        (MistralMLP, "quick_gelu"),
        (MistralMLP, "relu"),
        (_Scaled, "silu"),
        (_Limited, "silu"),
        (_Swapped, "silu"),
        (_Detached, "silu"),
    ],
)
def test_a_module_that_computes_something_else_keeps_its_own(kind: type[MistralMLP], activation: str) -> None:
    mlp = _mlp(kind, hidden_act=activation)
    assert str(fp8_mlp.fuse_one(mlp)).startswith("it differs from the model's own by ")
    assert "forward" not in vars(mlp)


def test_on_hopper_each_is_tried_and_the_log_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = _mlp(), _mlp(hidden_act="relu")
    fp8_mlp.fuse([right, wrong])
    assert "forward" not in vars(right), "there is no GPU here"
    warnings: list[str] = []
    monkeypatch.setattr(fp8_mlp, "log", type("Log", (), {"warning": staticmethod(warnings.append)}))
    monkeypatch.setattr(fp8_mlp, "_is_hopper", lambda device: True)
    fp8_mlp.fuse([torch.nn.ModuleList([right]), wrong])
    assert "forward" in vars(right)
    assert "forward" not in vars(wrong)
    (warning,) = warnings
    assert warning.startswith("The fused MLP in FP8 is disabled, using torch.compile's: it differs from the model's")


def test_what_fails_here_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = _mlp()
    monkeypatch.setattr(interpreted("fp8"), "LARGEST_WIDTH", WIDTH - 1)
    assert fp8_mlp.fuse_one(mlp) == f"a row of {WIDTH} numbers is wider than registers hold"

    def broken(*_: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(interpreted("fp8"), "LARGEST_WIDTH", WIDTH)
    monkeypatch.setattr(fp8_mlp, "gated", broken)
    assert fp8_mlp.fuse_one(mlp) == "fails here: RuntimeError: no such instruction"
    assert "forward" not in vars(mlp)


def test_adapters_biases_and_other_layers_keep_the_modules() -> None:
    assert fp8_mlp._is_supported(_mlp())
    with_adapter, with_bias, half_converted, narrower = (_mlp() for _ in range(4))
    with_adapter.up_proj = torch.nn.Sequential(with_adapter.up_proj)
    with_bias.down_proj.bias = torch.nn.Parameter(torch.zeros(HIDDEN).bfloat16(), requires_grad=False)
    half_converted.gate_proj = torch.nn.Linear(HIDDEN, WIDTH, bias=False).bfloat16()
    narrower.up_proj = fp8.Fp8Linear(torch.nn.Linear(HIDDEN, WIDTH - 16, bias=False).bfloat16())
    for other in (with_adapter, with_bias, half_converted, narrower, with_bias.down_proj, torch.nn.Linear(16, 16)):
        assert not fp8_mlp._is_supported(other)


def test_compiled_layers_share_one_graph_that_keeps_gate_and_up_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.norm = _mlp(dtype=torch.float16), torch.nn.RMSNorm(HIDDEN).half()

        def forward(self, x: torch.Tensor) -> Any:
            return x + self.mlp(self.norm(x))

    kept: list[list[torch.Tensor]] = []
    narrow: list[list[torch.Tensor]] = []
    roundings: list[int] = []

    def seen(graph: Any, _: Any) -> Any:
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        values = [node.meta["val"] for node in output.args[0]]
        inner = [each for each in values if isinstance(each, torch.Tensor) and each.shape[-1:] == (WIDTH,)]
        kept.append([each for each in inner if each.dtype != fp8.E4M3])
        narrow.append([each for each in values if isinstance(each, torch.Tensor) and each.dtype == fp8.E4M3])
        roundings.append(sum("amax" in str(node.target) for node in graph.graph.nodes))
        return graph

    _use_kernels(monkeypatch)
    layers = [Layer(), Layer()]
    backend = aot_autograd(
        fw_compiler=seen, bw_compiler=lambda graph, _: graph, partition_fn=min_cut_rematerialization_partition
    )
    plain = [each.mlp.forward for each in layers]
    assert [fp8_mlp.fuse_one(each.mlp) for each in layers] == [None, None]
    torch._dynamo.reset()
    compiled = [torch.compile(each.forward, backend=backend) for each in layers]
    fused = [each.mlp.forward for each in layers]
    for tokens in (40, 17):
        results = []
        for forwards, functions in ((fused, compiled), (plain, layers)):
            x = torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(2)).half().requires_grad_()
            torch._dynamo.maybe_mark_dynamic(x, 1)
            for layer, forward in zip(layers, forwards, strict=True):
                layer.mlp.forward = forward
            y = functions[1](functions[0](x))
            results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), x)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    assert roundings == [1], "the input, once for gate and up, and in one graph"
    assert [[(each.dtype, each.dim()) for each in graph] for graph in kept] == [[(torch.float16, 2)] * 2]
    assert [len(graph) for graph in narrow] == [3], "the transposed weights, and nothing of the tokens"
