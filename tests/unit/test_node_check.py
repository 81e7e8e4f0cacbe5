"""What a node tells about itself, and which differences between two nodes are an error."""
import shutil
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest

import frpo
from frpo.cluster.node_check import _compare, _inspector
from frpo.errors import ConfigError

LOOK = """
import pickle, sys
look = pickle.load(open(sys.argv[1], "rb"))
assert "frpo" not in sys.modules  # the code came along
found = look({}, ["torch", "no-such-package"], 0)["packages"]
print(found["frpo"], found["torch"], found["no-such-package"])
"""


def seen_from(folder: Path, code: Path) -> list[str]:
    """What the inspector says in a process whose frpo is that of `folder`."""
    done = subprocess.run([sys.executable, "-c", LOOK, str(code)], capture_output=True, text=True, timeout=60,
                          env={"PYTHONPATH": str(folder)}, cwd=code.parent, check=True)
    return done.stdout.split()


def test_the_same_source_has_the_same_digest_and_a_changed_line_another(tmp_path):
    code = tmp_path / "code"
    code.write_bytes(cloudpickle.dumps(_inspector()))
    source, copy = Path(frpo.__file__).parent, tmp_path / "copy" / "frpo"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    here, there = seen_from(source.parent, code), seen_from(copy.parent, code)
    assert here == there and len(here[0]) == 64 and here[1][0].isdigit() and here[2] == "None"
    with (copy / "errors.py").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert seen_from(copy.parent, code)[0] != here[0]


def test_a_file_that_comes_late_is_waited_for(tmp_path):
    file = tmp_path / "file"
    file.write_text("a", encoding="utf-8")
    look = _inspector()
    digest = look({str(file): None}, [], 0)["files"][str(file)]
    assert look({str(file): digest}, [], 60)["files"] == {str(file): digest}  # at once
    assert look({str(tmp_path / "missing"): digest}, [], 0.1)["files"] == {str(tmp_path / "missing"): None}


@pytest.mark.parametrize("there, told", [
    ({"torch": "2.12.0", "frpo": "a"}, r"node nb and this node have torch 2\.12\.0 and 2\.13\.0; install the same"),
    ({"torch": None, "frpo": "a"}, "node nb and this node have torch not at all and 2.13.0; install"),
    ({"torch": "2.13.0", "frpo": "b"}, "node nb and this node differ in the source files of frpo; install")])
def test_other_packages_are_named(there, told):
    here = {"torch": "2.13.0", "frpo": "a", "vllm": None}
    _compare("node nb", here, {**here})
    with pytest.raises(ConfigError, match=told):
        _compare("node nb", here, there)
