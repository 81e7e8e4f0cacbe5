"""Instructions on form: each rule on texts that just follow or just miss it, rows of IFEval, and wrong rows."""
import numpy as np
import pytest

from frpo.rewards import RewardSpec, RewardSuite
from frpo.rewards.instructions import CHECKS, follows_all
from frpo.types import Completion, Prompt, RolloutGroup

FIELDS = ("num_words", "relation", "keywords", "keyword", "frequency", "forbidden_words", "letter", "let_frequency",
          "let_relation", "num_paragraphs", "nth_paragraph", "first_word", "num_placeholders", "postscript_marker",
          "num_bullets", "num_highlights", "section_spliter", "num_sections", "prompt_to_repeat", "end_phrase",
          "language", "num_sentences", "capital_frequency", "capital_relation")

CASES = [
    ("keywords:existence", {"keywords": ["mom", "C++"]}, ["MOM, c++", "moments of C++"], ["mom and C", ""]),
    ("keywords:frequency", {"keyword": " war ", "frequency": 2, "relation": "at least"}, ["war War", "wars, warm"],
     ["a war", "w a r w a r"]),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "less than"}, ["war", "none"], ["war war"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rock", "p.t"]}, ["rocks", "pat"], ["Rock.", "a P.T here"]),
    ("keywords:letter_frequency", {"letter": "O", "let_frequency": 2, "let_relation": "at least"}, ["foo", "Oslo"],
     ["so"]),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 1.0, "let_relation": "less than"}, ["a"], ["#"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["one two three", "it's so"],
     ["one two", "one-two", "* - *"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one two"], ["one two three"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "***a***b\n***\n", "a *** b"],
     ["a\n\nb", "a***b***c", "a******b", "a"]),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Well"}, ["a\n\nwell, b", "a\n\n 'WELL' b", "a\n\n\"well"],
     ["well\n\na", "a\n\nwellness", "a\n\nb\n\nwell", "a well", "a\n\n\n\nwell"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b]", "[][] [c]"], ["[a]", "[a\n] [b]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a\nP.S. b", "a p. s. b"], ["PS b", "P.P.S b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["a\nP.P.S b", "p. p. s"], ["P.S. b"]),
    ("detectable_content:postscript", {"postscript_marker": "N.B."}, ["n.b. b"], ["nobs b"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "x\n - a\n\n*b", "-\n-"],
     ["* a", "* a\n- b\n- c", "** a\n** b", "a * b\na - b", "+ a\n+ b"]),
    ("detectable_format:constrained_response", {}, ["So: My answer is yes.", "My answer is maybe."],
     ["My answer is Yes.", "yes"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* *b*", "*a*\n**b**", "*a*b*c*"],
     ["*a*", "**a**", "*a* * *", "*a\n* *b"]),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     ["SECTION 1 a SECTION 2", "SECTION1\nSECTION\n2"], ["SECTION 1", "Section 1 Section 2", "SECTION I SECTION II"]),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n[1]\n```', "```\n1```", ' "a" '],
     ["a", "{'a': 1}", "```python\n1\n```", "[" * 100_000, ""]),
    ("detectable_format:title", {}, ["<<a b>>\nc", "x <<a>>"], ["<a>", "<< >>", "<<a\n>>"]),
    ("combination:two_responses", {}, ["a\n******\nb", "******a******b"], ["a******a", "a***b", "a******b******c"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it. "}, [" say IT. It."], ["It. Say it.", "Say it"]),
    ("startend:end_checker", {"end_phrase": "The end."}, ['"So. the END."\n'], ["The end. No.", "The end"]),
    ("startend:quotation", {}, ['"a"', ' "a "b" c"\n'], ['"', '"a', "\u201ca\u201d", "'a'"]),
    ("change_case:english_capital", {}, ["A B, C 1"], ["A b", "1"]),
    ("change_case:english_lowercase", {}, ["a b, c 1"], ["a B", "1"]),
    ("punctuation:no_comma", {}, ["a b"], ["a, b"]),
]


@pytest.mark.parametrize("name, values, right, wrong", CASES)
def test_each_rule(name, values, right, wrong):
    """As in the public files, where a row has its own fields only, and as in tables, where the others are null."""
    texts = right + wrong
    for given in (values, {key: values.get(key) for key in FIELDS}):
        scores = follows_all(texts, [[name]] * len(texts), [[given]] * len(texts))
        assert scores == [1.0] * len(right) + [0.0] * len(wrong)


def test_every_instruction_has_a_case():
    assert {name for name, *_ in CASES} == {*CHECKS}


def test_all_must_hold_or_the_share_counts():
    ids = ["punctuation:no_comma", "length_constraints:number_words", "detectable_format:title"]
    kwargs = [{}, {"num_words": 2, "relation": "at least"}, None]
    texts = ["<<a>> b", "<<a>>, b", "a b", ","]
    assert follows_all(texts, [ids] * 4, [kwargs] * 4) == [1, 0, 0, 0]
    assert follows_all(texts, [ids] * 4, [kwargs] * 4, graded=True) == pytest.approx([1, 2 / 3, 2 / 3, 0])
    assert follows_all(texts, [None, [], ids, ids], [None, [], kwargs, kwargs]) == [None, None, 0, 0]
    assert follows_all([[{"role": "assistant", "content": "a"}]], [["punctuation:no_comma"]], [None]) == [1]


def test_an_empty_completion_follows_nothing():
    assert follows_all(["", " \n"], [["punctuation:no_comma"]] * 2, [[{}]] * 2) == [0, 0]


@pytest.mark.parametrize("text, strict, loose", [
    ("Sure, here:\na b", 0, 1), ("a b\nYes, done.", 0, 1), ("Sure,\na b\nYes, done.", 0, 1), ("a, b", 0, 0),
    ("a b", 1, 1), ("Sure, a\nb, c", 0, 0)])
def test_loose_leaves_out_first_and_last_lines(text, strict, loose):
    row = [["punctuation:no_comma"]], [[{}]]
    assert follows_all([text], *row) == [strict] and follows_all([text], *row, strict=False) == [loose]


def test_loose_leaves_out_asterisks():
    row = [["startend:end_checker"]], [[{"end_phrase": "The end."}]]
    assert follows_all(["**The end.**"], *row) == [0] and follows_all(["**The end.**"], *row, strict=False) == [1]


def test_rows_with_other_instructions_are_refused_or_left_out():
    rows = [["language:response_language"], ["punctuation:no_comma"]], [[{"language": "kn"}], [{}]]
    with pytest.raises(ValueError, match="instruction 'language:response_language' is not known; known are keywords:ex"
                                         ".*punctuation:no_comma; set unknown: abstain"):
        follows_all(["a", "a"], *rows)
    assert follows_all(["a", "a"], *rows, unknown="abstain") == [None, 1]
    with pytest.raises(ValueError, match=r"did you mean 'punctuation:no_comma'\?"):
        follows_all(["a"], [["punctuation:no_commas"]], [[{}]])
    with pytest.raises(ValueError, match="unknown must be refuse or abstain, given 'ignore'"):
        follows_all(["a"], [["punctuation:no_comma"]], [[{}]], unknown="ignore")


@pytest.mark.parametrize("name, values, message", [
    ("length_constraints:number_words", {"relation": "at least"}, "num_words in its kwargs: a whole number.* None"),
    ("length_constraints:number_words", {"num_words": 2.5, "relation": "at least"}, "given 2.5"),
    ("length_constraints:number_words", {"num_words": -1, "relation": "at least"}, "given -1"),
    ("length_constraints:number_words", {"num_words": 2, "relation": "at most"}, "at least or less than; given 'at m"),
    ("keywords:existence", {"keywords": "war"}, "keywords in its kwargs: a list of texts, not empty; given 'war'"),
    ("keywords:forbidden_words", {"forbidden_words": []}, r"a list of texts, not empty; given \[\]"),
    ("keywords:letter_frequency", {"letter": "ab"}, "letter in its kwargs: one character; given 'ab'"),
    ("startend:end_checker", {"end_phrase": " "}, "end_phrase in its kwargs: a text, not blank; given ''")])
def test_a_value_that_is_missing_or_wrong_is_told(name, values, message):
    with pytest.raises(ValueError, match=f"instruction '{name}' needs .*{message}"):
        follows_all(["a"], [[name]], [[values]])


@pytest.mark.parametrize("ids, values", [(["punctuation:no_comma"], [{}, {}]), ("punctuation:no_comma", [{}]),
                                         (["punctuation:no_comma"], {"num_words": 1})])
def test_two_lists_of_the_same_length(ids, values):
    with pytest.raises(ValueError, match="must be two lists of the same length, given"):
        follows_all(["a"], [ids], [values])


def test_a_row_of_the_data_set_reaches_the_function_in_its_worker():
    """The column is called kwargs, as the recipe's setting is; both arrive."""
    def group(index, text, **columns):
        prompt = Prompt(uid=str(index), messages=({"role": "user", "content": "x"},), token_ids=(1,), columns=columns)
        return RolloutGroup(group_id=(0, index), prompt=prompt, completions=(Completion(
            text=text, token_ids=np.array([1]), logprobs=np.zeros(1), loss_mask=np.array([True]), version_spans=(),
            seed=0, finish_reason="stop"),))

    row = {"key": 1217, "instruction_id_list": ["length_constraints:number_words", "punctuation:no_comma"],
           "kwargs": [{"num_words": 3, "relation": "less than", "keywords": None}, {"num_words": None}]}
    other = {"instruction_id_list": ["length_constraints:number_sentences"], "kwargs": [{"num_sentences": 1}]}
    spec = RewardSpec(name="follows", function="frpo.rewards.instructions:follows_all",
                      kwargs={"graded": True, "unknown": "abstain"})
    with RewardSuite([spec]) as suite:
        report = suite.score([group(0, "one, two", **row), group(1, "one two", **row), group(2, "one", **other)])
    np.testing.assert_array_equal([float(scored.rewards_G[0]) for scored in report.groups], [0.5, 1.0, np.nan])
