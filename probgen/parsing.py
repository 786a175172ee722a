"""From the words of a command line to values, by jsonargparse; a mistake is one sentence.

An option is a parameter of a function: its annotation says what it takes, the function's docstring what it is
for. Only plain values can be typed: no option builds a class that is named in a word or in a file.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from probgen.errors import ProbgenError, did_you_mean
from probgen.options import Option, wanted

_PLAIN = (int, float, bool, str, type(None), Any, dict, tuple, list)


class CommandLine:
    """The options of one command: told to `--help`, read from words."""

    def __init__(self, prog: str, description: str) -> None:
        from jsonargparse import ArgumentParser

        self.name = prog.removeprefix("probgen ")
        self.annotations: dict[str, Any] = {}
        self._of_model: dict[str, str] = {}  # what an option of the model is called here -> its own name
        self._groups: dict[str, Any] = {}
        self._parser = ArgumentParser(
            prog=prog,
            usage=f"{prog} [OPTIONS]",
            description=description,
            formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=30, width=100),
            exit_on_error=False,
            print_config=None,
        )

    def add(self, flags: str, annotation: Any, text: str, group: str = "options") -> None:
        """Add an option (`"-n --number"`); one that is not given is left out of what `parse` returns."""
        told = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        action = self._group(group).add_argument(*flags.split(), type=annotation, **told)
        action.metavar = "" if annotation is bool else _metavar(annotation)
        self.annotations |= dict.fromkeys(flags.split(), annotation)

    def _group(self, title: str) -> Any:
        if title == "options":
            return self._parser
        if title not in self._groups:
            self._groups[title] = self._parser.add_argument_group(title)
        return self._groups[title]

    def add_config(self) -> None:
        """Add `--config FILE`, a YAML file of plain values by option name; what is typed goes before it."""
        self._parser.add_argument("--config", action="config", metavar="FILE", help="a YAML file of options")
        self.annotations["--config"] = str

    def add_options(self, title: str, options: Iterable[Option], help_of: Mapping[str, str]) -> None:
        """Add those of a function's options that can be typed; a name taken already gets `model.` in front."""
        for option in options:
            if not _speakable(option.annotation):
                continue
            flag = f"--{option.name}"
            flag = f"--model.{option.name}" if flag in self.annotations else flag
            default = "required" if option.required else f"default: {_shown(option.default)}"
            said = help_of.get(option.name, "").rstrip(". ")
            self.add(flag, option.annotation, f"{said} ({default})".strip(), title)
            self._of_model[flag[2:]] = option.name

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """The options given, by name; those of the model in a mapping of their own, under `"model"`."""
        words = self._spelled_out(argv)
        try:
            found = vars(self._parser.parse_args(words).as_flat())
        except (argparse.ArgumentError, TypeError, ValueError) as error:
            raise ProbgenError(self._sentence(error, words)) from error
        given = {n: v for n, v in found.items() if n != "config" and n not in self._of_model}
        return given | {"model": {self._of_model[n]: v for n, v in found.items() if n in self._of_model}}

    def _spelled_out(self, argv: Sequence[str]) -> list[str]:
        """`argv` as jsonargparse reads it.

        `--z-dim` means `--z_dim`, a flag alone is true, `--hidden 64,64` is a tuple; `--config` goes first,
        so that the command line wins. An option that there is not is refused here, with the nearest name.
        """
        first, rest, words = [], [], list(argv)
        while words:
            word = words.pop(0)
            if not _is_option(word):
                raise ProbgenError(f"{self.name} does not know what to do with {word!r}")
            flag, equals, value = word.partition("=")
            flag = self._known(flag)
            if flag == "--help":
                return ["--help"]
            if not equals:
                value = self._value_of(flag, words)
            (first if flag == "--config" else rest).extend([flag, _as_yaml(value, self.annotations[flag])])
        return first + rest

    def _known(self, flag: str) -> str:
        if flag in ("-h", "--help"):
            return "--help"
        name = flag.lstrip("-").replace("-", "_")
        for spelling in (flag, f"--{name}", "--" + name.replace("_", "-"), f"--model.{name}"):
            if spelling in self.annotations:
                return spelling
        known = [each for each in self.annotations if each.startswith("--")]
        raise ProbgenError(f"{self.name} has no option {flag}{did_you_mean(f'--{name}', known)}")

    def _value_of(self, flag: str, words: list[str]) -> str:
        """Take the option's value off the words that follow it."""
        annotation = self.annotations[flag]
        if annotation is bool and not (words and words[0].lower() in ("true", "false")):
            return "true"
        if not words or (_is_option(words[0]) and words[0].partition("=")[0] in self.annotations):
            raise ProbgenError(f"{self.name}: {flag} wants {wanted(annotation)}")
        return words.pop(0)

    def _sentence(self, error: Exception, words: Sequence[str]) -> str:
        """jsonargparse's complaint, in our words where it is about an option that we know."""
        text = str(getattr(error, "message", None) or error)
        key = re.search(r"[Kk]ey \"([\w.-]+)\"", text)
        flag = f"--{key.group(1)}" if key else ""
        if flag in self.annotations and flag != "--config":
            got = re.search(r"Got value: (.*)", text)
            value = words[words.index(flag) + 1] if flag in words else got.group(1) if got else "that"
            return f"{self.name}: {flag} must be {wanted(self.annotations[flag])}, not {value!r}"
        said = " ".join(text.split())
        unknown = re.search(r"Option '([\w.-]+)' is not accepted", said)
        if unknown and "--config" in words:
            known = [each[2:] for each in self.annotations if each.startswith("--")]
            name = unknown.group(1)
            file = words[words.index("--config") + 1]
            return f"{file}: {self.name} has no option {name!r}{did_you_mean(name, known)}"
        if "--config" in words and "config" in said:
            return f"{words[words.index('--config') + 1]} is not a YAML file of options: {said}"
        return f"{self.name}: {said}"


def help_of(function: Callable[..., Any] | None) -> dict[str, str]:
    """What a function's docstring says of each parameter."""
    doc = inspect.getdoc(function) if function is not None else None
    if not doc:
        return {}
    from docstring_parser import ParseError, parse

    try:
        return {p.arg_name: " ".join((p.description or "").split()) for p in parse(doc).params}
    except ParseError:
        return {}


def _shown(default: Any) -> str:
    if isinstance(default, tuple | list):
        return ",".join(str(value) for value in default)
    return "none" if default is None else str(default)


def _metavar(annotation: Any) -> str:
    """What stands for an option's value in the help: INT, FLOAT, a|b|c, ..."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(str(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return "|".join(dict.fromkeys(_metavar(arg) for arg in args))
    if (origin or annotation) in (tuple, list):
        return f"{_metavar(args[0]) if args else 'A'},..."
    words = {int: "INT", float: "FLOAT", bool: "true|false", str: "TEXT", dict: "{...}", type(None): "null"}
    return words.get(annotation, "VALUE")


def _speakable(annotation: Any) -> bool:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal or annotation is Ellipsis:
        return True
    if origin in (typing.Union, types.UnionType, tuple, list, dict):
        return all(_speakable(arg) for arg in args)
    return annotation in _PLAIN


def _is_option(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _as_yaml(value: str, annotation: Any) -> str:
    """`None` and, where many values are wanted, `64,64` and `(64, 64)`, as YAML writes what they mean."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if is_union else (annotation,)
    if value in ("None", "null") and type(None) in kinds:
        return "null"
    if not any((typing.get_origin(kind) or kind) in (tuple, list) for kind in kinds):
        return value
    return "[" + value.strip().strip("[]()").rstrip(", ") + "]"


# Values that are named: losses, schedules


def called(text: str, names: Mapping[str, Any], what: str) -> Any:
    """What `"IWAE"` or `"IWAE(num_particles=5)"` says: one of `names`, called with plain or such values.

    The text is parsed, never evaluated; case does not matter.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise ProbgenError(f"{what} {text!r} does not parse: write NAME or NAME(argument=value)") from None
    value = _value(node, {name.lower(): name for name in names}, names, what)
    return _made(value, [], {}, f"{what} {text!r}") if isinstance(value, type) else value


def _value(node: ast.expr, spelled: Mapping[str, str], names: Mapping[str, Any], what: str) -> Any:
    if isinstance(node, ast.Name):
        if node.id.lower() not in spelled:
            raise ProbgenError(f"there is no {what} {node.id!r}{did_you_mean(node.id.lower(), spelled)}")
        return names[spelled[node.id.lower()]]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        function = _value(node.func, spelled, names, what)
        args = [_value(arg, spelled, names, what) for arg in node.args]
        keywords = {str(k.arg): _value(k.value, spelled, names, what) for k in node.keywords}
        return _made(function, args, keywords, f"{what} {ast.unparse(node)!r}")
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ProbgenError(f"{what}: {ast.unparse(node)!r} is neither a name nor a plain value") from None


def _made(function: Any, args: list, keywords: dict, what: str) -> Any:
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **keywords)
    except TypeError as error:
        takes = ", ".join(str(parameter).partition(":")[0] for parameter in signature.parameters.values())
        raise ProbgenError(f"{what}: {error}; it takes {function.__name__}({takes})") from None
    try:
        return function(*args, **keywords)
    except (TypeError, ValueError) as error:
        raise ProbgenError(f"{what}: {error}") from error
