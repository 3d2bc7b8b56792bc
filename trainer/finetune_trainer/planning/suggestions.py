"""What to change when no layout fits in GPU memory. Pure, importable without torch."""

from collections.abc import Iterator
from dataclasses import replace

from finetune_trainer.planning.device import required_bytes
from finetune_trainer.planning.layout_search import LayoutSearch, can_be_sharded
from finetune_trainer.planning.memory import GIB, Layout
from finetune_trainer.planning.model_shape import ModelShape


def explain_wont_fit(search: LayoutSearch, shape: ModelShape) -> str:
    """Return the sentence for the user: what is needed, what the GPU has, and what to change."""
    layout = search.minimal_memory(shape, can_be_sharded(search.spec, search.processes))
    need = required_bytes(search.peak(shape, layout))
    fixes = list(suggest_fixes(search, shape, layout))
    least = search.layout(1, shape.layers, sharded=layout.sharded)
    if not fixes and layout != least and search.device.fits(search.peak(shape, least)):
        fixes = ["set training.microBatchSize: 1 and training.gradientCheckpointing: enabled"]
    return (
        f"needs {need / GIB:.1f} GiB of GPU memory at micro-batch {layout.micro_batch}, the GPU has"
        f" {search.device.memory_bytes / GIB:.1f}: {', or '.join([*fixes, 'use a larger GPU'])}"
        " (if this estimate is wrong, resources.gpuMemory overrides what the GPU has)"
    )


def suggest_fixes(search: LayoutSearch, shape: ModelShape, layout: Layout) -> Iterator[str]:
    """Yield single-field changes that would each make the run fit."""
    spec = search.spec

    def fits(layout: Layout, search: LayoutSearch = search) -> bool:
        return search.device.fits(search.peak(shape, layout))

    if layout.dequantized and fits(replace(layout, dequantized=0)):
        yield "set quantization.cachedLayers: auto"
    if layout.checkpointed < shape.layers and fits(replace(layout, checkpointed=shape.layers, selective=False)):
        yield "set training.gradientCheckpointing: enabled"
    sizes = [size for size in range(layout.micro_batch - 1, 0, -1) if layout.micro_batch % size == 0]
    resized = (replace(layout, micro_batch=size, tokens=search.most_tokens(size)) for size in sizes)
    smaller = next(filter(fits, resized), None)
    if smaller:
        yield f"set training.microBatchSize: {smaller.micro_batch}"
    for length in range(search.longest - 8 - search.longest % 8, search.longest // 8, -8):
        tokens = min(layout.tokens, layout.micro_batch * length)
        if fits(replace(layout, tokens=tokens), replace(search, longest=length)):
            yield f"set training.maxLength: {length} or less"
            break
    for bits in (8, 4):
        quantization = spec.quantization.model_copy(update={"bits": bits})
        fewer = replace(search, spec=spec.model_copy(update={"quantization": quantization}))
        if bits < spec.quantization.bits and fits(replace(layout, sharded=layout.sharded and bits != 8), fewer):
            yield f"set quantization.bits: {bits}"
            break
    more = (size for size in (2, 4, 8, 16) if size > layout.processes and spec.training.batch_size % size == 0)
    least = search.layout(1, shape.layers, sharded=True)
    sharded = (size for size in more if can_be_sharded(spec, size) and fits(replace(least, processes=size)))
    enough = next(sharded, None)
    if enough:
        yield f"shard the weights over {enough} GPUs (resources.gpusPerNode times resources.nodes)"
