"""The command line parser of `lora-jax`, without slow imports."""

import argparse
from collections.abc import Sequence
from typing import Any

COMMANDS = {
    "init": "write a commented config.yaml, with every setting, to start from",
    "train": "fine-tune a model; writes a run folder",
    "sweep": "fine-tune all combinations of settings, many runs in one compiled step",
    "plan": "show what would be trained and the cost of a step, without training",
    "eval": "evaluate a run's adapter on a data file",
    "encode": "compute embeddings (and logits) for the lines of a file",
    "generate": "continue or answer a prompt",
    "score": "compute log-probabilities of the tokens of each line",
    "merge": "merge an adapter into its base; writes a plain Hugging Face folder",
    "combine": "add up adapters of one base, or change an adapter's rank",
    "extract": "compute the adapter closest to a full fine-tuning",
    "export": "write a run's adapter (or all of them) for PEFT, vLLM and others",
    "inspect": "show what is in an adapter or model folder",
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line.

    Args:
      argv: the arguments after ``lora-jax``; by default those of the process.

    Returns:
      The arguments, with ``command`` and, if the command takes them, ``overrides``.

    Raises:
      SystemExit: with code 2 on an error and 0 on ``--help``.
    """
    parser, commands = _parser()
    args, rest = parser.parse_known_args(argv)
    command = commands[args.command]
    # Overrides may also follow options: `train c.yaml --resume train.epochs=2`.
    name = next((name for name in ("overrides", "grid") if hasattr(args, name)), "")
    is_override = [bool(name) and word[:1] != "-" for word in rest]
    if not all(is_override):
        command.error(f"unknown argument {rest[is_override.index(False)]!r}")
    if rest:
        setattr(args, name, [*getattr(args, name), *rest])
    return args


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="lora-jax",
        description="Fine-tunes pretrained transformers with LoRA, in JAX.",
        epilog="`lora-jax COMMAND --help` says more about each command.",
    )
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands = {
        name: choices.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:],
            allow_abbrev=False,
        )
        for name, text in COMMANDS.items()
    }
    for command in commands.values():
        _flag(command, "--json", "print only one JSON document on stdout")
        _flag(command, "--debug", "show the traceback of an error")
    for name in ("train", "plan"):
        commands[name].add_argument("config", help="YAML file, or a run folder")
        _add_overrides(commands[name])
    commands["init"].add_argument(
        "file", nargs="?", default="config.yaml", help="default: config.yaml"
    )
    train = commands["train"]
    _add_again(train, "resume from the run's last checkpoint", "the run folder")
    _add_processes(train)
    _add_sweep(commands["sweep"])
    _add_plan(commands["plan"])
    _add_eval(commands["eval"])
    _add_encode(commands["encode"])
    _add_generate(commands["generate"])
    _add_score(commands["score"])
    _add_model(commands["merge"], adapter_required=True)
    _add_combine(commands["combine"])
    _add_extract(commands["extract"])
    _add_export(commands["export"])
    for names, kind, text in (
        (("merge", "combine", "extract", "export"), "DIR", "folder to write"),
        (("encode", "score"), "FILE", "JSONL to write"),
    ):
        for name in names:
            commands[name].add_argument("--out", metavar=kind, required=True, help=text)
    commands["inspect"].add_argument(
        "dir", help="adapter, run or model folder; or a GGUF file"
    )
    return parser, commands


def _flag(command: Any, name: str, text: str) -> None:
    command.add_argument(name, action="store_true", help=text)


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],  # otherwise argparse requires them
        metavar="section.key=value",
        help="settings to change",
    )


def _add_sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", help="YAML file of all runs; output.dir is for all")
    command.add_argument(
        "grid",
        nargs="*",
        default=[],  # they may follow the options
        metavar="section.key=v1,v2",
        help="settings and their values; seed=0..2 is train.seed=0,1,2",
    )
    words = "take the first values together, then the second, and so on"
    _flag(command, "--zip", f"{words}, instead of all combinations")
    command.add_argument(
        "--together",
        type=_count,
        metavar="M",
        help="runs side by side (default: what is fastest here)",
    )
    _add_again(command, "continue the sweep in the folder", "the folder")


def _add_again(command: argparse.ArgumentParser, resume: str, folder: str) -> None:
    group = command.add_mutually_exclusive_group()
    _flag(group, "--resume", resume)
    _flag(group, "--overwrite", f"delete {folder} and start over")


def _add_processes(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "multiple processes",
        "run the same command in every process, on any number of hosts",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens"
    )
    group.add_argument("--processes", type=int, metavar="N", help="how many")
    group.add_argument(
        "--process-id", type=int, metavar="I", help="index of this process, from 0"
    )
    _flag(
        group,
        "--distributed",
        "detect these three from SLURM, Kubernetes, Open MPI or the TPU pod",
    )
    group.add_argument(
        "--start-timeout",
        type=_count,
        default=300,
        metavar="SECONDS",
        help="time to wait for the other processes (default: 300)",
    )


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--topology",
        metavar="CHIP:SHAPE",
        help="a TPU slice to compile a decoder's step for, e.g. v5e:4x4; needs only "
        "config.json: no weights, data or TPU",
    )
    command.add_argument(
        "--batch", type=_count, metavar="N", help="rows; default: train.batch_size"
    )
    command.add_argument(
        "--tokens", type=_count, metavar="T", help="per row; default: data.max_length"
    )
    command.add_argument(
        "--mesh", metavar="AXES", help="data=1,fsdp=4,sequence=2; default: all fsdp"
    )
    command.add_argument(
        "--together",
        type=_count,
        metavar="M",
        help="also price a sweep's step of M runs side by side, and find the most "
        "that fit",
    )
    _flag(
        command,
        "--largest-batch",
        "also find the largest batch that fits, with a few more compilations",
    )
    _flag(
        command,
        "--smallest-slice",
        "also find the smallest slice of the same chip that fits",
    )


def _add_eval(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", nargs="?", help="YAML file whose run is evaluated")
    _add_overrides(command)
    command.add_argument("--run", metavar="DIR", help="run folder")
    command.add_argument("--data", metavar="FILE", help="JSONL file of examples")
    command.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        default="test",
        help="without --data, the split of the run's own data (default: test)",
    )
    _flag(
        command,
        "--base",
        "evaluate the frozen base without the adapter; an encoder's with a linear "
        "head fitted on the train split",
    )


def _add_encode(command: argparse.ArgumentParser) -> None:
    _add_lines(
        command,
        "{text}, {input_ids}, or for image models {image} (a path relative to the "
        "file) or {pixel_values}; the embedding is what a folder of "
        "sentence-transformers says (modules.json), else the mean over unmasked "
        "tokens, for images over all tokens, including the class token",
        batch_size=32,
    )
    command.add_argument(
        "--prompt",
        metavar="NAME",
        help="put the prompt of this name before each text, of those in the folder's "
        "config_sentence_transformers.json",
    )
    command.add_argument(
        "--max-length", type=_count, metavar="N", help="maximum tokens per text"
    )


def _add_generate(command: argparse.ArgumentParser) -> None:
    _add_model(command, adapter_required=False, several=True)
    asked = command.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue; repeat it for a batch",
    )
    asked.add_argument(
        "--messages",
        metavar="FILE",
        help="JSONL with {messages} and optionally {tools}, as for train; the "
        "assistant's turns at the end of a line are dropped and generated anew",
    )
    command.add_argument(
        "--max-new-tokens",
        type=_count,
        metavar="N",
        help="default: 128, or as many as fit the model's context",
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="default: 0, for the most likely token",
    )
    command.add_argument("--top-p", type=float, default=1.0, metavar="P")
    command.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all")
    command.add_argument("--seed", type=int, default=0, metavar="S")
    command.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="text that ends generation; may be a special token, e.g. <|im_end|>",
    )
    _flag(
        command,
        "--chat",
        "format the prompt as a user message with the model's chat template",
    )
    command.add_argument(
        "--system", metavar="TEXT", help="system message before it, with --chat"
    )


def _add_score(command: argparse.ArgumentParser) -> None:
    _add_lines(
        command,
        "text or input_ids; or training data (messages, or prompt and completion), "
        "scored on the tokens that training counts; an encoder–decoder needs prompt "
        "and completion",
        batch_size=8,
    )


def _add_lines(
    command: argparse.ArgumentParser, fields: str, *, batch_size: int
) -> None:
    _add_model(command, adapter_required=False, several=True)
    command.add_argument(
        "--data", metavar="FILE", required=True, help=f"JSONL with {fields}"
    )
    command.add_argument("--batch-size", type=_count, default=batch_size, metavar="N")


def _add_combine(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "adapters", nargs="+", metavar="DIR", help="run or adapter folders"
    )
    command.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one each; default: 1"
    )
    command.add_argument(
        "--method",
        choices=("cat", "svd", "ties", "dare", "dare_ties"),
        help="cat: the exact sum, at the sum of the ranks (default); svd: the sum cut "
        "to --rank (default with --rank); ties and dare need --rank too",
    )
    command.add_argument("--rank", type=_count, metavar="R", help="of the result")
    command.add_argument(
        "--density",
        type=float,
        metavar="P",
        help="fraction of each update that TIES and DARE keep (default: 0.5)",
    )
    command.add_argument("--seed", type=int, metavar="S", help="of DARE (default: 0)")
    command.add_argument(
        "--head",
        metavar="DIR",
        help="the adapter whose head (and other weights trained in full) to keep; "
        "default: the sum of their changes, of new heads the weighted mean",
    )
    command.add_argument(
        "--model",
        metavar="DIR",
        help="the base; optional if the adapters say which it is",
    )


def _add_extract(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", metavar="DIR", required=True, help="the base")
    command.add_argument(
        "--tuned", metavar="DIR", required=True, help="the fully fine-tuned model"
    )
    command.add_argument("--rank", type=_count, required=True, metavar="R")
    command.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="layers to extract; default: all linear layers",
    )


def _add_export(command: argparse.ArgumentParser) -> None:
    _add_model(command, adapter_required=True)
    command.add_argument(
        "--format",
        choices=("peft", "mlx", "vera"),
        default="peft",
        help="default: peft; vera: PEFT's VeraConfig, of a run with lora.vera",
    )
    _flag(
        command,
        "--portable",
        "use only features all loaders agree on: one rank, no patterns, scaling 1",
    )
    _flag(command, "--skip-head", "omit an encoder's trained head")


def _add_model(
    command: argparse.ArgumentParser, *, adapter_required: bool, several: bool = False
) -> None:
    command.add_argument(
        "--model",
        metavar="DIR",
        help="Hugging Face folder, GGUF file, package:NAME/PATH, or hub id; "
        "optional if --adapter is a run folder",
    )
    named = "; repeat it as NAME=DIR and name one in each line's field 'adapter'"
    command.add_argument(
        "--adapter",
        metavar="DIR",
        required=adapter_required,
        action="append" if several else "store",
        help="run or adapter folder" + named * several,
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"must be an integer of at least 1; got {text!r}"
        )
    return int(text)
