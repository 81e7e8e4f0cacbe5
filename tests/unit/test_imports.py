"""What makes a process start quickly: no garbage collection while it imports, and no compiler that nothing uses."""
import gc
import subprocess
import sys

import pytest

from frpo.imports import quick_imports

MUON = """
import sys
import torch
from frpo.learner import zero
compiled = torch.compile
zero._import_muon_uncompiled()
assert torch.compile is compiled
from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5
assert zeropower_via_newtonschulz5(torch.eye(2), steps=1).shape == (2, 2)  # it works as it is
assert "torch._inductor.lowering" not in sys.modules
"""


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_off_within_and_afterwards_as_it_was(on):
    was_on = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(ImportError), quick_imports():
            assert not gc.isenabled()
            import nowhere_at_all  # noqa: F401
        assert gc.isenabled() == on
    finally:
        (gc.enable if was_on else gc.disable)()


def test_muon_is_imported_without_a_compiler():
    done = subprocess.run([sys.executable, "-c", MUON], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
