"""`finetune validate`: what kubectl apply would refuse, said here with file and line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import typer

from finetune_cli.errors import CliError


@dataclass
class Tally:
    """What a validation found.

    Names of valid jobs and sweeps, problems as printable lines, kinds left alone, what a cluster cannot read of valid
    jobs, and what their adapters must reach to be published.
    """

    valid: list[str] = field(default_factory=list)
    sweeps: list[str] = field(default_factory=list)
    invalid: int = 0
    problems: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    local: list[str] = field(default_factory=list)
    gates: list[str] = field(default_factory=list)


def check(file: str, tally: Tally) -> None:
    """Validate every document of `file` into `tally`."""
    from finetune_api import manifest
    from finetune_api.plain_text import one_line
    from finetune_api.sweep_trials import expand
    from finetune_cli.manifests import documents, foreign_kind, read

    try:
        source = read(file)
        found = documents(source)
    except (CliError, manifest.ManifestError) as error:
        lines = str(error).splitlines()
        if isinstance(error, CliError) and error.hint:
            lines[-1] += f" ({error.hint})"
        tally.problems.extend(lines)
        tally.invalid += 1
        return
    for document in found:
        if kind := foreign_kind(document):
            tally.skipped.append(
                f"{document.source}:{document.lines[()]}: {one_line(kind)} is not checked, only our own kinds are"
            )
            continue
        try:
            if document.is_sweep:
                sweep = manifest.check_sweep(document, source.base)
                trials, jobs = len(expand(sweep.metadata.name, sweep.spec)), len(manifest.holders_of(sweep))
                packed = f" in {_count(jobs, 'FineTuneJob')}" if jobs < trials else ""
                tally.sweeps.append(f"{sweep.metadata.name} ({_count(trials, 'trial')}{packed})")
                continue
            job = manifest.check(document, source.base)
            tally.valid.append(job.metadata.name)
            if job.spec.publish:
                asked = " and ".join(each.told for each in job.spec.publish.only_if)
                tally.gates.append(f"{job.metadata.name} is published only if {asked}")
            if fields := [f"spec.{name}" for name, uri in job.spec.uris.items() if uri.startswith("file://")]:
                tally.local.append(f"{document.source}: the cluster cannot read {', '.join(fields)}")
        except manifest.ManifestError as error:
            tally.problems.extend(one_line(str(problem)) for problem in error.problems)
            tally.invalid += 1


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def validate(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Manifests, or - for stdin.", show_default=False)
    ],
) -> None:
    """Check manifests without a cluster.

    Prints every problem with its file, line and field, in the words kubectl apply would use, and exits 1 if there
    is one. A file may hold several documents; kinds other than FineTuneJob and FineTuneSweep are left alone. Each
    trial of a sweep is checked. file:// is right for finetune run alone: a cluster cannot read this machine's files,
    and kubectl apply refuses file://./.

    Examples:
        finetune validate job.yaml
        finetune validate experiments/*.yaml
        kubectl kustomize overlays/rank32 | finetune validate -
    """
    from finetune_cli.output import console

    tally = Tally()
    for file in files:
        check(file, tally)
    for line in tally.skipped:
        console.note(line)
    for line in tally.problems:
        console.err().print(line, soft_wrap=True)
    if tally.problems:
        valid = len(tally.valid) + len(tally.sweeps)
        of = f" of {tally.invalid + valid}" if valid else ""
        raise CliError(
            f"{_count(len(tally.problems), 'problem')} in {tally.invalid}{of} manifest"
            f"{'' if tally.invalid + valid == 1 else 's'}"
        )
    if not tally.valid and not tally.sweeps:
        raise CliError("nothing to check: there is no FineTuneJob in what was given")
    where = " for finetune run" if len(tally.local) == len(tally.valid) else ""
    for names, kind in (
        (tally.valid, f"FineTuneJob{'' if len(tally.valid) == 1 else 's'} valid{where}"),
        (tally.sweeps, f"FineTuneSweep{'' if len(tally.sweeps) == 1 else 's'} valid"),
    ):
        if names:
            listed = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            console.done(f"{len(names)} {kind}: {listed}")
    for line in (*tally.gates, *tally.local):
        console.note(line)
    if tally.local:
        console.note("hint:  for a cluster, put these at s3://bucket/key, pvc://claim/path or hf://owner/name")
