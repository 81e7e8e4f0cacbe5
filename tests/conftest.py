"""For all tests: one thread, since tensors are tiny and the cores are shared with the processes that tests start.

Under `-n` integration tests go to two workers: one shares a Ray, its ranks and its engines among its tests; those of
whole runs, which start everything themselves, are the other's. Neither keeps two cores busy alone. All other tests
follow, file by file.
"""
import gc
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

WHOLE_RUNS = {"test_deaths", "test_first_command", "test_launcher_ranks", "test_launchers_two_nodes",
              "test_lost_gpu_node", "test_machine", "test_ray_job", "test_resume", "test_retention",
              "test_rollout_only", "test_slurm", "test_staleness", "test_two_nodes"}


def pytest_configure():
    gc.disable()  # collecting tests makes objects that last


def pytest_collection_finish():
    gc.enable()


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class IntegrationFirst(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            if "/integration/" not in file:
                return file
            return "whole runs" if Path(file).stem in WHOLE_RUNS else "shared engines"

    return IntegrationFirst(config, log)
