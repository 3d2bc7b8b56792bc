"""Images that an administrator's pattern allows, and look-alikes that it does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.core.image_reference import ImageReference, is_allowed

SHA = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32

ALLOWED = [
    ("trainer", "trainer"),
    ("trainer:*", "trainer:1.0"),
    ("trainer:*", "trainer"),
    ("trainer:latest", "trainer"),
    ("trainer:1.*", "trainer:1.0"),
    ("registry.example.com/team/*", "registry.example.com/team/trainer:1"),
    ("registry.example.com/team/*", f"registry.example.com/team/sub/trainer:1@{SHA}"),
    ("registry.example.com/*", "registry.example.com/a/b/c"),
    ("registry.example.com:5000/trainer:1", "registry.example.com:5000/trainer:1"),
    ("localhost/trainer:*", "localhost/trainer:1"),
    (f"r.example/trainer@{SHA}", f"r.example/trainer@{SHA}"),
    (f"r.example/trainer@{SHA}", f"r.example/trainer:whatever@{SHA}"),
    ("r.example/trainer:1.*@sha256:*", f"r.example/trainer:1.0@{SHA}"),
    ("r.example/trainer@*", f"r.example/trainer@{SHA}"),
    ("*.example.com/trainer", "a.example.com/trainer:1"),
    ("team/trainer", "team/trainer:1"),
    ("reg*.example.com:*/a", "reg1.example.com:5000/a"),
    ("reg.example.com:5*/a", "reg.example.com:5000/a"),
    ("*/*", "anywhere.example.com:5000/a/b:1"),
    ("*", f"anywhere.example.com/a/b:1@{SHA}"),
]

REFUSED = [
    ("trainer:1.*", f"trainer:1.0@{SHA}"),
    ("trainer:*", f"trainer:1@{SHA}"),
    ("trainer:*", "trainer:5000/evil/img"),
    ("trainer:*", "trainer:5000/evil:1"),
    ("trainer*", "trainer.evil.example.com/img"),
    ("trainer:1", "trainer"),
    ("trainer:1", "trainer:10"),
    ("team/trainer", "evil.example.com/team/trainer"),
    ("team/*", "team.example.com/trainer"),
    ("team/*", "team:5000/trainer"),
    ("registry.example.com/team/*", "registry.example.com/teams/trainer"),
    ("registry.example.com/team/*", "registry.example.com:5000/team/trainer"),
    ("registry.example.com/team/*", "registry.example.com.evil.example/team/trainer"),
    ("registry.example.com/team/*", "registry.example.com/team/../evil"),
    ("registry.example.com/team/*", "registry.example.com/team/a:1/../../evil"),
    ("registry.example.com/team/*", "registry.example.com/team/a@sha256:short"),
    ("registry.example.com/team/*", f"registry.example.com/team/a@{SHA}@{OTHER}"),
    ("registry.example.com/team/*", "registry.example.com/team/"),
    ("registry.example.com/team/*", "registry.example.com/team//trainer"),
    ("registry.example.com/team/*", "registry.example.com/team/a:"),
    ("registry.example.com/team/*", "registry.example.com/team/a@"),
    ("registry.example.com/*:1", f"registry.example.com/trainer:1@{SHA}"),
    ("*.example.com/trainer", "evil.test/x.example.com/trainer"),
    ("*.example.com/trainer", "example.com/trainer"),
    (f"r.example/trainer@{SHA}", f"r.example/trainer@{OTHER}"),
    (f"r.example/trainer@{SHA}", "r.example/trainer:1"),
    (f"r.example/trainer:2@{SHA}", f"r.example/trainer:1@{SHA}"),
    ("*/*", "UPPER/case"),
    ("reg*.example.com/a", "reg.example.com:5000/a"),
    ("reg*.example.com/a", "reg:5000.example.com/a"),
    ("reg.*/a", "reg.example.com:5000/a"),
    ("reg.example.com:5*/a", "reg.example.com/a"),
    ("reg[abc].example.com/a", "rega.example.com/a"),
    ("reg.example.com/[!b]", "reg.example.com/a"),
    ("reg?.example.com/a", "rega.example.com/a"),
    ("reg.example.com/a:[0-9]", "reg.example.com/a:1"),
]


@pytest.mark.parametrize(("pattern", "image"), ALLOWED)
def test_what_a_pattern_means_is_allowed(pattern: str, image: str) -> None:
    assert is_allowed(image, pattern)


@pytest.mark.parametrize(("pattern", "image"), REFUSED)
def test_a_look_alike_is_refused(pattern: str, image: str) -> None:
    assert not is_allowed(image, pattern)


@given(st.text("ab./:@*-", max_size=24))
def test_a_pattern_with_a_registry_never_allows_another_registry(image: str) -> None:
    if is_allowed(image, "a.b/*"):
        assert image.startswith("a.b/")
        assert ImageReference.split(image).registry == "a.b"
