"""Imports that stay are no work for the garbage collector."""

import gc

from finetune_trainer.runtime.gc import freeze_imports


def test_the_garbage_collector_passes_over_what_is_imported_for_good_and_works_on() -> None:
    gc.collect()
    with freeze_imports():
        assert not gc.isenabled()
        kept = {"name": []}
    assert gc.isenabled()
    made_later = {"name": []}
    seen = {id(each) for each in gc.get_objects()}
    assert id(made_later) in seen
    assert id(kept) not in seen
