"Garbage collections in a search pass over what has outlived the last one, and all is as before after it."

import gc
import subprocess
import sys
import weakref

import pytest

from channelslast.find.garbage import FEW, quick_collections


class Node:
    def __init__(self):
        self.itself = self


def test_what_outlives_a_collection_is_passed_over_until_the_end(nothing_frozen):
    with pytest.raises(KeyError), quick_collections() as collect:
        n_frozen = gc.get_freeze_count()
        kept, dropped = Node(), weakref.ref(Node())
        collect()
        assert dropped() is None and gc.get_freeze_count() > n_frozen > 0
        outlived = weakref.ref(kept)
        del kept
        collect()
        assert outlived() is not None
        raise KeyError
    assert gc.get_freeze_count() < FEW
    gc.collect()
    assert outlived() is None


def test_a_new_interpreter_has_frozen_few_objects():
    code = "import gc; print(gc.get_freeze_count())"
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) < FEW


def test_what_python_freezes_when_it_starts_is_no_reason_for_whole_collections(nothing_frozen, monkeypatch):
    n_frozen = gc.get_freeze_count
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 375)
    with quick_collections():
        assert n_frozen() > 1000
    assert n_frozen() < FEW


def test_what_others_have_frozen_stays_so(nothing_frozen):
    gc.freeze()
    n_frozen = gc.get_freeze_count()
    with quick_collections() as collect:
        dropped = weakref.ref(Node())
        collect()
        assert dropped() is None
    assert 0 < gc.get_freeze_count() <= n_frozen
