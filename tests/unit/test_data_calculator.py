"""GSM8K annotations to problems: parsing and normalisation by hand, and the real files where they are at hand."""
import re
from fractions import Fraction
from pathlib import Path

import pytest

from frpo.data.sets.arithmetic import ALPHABET
from frpo.data.sets.calculator import calculator_rows, normalise_number, parse_annotation
from frpo.data.source import Row, read_rows
from frpo.errors import DataError

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"


@pytest.mark.parametrize("text, number", [
    ("24", "24"), ("9.00", "9"), (".5", "0.5"), ("0.50", "0.5"), ("9.", "9"), ("007", "7"), ("-0.0", "0"),
    ("-21.50", "-21.5"), ("100", "100"), ("1/2", None), ("", None), (".", None), ("-", None), ("--3", None),
    ("3\n", None), ("٣", None),
])
def test_one_spelling_per_number(text, number):
    assert normalise_number(text) == number


@pytest.mark.parametrize("annotation, result", [
    ("48/2=24", ("48/2=", "24")),
    ("2*20*.01=.4", ("2*20*.01=", "0.4")),
    (" 80,000 + 50,000 = 130,000", ("80000+50000=", "130000")),
    ("-21/3=-7", ("-21/3=", "-7")),
    ("(5+3)*2=16.0", ("(5+3)*2=", "16")),
    ("50%*8=4", ("50%*8=", "4")),
    ("48/2", "no '='"),
    ("2+2=4=4", "more than one '='"),
    ("2x3=6", "character outside the alphabet"),
    ("1,5+2=3.5", "character outside the alphabet"),
    ("1,2345+1=12346", "character outside the alphabet"),
    ("12=12", "nothing to compute"),
    ("-153=-153", "nothing to compute"),
    ("1/2=1/2", "value is not a decimal number"),
    ("1+" * 16 + "1=17", "expression over 32 characters"),
    ("1+" * 15 + "11=26", ("1+" * 15 + "11=", "26")),
])
def test_annotation(annotation, result):
    assert parse_annotation(annotation) == result


def test_rows_keep_their_origin_and_skipped_annotations_are_counted():
    rows = [Row(origin="t.jsonl:1", columns={"question": "q", "answer": "a <<1+1=2>>2 <<3+3=6>>, <<5=5>> #### 6"}),
            Row(origin="t.jsonl:2", columns={"answer": "no annotation"}),
            Row(origin="t.jsonl:3", columns={"answer": "<<1+1=3>> <<2*2=4.0>> <<9+9=18"})]
    problems, skipped = calculator_rows(rows)
    assert problems == [Row(origin="t.jsonl:1", columns={"prompt": "1+1=", "answer": "2"}),
                        Row(origin="t.jsonl:1", columns={"prompt": "3+3=", "answer": "6"}),
                        Row(origin="t.jsonl:3", columns={"prompt": "2*2=", "answer": "4"})]
    assert skipped == {"nothing to compute": 1, "duplicate": 1, "annotation not closed": 1}


def test_row_without_answers_is_named():
    with pytest.raises(DataError, match="t.jsonl:9: no column 'answer'; the row has 'text'"):
        calculator_rows([Row(origin="t.jsonl:9", columns={"text": "<<1+1=2>>"})])


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs GSM8K's train.jsonl and test.jsonl in {GSM8K}")
@pytest.mark.parametrize("name, kept", [("train", 10645), ("test", 2799)])
def test_real_gsm8k(name, kept):
    """Every annotation is either a problem or counted, and every answer is the value of its expression."""
    rows = read_rows(str(GSM8K / f"{name}.jsonl"), split="", limit=None, seed=0)
    problems, skipped = calculator_rows(rows)
    assert len(problems) + sum(skipped.values()) == sum(row.columns["answer"].count("<<") for row in rows)
    assert len(problems) == len({row.columns["prompt"] for row in problems}) == kept
    for row in problems:
        question, answer = row.columns["prompt"], row.columns["answer"]
        assert set(question + answer) <= set(ALPHABET), row
        expression = re.sub(r"\d*\.?\d+|\d+\.", r"Fraction('\g<0>')", question[:-1])
        exact = eval(expression, {"Fraction": Fraction})
        assert exact == Fraction(answer), row
        line = int(row.origin.rpartition(":")[2])
        assert question[:-1] in rows[line - 1].columns["answer"].replace(" ", ""), row
