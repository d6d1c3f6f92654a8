"""Chat templates: rendered as transformers does, in a sandbox, with exact borders."""

import gc
import json
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.files.chat import ChatTemplate
from lora_jax.files.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + m.role",
    "{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}!"
    "{% endgeneration %}{% continue %}{% endif %}{{ '<|im_start|>' + m.role",
)
WORDS = st.text(st.sampled_from("ab 1\n\té日😀\u0301<|"), max_size=12)


def chat(*contents, roles=("user", "assistant")):
    return [
        {"role": roles[i % len(roles)], "content": text}
        for i, text in enumerate(contents)
    ]


def save_tokenizer(folder, template=CHATML, normalizer=None):
    """A byte-level tokenizer whose merges cross what they can."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ġ"), ("Ġ", "a"), ("a", "b"), ("Ċ", "Ċ"), ("b", "Ċ"), ("1", "1")]
    tokens = [*alphabet, *map("".join, merges)]
    model = tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, newline="")
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module", params=["plain", "nfc"])
def tokenizer(request, tmp_path_factory):
    normalizer = {"plain": None, "nfc": tokenizers.normalizers.NFC()}[request.param]
    return save_tokenizer(tmp_path_factory.mktemp("t"), normalizer=normalizer)


@given(st.lists(WORDS, min_size=2, max_size=5))
def test_the_mask_is_right_at_every_token_border(tokenizer, contents):
    messages = chat(*contents)
    (tokens,) = tokenizer.encode_chat(messages)
    # Byte by byte: which come from an assistant's turn, up to its end token.
    expected = []
    for message in messages:
        said = message["role"] == "assistant"
        head, tail = f"<|im_start|>{message['role']}\n", message["content"]
        expected += [(c, 0) for c in head] + [(c, said) for c in tail + "<|im_end|>"]
        expected += [("\n", 0)]
    text = "".join(c for c, _ in expected)
    encoding = tokenizer._tokenizer.encode(text, add_special_tokens=False)
    assert tokens.ids == encoding.ids
    for (start, end), m in zip(encoding.offsets, tokens.mask, strict=True):
        assert m == int(any(said for _, said in expected[start:end]))


@pytest.fixture(scope="module")
def marked_template():
    return ChatTemplate(MARKED, {})


@given(st.lists(WORDS, min_size=2, max_size=5))
def test_marks_give_the_same_as_their_text(marked_template, contents):
    messages = chat(*contents)
    (rendered,) = marked_template.mark_assistant(messages)
    said = [rendered.text[a:b] for turn in rendered.turns for a, b in turn]
    assert said == [m["content"] + "!" for m in messages if m["role"] == "assistant"]
    assert rendered.marked
    assert rendered.text == marked_template.render(messages)
    assert rendered.text.count("A:") >= len(said)


def test_several_turns_of_the_assistant_all_count():
    chats = chat("q", "one", "r", "two")
    (rendered,) = ChatTemplate(CHATML, {}).mark_assistant(chats)
    assert [rendered.text[a:b] for turn in rendered.turns for a, b in turn] == [
        "one<|im_end|>\n",
        "two<|im_end|>\n",
    ]


def test_a_template_that_rewrites_earlier_turns_is_an_error():
    forgets = (
        "{% for m in messages %}{{ m.role }}:"
        "{% if loop.last %}<think>{% endif %}{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(ValueError, match=r"same whatever follows.*message 3, .*genera"):
        ChatTemplate(forgets, {}).mark_assistant(chat("q", "a", "r", "b"))


def test_templates_see_what_transformers_shows_them():
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% if m.role == 'user' %}\n"
        "{{ m | tojson }}{{ dict(a=1).a }}{% set ns = namespace(x=2) %}{{ ns.x }}\n"
        "    {% endif %}\n"
        "{% endfor %}{{ tools is none }}{{ eos_token is defined }}",
        {"bos_token": "<s>"},
    )
    assert (
        template.render(chat("<é>")) == '<s>{"role": "user", "content": "<é>"}12\n'
        "TrueFalse"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "can't set '_x'"),
        ("{{ range(10000000) | list }}", "[Rr]ange"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ '{5}'.format(1) }}", "index out of range"),
        ("{{ '%(x)s' % {} }}", "'x'"),
        ("{{ 1e999 | int }}", "inf"),
        ("{{ cycler() }}", "at least one item"),
        ("{{ '%d' | format('a') }}", "a real number is required"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ ('a' * 1024) * 1025 }}", "at most 1,048,576 characters; it has 1,049,600"),
        ("{{ 'a' * 10**30 }}", "index-sized integer"),
    ],
)
def test_what_a_template_refuses_or_must_not_do_is_an_error(source, message):
    with pytest.raises(ValueError, match=f"can't render these 1 messages: .*{message}"):
        ChatTemplate(source, {}).render(chat("x"))


def test_texts_are_formatted_and_padded_as_in_python():
    source = (
        "{{ '%-4s|%03d|100%%' % ('a', 7) }} {{ '{:>4}{{}}{x:.2f}'.format(1, x=2) }} "
        "{{ 'ab'.ljust(4, '.') + 'ab'.center(4) + '7'.zfill(3) }} {{ 7 % 4 }} "
        "{{ '%s!' | format('b') }} {{ 'c' | center(3) }}{{ 'd' | indent(2, true) }}"
    )
    text = ChatTemplate(source, {}).render(chat("x"))
    assert text == "a   |007|100%    1{}2.00 ab.. ab 007 3 b!  c   d"


def test_the_day_that_a_template_is_told_is_always_the_same():
    source = "{{ strftime_now('%d %B %Y, %H:%M') }}"  # as SmolLM3's asks
    assert ChatTemplate(source, {}).render(chat("x")) == "26 July 2024, 00:00"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "endfor"),
        ("{% break %}", "'break' outside loop"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "recursion"),
        ("{% if 1 %}" * 200 + "{% endif %}" * 200, "too many levels"),
    ],
    ids=["unclosed", "break", "brackets", "blocks"],
)
def test_a_template_that_is_none_is_named(source, message):
    with pytest.raises(
        ValueError, match=f"must be Jinja; it can't be parsed: .*{message}"
    ):
        ChatTemplate(source, {})


DOUBLES = (
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
    "{% set ns.x = OP %}{% endfor %}"
)


@pytest.mark.parametrize(
    "source",
    [
        DOUBLES.replace("OP", "ns.x ~ ns.x"),
        DOUBLES.replace("OP", "ns.x + ns.x"),
        DOUBLES.replace("OP", "ns.x * 2"),
        DOUBLES.replace("OP", "[ns.x, ns.x] | join"),
        "{{ 'a' * 10**11 }}",
        "{{ 10**9 * messages }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '{:{}}'.format(1, 999999999) }}",
        "{{ ('a' | attr('center'))(999999999) }}",
        "{{ 'a' | indent(width=999999999, first=true) }}",
    ],
)
def test_a_template_gets_little_memory(source):
    with pytest.raises(ValueError, match=r"template of F .* 2 s and 256 MiB; it needs"):
        ChatTemplate(source, {}, "the chat template of F").render(chat("x"))


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ (messages | length + 8) ** 99999999 }}",
    ],
    ids=["loops", "power"],
)
def test_a_template_gets_little_time_and_none_again(source):
    template = ChatTemplate(source, {}, "the chat template of F")
    for _ in range(100):
        with pytest.raises(ValueError, match=r"template of F .* MiB; it takes longer"):
            template.render(chat("x"))


def test_a_template_gets_little_time_to_be_read():
    with pytest.raises(ValueError, match=r"template of F .* MiB; it takes longer"):
        ChatTemplate("{{ 9 ** 99999999 }}", {}, "the chat template of F")


def test_a_template_whose_process_dies_is_told_apart():
    template = ChatTemplate(CHATML, {})
    template._worker._process.kill()
    with pytest.raises(ValueError, match=r"it ended its process \(status -9\)"):
        template.render(chat("x"))


def test_the_process_of_a_template_ends_with_it():
    template = ChatTemplate(CHATML, {})
    process = template._worker._process
    assert process.poll() is None
    del template
    gc.collect()
    assert process.poll() is not None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' /proc")
def test_the_process_of_a_template_loads_no_jax():
    template = ChatTemplate(CHATML, {})
    pid = template._worker._process.pid
    loaded = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    assert "python" in loaded
    assert "jaxlib" not in loaded
    assert "numpy" not in loaded


def test_messages_that_are_no_json_are_named():
    with pytest.raises(ValueError, match=r"messages must be JSON values; .*object"):
        ChatTemplate(CHATML, {}).render([{**chat("x")[0], "name": object()}])


def test_tools_and_their_calls_reach_the_template():
    template = ChatTemplate(
        "{{ tools | tojson }}{% for m in messages %}{{ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}",
        {},
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    text = template.render([*chat("x"), call], tools=[{"name": "f"}])
    assert text == '[{"name": "f"}]xNone[{"name": "f"}]'


def test_templates_get_every_special_token(tmp_path):
    folder = tmp_path / "t"
    tokens = "{{ unk_token }} {{ sep_token }} {{ mask_token }} {{ cls_token }}"
    save_tokenizer(folder, template=f"{tokens} {{{{ additional_special_tokens }}}}")
    settings = {
        "unk_token": {"content": "<u>"},
        "sep_token": "<s>",
        "add_bos_token": True,
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    older = {"mask_token": "<m>", "sep_token": "<old>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(older))
    text = Tokenizer(folder / "tokenizer.json").render_chat(chat("x"))
    assert text == "<u> <s> <m>  ['<a>', '<b>']"


def test_the_file_of_a_template_is_named(tmp_path):
    save_tokenizer(tmp_path / "t", template="{{ raise_exception('no') }}")
    tokenizer = Tokenizer(tmp_path / "t" / "tokenizer.json")
    file = tmp_path / "t" / "chat_template.jinja"
    with pytest.raises(ValueError, match=f"chat template of {file} can't render .*no"):
        tokenizer.render_chat(chat("x"))
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=f"{file} must be UTF-8; byte 0 is not"):
        Tokenizer(tmp_path / "t" / "tokenizer.json")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"at least 1 message; got '\[\]'"),
        ("hi", "list of at least 1 message; got 'hi'"),
        ([{"role": "user"}], "message 0 must have a string as content; got 'None'"),
        ([{"role": 3, "content": ""}], "message 0 must have a string as role; got '3'"),
        (["hi"], "message 0 must be an object"),
        (chat("a", "b\ufdd0"), "message 1 .*noncharacter"),
        (chat("a"), r"a turn with the role 'assistant'; got \['user'\]"),
    ],
)
def test_malformed_messages_are_named(messages, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(CHATML, {}).mark_assistant(messages)


def test_without_a_template_the_error_says_what_to_do(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "t", template=None)
    with pytest.raises(ValueError, match="must come with a chat template"):
        tokenizer.encode_chat(chat("a", "b"))


def test_without_jinja2_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'pip install "lora_jax\[train\]"'):
        ChatTemplate(CHATML, {})
