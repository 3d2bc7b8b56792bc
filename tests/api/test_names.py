"""Exit codes and reasons: what the trainer, the operator and the documentation mean by them."""

import pytest

from finetune_api.exit_codes import (
    FINAL_EXIT_CODES,
    OUTCOMES,
    REASONS,
    ExitCode,
    outcome_of,
)


def test_every_exit_code_says_something_by_itself_and_every_reason_belongs_to_one():
    assert set(OUTCOMES) == set(ExitCode)
    assert all(OUTCOMES[outcome.code] for outcome in REASONS.values())
    assert all(REASONS[outcome.reason] is outcome for outcome in OUTCOMES.values())


@pytest.mark.parametrize(
    ("code", "said", "reason"),
    [
        (78, None, "ConfigInvalid"),
        (78, "ConfigInvalid", "ConfigInvalid"),
        (78, "WontFit", "WontFit"),
        (65, "WontFit", "DatasetInvalid"),
        (78, "MadeUp", "ConfigInvalid"),
        (137, None, "Killed"),
    ],
)
def test_of_two_reasons_with_one_exit_code_the_report_names_the_right_one(code: int, said: str | None, reason: str):
    outcome = outcome_of(code, said)
    assert outcome is not None and outcome.reason == reason


def test_an_exit_code_ends_a_job_at_once_only_when_all_its_reasons_do():
    assert FINAL_EXIT_CODES == (65, 77, 78, 91)
    assert outcome_of(3) is None
