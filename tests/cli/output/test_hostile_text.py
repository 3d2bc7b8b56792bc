"""What a cluster, a pod or a manifest says reaches the terminal as text: no escapes, no markup."""

import json

import pytest
import yaml

from finetune_cli.commands import logs
from finetune_cli.output import console, formatting, loss_history
from support.cli.run import MANIFEST, finetune, no_traceback
from support.simulation import job_states as states

EVIL = "\x1b]0;pwned\x07\x1b[2J\x1b[1A\x9b31mAll\x7f is\x00 well\r\u202egpj"
SHOWN = "All is well"
MARKUP = "[red]stop[/red] [link=https://evil.example]here[/link] [/nothing] :warning:"
UNSAFE = ("\x1b", "\x9b", "\x07", "\x7f", "\x00", "\r", "\u202e")
#: A terminal with colors: what Rich itself writes begins with ESC [ and is not counted.
COLORS = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}


def said(result):
    """What a command wrote, without Rich's own colors."""
    no_traceback(result)
    return result.stdout + result.stderr


@pytest.fixture
def evil(put):
    """Jobs whose every text is hostile."""
    waiting = states.waiting(f"{EVIL} {MARKUP}")
    waiting["phase"] = f"Pending{EVIL}"
    put(states.job("waiting"), waiting)
    failed = states.failed("Diverged", f"{EVIL} {MARKUP}", 91)
    failed["attempts"][0]["reason"] = f"Diverged{EVIL}"
    put(states.job("failed"), failed)


@pytest.mark.parametrize(
    "command",
    [
        ("list",),
        ("status", "waiting"),
        ("status", "failed"),
        ("watch", "failed"),
        ("watch", "waiting", "--timeout", "1"),
        ("logs", "waiting"),
        ("logs", "failed"),
        ("download", "waiting", "out"),
        ("delete", "waiting"),
    ],
    ids=" ".join,
)
def test_no_text_of_the_cluster_is_obeyed(ctl, evil, command):
    words = said(ctl(*command))
    assert [character for character in UNSAFE if character in words] == []
    assert SHOWN in words or command[0] == "delete"
    if command[0] not in ("delete", "download", "list"):
        assert MARKUP in " ".join(words.split())


@pytest.mark.parametrize("command", [("list",), ("status", "failed"), ("logs", "failed")], ids=" ".join)
def test_nor_on_a_terminal_with_colors(ctl, evil, command):
    words = said(ctl(*command, env=COLORS))
    for harm in ("\x1b]", "\x1b[2J", "\x1b[1A", "\x9b", "\x07", "\u202e", "\x1b]8;"):
        assert harm not in words


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_data_for_programs_keeps_every_value_and_escapes_it(ctl, evil, form):
    result = no_traceback(ctl("status", "failed", "-o", form))
    assert [character for character in UNSAFE if character in result.stdout] == []
    read = json.loads if form == "json" else yaml.safe_load
    assert read(result.stdout)["status"]["attempts"][0]["reason"] == f"Diverged{EVIL}"


def test_a_manifest_cannot_speak_through_the_messages_about_it(tmp_path):
    spec = yaml.safe_load(MANIFEST)
    spec["spec"][f"x\n✓ 1 FineTuneJob valid\n{EVIL}{MARKUP}"] = 1
    spec["metadata"]["name"] = f"{EVIL}{MARKUP}"
    other = {"kind": f"Secret{EVIL}\n✓ fine", "apiVersion": "v1"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump_all([spec, other]))
    words = said(finetune("validate", "job.yaml", cwd=tmp_path))
    assert [character for character in UNSAFE if character in words] == []
    assert not any(line.startswith("✓") for line in words.splitlines())


@pytest.mark.parametrize(
    "line",
    [
        EVIL,
        MARKUP,
        json.dumps({"event": f"{EVIL}{MARKUP}", "level": "error", "loss": EVIL}),
        '{"event": ' + '{"a":' * 100_000,
        '{"event": "\\ud800"}',
    ],
    ids=["plain", "markup", "JSON", "deep", "surrogate"],
)
@pytest.mark.parametrize("raw", [True, False])
def test_a_log_is_text(capsys, line, raw):
    console.out.cache_clear()
    try:
        logs._print([line], raw=raw)
    finally:
        console.out.cache_clear()
    shown = capsys.readouterr().out
    assert [character for character in UNSAFE if character in shown] == []


@pytest.mark.parametrize(
    "loss", ["1e308", "1e999", "-1e308", "1" + "0" * 4000, '"nan"', '"x"', "[1]", "null", '"1e400"']
)
def test_no_number_of_a_log_breaks_the_curve(loss):
    lines = [f'{{"step": {step}, "loss": {loss}}}' for step in range(3)]
    found = loss_history.losses([*lines, '{"a":' * 100_000])
    assert len(formatting.sparkline(found, 40)) <= 40
    assert all(
        len(formatting.loss(value)) < 20 and len(formatting.number(value or 0)) < 20
        for value in found
        if value == value
    )
