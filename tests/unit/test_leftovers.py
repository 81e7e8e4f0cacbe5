"""Shared memory of runs that were killed: whose is removed, and whose is not."""
import mmap
import os
import time

from frpo.cluster import leftovers


def buffer(folder, name, age_s):
    file = folder / name
    file.write_bytes(b"x" * mmap.PAGESIZE)
    then = time.time() - age_s
    os.utime(file, (then, then))
    return file


def test_only_old_buffers_that_nobody_maps_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path)
    gone = [buffer(tmp_path, name, 99) for name in ("deepspeed_allreduce_buffer_0_host_1_0", "vllm_dist_1-cpushm_0")]
    young = buffer(tmp_path, "deepspeed_allreduce_buffer_0_host_2_0", 5)
    another = buffer(tmp_path, "somebody_elses", 3600)
    used = buffer(tmp_path, "vllm_dist_2-cpushm_0", 3600)
    with used.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        os.utime(used, (1, 1))
        leftovers.remove_leftovers()
        assert [file.exists() for file in (*gone, young, another, used)] == [False, False, True, True, True]
