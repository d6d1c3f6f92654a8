"""Writes tests/golden/smollm_tokens.json: what other software makes of texts and chats.

Run once, with transformers 5.24 and regex installed:

    python tests/golden/make_smollm_tokens.py SmolLM2-135M-Instruct.Q4_1.gguf

Ids come from a slow BPE over llama.cpp's two regular expressions for "smollm" (numbers
one by one, then GPT-2's), written here without the tokenizers package. Transformers'
own reading of the file must agree wherever a text has no digit: it doesn't know that
rule (its table of pre-tokenizers lacks "smollm"). Chats are transformers' own.
"""

import itertools
import json
import sys
from pathlib import Path

import gguf
import regex
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEXTS = [
    "Hello",
    "The capital of France is",
    "def fibonacci(n):",
    "def f(x):\n\treturn x ** 2  # 1234567890\n\n\n",
    " two  spaces   three\t\ttabs \n \n mixed   ",
    "it's we'll I'VE don't 'tis 'S",
    "naïve café Ünïcödé ÅÄÖ ñ",
    "日本語のテキスト、中文字符 한국어",
    "emoji 😀👩‍👩‍👧‍👦🇩🇪 done",
    "العربية עברית हिन्दी ไทย",
    "½ ² Ⅷ ٣ 3.14e-10 1,000,000 0x1F",
    "e\u0301 combining \u200b zero\ufeff width",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "a<|im_end|>b <|im_end|> c",
    "<|im_startx|> <|not_special|>",
    "\r\n\r\n \u00a0nbsp\u2028line",
    "",
    " ",
    "\n",
    "…—–“quotes”‘x’!!!???...",
]
CHATS = [
    [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "é😀 "}],
    [
        {"role": "system", "content": "Be\nbrief."},
        {"role": "user", "content": " a  "},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b\n"},
        {"role": "assistant", "content": "  two\n\n"},
    ],
]
MARKED = """{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == "assistant" %}
        {{- "<|im_start|>assistant\\n" }}
        {%- generation %}
        {{- m.content + eos_token }}
        {%- endgeneration %}
        {{- "\\n" }}
    {%- else %}
        {{- "<|im_start|>" + m.role + "\\n" + (m | tojson) + eos_token + "\\n" }}
    {%- endif %}
    {%- if loop.index > 40 %}{% break %}{% endif %}
{%- endfor %}
{% set ns = namespace(n=0) %}
  {% for m in messages %}
    {% set ns.n = ns.n + 1 %}
  {% endfor %}
{{- ns.n }}
"""
RULE = [
    r"\p{N}",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
]


def pieces(text, expressions):
    """What llama.cpp does: each expression cuts what the one before left over."""
    for expression in expressions:
        cut = []
        for part in text:
            at = 0
            for match in regex.finditer(expression, part):
                cut += [part[at : match.start()], match.group()]
                at = match.end()
            cut.append(part[at:])
        text = [part for part in cut if part]
    return text


class SlowBPE:
    def __init__(self, fields):
        tokens = fields["tokenizer.ggml.tokens"].contents()
        kinds = fields["tokenizer.ggml.token_type"].contents()
        merges = fields["tokenizer.ggml.merges"].contents()
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
        self.special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
        self.spelling = bytes_to_unicode()

    def encode(self, text):
        ids = []
        longest = sorted(self.special, key=len, reverse=True)
        for part in regex.split("(" + "|".join(map(regex.escape, longest)) + ")", text):
            if part in self.special:
                ids.append(self.ids[part])
            elif part:
                for piece in pieces([part], RULE):
                    ids += self.merge([self.spelling[b] for b in piece.encode()])
        return ids

    def merge(self, word):
        while True:
            pairs = list(itertools.pairwise(word))
            best = min(pairs, key=lambda p: self.rank.get(p, 1 << 30), default=None)
            if best not in self.rank:
                return [self.ids[token] for token in word]
            at = pairs.index(best)
            word[at : at + 2] = ["".join(best)]


def main(path):
    path = Path(path)
    slow = SlowBPE(gguf.GGUFReader(path).fields)
    fast = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = {}
    for text in TEXTS:
        texts[text] = slow.encode(text)
        if not regex.search(r"\p{N}", text):
            assert fast(text).input_ids == texts[text], text
    chats = []
    for messages in CHATS:
        plain = fast.apply_chat_template(messages, tokenize=False)
        fast.backend_tokenizer.pre_tokenizer = _documented()
        marked = fast.apply_chat_template(
            messages,
            chat_template=MARKED,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        prompt = fast.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        chats.append(
            {
                "messages": messages,
                "text": plain,
                "prompt": prompt,
                "marked_text": fast.apply_chat_template(
                    messages, chat_template=MARKED, tokenize=False
                ),
                "marked_ids": marked["input_ids"],
                "marked_mask": marked["assistant_masks"],
            }
        )
    golden = {
        "versions": {"transformers": transformers.__version__},
        "template": MARKED,
        "texts": texts,
        "chats": chats,
    }
    out = Path(__file__).parent / "smollm_tokens.json"
    out.write_text(json.dumps(golden, indent=1) + "\n")


def _documented():
    """The pre-tokenizer of the model's own tokenizer.json."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


if __name__ == "__main__":
    main(sys.argv[1])
