"""Functions that take turns: each runs on a thread of its own, but never while another does.

What libraries keep for the whole process, the states of random generators and what accelerate counts, goes with each.
"""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from accelerate.state import GradientState

from finetune_trainer.runtime.rng import RngState

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Turns(Generic[Request, Answer]):
    """A function that gives its turn away with a request, and goes on with the answer."""

    def __init__(self, name: str, work: Callable[["Turns[Request, Answer]"], None]) -> None:
        """`work` gets this object, to call `wait` on; it must not raise."""
        self._work = work
        self._mine, self._others = threading.Semaphore(0), threading.Semaphore(0)
        self._request: Request | None = None
        self._answer: Answer | BaseException | None = None
        self._accelerate: dict[str, Any] = {}
        self._generators: RngState | None = None
        # A process that must end does not wait for it: what counts is in the store, or is not.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def thread(self) -> threading.Thread:
        return self._thread

    def resume(self, answer: "Answer | BaseException | None" = None) -> Request | None:
        """Let the function run, with the answer to its request, or an error to raise there.

        Returns:
            Its next request, or None once it has ended.
        """
        self._answer = answer
        generators, accelerate = RngState.now(), dict(GradientState._shared_state)
        _take_over(self._accelerate)
        if self._generators is not None:
            self._generators.restore()
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._mine.release()
        self._others.acquire()
        self._accelerate, self._generators = dict(GradientState._shared_state), RngState.now()
        _take_over(accelerate)
        generators.restore()
        request, self._request = self._request, None
        return request

    def wait(self, request: Request) -> Answer:
        """Give the turn away until `request` is answered; only the function calls it. Raises an answer that is one."""
        self._request = request
        self._others.release()
        self._mine.acquire()
        answer, self._answer = self._answer, None
        if isinstance(answer, BaseException):
            raise answer
        assert answer is not None
        return answer

    def _run(self) -> None:
        try:
            self._work(self)
        finally:
            self._others.release()


def _take_over(state: dict[str, Any]) -> None:
    """Make `state` what accelerate knows of the step that is under way: every Accelerator shares it."""
    GradientState._shared_state.clear()
    GradientState._shared_state.update(state)
