"""`finetune plan`: what a manifest comes to. Every value with its origin, the batch, and the memory it will take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import price as prices
from finetune_cli.errors import CliError, Exit
from finetune_cli.options import Context, Kubeconfig, ManifestFile, Namespace, Output, Overrides
from finetune_cli.output import console, formatting

if TYPE_CHECKING:
    from finetune_api.base import ApiModel
    from finetune_api.manifest import Document
    from finetune_api.spec import FineTuneJob, FineTuneJobSpec
    from finetune_cli.duration import Cost
    from finetune_cli.forecast import Forecast

DEFAULT = "default"


@dataclass(frozen=True)
class Value:
    """One resolved field of spec. `origin` is "default", "--set" or "file:line"."""

    path: str
    value: Any
    origin: str


def values(job: FineTuneJob, document: Document) -> list[Value]:
    """Every field of the spec in the models' order, unset ones as None."""
    return list(_values(job.spec, (), document))


def _values(model: ApiModel, path: tuple[str, ...], document: Document) -> Iterator[Value]:
    from finetune_api.base import ApiModel

    dumped = model.model_dump(mode="json", by_alias=True, exclude_none=True)
    for name, field in type(model).model_fields.items():
        key = field.alias or name
        below = getattr(model, name)
        if isinstance(below, ApiModel):
            yield from _values(below, (*path, key), document)
        else:
            yield Value(".".join((*path, key)), dumped.get(key), _origin(("spec", *path, key), document))


def _origin(path: tuple[str, ...], document: Document) -> str:
    if path not in document.lines:
        return DEFAULT
    source, line = document.place(path)
    return f"{source}:{line}" if line else source


@dataclass(frozen=True)
class Batch:
    """How one optimizer step's sequences are made up: effective = processes * microBatch * accumulation.

    microBatch and accumulation are None where the trainer chooses; `choices` are the micro-batches it may choose from.
    """

    effective: int
    processes: int
    micro: int | None
    accumulation: int | None
    choices: tuple[int, ...] = ()


def batch(spec: FineTuneJobSpec) -> Batch:
    """Return the effective batch and what it is made of."""
    processes = spec.resources.nodes * max(1, spec.resources.gpus_per_node)
    effective, micro = spec.training.batch_size, spec.training.micro_batch_size
    share = effective // processes
    if isinstance(micro, int):
        return Batch(effective, processes, micro, share // micro)
    return Batch(effective, processes, None, None, tuple(n for n in range(1, share + 1) if share % n == 0))


def plan(
    file: ManifestFile,
    overrides: Overrides = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", metavar="SIZE", help="Memory of one GPU, such as 24Gi: will the run fit?"),
    ] = None,
    model_config: Annotated[
        Path | None,
        typer.Option(
            "--model-config", metavar="FILE", help="The model's config.json, instead of the one where the model lies."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help="The GPU, such as H100 or L4: will it fit, how long will it take?"),
    ] = None,
    price: Annotated[
        str | None,
        typer.Option(
            "--price",
            metavar="PRICE|cluster",
            parser=prices.parse,
            help="Of one hour of one GPU, or 'cluster' for the administrator's: what will it cost?",
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", metavar="N", min=1, max=10**12, help="Training rows, where they are not counted here."),
    ] = None,
    trial_hours: Annotated[
        float | None,
        typer.Option(
            "--trial-hours",
            metavar="HOURS",
            min=0,
            max=1e6,
            help="How long one trial of a sweep takes, where you know better.",
        ),
    ] = None,
    changed: Annotated[bool, typer.Option("--changed", help="Leave out the values that are defaults.")] = False,
    output: Output = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show what a manifest comes to: whether it fits, the batch, every value and its origin; of a sweep, every trial.

    A value on the command line wins over the file, which wins over the default.

    The memory is the trainer's own prediction, for rows of training.maxLength tokens. It needs the shape of the model:
    popular ones are known by their name on the hub; of others config.json is read from the hub (HF_TOKEN, HF_ENDPOINT),
    the bucket (AWS_*) or this machine, or given with --model-config. No GPU is needed, and no weights.

    The time is for rows of training.maxLength tokens and without evaluations, by what an H100 and an H200 were measured
    to do; other GPUs are scaled by their makers' figures. The GPU is --gpu, or what resources.nodeSelector names in
    nvidia.com/gpu.product. Steps are training.maxSteps, or follow from --rows, or the rows of a local file of JSON
    lines. --price cluster takes what the operator's chart says (costs.gpuPrices), if you may read its Deployment; no
    other option asks the cluster.

    Examples:
        finetune plan job.yaml
        finetune plan job.yaml --gpu h100 --price 2.5 --rows 50000
        finetune plan job.yaml --gpu h100 --price cluster
        finetune plan job.yaml --changed
        finetune plan job.yaml --set training.batchSize=64
        finetune plan job.yaml --gpu-memory 24Gi
        finetune plan job.yaml --gpu-memory 24Gi --model-config Mistral-7B/config.json
        finetune plan job.yaml -o json
        finetune plan sweep.yaml --gpu-memory 80Gi --gpu H100 --price 2.5
        finetune plan sweep.yaml --trial-hours 1.5

    Exit codes:
        0    the manifest is right, and fits the GPU if one is given
        1    it is wrong, or does not fit
        3    it cannot be told whether it fits: the model's config.json is out of reach, or of an unknown kind
    """
    from finetune_api import manifest
    from finetune_cli import duration
    from finetune_cli import forecast as memory
    from finetune_cli.manifests import refused, the_job

    room = memory.parse_size(gpu_memory) if gpu_memory else duration.memory_of(gpu) if gpu else None
    paid = prices.asked(price, gpu, namespace, context, kubeconfig)
    source, document = the_job(file, or_sweep=True)
    if document.is_sweep:
        from finetune_cli.sweep_forecast import Time, plan_sweep

        said = Time(gpu, trial_hours, rows, paid)
        plan_sweep(document, source.base, overrides or (), room, model_config, said, output)
        return
    if trial_hours is not None:
        raise CliError("--trial-hours is for sweeps")
    try:
        job = manifest.check(document, source.base, overrides or ())
    except manifest.ManifestError as error:
        raise refused(error) from None
    found, made = values(job, document), batch(job.spec)
    forecast = memory.forecast(job, room, model_config)
    time = duration.predict(job, forecast, duration.gpu_of(job, gpu), rows)
    gpus = max(1, job.spec.resources.nodes * job.spec.resources.gpus_per_node)
    cost = None if isinstance(time, str) else duration.Cost(time, gpus, paid and paid(job))
    if output:
        console.structured(
            {
                "job": job.metadata.name,
                "values": [asdict(value) for value in found],
                "batch": asdict(made) | {"choices": list(made.choices)},
                "memory": forecast.data,
                "time": cost and asdict(cost.time) | {"seconds": cost.time.seconds},
                "gpuHours": cost and cost.gpu_hours,
                "cost": cost and cost.money,
                "currency": cost and cost.price and (cost.price.currency or None),
            },
            output,
        )
    else:
        shown = [value for value in found if not changed or value.origin != DEFAULT]
        _page(job, shown, made, forecast, cost, time if isinstance(time, str) and (gpu or rows or price) else "")
    if forecast.fits is False:
        raise CliError("", code=Exit.INVALID)
    if room and forecast.fits is None:
        raise CliError("", code=Exit.UNREACHABLE)


def verdict(forecast: Forecast, cost: Cost | None) -> str:
    """Return what to know of a plan in one line."""
    peak = forecast.plan and forecast.plan.predicted_peak_memory_bytes
    of = f" of {formatting.size(forecast.gpu_memory_bytes)}" if forecast.gpu_memory_bytes else ""
    fits = {True: "fits", False: "does not fit", None: "" if peak else "memory not predicted"}[forecast.fits]
    memory = f"{formatting.size(peak)}{of} at the peak" if peak else ""
    return ", ".join(filter(None, [fits, memory, cost.sentence if cost else ""]))


def _page(
    job: FineTuneJob, found: list[Value], made: Batch, forecast: Forecast, cost: Cost | None, untold: str
) -> None:
    from rich.table import Table
    from rich.text import Text

    screen = console.out()
    screen.print(Text.assemble((f"{job.metadata.name}: ", "bold"), verdict(forecast, cost)))
    screen.print(Text("\nMemory", style="bold"))
    for line in forecast.lines:
        screen.print(Text("  " + line))
    if cost:
        each = f"{cost.time.steps:,} steps of {formatting.number(cost.time.step_seconds)} s"
        screen.print(Text("\nTime", style="bold"))
        screen.print(Text(f"  {each}, if all rows have training.maxLength tokens; no evaluations"))
    elif untold:
        screen.print(Text("\nTime", style="bold"))
        screen.print(Text(f"  Not predicted: {untold}."))
    screen.print(Text("\nBatch", style="bold"))
    screen.print(Text("  " + batch_sentence(made) + "\n"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True)
    section = None
    for item in found:
        head, _, rest = item.path.partition(".")
        if item.value is None:
            continue
        if (head if rest else "") != section:
            section = head if rest else ""
            table.add_row()
            if section:
                table.add_row(Text(section, style="bold"))
        style = "dim" if item.origin == DEFAULT else ""
        table.add_row(
            Text(f"  {rest}" if rest else head), Text(_shown(item.value), style=style), Text(item.origin, "dim")
        )
    console.page(table)
    unset = [item.path for item in found if item.value is None]
    if unset:
        screen.print(Text("\nNot set: " + ", ".join(unset), style="dim"))


def _shown(value: Any) -> str:
    import json

    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def batch_sentence(made: Batch) -> str:
    """Return the decomposition in words."""
    gpus = f"{made.processes} GPU{'' if made.processes == 1 else 's'}"
    total = f"{made.effective} sequences per optimizer step"
    if made.micro is not None:
        return f"{total} = {gpus} × micro-batch {made.micro} × {made.accumulation} accumulated"
    choices = ", ".join(map(str, made.choices))
    return (
        f"{total} = {gpus} × micro-batch (the trainer takes what fits of {choices}) × accumulated to make up the rest"
    )
