"""Read FineTuneJob manifests: YAML in, a checked FineTuneJob out, or sentences that name field, file and line.

The sentences follow the API server's ("spec.lora.rank: Invalid value: -1: should be …"), so that `finetune validate`,
the trainer and `kubectl apply` speak alike.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from finetune_api import constants, packed_jobs, sentences, sweep_packs, uri
from finetune_api.spec import FineTuneJob, FineTuneJobSpec, Metadata
from finetune_api.sweep import FineTuneSweep
from finetune_api.sweep_packing import DRAWN_LATER, why_not_packed
from finetune_api.sweep_trials import PlannedTrial, SweepError, expand, extremes, job_name, trial_spec
from finetune_api.yaml_documents import (
    SET,
    Document,
    ManifestError,
    Path_,
    Problem,
    decoded,
    dotted,
    parse,
)

__all__ = ["Document", "ManifestError", "Problem", "check", "check_sweep", "decoded", "load_file", "load_text", "parse"]

M = TypeVar("M", FineTuneJob, FineTuneSweep)
#: Of a sweep's trials: a wrong template would say the same a thousand times.
MAX_PROBLEMS = 20
#: What stands beside spec, which no --set reaches.
_BESIDE_SPEC = ("apiVersion", "kind", "metadata", "status")


def _override(document: Document, assignments: Sequence[str]) -> None:
    """Apply 'path.below.spec=value' assignments; the value is YAML."""
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        keys = ("spec", *name.strip().removeprefix("spec.").split("."))
        if not equals or not all(keys):
            raise ManifestError(
                [Problem("", f"{assignment!r} is not path=value, for example training.learningRate=1e-4", source=SET)]
            )
        if keys[1] in _BESIDE_SPEC:
            where = Problem(
                dotted(keys[1:]), "--set reaches fields of spec alone: change this one in the file", None, SET
            )
            raise ManifestError([where])
        parsed = parse(value, SET)
        target = document.data
        for key in keys[:-1]:
            if not isinstance(target, dict):
                raise ManifestError([Problem(dotted(keys), "does not exist", source=SET)])
            target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise ManifestError([Problem(dotted(keys), "does not exist", source=SET)])
        target[keys[-1]] = parsed[0].data if parsed else None
        for end in range(1, len(keys) + 1):
            document.lines.setdefault(keys[:end], 0)
        document.lines[keys] = 0


def _resolve_relative(value: Any, base: Path) -> Any:
    """Make file://./x absolute, below `base`."""
    if isinstance(value, dict):
        return {key: _resolve_relative(item, base) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve_relative(item, base) for item in value]
    if isinstance(value, str) and value.startswith("file://./"):
        return f"file://{base.resolve()}/{value.removeprefix('file://./')}"
    return value


def with_name(value: Any, name: Any) -> Any:
    """Return the URI with {name} in its path filled in; anything else unchanged."""
    if not isinstance(value, str) or not isinstance(name, str) or uri.NAME_FIELD not in value:
        return value
    forms = (uri.rules_with_name(uri.WRITABLE), uri.image_rules(), uri.repository_rules())
    is_right = any(all(rule.holds(value) for rule in rules) for rules in forms)
    return value.replace(uri.NAME_FIELD, name) if is_right else value


def _fill_in_name(spec: Any, name: Any) -> Any:
    """Fill {name} in where a job writes."""
    if not isinstance(spec, dict):
        return spec
    filled = {section: _filled(spec[section], name) for section in ("output", "checkpoint") if section in spec}
    return {**spec, **filled}


def _filled(section: Any, name: Any) -> Any:
    """Return a section with {name} filled in in its uri, and in those of what lies in it."""
    if not isinstance(section, dict):
        return section
    inner = {key: _filled(value, name) for key, value in section.items() if isinstance(value, dict)}
    own = {"uri": with_name(section["uri"], name)} if "uri" in section else {}
    return {**section, **inner, **own}


def _problems(error: ValidationError, document: Document, root: type[BaseModel]) -> Iterator[Problem]:
    for item in error.errors(include_url=False):
        path: Path_ = tuple(item["loc"])
        if item["type"] == "rule" and (blamed := item.get("ctx", {}).get("field")):
            path = (*path, *blamed.split("."))
        yield document.problem(path, sentences.sentence(item, path, root))


def check(document: Document, base: Path | None = None, overrides: Sequence[str] = ()) -> FineTuneJob:
    """Turn a document into a FineTuneJob, {name} filled in. Raises ManifestError.

    Args:
        document: What was read; overrides are set in it.
        base: The folder that file://./ starts from.
        overrides: 'path.below.spec=value' assignments.
    """
    job = check_as(FineTuneJob, document, base, overrides)
    if job.spec.pack:
        _check_pack(job, document)
    return job


def _check_pack(job: FineTuneJob, document: Document) -> None:
    """Check the trials of a pack: each is a valid job, and may share a process with the others."""
    where = ("spec", "pack", "trials")
    try:
        trials = trial_specs(job.metadata.name, job.spec)
    except ManifestError as error:
        raise ManifestError([document.problem(where, str(each)) for each in error.problems]) from None
    template = job.spec.model_copy(update={"suspend": False, "active_deadline_seconds": None})
    others = {"pending_deadline_seconds": None, "ttl_seconds_after_finished": None}
    if why := why_not_packed([("the job", template.model_copy(update=others)), *trials.items()]):
        raise ManifestError([document.problem(where, why)])


def trial_specs(name: str, spec: FineTuneJobSpec) -> dict[str, FineTuneJobSpec]:
    """Return the spec of each trial of a pack, none for any other job. Raises ManifestError for wrong values.

    Args:
        name: Name of the job.
        spec: Its spec.
    """
    if spec.pack is None:
        return {}
    found = Document(packed_jobs.sweep_document(Metadata(name=name), spec), "")
    sweep, trials, problems = check_sweep(found, each_trial=False), dict[str, FineTuneJobSpec](), list[Problem]()
    for trial, document in trial_documents(sweep):
        try:
            trials[trial.name] = check(document).spec
        except ManifestError as error:
            problems += [Problem(f"trial {trial.name}", str(each)) for each in error.problems]
    if problems:
        raise ManifestError(problems[:MAX_PROBLEMS])
    return trials


def check_sweep(
    document: Document, base: Path | None = None, overrides: Sequence[str] = (), *, each_trial: bool = True
) -> FineTuneSweep:
    """Turn a document into a FineTuneSweep, each of whose trials is a valid FineTuneJob. Raises ManifestError.

    Args:
        document: The manifest.
        base: The folder that file://./ starts from.
        overrides: path=value, below spec.
        each_trial: Whether to check the trials one by one.
    """
    sweep = check_as(FineTuneSweep, document, base, overrides)
    try:
        trials = expand(sweep.metadata.name, sweep.spec)
    except SweepError as error:
        raise ManifestError([document.problem(("spec", *_parts(error.field)), error.message)]) from None
    template, problems = sweep.spec.template.model_dump(mode="json", by_alias=True, exclude_unset=True), []
    specs: list[tuple[PlannedTrial, FineTuneJobSpec]] = []
    drawn_later = sweep.spec.strategy == "tpe"
    for trial in (extremes(sweep.spec) if drawn_later else trials) if each_trial else ():
        name = f"a trial of {trial.summary}" if drawn_later else f"trial {trial.name}"
        try:
            specs.append((trial, check(trial_document(sweep.metadata.name, template, trial)).spec))
        except ManifestError as error:
            problems += [Problem(name, str(each), source=document.source) for each in error.problems]
    if problems:
        raise ManifestError(problems[:MAX_PROBLEMS])
    if why := sweep_packs.refusal(sweep.metadata.name, sweep.spec, specs):
        raise ManifestError([document.problem(("spec", "packing"), why)])
    return sweep


def trial_document(sweep: str, template: dict[str, Any], trial: PlannedTrial) -> Document:
    """Return the FineTuneJob of one trial."""
    metadata = {"name": job_name(sweep, trial.name)}
    spec = trial_spec(sweep, template, trial)
    return Document(
        {"apiVersion": constants.API_VERSION, "kind": constants.KIND, "metadata": metadata, "spec": spec}, ""
    )


def trial_problem(sweep: str, template: dict[str, Any], trial: PlannedTrial) -> str:
    """Return what is wrong with the FineTuneJob of a trial; nothing of one that is right."""
    try:
        check(trial_document(sweep, template, trial))
    except ManifestError as error:
        return str(error.problems[0])
    return ""


def _parts(field: str) -> Path_:
    """Return trials[0].values as ('trials', 0, 'values')."""
    return tuple(
        int(part) if part.isdecimal() else part for part in field.replace("]", "").replace("[", ".").split(".")
    )


def check_as(kind: type[M], document: Document, base: Path | None = None, overrides: Sequence[str] = ()) -> M:
    """Turn a document into an object of `kind` by the rules of its schema, which the API server holds too.

    Raises ManifestError.
    """
    if not isinstance(document.data, dict):
        found = "a list" if isinstance(document.data, list) else "a single value"
        rule = "a manifest is a YAML mapping with apiVersion, kind, metadata and spec"
        raise ManifestError([document.problem((), f"is no {kind.__name__}: {rule}, this is {found}")])
    _override(document, overrides)
    data = dict(document.data)
    data.pop("status", None)
    if base is not None and "spec" in data:
        data["spec"] = _resolve_relative(data["spec"], base)
    metadata = data.get("metadata")
    if kind is FineTuneJob and "spec" in data and isinstance(metadata, dict):
        data["spec"] = _fill_in_name(data["spec"], metadata.get("name"))
    try:
        return kind.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        problems = list(_problems(error, document, kind))
        if data.get("kind") not in constants.KINDS:  # what its spec must hold is not known
            problems = [problem for problem in problems if problem.field in ("apiVersion", "kind")]
        # As one reads the file; what --set gave has line 0.
        raise ManifestError(sorted(problems, key=lambda problem: problem.line or 0)) from None


def load_text(text: str, source: str, base: Path | None = None, overrides: Sequence[str] = ()) -> FineTuneJob:
    """Return the one FineTuneJob in `text`. Raises ManifestError when there is none, several, or a wrong one."""
    return check(the_document(text, source), base, overrides)


def the_document(text: str, source: str) -> Document:
    """Return the one FineTuneJob in `text`, not checked yet. Raises ManifestError when there is none, or several."""
    documents = parse(text, source)
    jobs = [document for document in documents if document.is_job] or documents
    if len(jobs) != 1:
        found = "nothing" if not jobs else f"{len(jobs)}"
        raise ManifestError([Problem("", f"one {constants.KIND} is expected, {found} found", source=source)])
    return jobs[0]


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> tuple[FineTuneSweep, dict[str, FineTuneJob]] | None:
    """Return the FineTuneSweep in the file at `path`, and the FineTuneJob of each trial; None if it holds a job.

    Raises ManifestError.
    """
    path = Path(path)
    documents = [document for document in parse(_read(path), str(path)) if document.is_sweep or document.is_job]
    if len(documents) != 1 or not documents[0].is_sweep:
        return None
    sweep = check_sweep(documents[0], path.parent, overrides)
    if sweep.spec.strategy == "tpe":
        raise ManifestError([documents[0].problem((), f"its trials cannot share a process: {DRAWN_LATER}")])
    return sweep, {trial.name: check(document) for trial, document in trial_documents(sweep)}


def trial_documents(sweep: FineTuneSweep) -> list[tuple[PlannedTrial, Document]]:
    """Return the trials of `sweep`, each with its FineTuneJob."""
    name, template = sweep.metadata.name, sweep.spec.template.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return [(trial, trial_document(name, template, trial)) for trial in expand(name, sweep.spec)]


def holders_of(sweep: FineTuneSweep, parallelism: int | None = None) -> tuple[sweep_packs.Holder, ...]:
    """Return the FineTuneJobs of a valid sweep: which trials share one.

    Args:
        sweep: The sweep.
        parallelism: Trials that run at the same time; by default as many as its spec says.
    """
    if sweep.spec.strategy == "tpe":
        return sweep_packs.singles(expand(sweep.metadata.name, sweep.spec))
    trials = [(trial, check(document).spec) for trial, document in trial_documents(sweep)]
    return sweep_packs.holders(sweep.metadata.name, sweep.spec, trials, parallelism or sweep.spec.parallelism)


def load_file(path: str | Path, overrides: Sequence[str] = ()) -> FineTuneJob:
    """Return the FineTuneJob in the file at `path`. Raises ManifestError, also for a file that cannot be read."""
    path = Path(path)
    return load_text(_read(path), str(path), path.parent, overrides)


def _read(path: Path) -> str:
    try:
        return decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise ManifestError([Problem("", f"cannot be read: {error.strerror}", source=str(path))]) from None
