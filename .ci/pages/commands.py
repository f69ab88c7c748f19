"""The commands ``hora`` and ``hora-bench``, read from their parsers."""

import argparse
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin

LEAD = """# Commands

Read from the parsers when this site is built. `hora` comes with `hora-spec` and needs no framework; `hora-bench` comes
with the package of that name. A refusal is one line on stderr and the status 2. Tools that you do not write are started
with HoRA by `python -m hora_torch -m MODULE ...`, see [When something is refused](../guide/troubleshooting.md).
"""
Row = tuple[str, str, str]


def page() -> str:
    """The page of both commands."""
    return "\n".join([LEAD, "## hora", "", *_hora(), "## hora-bench", "", *_bench()])


def _hora() -> Iterator[str]:
    from hora_spec.__main__ import _parser

    parser = _parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        rows = [_of_argument(action) for action in command._actions if action.dest != "help"]
        usage = command.format_usage().removeprefix("usage: ").split()
        yield from _command(f"hora {name}", command.description or "", " ".join(usage).replace("[-h] ", ""), rows)


def _of_argument(action: argparse.Action) -> Row:
    name = ", ".join(action.option_strings) or str(action.metavar)
    choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
    default = "" if action.default is None or action.default is False else str(action.default)
    return name, _sentence(action.help or "") + choices, default


def _bench() -> Iterator[str]:
    from hora_bench.cli import app

    yield from _of_app(app, "hora-bench")


def _of_app(app: Any, name: str) -> Iterator[str]:
    for command in app.registered_commands:
        if not command.hidden:
            given = inspect.signature(command.callback, eval_str=True).parameters.values()
            rows = [_of_parameter(each) for each in given if hasattr(each.annotation, "__metadata__")]
            path = f"{name} {command.name or command.callback.__name__.replace('_', '-')}"
            text = command.help or inspect.getdoc(command.callback) or ""
            arguments = [first for first, *_ in rows if not first.startswith("-")]
            yield from _command(path, text, " ".join([path, *arguments, "[OPTIONS]"]), rows)
    for group in app.registered_groups:
        yield from _of_app(group.typer_instance, f"{name} {group.name}")


def _of_parameter(parameter: inspect.Parameter) -> Row:
    """From ``Annotated[type, typer.Option(...)]``, the only form that the commands use."""
    kind, declared = parameter.annotation.__origin__, parameter.annotation.__metadata__[0]
    required = parameter.default is inspect.Parameter.empty
    default = "" if required or parameter.default is None or parameter.default is False else str(parameter.default)
    said = _sentence(declared.help or "")
    if get_origin(kind) is Literal:
        said += f" One of {', '.join(map(str, get_args(kind)))}."
    if type(declared).__name__ == "ArgumentInfo":
        name = parameter.name.upper()
        return name if required else f"[{name}]", said, default
    names = declared.param_decls or (f"--{parameter.name.replace('_', '-')}",)
    return ", ".join(names), said, default


def _command(path: str, text: str, usage: str, rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    head = [f"### {path}", "", _sentence(text), "", "```text", usage, "```", ""]
    if not rows:
        return head
    cells = [f"| `{name}` | {said.strip()} | {default} |" for name, said, default in rows]
    return [*head, "| argument | meaning | default |", "|---|---|---|", *cells, ""]


def _sentence(text: str) -> str:
    """One paragraph that begins with a capital and ends with a stop."""
    flat = " ".join(text.split())
    return flat and flat[0].upper() + flat[1:] + ("" if flat.endswith((".", "?", "!")) else ".")
