"""Which of the jobs that would write to one place goes first."""

import heapq

from finetune_operator.core.objects.observed import JobObject

_Order = tuple[bool, str, str, str]
"""Those that have begun, then the oldest; last the name."""


class Claims:
    """The places that live jobs write to. All is logarithmic in the number of jobs of one place."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[str, _Order]] = {}
        self._heaps: dict[str, list[tuple[_Order, str]]] = {}

    def put(self, job: JobObject) -> None:
        """Note what a job writes to, and forget it once the job is over."""
        place, order = (
            job.place,
            (not job.attempts, job.created_at.isoformat() if job.created_at else "", job.uid, job.name),
        )
        if not job.claims:
            self.remove(job.uid)
        elif self._held.get(job.uid) != (place, order):
            self._held[job.uid] = place, order
            heapq.heappush(self._heaps.setdefault(place, []), (order, job.uid))

    def remove(self, uid: str) -> None:
        """Forget a job."""
        place, _ = self._held.pop(uid, ("", None))
        if place:
            self._first(place)

    def holder(self, job: JobObject) -> str:
        """Return the name of the other job that writes to the place of `job`; empty where it may go first."""
        first = self._first(job.place)
        return "" if first is None or first[1] == job.uid else first[0][-1]

    def _first(self, place: str) -> tuple[_Order, str] | None:
        heap = self._heaps.get(place, [])
        while heap and self._held.get(heap[0][1]) != (place, heap[0][0]):
            heapq.heappop(heap)
        if not heap:
            self._heaps.pop(place, None)
        return heap[0] if heap else None
