"""Which of the jobs that would write to one place goes first."""

import heapq

from finetune_operator.core.objects.observed import JobObject

_Order = tuple[bool, str, str, str]
"""Those that have begun, then the oldest; last the name."""


class Claims:
    """The places that live jobs write to. All is logarithmic in the number of jobs of one place."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[tuple[str, ...], _Order]] = {}
        self._heaps: dict[str, list[tuple[_Order, str]]] = {}

    def put(self, job: JobObject) -> None:
        """Note what a job writes to, and forget it once the job is over."""
        order = (not job.attempts, job.created_at.isoformat() if job.created_at else "", job.uid, job.name)
        if not job.claims:
            self.remove(job.uid)
        elif self._held.get(job.uid) != (job.places, order):
            self._held[job.uid] = job.places, order
            for place in job.places:
                heapq.heappush(self._heaps.setdefault(place, []), (order, job.uid))

    def remove(self, uid: str) -> None:
        """Forget a job."""
        places, _ = self._held.pop(uid, ((), None))
        for place in places:
            self._first(place)

    def holder(self, job: JobObject) -> str:
        """Return the name of another job that writes to a place of `job` and goes first; empty where there is none."""
        first = (self._first(place) for place in job.places)
        return next((each[0][-1] for each in first if each and each[1] != job.uid), "")

    def _is_held(self, place: str, order: _Order, uid: str) -> bool:
        places, known = self._held.get(uid, ((), None))
        return known == order and place in places

    def _first(self, place: str) -> tuple[_Order, str] | None:
        heap = self._heaps.get(place, [])
        while heap and not self._is_held(place, *heap[0]):
            heapq.heappop(heap)
        if not heap:
            self._heaps.pop(place, None)
        return heap[0] if heap else None
