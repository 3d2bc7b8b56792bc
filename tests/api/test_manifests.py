"""The table of manifests against the pydantic models; tests/api/test_crd_on_server.py tries it on an API server."""

import json

import pytest

from api.manifests import ACCEPTED, CASES, REFUSED, Case
from finetune_api.manifest import ManifestError, load_text


def test_the_table_is_large_enough_to_mean_something():
    assert len(CASES) >= 60
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_every_refusal_is_expected_to_say_what_is_allowed(case: Case):
    assert case.field
    for words in (case.says, case.server_says):
        assert words is None or len(words.split()) > 1


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.id)
def test_accepted(case: Case):
    load_text(json.dumps(case.manifest()), "job.yaml")


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_refused_with_the_field_and_what_is_allowed(case: Case):
    with pytest.raises(ManifestError) as refusal:
        load_text(json.dumps(case.manifest()), "job.yaml")
    problems = {problem.field.split("[")[0]: problem.message for problem in refusal.value.problems}
    assert case.field in problems, str(refusal.value)
    assert case.says in problems[case.field]
    assert "match '" not in str(refusal.value), "a sentence, not a regular expression"
