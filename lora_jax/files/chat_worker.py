"""Fills in one chat template, in a process of its own with little time and memory.

A template comes with a model, so it is a stranger's program. jinja2's sandbox keeps it
from the machine, but not from looping for ever or doubling a text until memory is full:
only the operating system can. So `lora_jax.files.chat` runs this file as a script that
imports jinja2 and nothing else; where a limit is passed, this process ends.

Requests and answers are JSON, one a line. The first request is ``{"path", "source",
"tokens", "seconds", "memory", "letters"}``; each later one ``{"messages", "tools",
"ends", "seconds"}``. An answer holds ``error`` (the template's fault), ``limit`` (what
it asks too much of), or ``text`` and ``ends``.
"""

import datetime
import json
import resource
import signal
import sys
from typing import Any, ClassVar

# Characters that Unicode keeps free of meaning, as marks inside a rendered text.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
TIME_IS_OVER = signal.SIGPROF  # ends the process, whatever it does
NOW = datetime.datetime(2024, 7, 26)  # for all templates, on every day


def make_environment() -> Any:
    """Returns what a template may see and call: as in transformers, on one day."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox
    import jinja2.utils

    class Generation(jinja2.ext.Extension):
        tags: ClassVar = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **values: Any):  # so that a value may be named self
            attributes = dict(*args[1:], **values)
            for name in attributes:
                check_name(name)
            jinja2.utils.Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    def check_name(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template can't set {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def make_dict(*args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as text; jinja2's own filter would escape it for HTML."""
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = NOW.strftime
    environment.globals["dict"] = make_dict
    environment.globals["namespace"] = Namespace
    return environment


def _render(template: Any, first: dict[str, Any], request: dict[str, Any]) -> Any:
    """Returns the text of all messages, and how far it is that of each beginning."""

    def write(stop: int | None, prompt: bool) -> str:
        text = template.render(
            messages=request["messages"][:stop],
            tools=request["tools"],
            documents=None,
            add_generation_prompt=prompt,
            **first["tokens"],
        )
        if len(text) > first["letters"]:
            most = f"at most {first['letters']:,}"
            raise ValueError(f"the text must have {most} letters; it has {len(text):,}")
        return text

    text, ends = write(None, request["prompt"]), []
    for stop, prompt in request["ends"]:
        part = write(stop, prompt)
        ends.append(len(part) if text.startswith(part) else None)
    return {"text": text, "ends": ends}


def main() -> None:
    """Answers requests until there are no more."""
    first = json.loads(sys.stdin.readline())
    sys.path[:] = first["path"]
    environment = make_environment()
    for what, size in (
        (resource.RLIMIT_DATA, first["memory"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (size, size))
    template, request = None, first
    while request:
        # The time is the process's own, so that a busy machine changes nothing.
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            if template is None:
                template, answer = environment.from_string(first["source"]), {}
            else:
                answer = _render(template, first, request)
        except MemoryError:
            answer = {"limit": "memory"}
        except Exception as error:  # whatever a stranger's program may raise
            answer = {"error": (str(error) or type(error).__name__)[:500]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        line = sys.stdin.readline()
        request = json.loads(line) if line else None


if __name__ == "__main__":
    main()
