"""Renders one chat template in a separate process with little time and memory.

A template comes with a model, so it is an untrusted program. jinja2's sandbox isolates
it from the machine but doesn't stop infinite loops or exponential memory use; only the
operating system can. So `lora_jax.files.chat` runs this file as a script that imports
only jinja2, and the process ends when a limit is exceeded.

Requests and answers are JSON lines. The first request is ``{"path", "source",
"tokens", "seconds", "memory", "max_chars"}``; later ones are ``{"messages", "tools",
"prompt", "ends", "seconds"}``. An answer contains ``error`` (in the template),
``limit`` (the one exceeded), ``words`` (of the template's source), or ``text`` and
``ends``.
"""

import datetime
import json
import resource
import signal
import sys
from typing import Any, ClassVar

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters, as marks in a rendered text
REFUSED = -1  # the end of a prefix that the template rejects
TIMEOUT_SIGNAL = signal.SIGPROF  # ends the process
NOW = datetime.datetime(2024, 7, 26)  # in all templates, on any day


def make_environment() -> Any:
    """Returns the environment that transformers provides, with a fixed date."""
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
        def __init__(*args: Any, **values: Any):  # a value may be named self
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
        """Dumps JSON without HTML escapes, which jinja2's own filter would add."""
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
    """Returns the text, and the end of each requested prefix in it.

    An end is None if the text doesn't start with that prefix, and `REFUSED` if the
    template rejects it.
    """

    def write(stop: int | None, prompt: bool) -> str:
        text = template.render(
            messages=request["messages"][:stop],
            tools=request["tools"],
            documents=None,
            add_generation_prompt=prompt,
            **first["tokens"],
        )
        if len(text) > first["max_chars"]:
            raise ValueError(
                f"the text must have at most {first['max_chars']:,} characters; it has "
                f"{len(text):,}"
            )
        return text

    text, ends = write(None, request["prompt"]), []
    for stop, prompt in request["ends"]:
        try:
            part = write(stop, prompt)
        except MemoryError:
            raise
        except Exception:  # an untrusted program may raise anything
            ends.append(REFUSED)
        else:
            ends.append(len(part) if text.startswith(part) else None)
    return {"text": text, "ends": ends}


def _words(environment: Any, source: str) -> list[str]:
    """Returns the names and strings in a template, without its literal text."""
    tokens = [(kind, value) for _, kind, value in environment.lex(source)]
    names = {value for kind, value in tokens if kind == "name"}
    return sorted(names | {value[1:-1] for kind, value in tokens if kind == "string"})


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
        # CPU time, so that a busy machine makes no difference.
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            if template is None:
                template = environment.from_string(first["source"])
                answer = {"words": _words(environment, first["source"])}
            else:
                answer = _render(template, first, request)
        except MemoryError:
            answer = {"limit": "memory"}
        except Exception as error:  # an untrusted program may raise anything
            answer = {"error": (str(error) or type(error).__name__)[:500]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        line = sys.stdin.readline()
        request = json.loads(line) if line else None


if __name__ == "__main__":
    main()
