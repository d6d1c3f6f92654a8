"""Makes chat_ids.json: token ids of chats, by transformers' apply_chat_template.

Run with transformers 5.x, tokenizers and jinja2, from the repository's root:
``python tests/golden/make_chat_ids.py``. The tokenizer begins every text with BOS, as
Llama 3's and Mistral's do; the templates don't write one.
"""

import json
from pathlib import Path

import tokenizers
import transformers

HERE = Path(__file__).parent
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
TOOLED = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content or '' }}{{ m.tool_calls | tojson if m.tool_calls }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"é": 1}}}
CHATS = [
    [("user", "é 12"), ("assistant", "  two\n")],
    [("system", "s"), ("user", "q"), ("assistant", "<think>\nt\n</think>\n\na")],
    [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")],
]


def make_tokenizer():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({t: i for i, t in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def main():
    tokenizer = make_tokenizer()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>"
    )
    assert fast("a").input_ids[0] == fast.bos_token_id
    called = [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "No."},
    ]
    plain = [[{"role": r, "content": c} for r, c in chat] for chat in CHATS]
    qwen3 = (HERE / "qwen3_turns.jinja").read_text()
    found = []
    for template, messages, tools in [
        *((TOOLED, messages, None) for messages in plain),
        *((qwen3, messages, None) for messages in plain),
        (TOOLED, called, TOOLS),
    ]:
        options = {"chat_template": template, "tools": tools, "return_dict": False}
        found.append(
            {
                "template": "qwen3" if template == qwen3 else "tooled",
                "messages": messages,
                "tools": tools,
                "ids": fast.apply_chat_template(messages, **options),
                "prompt": fast.apply_chat_template(
                    messages[:-1], add_generation_prompt=True, **options
                ),
            }
        )
    golden = {
        "transformers": transformers.__version__,
        "tooled": TOOLED,
        "tokenizer": json.loads(tokenizer.to_str()),
        "chats": found,
    }
    text = json.dumps(golden, separators=(",", ":"))
    (HERE / "chat_ids.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
