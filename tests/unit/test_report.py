"""`frpo report` about folders that hold no matrix: a fine-tuning, only a picture, a run that has just begun."""
from __future__ import annotations

import json

from frpo.evaluate.curve import draw_loss_curve
from frpo.evaluate.page import TableText
from frpo.report import run_report, section
from frpo.retention.command import REPORT, show


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_folders_of_other_kinds(tmp_path):
    write(tmp_path / "tuned" / "metrics.jsonl", [{"step": 1, "sft/nll": 2.0, "eval/nll": 1.5},
                                                 {"step": 7, "sft/nll": 1.0, "eval/nll": None}])
    (tmp_path / "tuned" / "manifest.json").write_text('{"seed": 5}', encoding="utf-8")
    found = section(tmp_path / "tuned")
    assert (found.title, found.text, found.folded) == ("tuned", ("7 steps.",), {"manifest.json": '{"seed": 5}'})
    assert found.tables[0].rows == (("eval/nll", "1.5", "-"),) and found.pictures["Training"].is_file()
    losses = draw_loss_curve({"tuned": tmp_path / "tuned" / "metrics.jsonl"}, tmp_path / "losses.png")
    assert found.pictures["Training"].read_bytes() == losses.read_bytes()
    (tmp_path / "drawn").mkdir()
    (tmp_path / "tuned" / "curve.png").rename(tmp_path / "drawn" / "a<b.png")
    assert list(section(tmp_path / "drawn").pictures) == ["a<b"]
    write(tmp_path / "begun" / "metrics.jsonl", [])
    assert section(tmp_path / "begun").pictures == {} and section(tmp_path / "begun").text == ()
    assert run_report([str(tmp_path / "drawn")], None) == 0
    page = (tmp_path / "drawn" / REPORT).read_text(encoding="utf-8")
    assert "<h1>drawn</h1>" in page and 'alt="a&lt;b"' in page and 'src="data:image/png;base64,iVBOR' in page
    run_report([str(tmp_path / "drawn"), str(tmp_path / "begun")], None)
    assert "<h1>2 runs</h1>" in (tmp_path / "drawn" / REPORT).read_text(encoding="utf-8")


def test_a_terminal_shows_what_looks_like_markup(capsys):
    show([TableText(title="[red]t", note="[/]", columns=("[b]a", "b"), rows=(("[i]x", "1"),))])
    out = capsys.readouterr().out
    assert all(text in out for text in ("[red]t", "[/]", "[b]a", "[i]x"))
