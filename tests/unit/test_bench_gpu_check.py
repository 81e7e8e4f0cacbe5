"""The check of a GPU on a CPU: what runs here is right, what cannot says why, and what breaks is told."""
from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
PARTS = ["gemm", "rows", "losses", "attention", "zero", "broadcast", "ipc", "lora_push"]


def module(name):
    """A file of the benchmarks, under the name by which they import each other."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    found = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


module("token_losses")
bench = module("gpu_check")


def run(folder, *options, **environment):
    """(what the script printed, its lines by part)."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(FOLDER / "gpu_check.py"), "--json", str(folder / "lines"), *options],
                          capture_output=True, text=True, timeout=200, env=clean | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *lines = map(json.loads, (folder / "lines").read_text().splitlines())
    assert first["device"] == "CPU" and first["small"] and first["versions"]["torch"]
    assert done.stdout.startswith(json.dumps(first))
    return done.stdout, {line["part"]: line for line in lines}


def here(capsys, *options):
    """(exit code, lines) of a run in this process."""
    code = bench.main(["--here", *options])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"part"')]


def test_all_parts_on_a_cpu(tmp_path):
    printed, lines = run(tmp_path)
    assert list(lines) == PARTS and all(json.dumps(line) in printed for line in lines.values())
    table = printed[printed.index("verdict ┃"):]
    assert all(f" {part} " in table for part in PARTS)
    skipped = {part: line["why"] for part, line in lines.items() if line["verdict"] == "skipped"}
    assert skipped.keys() == {"rows", "ipc"}
    assert "TRITON_INTERPRET=1" in skipped["rows"] and "needs a GPU" in skipped["ipc"]
    assert {line["verdict"] for part, line in lines.items() if part not in skipped} == {"pass"}
    assert all(lines["zero"][f"{name}_loss_error"] < 1e-4 for name in bench.STRATEGIES)
    assert lines["zero"]["compiled"] == []
    assert lines["attention"]["Mistral_regrouped_logit_error"] < 1e-5
    assert lines["lora_push"]["arrived_as_sent"] and lines["lora_push"]["adapters_show"]
    assert lines["broadcast"]["bytes_equal"]


def test_triton_rows_in_the_interpreter(tmp_path):
    _, lines = run(tmp_path, "--parts", "rows", TRITON_INTERPRET="1")
    assert list(lines) == ["rows"] and lines["rows"]["verdict"] == "pass"
    assert lines["rows"]["repeats_bit_for_bit"] and lines["rows"]["triton_gradient_error"] < 2e-5


def test_a_part_that_raises_fails_and_the_others_go_on(monkeypatch, capsys):
    def broken(setting, found):
        found.note(before=1.23456)
        raise ValueError("no such kernel\nsecond line")

    monkeypatch.setitem(bench.PARTS, "rows", broken)
    code, lines = here(capsys, "--parts", "rows,gemm")
    assert code == 1 and [line["verdict"] for line in lines] == ["fail", "pass"]
    assert lines[0]["why"] == "ValueError: no such kernel" and lines[0]["before"] == 1.235


def test_a_wrong_result_fails_with_its_error(monkeypatch, capsys):
    monkeypatch.setattr(bench, "project_", lambda logits, hidden, head: logits.fill_(float("nan")))
    code, (line,) = here(capsys, "--parts", "gemm")
    assert code == 1 and line["why"] == "logits_error is nan, allowed 0.0001"


@pytest.mark.parametrize("installed, verdict", [(True, "fail"), (False, "skipped")])
def test_a_part_without_its_package_is_skipped(monkeypatch, capsys, installed, verdict):
    def lacking(setting, found):
        raise ModuleNotFoundError("No module named 'deepspeed.ops'", name="deepspeed.ops")

    monkeypatch.setitem(bench.PARTS, "zero", lacking)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: object() if installed else None)
    code, (line,) = here(capsys, "--parts", "zero")
    assert line["verdict"] == verdict and code == installed
    assert installed or line["why"] == "deepspeed is not installed"


def test_a_process_that_dies_or_hangs_is_told(monkeypatch, capsys):
    def only_line(*options):
        assert bench.main(["--parts", "gemm", *options]) == expected
        return json.loads(capsys.readouterr().out.splitlines()[1])

    expected = 1
    with monkeypatch.context() as patched:
        patched.setattr(bench.sys, "executable", "/bin/false")
        assert only_line()["why"] == "its process ended with 1 and no result"
    monkeypatch.setattr(bench, "PART_S", 0.1)
    assert only_line()["why"] == "its process did not end in 0.1 s"
    expected = 0
    monkeypatch.setattr(bench, "PART_S", 100)
    assert only_line("--seconds", "0.1")["why"] == "0.1 s were used up before it ended"


def test_no_part_begins_when_the_time_is_used_up(capsys):
    code, lines = here(capsys, "--seconds", "0")
    assert code == 0 and [line["part"] for line in lines] == PARTS
    assert {(line["verdict"], line["why"]) for line in lines} == {("skipped", "0 s are used up")}


@pytest.mark.parametrize("options, there_are", [([], PARTS), (["--all"], [*PARTS, *bench.MACHINE])])
def test_an_unknown_part_is_refused(capsys, options, there_are):
    with pytest.raises(SystemExit, match="2"):
        bench.main([*options, "--parts", "gemm,rosw"])
    assert f"unknown parts: rosw; there are {', '.join(there_are)}" in capsys.readouterr().err
