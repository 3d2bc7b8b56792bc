"""Passes replayed as CUDA graphs compute what launched kernels do, bit for bit. Skipped where there is no GPU.

tests/trainer/engine/test_graphs.py runs the same steps on a CPU, where a replay runs the pass again.
"""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", params=["eager", "compiled"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from support.trainer.graph_steps import small_model

    return small_model(tmp_path_factory.mktemp("model"), "cuda", compiled=request.param == "compiled")


@pytest.fixture(scope="module")
def launched(model: Any) -> Any:
    """The second of two: whatever compiles or tunes itself has done so."""
    from support.trainer.graph_steps import train

    train(model, replayed=False, steps=4)
    return train(model, replayed=False)


def test_captured_steps_are_those_of_launched_kernels_bit_for_bit(model: Any, launched: Any) -> None:
    """With dropout, 8-bit optimizer state, two passes a step, an evaluation and a resume; twice, for what lingers."""
    from support.trainer.graph_steps import train

    again = train(model, replayed=False)
    noise = again.difference(launched)  # of kernels that add in any order
    for _ in range(2):
        captured = train(model, replayed=True)
        off = captured.difference(launched)
        print(f"RESULT replayed {captured.replayed} passes, off {off:.2g}, launched twice {noise:.2g}")
        assert captured.problem is None
        assert captured.replayed >= 16
        assert captured.equals(launched) if again.equals(launched) else off <= 10 * noise


def test_a_capture_that_fails_changes_no_number(model: Any, launched: Any) -> None:
    """One that looks at a number on the GPU, which no capture allows; the generators draw on afterwards."""
    from support.trainer.graph_steps import model_loss, train

    def looking(model: Any, batch: dict[str, Any]) -> Any:
        found = model_loss(model, batch)
        if torch.cuda.is_current_stream_capturing():
            float(found)
        return found

    stream = torch.cuda.current_stream()
    found = train(model, replayed=True, loss=looking)
    assert found.problem is not None
    assert found.replayed == 0
    assert torch.cuda.current_stream() == stream
    assert found.difference(launched) <= 10 * train(model, replayed=False).difference(launched)
