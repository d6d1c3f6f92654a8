"""Conversations: nothing is dropped in silence, each turn as it would be generated."""

import json
from pathlib import Path

import pytest

from lora_jax.files.chat import ChatTemplate
from lora_jax.files.tokenizer import Tokenizer
from tests.files.test_chat import CHATML, MARKED, chat, save_tokenizer

TOOLED = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson }}"
    "{{ '<|im_end|>\n' }}{% endif %}"
) + CHATML.replace(
    "m.content +",
    "(m.content or '') + (m.tool_calls | tojson if m.tool_calls else '') +",
)
GOLDEN = Path(__file__).parents[1] / "golden"
# What Qwen3's template does with thoughts, in its own words; without its tools.
QWEN3 = (GOLDEN / "qwen3_turns.jinja").read_text(encoding="utf-8")
CHAT_IDS = json.loads((GOLDEN / "chat_ids.json").read_text(encoding="utf-8"))


def said(rendered):
    return [
        "".join(rendered.text[start:end] for start, end in turn)
        for turn in rendered.turns
    ]


@pytest.mark.parametrize("contents", [("q", "<think>\nt\n</think>\n\na"), ("q", "a")])
def test_a_turn_is_trained_as_it_would_be_generated(contents):
    template = ChatTemplate(QWEN3, {})
    messages = chat(*contents, "r", "<think>\nu\n</think>\n\nb", "s")
    first, second = template.mark_assistant(messages)
    thought = (
        "<think>\nt\n</think>\n\n"
        if "</think>" in contents[1]
        else ("<think>\n\n</think>\n\n")
    )
    asked = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert first.text == f"{asked}{thought}a<|im_end|>\n"
    assert said(first) == [f"{thought}a<|im_end|>\n"]
    again = "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
    end = "<think>\nu\n</think>\n\nb<|im_end|>\n"
    assert second.text == f"{asked}a<|im_end|>\n{again}{end}"
    assert said(second) == [end]
    for rendered, stop in ((first, 1), (second, 3)):
        before = template.render(messages[:stop], add_generation_prompt=True)
        assert rendered.text.startswith(before)
        assert rendered.turns[0][0][0] == len(before)


def test_turns_of_one_rendering_share_a_text():
    thoughts = ("<think>\nt\n</think>\n\na", "<think>\nu\n</think>\n\nb")
    messages = [*chat("q"), *chat(*thoughts, roles=("assistant",))]
    (rendered,) = ChatTemplate(QWEN3, {}).mark_assistant(messages)
    assert said(rendered) == [f"{thought}<|im_end|>\n" for thought in thoughts]


def test_a_template_that_marks_turns_but_drops_thoughts_gives_several_texts():
    forgets = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content if loop.last else m.content[-1] }};"
        "{% endgeneration %}{% else %}{{ m.content }};{% endif %}{% endfor %}"
    )
    first, second = ChatTemplate(forgets, {}).mark_assistant(chat("q", "ta", "r", "ub"))
    assert (first.text, said(first)) == ("user:q;assistant:ta;", ["ta;"])
    assert second.text == "user:q;assistant:a;user:r;assistant:ub;"
    assert said(second) == ["ub;"]


DEFAULT = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
) + CHATML


@pytest.mark.parametrize("source", [CHATML, DEFAULT, QWEN3])
def test_a_conversation_may_begin_with_the_assistant(source):
    roles = ("assistant", "user")
    template = ChatTemplate(source, {})
    messages = chat("Hello!", "q", "Aha", roles=roles)
    rendered = template.mark_assistant(messages)
    turns = [text for each in rendered for text in said(each)]
    assert [turn.split("</think>\n\n")[-1] for turn in turns] == [
        "Hello!<|im_end|>\n",
        "Aha<|im_end|>\n",
    ]
    assert "Be kind" not in "".join(turns)
    assert "user" not in "".join(turns)


@pytest.mark.parametrize("source", [CHATML, MARKED])
def test_a_turn_of_weight_0_is_written_but_does_not_count(source):
    messages = chat("q", "WRONG", "r", "ok")
    messages[1]["weight"] = 0
    (rendered,) = ChatTemplate(source, {}).mark_assistant(messages)
    assert "WRONG" in rendered.text
    assert [text[:2] for text in said(rendered)] == ["ok"]
    messages[3]["weight"] = 0
    with pytest.raises(ValueError, match="and weight 1; all 2 have weight 0"):
        ChatTemplate(source, {}).mark_assistant(messages)


def test_no_template_sees_a_weight():
    template = ChatTemplate("{{ messages | tojson }}", {})
    assert template.render([{"role": "user", "content": "x", "weight": 0}]) == (
        '[{"role": "user", "content": "x"}]'
    )


def test_tools_and_calls_are_written_and_calls_count(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "weather"}]}
    messages = [*chat("rain?"), call, {"role": "tool", "content": "no"}]
    messages += chat("No rain.", roles=("assistant",))
    (rendered,) = ChatTemplate(TOOLED, {}).mark_assistant(messages, tools=tools)
    assert rendered.text.startswith('<|im_start|>system\nTools: [{"type": "function"')
    assert said(rendered)[0] == '[{"name": "weather"}]<|im_end|>\n'
    tokenizer = save_tokenizer(tmp_path / "t", TOOLED)
    (tokens,) = tokenizer.encode_chat(messages, tools=tools)
    assert tokenizer.decode(tokens.ids, skip_special=False) == rendered.text
    with pytest.raises(ValueError, match=r"tools must be empty, .* use them; got 1"):
        ChatTemplate(CHATML, {}).render(messages[:1], tools=tools)
    with pytest.raises(ValueError, match=r"message 1 has tool_calls, .* use"):
        ChatTemplate(CHATML, {}).render(messages)
    with pytest.raises(ValueError, match=r"tools must be a list of objects.*'weather'"):
        ChatTemplate(TOOLED, {}).render(messages[:1], tools="weather")


@pytest.mark.parametrize("nested", [True, False], ids=["in a function", "flat"])
def test_arguments_of_calls_in_json_are_read_where_they_would_be_quoted(nested):
    def turns(arguments):
        function = {"name": "rain", "arguments": arguments}
        call = {"type": "function", "function": function} if nested else function
        return [
            *chat("q"),
            {"role": "assistant", "tool_calls": [call]},
            *chat("r", "s"),
        ]

    template = ChatTemplate(TOOLED, {})
    wanted = template.render(turns({"city": "é"}))
    assert '{"city": "é"}}' in wanted
    assert template.render(turns('{"city": "é"}')) == wanted
    marked = template.mark_assistant(turns('{"city": "é"}'))
    assert marked == template.mark_assistant(turns({"city": "é"}))
    for given in ('{"city": "é"', '["é"]'):
        with pytest.raises(ValueError, match=r"message 1 must have an object, .*é"):
            template.render(turns(given))
    path = "function.arguments" if nested else "arguments"
    as_text = TOOLED.replace("m.tool_calls | tojson", f"m.tool_calls[0].{path}")
    own = ChatTemplate(as_text, {}).render(turns('{"city":"é"}'))
    assert '{"city":"é"}<|im_end|>' in own  # a template that takes strings


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "usr"}, "has an unknown role, 'usr'; did you mean 'user'?"),
        (
            {"contnt": "b"},
            "an unknown key, 'contnt'; did you mean 'content'?",
        ),
        ({"thinking": "b"}, "an unknown key, 'thinking'; known: role, cont"),
        ({"weight": 0.5}, "must have a weight of 0 or 1; got '0.5'"),
        ({"tool_calls": "f()"}, "must have a list as tool_calls; got 'f()'"),
        ({"weight": True}, "must have a weight of 0 or 1; got 'True'"),
        ({"weight": 1}, "a weight of 0: only turns of 'assistant' are trained on"),
    ],
)
def test_what_no_one_understands_is_an_error(message, fault):
    messages = [*chat("q"), {"role": "user", "content": "a"} | message]
    with pytest.raises(ValueError, match="message 1 ") as error:
        ChatTemplate(CHATML, {}).render(messages)
    assert fault in str(error.value)


def test_roles_and_keys_that_a_template_names_are_understood():
    source = "{% for m in messages %}{% if m.role == 'ipython' %}{{ m['plan'] }}"
    template = ChatTemplate(source + "{% endif %}{% endfor %} usr, thinking", {})
    message = {"role": "ipython", "content": "", "plan": "b"}
    assert template.render([message]) == "b usr, thinking"
    with pytest.raises(ValueError, match="unknown role"):  # text is not the program
        template.render([message | {"role": "usr"}])


@pytest.mark.parametrize("chat", CHAT_IDS["chats"])
def test_chats_and_prompts_have_the_ids_of_transformers(chat, tmp_path):
    """No BOS, where the template writes none but the tokenizer begins texts with it."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(CHAT_IDS["tokenizer"]))
    template = {"qwen3": QWEN3, "tooled": CHAT_IDS["tooled"]}[chat["template"]]
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode_text("q").ids[0] == tokenizer.special_ids["<s>"]
    messages, tools = chat["messages"], chat["tools"]
    last = tokenizer.encode_chat(messages, tools=tools)[-1]
    assert last.ids == chat["ids"]
    asked = tokenizer.encode_prompt(messages[:-1], tools=tools)
    assert asked == chat["prompt"] == last.ids[: len(asked)]
    assert last.mask[len(asked) - 1 : len(asked) + 1] == [0, 1]
    assert {*last.ends} == {tokenizer.special.eos_id}


def test_the_token_that_a_turn_ends_in_is_told(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "t", CHATML.replace("<|im_end|>", "</e>"))
    (tokens,) = tokenizer.encode_chat(chat("q", "a", "r", "b"))
    assert tokenizer.decode(tokens.ends) == ">>"
    assert tokenizer.special_ids.keys() == {"<|im_start|>", "<|im_end|>"}


PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def test_parts_of_text_reach_the_template_as_they_are():
    template = ChatTemplate(PARTS, {})
    messages = [
        {"role": "user", "content": parts("a", "b")},
        {"role": "assistant", "content": parts("c")},
    ]
    assert template.render(messages) == "<user>ab</><assistant>c</>"
    [found] = template.mark_assistant(messages)
    assert said(found) == ["c</>"]


def test_a_greeting_in_parts_is_found_in_a_template_for_parts_only():
    source = "{% for m in messages %}{% for p in m.content %}{{ p['text'] + '|' }}"
    source += "{% endfor %}{% endfor %}{{ raise_exception('x') if not messages }}"
    messages = [{"role": "assistant", "content": parts("hello")}]
    [found] = ChatTemplate(source, {}).mark_assistant(messages)
    assert said(found) == ["hello|"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image", "url": "x"}], "'text' only; got 'image': a language model"),
        ([*parts("a"), {"type": "audio"}], "'text' only; got 'audio'"),
        (["a"], "objects with a type as parts; got 'a'"),
        ([{"type": "text"}], "a string as text of each part"),
        ([{"type": "text", "text": "a", "bold": 1}], "a string as text of each part"),
        (parts("a\ufdd0"), "noncharacter"),
        ([], r"a string as content; got '\[\]'"),
    ],
)
def test_parts_that_are_no_text_are_refused(content, message):
    chat = [{"role": "user", "content": content}]
    with pytest.raises(ValueError, match=f"message 0 .*{message}"):
        ChatTemplate(PARTS, {}).render(chat)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "doesn't read parts"),
        (CHATML, "strings only, not parts: join their texts"),
    ],
    ids=["list", "error"],
)
def test_a_template_that_takes_strings_alone_says_so(source, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, {}).render([{"role": "user", "content": parts("a")}])


# DeepSeek-R1's: no turn keeps its thoughts, and the prompt to generate opens them.
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}"
    "<A>{{ m.content.split('</think>')[-1] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)


@pytest.mark.parametrize("opening", ["<think>\n", "<think>"])
def test_thoughts_that_a_template_drops_from_all_turns_are_trained_on(opening):
    chat_ = chat("q", f"{opening}t\n</think>\na", "r", f"{opening}u\n</think>\nb")
    first, second = ChatTemplate(R1, {}).mark_assistant(chat_)
    assert first.text == "<U>q<A><think>\nt\n</think>\na<end>"
    assert said(first) == ["t\n</think>\na<end>"]
    assert second.text == "<U>q<A>\na<end><U>r<A><think>\nu\n</think>\nb<end>"
    assert said(second) == ["u\n</think>\nb<end>"]


def test_an_answer_without_the_thoughts_that_its_prompt_opens_is_an_error():
    with pytest.raises(ValueError, match="before message 1, so the assistant's turn"):
        ChatTemplate(R1, {}).mark_assistant(chat("q", "a"))
