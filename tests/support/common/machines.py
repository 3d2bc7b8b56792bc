"""How many stories Hypothesis plays with a state machine: few for every change, many at night."""

from hypothesis import HealthCheck, settings


def stories(number: int, steps: int = 40) -> settings:
    """Settings for `number` stories of up to `steps` steps each."""
    return settings(
        max_examples=number, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )
