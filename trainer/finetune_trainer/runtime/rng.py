"""The states of all random number generators that training draws from."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RngState:
    """The states of Python's, NumPy's and PyTorch's generators, and of this process's GPU if it has one."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    gpu: torch.Tensor | None

    @classmethod
    def now(cls) -> "RngState":
        """Return the present states."""
        gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu)

    def restore(self) -> None:
        """Set all generators back to these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu)

    def same(self, other: "RngState") -> bool:
        """Return whether PyTorch's generators are in the same states in `other`."""
        gpus = [each.gpu for each in (self, other) if each.gpu is not None]
        return torch.equal(self.cpu, other.cpu) and (len(gpus) < 2 or torch.equal(*gpus))
