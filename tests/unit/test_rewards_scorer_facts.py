"""The file beside a reward model: written and read back, and refused where it is not what it should be."""
import json
import subprocess
import sys

import pytest

from frpo.errors import ModelError
from frpo.rewards.scorer_facts import FILE, ScorerFacts, template_digest

FACTS = ScorerFacts(kind="cost", format="chat", template=template_digest("{{ messages }}"), system_prompt="Sei kurz: é",
                    max_length=512, dtype="bf16", heldout={"accuracy": 0.75}, data="00ff")


def test_what_is_written_is_read(tmp_path):
    assert FACTS.write(tmp_path) == tmp_path / FILE
    assert ScorerFacts.read(tmp_path) == FACTS


def test_a_folder_without_the_file_has_no_facts(tmp_path):
    assert ScorerFacts.read(tmp_path) is None


def test_keys_of_a_later_version_are_left_out(tmp_path):
    path = FACTS.write(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
    assert ScorerFacts.read(tmp_path) == FACTS


@pytest.mark.parametrize("text, said", [
    ("{", "cannot be read"),
    ("[]", "is no mapping"),
    ('{"kind": "cost"}', "lacks data, dtype, format, heldout, max_length, system_prompt, template"),
])
def test_a_broken_file_is_refused(tmp_path, text, said):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ModelError, match=f"{FILE} {said}.*; export the reward model again"):
        ScorerFacts.read(tmp_path)


def test_an_unknown_kind_is_refused_with_those_that_exist(tmp_path):
    path = FACTS.write(tmp_path)
    path.write_text(path.read_text().replace('"cost"', '"mood"'))
    with pytest.raises(ModelError, match="kind is 'mood'; allowed are 'bradley_terry', 'cost'"):
        ScorerFacts.read(tmp_path)


def test_the_digest_is_that_of_the_text():
    assert template_digest("a") == "ca978112ca1bbdca"  # sha256sum of "a"


def test_the_module_loads_without_torch():
    code = "import sys, frpo.rewards.scorer_facts; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
