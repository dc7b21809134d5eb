"""The command line: a recipe, dotted overrides, and one clear line for every mistake."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import sys
import textwrap
import typing
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from engine.config import TINY, Config

PROGRAM = "pretrain"
HANGING = {"initial_indent": " " * 8, "subsequent_indent": " " * 8}
UNKNOWN_OPTION = (
    r"unrecognized arguments: --([\w.-]+)",
    r"Parser key \"([\w.]+)\".*unknown option ([\w.]+)",  # from the parser of an inner section
    r"Option '([\w.]+)' is not accepted",
    r"Group '([\w.]+)' does not accept option '([\w.]+)'",
)
"""How jsonargparse says that it does not know an option."""
INSIDE_OPTIONAL_SECTION = (
    r"(?:\"?([\w.]+)\"?: )?Does not validate against any of the Union subtypes .*? Errors: - (.*?) "
    r"- Expected (?:a <class ')?NoneType"
)
"""How it wraps what is wrong inside a section that may be null."""
SOURCES = {"data.source", "data.sets", "data.held_out"}
"""Options that say what to read: what stands on the command line is read, of a tiny run too."""


def optional_sections(section: type = Config, prefix: str = "") -> dict[str, type]:
    """Path and class of every section that may be null."""
    found: dict[str, type] = {}
    for name, hint in typing.get_type_hints(section).items():
        path, choices = prefix + name, typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            found |= optional_sections(hint, f"{path}.")
        elif type(None) in choices and dataclasses.is_dataclass(choices[0]):
            found[path] = choices[0]
            found |= optional_sections(choices[0], f"{path}.")
    return found


def parse(argv: list[str] | None = None) -> Config:
    """The configuration of a run. --help, --print_config and mistakes end the process."""
    with one_line_errors():
        arguments = drop_launcher_arguments(sys.argv[1:] if argv is None else argv)
        for recipe in recipes_of(arguments):
            refuse_repeated_keys(recipe)
        parser = make_parser()
        values = parser.parse_args(arguments).clone(with_meta=False)
        printed = values.pop("print_config")
        values.pop("config")
        given = {name: values[name] for name in options_of(arguments) if name in values}
        if SOURCES & given.keys() and "data.tiny_source" not in given:
            values["data.tiny_source"] = None
        config = Config(**vars(parser.instantiate(values)))
    tell_what_tiny_lowered(config, given)
    if printed:
        if is_main():
            print(config.to_yaml(), end="")
        sys.exit(0)
    return config


def is_main() -> bool:
    """Every rank parses; one of them speaks."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def one_line_errors(program: str = PROGRAM) -> Iterator[None]:
    """A mistake of the user ends the process with one line on stderr and code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        if is_main():
            print(f"{program}: error: {unwrapped(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)


def drop_launcher_arguments(argv: list[str]) -> list[str]:
    """Leave out what DeepSpeed's launcher adds; refuse a second source of the DeepSpeed configuration."""
    kept, rest = [], iter(argv)
    for argument in rest:
        name, _, value = argument.partition("=")
        if name in ("--deepspeed_config", "--deepspeed-config"):
            raise ValueError(f"{name} is not taken: the recipe alone configures DeepSpeed")
        if name in ("--local_rank", "--local-rank"):
            if not value:
                next(rest, None)
        elif name != "--deepspeed":
            kept.append(argument)
    return kept


def options_of(arguments: list[str]) -> list[str]:
    """Dotted names of the options that stand on the command line."""
    return [argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")]


def tell_what_tiny_lowered(config: Config, given: dict[str, Any]) -> None:
    """--tiny true caps what the command line asks for as it caps the recipe: not without a word."""
    lowered = {name: config.option(name) for name in TINY if config.tiny and name in given}
    told = [f"{name} {cap} ({given[name]} was given)" for name, cap in lowered.items() if cap != given[name]]
    if told and is_main():
        print(f"{PROGRAM}: --tiny true makes it {', '.join(told)}", file=sys.stderr)


def recipes_of(arguments: list[str]) -> list[Path]:
    """The files that --config names, as far as they are there."""
    given = [value for name, value in zip(arguments, arguments[1:]) if name == "--config"]
    given += [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    return [path for path in map(Path, given) if path.is_file()]


def refuse_repeated_keys(recipe: Path) -> None:
    """Of a key that stands twice, yaml takes the last without a word."""
    with contextlib.suppress(yaml.YAMLError):  # told by the parser
        waiting = [("", yaml.compose(recipe.read_text(), yaml.SafeLoader))]
        while waiting:
            section, node = waiting.pop()
            lines: dict[str, int] = {}
            for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
                path, line = f"{section}{key.value}", key.start_mark.line + 1
                if path in lines:
                    raise ValueError(f"{recipe}: {path} is given twice, on lines {lines[path]} and {line}")
                lines[path] = line
                waiting.append((f"{path}.", value))


class Parser(ArgumentParser):
    """Errors are ValueErrors of one line, with the option that was probably meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        options = [option.lstrip("-") for option in self._option_string_actions]
        for path, section in optional_sections().items():
            options += [f"{path}.{name}" for name in vars(section())]
        raise ValueError(explain(message, options))

    def format_help(self) -> str:
        self.epilog = describe_optional_sections()  # here, because finding the explanations takes a second
        return super().format_help()


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of the text behind the options."""


def make_parser() -> Parser:
    """Every option from the dataclasses and their docstrings."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog=f"deepspeed engine/{PROGRAM}.py",
        description="Pretrain a vision-language model as a recipe describes it.",
        formatter_class=HelpFormatter,
        print_config=None,
    )
    parser.add_argument("--config", action="config", help="Recipe (yaml); options after it override it.")
    parser.add_argument("--print_config", action="store_true", help="Print the whole run as a recipe.")
    parser.add_class_arguments(Config)
    return parser


def describe_optional_sections() -> str:
    """jsonargparse lists no options of a section that may be null; this does."""
    lines = ["options inside sections that may be null, with their defaults where the section is given:"]
    for path, section in optional_sections().items():
        explanations = explained(section)
        for name, default in vars(section()).items():
            lines.append(f"  --{path}.{name}")
            lines += textwrap.wrap(f"{explanations[name]} (default: {default})", 78, **HANGING)
    return "\n".join(lines)


def explained(section: type) -> dict[str, str]:
    """What the docstrings say about the fields of a section, those of its base classes too."""
    options = [o for base in reversed(section.__mro__[:-1]) for o in docstring_parser.parse_from_object(base).params]
    return {option.arg_name: " ".join(option.description.split()) for option in options}


def unwrapped(text: str) -> str:
    """What is wrong, without jsonargparse's account of the types it tried."""
    inner = re.search(INSIDE_OPTIONAL_SECTION, text)
    if inner is None:
        return text
    section, mistake = inner.groups()
    return f"{section}.{mistake}" if section else mistake


def explain(message: str, options: list[str]) -> str:
    """One line out of jsonargparse's message."""
    text = " ".join(message.split())
    unknown = next(filter(None, (re.search(pattern, text) for pattern in UNKNOWN_OPTION)), None)
    if unknown:
        name = ".".join(part for part in unknown.groups() if part)
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
        return f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else "")
    if "unrecognized arguments: " in text:
        return f"{text}: an option takes one value; put a pattern such as shards/{{00..07}}.tar in quotes"
    text = unwrapped(text)
    text = re.sub(r"a <class '(\w+)'>", r"\1", text).replace("a typing.Literal", "one of ")
    return re.sub(r"^Parser key \"([\w.]+)\":", r"\1:", text).replace(": Expected", ": expected")
