"""Loading, holding out and streaming prompts."""
import json
import random
from collections import Counter

import pytest
from tokenizers import normalizers

from frpo.config.sections import DataSection
from frpo.data.chat import render, render_text
from frpo.data.prompts import PromptStream, load_prompts
from frpo.data.sets.calculator import normalise_number
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.errors import DataError, ModelError
from frpo.rewards.arguments import offered_arguments
from frpo.types import Completion, RolloutGroup

TOKENIZER = build_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path, seed=0, tokenizer=TOKENIZER, **fields):
    return load_prompts(DataSection(path=str(path), **{"format": "text", "heldout": 0} | fields), tokenizer, seed)


def texts(prompts):
    return [TOKENIZER.decode(prompt.token_ids) for prompt in prompts]


def test_text_is_verbatim_and_other_columns_travel(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": " 1+1=", "answer": "2", "task": {"kind": 7}}, {"q": "<user>"}])
    first, second = load(path, prompt_column="q").train
    assert first.token_ids == render_text(" 1+1=", TOKENIZER)
    completion = Completion(text="2", token_ids=(1,), logprobs=(0.0,), loss_mask=(True,), version_spans=(), seed=0,
                            finish_reason="stop")
    group = RolloutGroup(group_id=(0, 0), prompt=first, completions=(completion,))
    assert offered_arguments([group], "text", always=())["prompts"] == [" 1+1="]  # what rewards see
    assert first.columns == {"answer": "2", "task": {"kind": 7}} and second.columns == {}


def test_chat_of_a_string_or_a_list_with_a_system_prompt(tmp_path):
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    path = write(tmp_path / "a.jsonl", [{"prompt": "9"}, {"prompt": [turn | {"name": None} for turn in turns]}])
    system = {"role": "system", "content": "hi"}
    one, many = load(path, format="chat", system_prompt="hi").train
    assert one.messages == (system, {"role": "user", "content": "9"})
    assert many.messages == (system, *turns)
    assert many.token_ids == render(many.messages, TOKENIZER)
    assert load(path, format="chat").train[0].messages == ({"role": "user", "content": "9"},)


@pytest.mark.parametrize("prompt, wrong", [
    ([], "the list of messages is empty"),
    (["hi"], "message 0 must be {role: .*given 'hi'"),
    ([{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}], "message 1 must be .*'bot'"),
    ([{"role": "user", "content": 3}], "message 0 must be"),
    ([{"role": "user", "content": "a", "tool_calls": [1]}], "message 0 must be .*tool_calls"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "last message .* given 'assistant'"),
    ([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "already has a system message"),
    (5, "column 'prompt' must be str or list, given int 5"),
    ("x" * 30, "the prompt has 35 tokens, data.max_prompt_tokens allows 30"),
])
def test_broken_chat_row_is_named(tmp_path, prompt, wrong):
    path = write(tmp_path / "a.jsonl", [{"prompt": "fine"}, {"prompt": prompt}])
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{wrong}"):
        load(path, format="chat", system_prompt="s!", max_prompt_tokens=30)


def test_prompt_of_just_the_limit_is_fine_and_an_empty_one_is_not(tmp_path):
    assert len(load(write(tmp_path / "a.jsonl", [{"prompt": "x" * 30}]), max_prompt_tokens=30).train) == 1
    with pytest.raises(DataError, match=r"b\.jsonl:1: the prompt has no tokens"):
        load(write(tmp_path / "b.jsonl", [{"prompt": ""}]))


def test_refusing_template_names_the_row(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template refuses"):
        load(write(tmp_path / "a.jsonl", [{"prompt": "a"}]), tokenizer=tokenizer, format="chat")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        load(tmp_path / "a.jsonl", tokenizer=tokenizer, format="chat")


def test_heldout_ignores_seed_order_and_tokenizer_and_never_overlaps(tmp_path):
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    plain = load(write(tmp_path / "a.jsonl", rows), heldout=20)
    mixed = random.Random(1).sample(rows, len(rows))
    shuffled = load(write(tmp_path / "b.jsonl", mixed), seed=9, heldout=20)
    other = build_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Prepend("0")
    elsewhere = load(tmp_path / "a.jsonl", tokenizer=other, heldout=20)
    assert shuffled.heldout == plain.heldout and len(plain.heldout) == 20
    assert [p.uid for p in elsewhere.heldout] == [p.uid for p in plain.heldout]
    assert elsewhere.heldout[0].token_ids != plain.heldout[0].token_ids
    assert sorted(texts(plain.train + plain.heldout)) == sorted(row["prompt"] for row in rows)
    assert texts(shuffled.train) == [row["prompt"] for row in mixed if row["prompt"] not in texts(plain.heldout)]
    assert load(tmp_path / "a.jsonl", heldout=5).heldout == plain.heldout[:5]
    assert plain.skipped == {}


def test_generated_heldout_does_not_depend_on_the_seed():
    a, b = (load("arithmetic", seed=seed, heldout=64) for seed in (1, 2))
    assert a.heldout == b.heldout and a.train != b.train and set(texts(a.train)) == set(texts(b.train))


def test_training_rows_with_the_tokens_of_a_heldout_one_are_removed(tmp_path):
    """Ten questions, each with three answers: holding out six questions must remove all 18 rows."""
    rows = [{"prompt": f"q{q}", "answer": a} for q in range(10) for a in range(3)]
    prompts = load(write(tmp_path / "a.jsonl", rows), heldout=6)
    assert len(set(texts(prompts.heldout))) == 6 and len(prompts.train) == 12
    assert not set(texts(prompts.heldout)) & set(texts(prompts.train))
    assert prompts.skipped == {"same prompt as a held-out one": 12}


def test_heldout_file_replaces_heldout_rows(tmp_path):
    train = write(tmp_path / "a.jsonl", [{"prompt": p} for p in "abcde"])
    other = write(tmp_path / "b.jsonl", [{"prompt": p} for p in "dxy"])
    prompts = load(train, heldout=3, heldout_path=other, limit=3)  # the first three rows have none of it
    assert texts(prompts.train) == ["a", "b", "c"] and sorted(texts(prompts.heldout)) == ["d", "x", "y"]
    assert prompts.skipped == {} and prompts.overlap == 0


@pytest.fixture
def overlapping(tmp_path):
    """Training rows a, b, c, b (another answer), d and held-out rows y, b, d, b: three training rows are shared."""
    train = write(tmp_path / "a.jsonl", [{"prompt": p, "answer": i} for i, p in enumerate("abcbd")])
    return train, write(tmp_path / "b.jsonl", [{"prompt": p} for p in "ybdb"])


def test_training_prompts_that_are_in_the_heldout_file_are_refused(overlapping):
    train, other = overlapping
    with pytest.raises(DataError) as caught:
        load(train, heldout_path=other)
    assert str(caught.value) == (
        f"3 of the 5 training prompts of data.path {train!r} are also held-out prompts of data.heldout_path {other!r} "
        f"(the first: {train}:2, same as {other}:2). data.heldout_overlap is 'refuse'; set it to 'remove' to leave "
        "them out of training, set it to 'keep' to train on them anyway, or give other files")
    with pytest.raises(DataError, match=f"1 of the 2 training .*the first: {train}:2, same as {other}:2"):
        load(train, heldout_path=other, limit=2)
    assert texts(load(train, heldout_path=other, limit=1).train) == ["a"]


def test_training_prompts_that_are_in_the_heldout_file_are_removed_on_request(overlapping):
    train, other = overlapping
    prompts = load(train, heldout_path=other, heldout_overlap="remove")
    assert texts(prompts.train) == ["a", "c"] and sorted(texts(prompts.heldout)) == ["b", "d", "y"]
    assert prompts.skipped == {"same prompt as a held-out one": 3} and prompts.overlap == 0
    with pytest.raises(DataError, match="nothing left to train on: all of the 5 prompts"):
        load(train, heldout_path=train, heldout_overlap="remove")


def test_training_prompts_that_are_in_the_heldout_file_are_kept_on_request_and_not_called_skipped(overlapping):
    train, other = overlapping
    prompts = load(train, heldout_path=other, heldout_overlap="keep")
    assert texts(prompts.train) == list("abcbd") and sorted(texts(prompts.heldout)) == ["b", "d", "y"]
    assert prompts.skipped == {} and prompts.overlap == 3
    assert prompts.digest != load(train, heldout_path=other, heldout_overlap="remove").digest
    assert load(train, heldout_path=train, heldout_overlap="keep").overlap == 5


@pytest.mark.parametrize("choice", ["refuse", "remove", "keep"])
def test_a_split_of_one_data_set_never_trains_on_a_heldout_prompt(tmp_path, choice):
    rows = [{"prompt": f"q{q}", "answer": a} for q in range(10) for a in range(3)]
    prompts = load(write(tmp_path / "a.jsonl", rows), heldout=6, heldout_overlap=choice)
    assert prompts.skipped == {"same prompt as a held-out one": 12} and len(prompts.train) == 12
    assert prompts.overlap == 0 and not set(texts(prompts.heldout)) & set(texts(prompts.train))


def test_nothing_left_to_train_on_and_empty_files(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": p} for p in "abc"])
    assert len(load(path, heldout=2).train) == 1
    with pytest.raises(DataError, match=r"all of the 3 prompts .* lower data.heldout \(given 3\)"):
        load(path, heldout=3)
    with pytest.raises(DataError, match="has no rows"):
        load(write(tmp_path / "b.jsonl", []))


def test_calculator_prompts(tmp_path):
    rows = [{"question": "q", "answer": "<<48/2=24>> <<1*.5=.50>>"}, {"question": "r", "answer": "<<48/2=24>> <<3=3>>"}]
    prompts = load(write(tmp_path / "a.jsonl", rows), format="calculator")
    assert texts(prompts.train) == ["48/2=", "1*.5="]
    assert [prompt.columns for prompt in prompts.train] == [{"answer": "24"}, {"answer": "0.5"}]
    assert prompts.skipped == {"duplicate": 1, "nothing to compute": 1}
    with pytest.raises(DataError, match="no usable <<expression=value>> annotation"):
        load(write(tmp_path / "b.jsonl", [{"answer": "#### 5"}]), format="calculator")
    assert all(normalise_number(prompt.columns["answer"]) == prompt.columns["answer"] for prompt in prompts.train)


def test_digest_and_uid_change_with_content_only(tmp_path):
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2, "task": "sum"}]
    first = load(write(tmp_path / "a.jsonl", rows))
    again = load(write(tmp_path / "b.jsonl", [dict(reversed(row.items())) for row in rows]), seed=3)
    other = load(write(tmp_path / "c.jsonl", [rows[0], rows[1] | {"answer": 3}]))
    assert first.digest == again.digest != other.digest
    assert [p.uid for p in first.train] == [p.uid for p in again.train]
    assert first.train[0].uid == other.train[0].uid and first.train[1].uid != other.train[1].uid
    assert load(tmp_path / "a.jsonl", heldout=1).digest != first.digest
    # Old traces refer to uids, so they stay what they are: SHA-256 of the text ["a", {"answer": 1}].
    assert first.train[0].uid == "e30fd67600d6b96a"


@pytest.fixture(scope="module")
def ten():
    return load("arithmetic", limit=10).train


def test_stream_covers_each_epoch_once_and_reshuffles(ten):
    stream = PromptStream(ten, seed=4, shuffle=True)
    epochs = [stream.take(10 * epoch, 10) for epoch in range(3)]
    for epoch in epochs:
        assert Counter(p.uid for p in epoch) == Counter(p.uid for p in ten)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != ten
    assert PromptStream(ten, seed=5, shuffle=True).take(0, 10) != epochs[0]
    assert PromptStream(ten, seed=3, shuffle=True).take(10, 10) != epochs[0]  # seeds are no shifted epochs


def test_resume_anywhere_continues_the_same_sequence(ten):
    """Also on an epoch boundary (10, 20), where verl#5725 trained nothing, and for draws longer than an epoch."""
    whole = PromptStream(ten, seed=4, shuffle=True).take(0, 60)
    for cursor in range(31):
        for count in (0, 1, 7, 10, 25):
            assert PromptStream(ten, seed=4, shuffle=True).take(cursor, count) == whole[cursor:cursor + count]


def test_unshuffled_stream_repeats_file_order(ten):
    assert PromptStream(ten, seed=4, shuffle=False).take(8, 14) == ten[8:] + ten + ten[:2]
    with pytest.raises(DataError, match="at least one prompt"):
        PromptStream((), seed=0, shuffle=True)
