"""For all tests: one thread, since tensors are tiny and the cores are shared with the processes that tests start.

Under `-n` all integration tests go to one worker, which shares one Ray and its engines among them; the others run
beside them, file by file.
"""
import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class IntegrationTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "integration" if "/integration/" in file else file

    return IntegrationTogether(config, log)
