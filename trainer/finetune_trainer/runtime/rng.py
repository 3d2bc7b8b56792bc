"""The states of all generators that training draws from, to be put back as they were."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RngState:
    """What Python, NumPy, PyTorch and, where there is one, this process's GPU draw from."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    gpu: torch.Tensor | None

    @classmethod
    def now(cls) -> "RngState":
        gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu)

    def put_back(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu)
