"""varlen attention, by torch's kernel and by ours, against SDPA on a real GPU. Skipped where there is none."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _model(name: str, head_dim: int, kv_heads: int, layers: int = 2) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    from finetune_trainer.engine import attention

    attention.register()
    config = MistralConfig(
        vocab_size=512,
        hidden_size=8 * head_dim,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        sliding_window=None,
        attn_implementation=name,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return MistralForCausalLM(config).to(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "kv_heads"), [(64, 8), (128, 2), (128, 8), (256, 1)])
@pytest.mark.parametrize("longest", [512, 4096])
def test_the_check_at_start_passes(longest: int, head_dim: int, kv_heads: int, dtype: Any) -> None:
    from finetune_trainer.engine import attention

    config = _model("eager", head_dim, kv_heads, layers=1).config
    assert attention.self_check(config, "cuda", dtype, longest) is None
    assert attention._ours == (head_dim in (64, 128) and torch.cuda.get_device_capability() == (9, 0))


def test_the_check_at_start_finds_its_kernels_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from triton import knobs

    from finetune_trainer.engine import ahead, attention
    from finetune_trainer.engine.compilation import _lora_kernel_works
    from finetune_trainer.runtime.device import RuntimeDevice

    config = _model("eager", 64, 4, layers=1).config
    compiled: list[Any] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **told: compiled.append(told["fn"].name))
    device = RuntimeDevice("cuda", torch_name="cuda:0")
    spec: Any = SimpleNamespace(
        model=SimpleNamespace(attention="auto"),
        training=SimpleNamespace(precision="bf16", compile="auto", max_length=2048),
        resources=SimpleNamespace(gpus_per_node=1),
    )
    base: Any = SimpleNamespace(config=config, open_attention=True)
    ahead.compile_kernels_ahead(spec, base, device).shutdown()
    print("RESULT compiled ahead:", compiled)
    compiled.clear()
    assert attention.self_check(config, "cuda", torch.bfloat16, 2048) is None
    assert _lora_kernel_works(torch.device("cuda:0")) == (torch.cuda.get_device_capability() == (9, 0))
    assert compiled == []


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("longest", [512, 2048])
def test_logits_and_gradients_are_those_of_sdpa(
    longest: int, packed: bool, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_trainer.engine import attention
    from finetune_trainer.engine.kernels import attention as triton_attention  # noqa: F401 - its operation is called by name

    monkeypatch.setattr(attention, "_ours", ours)
    lengths = [200, longest, 325, 17]
    if packed:
        ids = torch.randint(4, 500, (1, sum(lengths)), device="cuda")
        inputs = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None].cuda()}
        real = torch.ones_like(ids, dtype=torch.bool)
    else:
        ids = torch.randint(4, 500, (4, longest), device="cuda")
        real = torch.arange(longest, device="cuda") < torch.tensor(lengths, device="cuda")[:, None]
        inputs = {"attention_mask": real.long()}
    found = []
    for name in ("sdpa", "varlen"):
        model = _model(name, 128, 2)
        logits = model(input_ids=ids, use_cache=False, **inputs).logits[real].float()
        logits.square().mean().backward()
        found.append([logits.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.float()])
    for theirs, here in zip(*found, strict=True):
        assert torch.nn.functional.cosine_similarity(theirs.flatten(), here.flatten(), dim=0) > 0.999
        assert float((theirs - here).abs().max() / theirs.abs().max()) < 5e-2


def test_a_run_has_the_losses_of_sdpa(material: Path, tmp_path: Path) -> None:
    from support.trainer.gpu import losses, start

    found = {}
    for name in ("sdpa", "varlen"):
        settings = {"model__attention": name, "training__maxSteps": 8, "lora__dropout": 0.0}
        run = start(material, tmp_path / name, **settings)
        log, _ = run.communicate(timeout=300)
        assert run.returncode == 0, log[-3000:]
        assert f"Attention: {name} (as asked for)" in log
        found[name] = losses(tmp_path / name)
    print("RESULT losses:", found)
    assert found["varlen"] == pytest.approx(found["sdpa"], rel=1e-2)
