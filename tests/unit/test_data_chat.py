"""The tiny tokenizer, rendering with it and with tokenizers that add tokens, and the checks of a tokenizer."""
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from frpo.data.chat import check_tokenizer, render, render_text
from frpo.data.sets.arithmetic import ALPHABET
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.errors import DataError, ModelError

PAD, EOS, UNK, SYSTEM, USER, ASSISTANT = range(6)
FIRST = 7  # id of ALPHABET[0], which is "0"


@pytest.fixture
def tokenizer():
    return build_tokenizer()


def with_added(tokenizer, single: str):
    """The same tokenizer, now putting special tokens around text as `single` says (as Llama's puts <s> before it)."""
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<tool>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def test_text_round_trip_is_exact(tokenizer):
    for text in (ALPHABET, "12 + 7 = 19 , \"it's\" \n\n\t(0.5%) ?", " a  b "):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text) and UNK not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer("48/2=")["input_ids"] == [FIRST + ALPHABET.index(c) for c in "48/2="]
    assert tokenizer("é")["input_ids"] == [UNK]


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (PAD, EOS, UNK)
    assert loaded.get_vocab() == tokenizer.get_vocab() and len(loaded) == 104
    messages = [{"role": "user", "content": "a b"}]
    assert render(messages, loaded) == render(messages, tokenizer)
    assert loaded.decode(loaded("x , y .<eos>")["input_ids"], skip_special_tokens=True) == "x , y ."


def test_chat_ends_where_the_assistant_begins(tokenizer):
    one, plus = FIRST + 1, FIRST + ALPHABET.index("+")
    assert render([{"role": "user", "content": "1+1"}], tokenizer) == (USER, one, plus, one, ASSISTANT)
    conversation = [{"role": "system", "content": "0"}, {"role": "user", "content": "1"},
                    {"role": "assistant", "content": "1"}, {"role": "user", "content": "+"}]
    assert render(conversation, tokenizer) == (
        SYSTEM, FIRST, USER, one, ASSISTANT, one, EOS, USER, plus, ASSISTANT)


def test_only_the_template_adds_tokens_to_a_chat(tokenizer):
    expected = render([{"role": "user", "content": "1"}], tokenizer)
    assert render([{"role": "user", "content": "1"}], with_added(tokenizer, "<tool> $A <eos>")) == expected


def test_template_that_refuses_is_a_data_error(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"refuses the roles \['system'\]: System role not supported"):
        render([{"role": "system", "content": "1"}], tokenizer)


def test_template_that_leaves_a_message_out_is_a_data_error(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("in messages", "in messages if message.role != 'system'")
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1"}]
    assert render(asked[1:], tokenizer) == (USER, FIRST + 1, ASSISTANT)
    with pytest.raises(DataError, match=r"leaves out message 0, of role 'system'; .* \(remove data.system_prompt"):
        render(asked, tokenizer)


def test_template_that_does_not_write_where_an_answer_begins_is_a_data_error(tokenizer):
    whole = tokenizer.chat_template
    tokenizer.chat_template = whole[:whole.index("{% if add_generation_prompt")]
    with pytest.raises(DataError, match="writes '<assistant>' before the assistant's text in message 1, but does"):
        render([{"role": "user", "content": "1"}], tokenizer)
    one = "{% for m in messages %}[{{ m.content }}]{{ raise_exception('one') if m.role != 'user' }}{% endfor %}"
    tokenizer.chat_template = one
    assert tokenizer.decode(render([{"role": "user", "content": "1"}], tokenizer)) == "[1]"


def test_text_keeps_a_leading_token_and_drops_an_added_end(tokenizer):
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    assert render_text("01", tokenizer) == (FIRST, FIRST + 1)
    assert render_text("01<eos>", tokenizer) == (FIRST, FIRST + 1, EOS)  # written by the user, so it stays
    assert render_text("01", with_added(tokenizer, "<tool> $A <eos>")) == (tool, FIRST, FIRST + 1)


@pytest.mark.parametrize("attribute, wrong", [
    ("pad_token", "no padding token; set tokenizer.pad_token"),
    ("eos_token", "no end-of-sequence token.*set tokenizer.eos_token"),
    ("chat_template", "no chat template.*data.format: text"),
])
def test_unfit_tokenizer_says_what_to_set(tokenizer, attribute, wrong):
    check_tokenizer(tokenizer, needs_chat=True)
    setattr(tokenizer, attribute, None)
    with pytest.raises(ModelError, match=wrong):
        check_tokenizer(tokenizer, needs_chat=True)
    if attribute == "chat_template":
        check_tokenizer(tokenizer, needs_chat=False)
