"""The gate before publication: whether the adapter meets publish.onlyIf, and where it goes if it does not."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import structlog

from finetune_api import constants
from finetune_api.artifact_manifest import Lineage, StoreManifest
from finetune_api.gate import GateCheck, candidate_folder
from finetune_api.latest import LATEST_FILE
from finetune_api.spec_publish import LOSS, Requirement
from finetune_api.uri import parse, place
from finetune_trainer.checkpoints.manager import CheckpointManager
from finetune_trainer.context import RunContext
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.publishing.bundle import Bundle
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.settings import Settings
from finetune_trainer.stores import latest
from finetune_trainer.stores import manifest as store_manifest
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import StoreCorrupted, StoreNotFound
from finetune_trainer.stores.open import open_store
from finetune_trainer.stores.signature import require_signature

log = structlog.get_logger(__name__)


def check_gate(settings: Settings, lineage: Lineage, decided: Sequence[GateCheck] | None = None) -> None:
    """Refuse, before anything is trained, a comparison with an adapter that was measured otherwise.

    Args:
        settings: Its spec has the conditions.
        lineage: Of what is about to be trained.
        decided: What an earlier attempt decided: then nothing is read again, for it may have begun to publish.

    Raises:
        ConfigInvalid: There is no such adapter, it is damaged, or its metric is not of the same rows and settings.
        StoreError: It cannot be read.
    """
    for index, each in enumerate(_requirements(settings) if decided is None else ()):
        if each.better_than and (problem := _check(settings, index, each, {each.metric: 0.0}, lineage).problem):
            raise ConfigInvalid(f"spec.{_field(index)}: {each.better_than}: {problem}")


def through_gate(
    ctx: RunContext, output: AdapterOutput, bundle: Bundle, checkpoints: CheckpointManager, fingerprint: str
) -> tuple[AdapterOutput, Bundle, str]:
    """Decide whether the adapter is published, and report it.

    The decision is kept before anything is published, and an attempt that follows on a kill holds to it.

    Args:
        ctx: The run.
        output: Where the adapter goes if all conditions are met.
        bundle: The adapter.
        checkpoints: The run's, with which the decision is kept.
        fingerprint: What decides the run's result.

    Returns:
        Where it goes, the bundle with what decided it, and what is not met ('' if it is published).

    Raises:
        StoreError: An adapter to beat is out of reach.
    """
    if not ctx.settings.spec.publish:
        return output, bundle, ""
    checks = checkpoints.decided(fingerprint)
    if checks is None or not _decides(ctx.settings, checks, bundle.metrics):
        checks = judge(ctx.settings, bundle.metrics, bundle.lineage or Lineage())
        checkpoints.keep_decision(fingerprint, checks)
    ctx.report.gate(checks)
    bundle, refusal = replace(bundle, gate=tuple(checks)), verdict(checks)
    if not refusal:
        return output, bundle, ""
    log.warning(f"The adapter does not meet publish.onlyIf: {refusal}")
    return candidate_output(ctx.settings), bundle, refusal


def _decides(settings: Settings, checks: Sequence[GateCheck], metrics: Mapping[str, float]) -> bool:
    """Return whether `checks`, which were read, are what this spec asks of these metrics, and say what follows.

    All of it is computed again but for the bar of betterThan, which may be gone by now.
    """
    asked = _requirements(settings)
    return len(asked) == len(checks) and all(map(partial(_is_of, metrics), asked, checks))


def _is_of(metrics: Mapping[str, float], asked: Requirement, check: GateCheck) -> bool:
    value = metrics.get(asked.metric)
    if fixed := _fixed(asked, value):
        return check == fixed
    mine = ("betterThan", asked.metric, asked.better_than, value)
    is_mine = (check.comparison, check.metric, check.other, check.value) == mine
    return is_mine and check.passed == _beats(asked.metric, value, check.bar)


def candidate_output(settings: Settings) -> AdapterOutput:
    """Return where this job's adapter is kept if it does not pass."""
    job = settings.job.metadata
    return AdapterOutput.open(settings, candidate_folder(job.name, job.uid))


def judge(settings: Settings, metrics: Mapping[str, float], lineage: Lineage) -> list[GateCheck]:
    """Return what becomes of each condition of publish.onlyIf, with these metrics of the adapter and its lineage.

    An adapter to beat is read again: it is what the pointer names now that would be replaced.
    """
    return [_check(settings, index, each, metrics, lineage) for index, each in enumerate(_requirements(settings))]


def verdict(checks: Sequence[GateCheck]) -> str:
    """Return what to say of the conditions that are not met; '' if all are."""
    return "; ".join(each.told for each in checks if not each.passed)


def _requirements(settings: Settings) -> Sequence[Requirement]:
    return settings.spec.publish.only_if if settings.spec.publish else ()


def _field(index: int) -> str:
    return f"publish.onlyIf[{index}].betterThan"


def _check(
    settings: Settings, index: int, asked: Requirement, metrics: Mapping[str, float], lineage: Lineage
) -> GateCheck:
    value = metrics.get(asked.metric)
    if fixed := _fixed(asked, value):
        return fixed
    check = GateCheck(metric=asked.metric, value=value, comparison="betterThan", other=asked.better_than, passed=False)
    try:
        digest, other = _other(settings, index, asked)
        bar = _comparable(other, asked.metric, lineage)
    except (StoreCorrupted, StoreNotFound, _CannotBeBeaten) as error:
        return check.model_copy(update={"problem": str(error).removeprefix(f"{_field(index)}: ")[:512]})
    passed = _beats(asked.metric, value, bar)
    return check.model_copy(update={"bar": bar, "other_digest": digest, "passed": passed})


def _fixed(asked: Requirement, value: float | None) -> GateCheck | None:
    """Return what becomes of a condition with a number of its own; None of one that names an adapter."""
    if asked.at_least is not None:
        passed = value is not None and value >= asked.at_least
        return GateCheck(metric=asked.metric, value=value, comparison="atLeast", bar=asked.at_least, passed=passed)
    if asked.at_most is not None:
        passed = value is not None and value <= asked.at_most
        return GateCheck(metric=asked.metric, value=value, comparison="atMost", bar=asked.at_most, passed=passed)
    return None


def _beats(metric: str, value: float | None, bar: float | None) -> bool:
    return value is not None and bar is not None and (value < bar if metric == LOSS else value > bar)


class _CannotBeBeaten(Exception):
    """The other adapter is one that this one would replace."""


class _OtherwiseMeasured(_CannotBeBeaten):
    """Two metrics of one name are not of the same rows, or were not measured alike."""


def _other(settings: Settings, index: int, asked: Requirement) -> tuple[str, StoreManifest]:
    """Return the digest and the manifest of the adapter to beat, whose every file was read and compared.

    Raises:
        StoreNotFound: There is none.
        StoreCorrupted: It is not what its manifest says, or is not signed as it must be.
        _CannotBeBeaten: It, or what a pointer leads to, is this job's own output.
    """
    credentials = Credentials.for_role("output", secrets_dir=settings.environment.secrets)
    store = open_store(parse(asked.better_than or ""), credentials, field=_field(index))
    found = latest.find(store)
    if found is None or found.manifest.kind != "Adapter":
        raise StoreNotFound(
            f"there is no adapter to beat: neither {constants.MANIFEST_FILE} of one nor {LATEST_FILE}; publish"
            " the first one without this condition"
        )
    if place(store.uri_of(found.path)) == place(settings.spec.output.uri):
        raise _CannotBeBeaten(
            f"{f'{LATEST_FILE} names' if found.path else 'it is'} this job's own output.uri, and its readers would lose"
            " the adapter while it is replaced: write to another folder, and promote it"
        )
    require_signature(found.data, store.uri_of(found.path), credentials.values)
    store_manifest.verify(store, found.manifest, found.path)
    return store_manifest.digest_of(found.data), found.manifest


def _comparable(other: StoreManifest, metric: str, mine: Lineage) -> float:
    """Return the recorded metric of `other`. Raises _OtherwiseMeasured unless it is of the same rows and settings."""
    theirs = other.lineage or Lineage()
    value = (other.metrics or {}).get(metric)
    if value is None:
        raise _OtherwiseMeasured(f"its manifest records no {metric}")
    if theirs.eval_rows is None or theirs.eval_rows != mine.eval_rows:
        raise _OtherwiseMeasured(
            f"its {metric} is of other held-out rows ({_short(theirs.eval_rows)}, here {_short(mine.eval_rows)}):"
            " train it with this job's dataset.eval, base tokenizer and maxLength"
        )
    if metric != LOSS and (theirs.eval_prompts is None or theirs.eval_prompts != mine.eval_prompts):
        raise _OtherwiseMeasured(
            f"its {metric} was measured with other prompts or settings ({_short(theirs.eval_prompts)}, here"
            f" {_short(mine.eval_prompts)}): evaluation.generation must be the same"
        )
    return value


def _short(digest: str | None) -> str:
    return digest[:15] if digest else "not recorded"
