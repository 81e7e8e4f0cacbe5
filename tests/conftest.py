"""For all tests: one thread, since tensors are tiny and the cores are shared with the processes that tests start.

Under `-n` all integration tests stay on one worker, which shares one Ray and its engines among them; the others run
beside them.
"""
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
INTEGRATION = Path(__file__).parent / "integration"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    for item in items:
        if INTEGRATION in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("integration"))
