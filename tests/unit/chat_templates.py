"""Chat templates in the structure that model families publish them in, and tokenizers made on the spot for them.

Data of tests: no weights, no hub. The tokenizers know the scheme of a family (byte-level or sentencepiece), not its
vocabulary.
"""
import json
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Family:
    """One template.

    special: its special tokens. said: what is to be learned of a conversation's last turn, {} being the content;
    earlier: and of an earlier one, if otherwise. trims: whether white space at the content's ends is left out.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    said: str
    earlier: str = ""
    trims: bool = False
    bos: str | None = None


CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

QWEN25 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

QWEN3 = """{%- set ns = namespace(last_query_index=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set ns.searching = false %}{%- set ns.last_query_index = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content, reasoning = message.content, '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}
{%- set system = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{%- for message in rest %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if loop.index0 == 0 and system != false %}
{%- set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}
{%- else %}{% set content = message['content'] %}{% endif %}
{%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

LLAMA3 = """{{- bos_token }}{% for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

NEMO = """{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}{%- for message in rest %}
{%- if message['role'] == 'user' %}
    {%- if loop.last and system is defined %}{{- '[INST]' + system + '\n\n' + message['content'] + '[/INST]' }}
    {%- else %}{{- '[INST]' + message['content'] + '[/INST]' }}{%- endif %}
{%- else %}{{- message['content'] + eos_token }}{%- endif %}{%- endfor %}"""

PHI3 = """{% for message in messages %}
{{- '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

PHI4_MINI = """{% for message in messages %}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

DEEPSEEK = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}
{%- elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}
{%- else %}{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""

DEEPSEEK_R1 = DEEPSEEK.replace("message['content'] + '<｜end", "message['content'].split('</think>')[-1] + '<｜end")
"""A reasoning model's: what was thought is never shown again."""

COMMAND_R7B = """{{ bos_token }}{% for message in messages %}<|START_OF_TURN_TOKEN|>
{%- if message.role == 'assistant' %}<|CHATBOT_TOKEN|><|START_RESPONSE|>{{ message.content }}<|END_RESPONSE|>
{%- else %}<|{{ message.role | upper }}_TOKEN|>{{ message.content }}{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}
{%- if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"""

HARMONY = """{% for message in messages %}{% if message.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else %}{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""

IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAMILIES = {
    "ChatML": Family(template=CHATML, special=IM, eos="<|im_end|>", said="{}<|im_end|>"),
    "Qwen2.5": Family(template=QWEN25, special=IM, eos="<|im_end|>", said="{}<|im_end|>"),
    "Qwen3": Family(template=QWEN3, special=(*IM, "<think>", "</think>"), eos="<|im_end|>", earlier="{}<|im_end|>",
                    said="<think>\n\n</think>\n\n{}<|im_end|>"),
    "Llama-2": Family(template=LLAMA2, special=("<s>", "</s>"), bos="<s>", eos="</s>", said=" {} </s>", trims=True),
    "Llama-3": Family(template=LLAMA3, bos="<|begin_of_text|>", eos="<|end_of_text|>", said="{}<|eot_id|>", trims=True,
                      special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                               "<|eot_id|>")),
    "Gemma": Family(template=GEMMA, special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), bos="<bos>",
                    eos="<eos>", said="{}<end_of_turn>", trims=True),
    "Mistral": Family(template=MISTRAL, special=("<s>", "</s>"), bos="<s>", eos="</s>", said="{}</s>"),
    "Phi-3": Family(template=PHI3, special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
                    eos="<|endoftext|>", said="{}<|end|>"),
    "Phi-4-mini": Family(template=PHI4_MINI, special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>",
                                                      "<|end|>"), eos="<|endoftext|>", said="{}<|end|>"),
    "Zephyr": Family(template=ZEPHYR, special=("<s>", "</s>"), bos="<s>", eos="</s>", said="{}</s>"),
    "DeepSeek": Family(template=DEEPSEEK, bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>",
                       said="{}<｜end▁of▁sentence｜>",
                       special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")),
    "Command-R7B": Family(template=COMMAND_R7B, bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>",
                          said="<|START_RESPONSE|>{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
                          special=("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
                                   "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>")),
}

CORPUS = ["yes no yes no", "is 12 is 12", "four four", "the sum of 2 and 2 is four", "user: assistant: yes",
          "\n\nyes\n\n"]


def tokenizer_of(family: Family, scheme: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the family's special tokens and template.

    scheme: byte-level, byte-level trimmed (offsets leave spaces out), sentencepiece (a space before the text's first
    word) or sentencepiece legacy (and after every special token, as Llama-2's).
    """
    core = _byte_level(scheme == "byte-level trimmed") if scheme.startswith("byte") else _pieces(scheme)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token=family.eos, bos_token=family.bos,
        additional_special_tokens=[token for token in family.special if token not in (family.eos, family.bos)],
        clean_up_tokenization_spaces=False, chat_template=family.template)
    return tokenizer


def _byte_level(trim_offsets: bool) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    core.train_from_iterator(CORPUS * 9, trainers.BpeTrainer(
        vocab_size=320, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return core


def _pieces(scheme: str) -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.train_from_iterator(CORPUS * 9, trainers.BpeTrainer(vocab_size=90, show_progress=False,
                                                            special_tokens=["<unk>"]))
    trained = json.loads(core.to_str())["model"]
    vocabulary = trained["vocab"]
    for token in (*(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127))):
        vocabulary.setdefault(token, len(vocabulary))
    core = Tokenizer(models.BPE(vocabulary, [tuple(merge) for merge in trained["merges"]], unk_token="<unk>",
                                byte_fallback=True, fuse_unk=True))
    if scheme == "sentencepiece legacy":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    return core
