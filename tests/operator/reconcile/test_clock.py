"""The clock: no single clock that steps may bring a deadline about or undo one."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

from finetune_operator.reconcile.clock import Clock

DAY = 86400.0
START = datetime(2026, 11, 1, 12, tzinfo=UTC)


class Clocks:
    """The clocks it listens to; `wall_off` and `server_off` are how far they are from the true time."""

    def __init__(self, wall_off: float = 0.0) -> None:
        self.true, self.wall_off, self.server_off = START.timestamp(), wall_off, 0.0
        self.steady = 1000.0
        self.clock = Clock(lambda: self.true + self.wall_off, lambda: self.steady)

    def pass_time(self, seconds: float, hear: bool = True) -> float:
        """Seconds that what it says is away from the true time, after `seconds`."""
        self.true += seconds
        self.steady += seconds
        if hear:
            there = datetime.fromtimestamp(self.true + self.server_off, UTC).replace(microsecond=0)
            self.clock.observe(format_datetime(there, usegmt=True))
        return self.clock().timestamp() - self.true


def test_before_the_api_server_is_heard_the_time_just_passes():
    clocks = Clocks()
    clocks.wall_off = DAY
    assert abs(clocks.pass_time(60, hear=False)) < 1


def test_a_wall_clock_that_jumps_ahead_and_back_leaves_no_trace():
    clocks = Clocks()
    clocks.pass_time(10)
    clocks.wall_off = DAY
    assert abs(clocks.pass_time(10)) < 2, "TTLs and deadlines of a day must not end now"
    clocks.wall_off = 0
    assert abs(clocks.pass_time(10)) < 2


def test_a_wall_clock_that_is_set_back_undoes_no_deadline():
    clocks = Clocks()
    clocks.pass_time(10)
    clocks.wall_off = -3600
    assert abs(clocks.pass_time(60)) < 2


def test_an_api_server_whose_clock_jumps_is_outvoted():
    clocks = Clocks()
    clocks.pass_time(10)
    clocks.server_off = DAY
    assert abs(clocks.pass_time(10)) < 2
    clocks.server_off = 0
    assert abs(clocks.pass_time(10)) < 2


def test_when_both_agree_that_the_time_is_another_it_is():
    clocks = Clocks()
    clocks.pass_time(10)
    clocks.wall_off = clocks.server_off = DAY
    assert abs(clocks.pass_time(10) - DAY) < 2
    clocks.wall_off = clocks.server_off = 0
    assert abs(clocks.pass_time(10)) < 2, "also back: the wrong day was corrected"


def test_a_node_whose_clock_is_wrong_goes_by_the_api_server():
    assert abs(Clocks(wall_off=DAY).pass_time(10)) < 2, "timestamps of objects are in the API server's time"


def test_ordinary_corrections_never_turn_it_back():
    clocks = Clocks()
    said = clocks.clock()
    for number in range(400):
        clocks.wall_off = 0.4 if number % 2 else -0.4
        clocks.pass_time(0.13)
        assert clocks.clock() >= said
        said = clocks.clock()
    assert abs(said - datetime.fromtimestamp(clocks.true, UTC)) < timedelta(seconds=2)


def test_a_date_that_cannot_be_read_is_no_date():
    clock = Clock(lambda: 5.0, lambda: 5.0)
    clock.observe("yesterday")
    assert clock().timestamp() == 5.0
