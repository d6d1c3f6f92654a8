"""Chats through the commands: trained, asked and scored in the same tokens."""

import json
import re

import pytest
import tokenizers

from lora_jax.cli.main import main
from lora_jax.files.tokenizer import load_tokenizer
from lora_jax.finetune import language
from lora_jax.finetune.settings import load_settings
from lora_jax.finetune.tasks import open_job
from tests.tiny_decoder import TEMPLATE, WORDS, make_decoder

SKY = [
    {"role": "user", "content": "what is the sky ?"},
    {"role": "assistant", "content": "blue ."},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Its tokenizer begins every text with BOS, which its template doesn't write."""
    folder = make_decoder(tmp_path_factory.mktemp("decoder") / "llama")
    file = str(folder / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(file)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", WORDS.index("<s>"))]
    )
    tokenizer.save(file)
    return folder


def with_template(folder, place, template):
    """The same model with another template."""
    for file in folder.iterdir():
        (place / file.name).symlink_to(file)
    (place / "tokenizer_config.json").unlink()
    settings = {"eos_token": "</s>", "chat_template": template}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return place


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("chats")
    data = write(place / "train.jsonl", [{"messages": SKY}] * 8)
    file = place / "config.yaml"
    file.write_text(
        f"""
model: {{path: {folder}}}
data: {{train: {data}, holdout: 0.5}}
lora: {{rank: 2}}
train: {{max_steps: 1, batch_size: 4, baseline: false, samples: ["what is the sky ?"]}}
output: {{dir: {place}/run}}
"""
    )
    return file


@pytest.fixture(scope="module")
def run(config):
    asked = []
    generate = language.generate

    def spy(module, variables, prompts, **options):
        asked.extend(prompts)
        return generate(module, variables, prompts, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "generate", spy)
        assert main(["train", str(config)]) == 0
    return config.parent / "run", asked


def words(ids):
    return " ".join(WORDS[i] for i in ids)


def test_a_chat_is_asked_in_the_tokens_that_it_is_trained_in(folder, run, call):
    (trained,) = load_tokenizer(folder).encode_chat(SKY)
    prompt = trained.ids[: trained.mask.index(1)]
    assert words(prompt) == "user what is the sky ? </s> assistant"
    _, samples = run
    assert samples[0] == prompt
    options = ["--model", folder, "--max-new-tokens", 1, "--json"]
    _, out, _ = call("generate", "--chat", "--prompt", SKY[0]["content"], *options)
    assert json.loads(out)["results"][0]["input_ids"] == prompt
    _, out, _ = call("generate", "--prompt", "the sky", *options)  # a text has its BOS
    assert words(json.loads(out)["results"][0]["input_ids"]) == "<s> the sky"


def test_a_system_and_a_file_of_messages_are_asked(folder, tmp_path, call):
    options = ["--model", folder, "--max-new-tokens", 1]
    asked = ["generate", "--chat", "--prompt", "what ?", "--system", "the grass is red"]
    _, out, _ = call(*asked, *options, "--json")
    (result,) = json.loads(out)["results"]
    wanted = "[UNK] the grass is red </s> user what ? </s> assistant"
    assert words(result["input_ids"]) == wanted
    system = {"role": "system", "content": "the grass is red"}
    file = write(
        tmp_path / "in.jsonl", [{"messages": SKY}, {"messages": [system, *SKY]}]
    )
    _, out, _ = call("generate", "--messages", file, *options, "--json")
    first, second = json.loads(out)["results"]
    assert words(first["input_ids"]) == "user what is the sky ? </s> assistant"
    assert words(second["input_ids"]) == (
        "[UNK] the grass is red </s> user what is the sky ? </s> assistant"
    )
    assert first["prompt"] == SKY[0]["content"]
    for asked, message in (
        (["--prompt", "a", "--system", "b"], "--system requires --chat"),
        (["--messages", file, "--chat"], "--chat requires --prompt"),
        (["--messages", file, "--prompt", "a"], "not allowed with"),
        ([], "one of the arguments --prompt --messages is required"),
    ):
        try:
            code, _, shown = call("generate", *asked, *options)
        except SystemExit as stop:
            code, shown = stop.code, ""
        assert code == 2
        assert message in shown or not shown


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "in.jsonl:1: must be messages; it is text"),
        (
            {"messages": SKY[1:]},
            "in.jsonl:1: messages must contain one that is not the",
        ),
        ({"messages": "a"}, "in.jsonl:1: messages must be a list of objects"),
        ({"messages": SKY, "tool": []}, "unknown key, 'tool'; did you mean 'tools'?"),
        ({"messages": SKY, "tools": [{}]}, "example 1: tools must be empty"),
        ({"messages": [{"role": "usr", "content": ""}]}, "did you mean 'user'?"),
    ],
)
def test_messages_that_can_not_be_asked_are_named(row, message, folder, tmp_path, call):
    file = write(tmp_path / "in.jsonl", [row])
    code, _, shown = call("generate", "--model", folder, "--messages", file)
    assert code == 2
    assert message in shown


def test_a_special_token_stops_a_text(folder, tmp_path, call):
    options = ["--prompt", "the sky is", "--max-new-tokens", 6, "--json"]
    _, out, _ = call("generate", "--model", folder, *options)
    (free,) = json.loads(out)["results"]
    at = free["output_ids"][-1]
    token = load_tokenizer(folder).decode([at], skip_special=False)
    place = tmp_path / "special"
    place.mkdir()
    with_template(folder, place, TEMPLATE)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([token])
    (place / "tokenizer.json").unlink()
    tokenizer.save(str(place / "tokenizer.json"))
    _, out, _ = call("generate", "--model", place, *options, "--stop", token)
    (stopped,) = json.loads(out)["results"]
    assert stopped["output_ids"] == free["output_ids"][: free["output_ids"].index(at)]
    assert stopped["stopped_by"] == f"stop string {token!r}"
    mixed = ["--stop", f"the {token}"]
    code, _, shown = call("generate", "--model", place, *options, *mixed)
    assert code == 2
    assert f"it contains the token {token!r}, which" in shown


def test_turns_that_end_in_no_stop_token_are_told(folder, config, tmp_path, call):
    place = tmp_path / "endless"
    place.mkdir()
    with_template(folder, place, TEMPLATE.replace("</s>", "sea"))  # a word
    ask = ["generate", "--model", place, "--chat", "--prompt", "a"]
    ask += ["--max-new-tokens", 1]
    _, _, shown = call(*ask)
    assert "warning: the assistant's turns end in 'sea' (1 of 1)" in shown
    assert "which is not a stop token ('</s>', '<s>')" in shown
    assert "warning" not in call(*ask, "--stop", "sea")[2]
    ask[2] = folder
    assert "warning" not in call(*ask)[2]
    code, out, shown = call(
        *("train", config, f"model.path={place}", f"output.dir={tmp_path}/run")
    )
    assert code == 0, shown
    assert re.search(r"warning +the assistant's turns end in 'sea' \(8 of 8\)", out)


def test_a_file_of_messages_is_scored_as_it_is_trained(run, config, tmp_path, call):
    folder, _ = run
    unlike = [
        {**SKY[0], "content": "what is the grass ?"},
        {**SKY[1], "content": "red"},
    ]
    rows = [{"messages": SKY}, {"messages": [*SKY, *unlike]}]
    data = write(tmp_path / "in.jsonl", rows)
    target = tmp_path / "out.jsonl"
    words = ["score", "--adapter", folder, "--data", data, "--out", target, "--json"]
    code, out, shown = call(*words)
    assert code == 0, shown
    found = json.loads(out)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 2]
    assert [sum(line["loss_mask"]) for line in lines] == [3, 5]
    assert found["scored_tokens"] == 8
    code, out, _ = call("eval", "--run", folder, "--data", data, "--json")
    assert found["mean_logprob"] == pytest.approx(-json.loads(out)["loss"], rel=1e-5)
    pairs = [{"prompt": "the sky is ", "completion": "blue ."}]
    write(data, pairs)
    code, out, _ = call(*words)
    assert json.loads(out)["scored_tokens"] == 3  # blue . </s>
    write(data, [{"messages": [{"role": "usr", "content": "a"}]}])
    code, _, shown = call(*words)
    assert code == 2
    assert "example 1: message 0 has an unknown role, 'usr'" in shown


def test_the_split_that_there_is_is_the_one_to_evaluate(config, run, call, tmp_path):
    code, out, shown = call("train", config, f"output.dir={tmp_path}/run")
    assert code == 0, shown
    (line,) = [line for line in out.splitlines() if "lora-jax eval" in line]
    code, out, shown = call(*line.split()[1:])
    assert code == 0, shown
    assert "validation" in out
    code, _, shown = call("eval", "--run", run[0])
    assert code == 2
    assert "no test split: its data.test is null" in shown
    assert "--split validation" in shown


def test_a_max_length_above_the_context_is_told(config, tmp_path, call, folder):
    longest = json.loads((folder / "config.json").read_text())[
        "max_position_embeddings"
    ]
    data = write(tmp_path / "in.jsonl", [{"text": "the " * 2 * longest}] * 4)
    settings = [
        "data.max_length=9999",
        f"output.dir={tmp_path}/run",
        "train.samples=[]",
    ]
    code, out, shown = call("train", config, *settings, f"data.train={data}")
    assert code == 0, shown
    said = f"{longest} tokens, the model's context"
    assert f"{said}; data.max_length = 9999 is more" in out
    assert f"4 examples truncated to {said}" in out


def test_no_conversation_is_in_two_splits(folder, tmp_path):
    """Where a template drops earlier thoughts, each turn is an example of its own."""
    thought = "{{ 'is ' if loop.last and m.role == 'assistant' }}{{ m.content }}"
    template = TEMPLATE.replace("{{ m.content }}", thought)
    place = with_template(folder, tmp_path, template)
    rows = [
        {
            "messages": [
                {"role": role, "content": f"w{16 + i}"}
                for role in ("assistant", "system", "assistant")
            ]
        }
        for i in range(8)
    ]
    data = write(tmp_path / "train.jsonl", rows)
    settings = load_settings(
        {
            "model": {"path": str(place)},
            "data": {"train": str(data), "holdout": 0.5},
            "output": {"dir": str(tmp_path / "run")},
        }
    )
    job = open_job(settings, splits=("train", "validation"))
    said = {
        name: [max(e["input_ids"]) for e in split.examples]
        for name, split in job.splits.items()
    }
    assert {name: len(ids) for name, ids in said.items()} == dict.fromkeys(said, 8)
    assert not {*said["train"]} & {*said["validation"]}
    assert len({*said["train"]}) == len({*said["validation"]}) == 4
