"""Each constraint on texts whose degree is plain to a reader, and what earns nothing."""
import pytest

from frpo.rewards.constraints import DEGREES, follows, is_answer, names_topic

CASES = {
    "no_commas": {"Rain falls on the hills.": 1, "Rain, wind fall on hills.": 1 / 2, "Rain, wind, fog, hail.": 1 / 4},
    "few_words": {"a1 a2 a3 a4 a5 a6 a7 a8 a9 b1 b2 b3": 1, "a1 a2 a3 a4 a5 a6 a7 a8 a9 b1 b2 b3 b4": 12 / 13,
                  "It's well-known that rain that we've had falls down-hill in north-west winds": 1},
    "two_bullets": {"- rain falls down\n- it is wet": 1, "Here:\n* rain falls\n  * it is wet": 1,
                    "\u2022 a b\n\u2022 c d": 1, "- rain falls down here": 0.5, "- a b\n- c\n- d": 0.5,
                    "- a\n- b\n- c\n- d": 0, "Rain falls down here.": 0, "- \n- \nRain falls down here.": 0,
                    "-a b\n-c d": 0},
    "opening": {"Certainly, rain falls on hills.": 1, " \nCertainly rain falls on hills.": 1,
                "Rain certainly falls on all hills.": 0.3, "certainly, rain falls on hills.": 0.3,
                "Certainlyish rain falls on hills.": 0.3, "Rain falls on the hills.": 0},
    "closing": {"Rain falls on hills. That is all.": 1, "Rain falls on hills. That is all. \n": 1,
                "Rain falls on hills, that is all": 0.3, "That is all. Rain falls on hills.": 0.3,
                "Rain falls on the hills.": 0},
    "quoted": {'"Rain falls on the hills."': 1, "\u201cRain falls on the hills.\u201d": 1,
               '"Rain falls on the hills.': 0.5, 'Rain falls on the hills."': 0.5, '"Rain" falls on the "hills"': 0.5,
               'Rain "falls" on the hills': 0},
}


@pytest.mark.parametrize("name, text, degree", [
    (name, *case) for name, cases in CASES.items() for case in cases.items()])
def test_degrees(name, text, degree):
    assert follows([text], [name]) == pytest.approx([degree])
    assert follows([text], [name], graded=False) == [float(degree == 1)]


def test_every_constraint_is_tested():
    assert set(CASES) == set(DEGREES)


@pytest.mark.parametrize("name, text", [
    ("no_commas", ""), ("no_commas", "Rain."), ("few_words", "rain rain rain rain rain"),
    ("opening", "Certainly Certainly rain falls here"), ("closing", "That is all. So rain falls. That is all."),
    ("two_bullets", "- a\n- b"), ("quoted", '""')])
def test_what_is_no_answer_earns_nothing(name, text):
    """Fewer than four distinct words besides the dictated ones."""
    assert follows([text], [name]) == [0.0] and not is_answer(text)
    assert names_topic([text], ["rain"]) == [0.0]


def test_completions_of_a_chat_and_rows_without_a_constraint():
    chat = [{"role": "assistant", "content": "Rain falls on the hills."}]
    assert follows([chat, chat], ["no_commas", None]) == [1.0, None]
    assert names_topic([chat, chat], ["hills", None]) == [1.0, None]
    assert follows([chat, chat], ["no_commas", None], graded=False) == [1.0, None]


def test_an_unknown_constraint_is_named():
    with pytest.raises(ValueError, match="constraint 'rhyme' is not one of no_commas, few_words, "):
        follows(["Rain falls on the hills."], ["rhyme"])


@pytest.mark.parametrize("text, topic, named", [
    ("A Bear sleeps all winter.", "bears", 1), ("Bears sleep all winter.", "bears", 1),
    ("The tea team drinks a lot.", "tea", 1), ("The team drinks a lot.", "tea", 0),
    ("Green glass breaks so easily.", "glass", 1),
    ("A beard grows in winter.", "bears", 0), ("It sleeps all winter long.", "bears", 0)])
def test_the_topic_is_named_in_the_singular_or_plural(text, topic, named):
    assert names_topic([text], [topic]) == [named]
