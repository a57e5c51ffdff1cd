"""The `mas` command: one table, from a command's name to the function that does it.

Functions are imported only when their command runs, so `mas --help` is quick and a machine that
only samples needs neither Ray nor Lightning. Arguments come from the function's signature and
docstring (jsonargparse): typed, `--config FILE.yaml`, `--print-config`, unknown keys refused.
Exit status: 0 done, 1 failed, 2 usage. MAS_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args, get_origin

import mas
from mas.field_help import explain_fields


class Command(NamedTuple):
    """Where a command's function lives and which extra brings what it imports."""

    function: str  # module:function
    summary: str
    extra: str = ""  # extra of setup.py, empty for the plain install


COMMANDS = {
    "park": Command("preprocess.park:park", "write the park world as annotated image-text shards"),
    "preprocess": Command(
        "preprocess.run:preprocess", "photos and captions → photos with scene maps", "preprocess"
    ),
    "preprocess-status": Command(
        "preprocess.status:preprocess_status", "how far a preprocessing run is", "preprocess"
    ),
    "inspect": Command(
        "preprocess.inspect:inspect", "contact sheet and class histogram of shards", "preprocess"
    ),
    "fetch-weights": Command(
        "preprocess.weights:fetch_weights", "download what the configs name, checked", "preprocess"
    ),
    "fit-bpe": Command("train.bpe:fit_bpe", "fit the text tokenizer on captions"),
    "train": Command(
        "train.cli:train",
        "train vqseg, vqgan, gpt, reader, judge or refiner with Lightning",
        "train",
    ),
    "tokenize": Command("preprocess.tokens:tokenize", "scene shards → token shards", "preprocess"),
    "import-vqgan": Command(
        "mas.pretrained:import_vqgan", "convert a published VQ-GAN checkpoint to a vqgan folder"
    ),
    "assemble": Command("train.assemble:assemble", "tokenizers + GPT → one model folder"),
    "sample": Command("mas.sample:sample", "caption (+ scene) → pictures"),
    "studio": Command(
        "mas.studio:studio", "draw scenes in the browser, watch them become pictures", "studio"
    ),
    "evaluate": Command(
        "mas.evaluate:evaluate", "obedience to captions and scenes, picture quality", "eval"
    ),
    "bench sample": Command(
        "mas.bench_sample:bench_sample", "tokens per second, against the memory's speed"
    ),
    "bench preprocess": Command(
        "preprocess.bench:bench_preprocess",
        "photos per second, against what limits them",
        "preprocess",
    ),
    "bench train": Command(
        "train.bench:bench_train", "tokens per second of the GPT's training", "train"
    ),
    "bench vqseg": Command(
        "mas.bench_vqseg:bench_vqseg", "maps per second and memory of both VQ-SEG layouts"
    ),
    "doctor": Command("mas.doctor:doctor", "what is installed, what is missing"),
}
OWN_PARSER = {"train"}  # LightningCLI parses these itself
TYPES = {  # how wrong usage calls them
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "dict": "of the form '{name: value}'",
    "NoneType": "",
}
EMPTY_PATH = "empty, name a file or folder"  # Path("") would be the current folder
FLAGS = {"json": "as_json"}  # option -> parameter, where Python's name for it is taken


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status."""
    logging.basicConfig(level=logging.WARNING, format="mas: %(levelname)s: %(message)s")
    for package in ("mas", "preprocess", "train"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        try:
            return dispatch(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()  # here a reader that has gone can still be answered
    except KeyboardInterrupt:
        print("mas: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone
        return 1
    except (ValueError, OSError) as error:
        if os.environ.get("MAS_DEBUG"):
            raise
        print(f"mas: error: {_one_line(error)}", file=sys.stderr)
        return 1


def dispatch(words: list[str]) -> int:
    """Runs the command that the words begin with; a missing package names the extra to install."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"mini-make-a-scene {mas.__version__}")
        return 0
    length = 2 if " ".join(words[:2]) in COMMANDS else 1
    name, rest = " ".join(words[:length]), words[length:]
    if name not in COMMANDS:
        longer = ", ".join(known for known in COMMANDS if known.startswith(f"{name} "))
        mend = f"there are {longer}" if longer else "see mas --help"
        print(f"mas: error: no command {name!r}; {mend}", file=sys.stderr)
        return 2
    try:
        return run(name, rest)
    except ImportError as error:  # now, or where a stage first needs it
        package, extra = (error.name or "").split(".")[0], COMMANDS[name].extra
        if not extra or package in ("", "mas", "preprocess", "train"):
            raise
        raise OSError(f"mas {name} {_package_mend(error, package, extra)}") from error


def _package_mend(error: ImportError, package: str, extra: str) -> str:
    """What to say of a package that is missing, or lacks what a command imports from it."""
    wanted = f"'mini-make-a-scene[{extra}]'"
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return f"needs the package {package!r}: pip install {wanted}"
    import importlib.metadata

    found = importlib.metadata.packages_distributions().get(package, [""])[0]
    present = f"{found} {importlib.metadata.version(found)}" if found else package
    mend = f"pip install -U {found or package} {wanted}"
    return f"does not fit the installed {present}: {error}; {mend}"


def run(name: str, arguments: list[str]) -> int:
    """Parses `arguments` for the command and calls its function."""
    function = load(name)
    if name in OWN_PARSER:
        return function(arguments) or 0
    parser = build_parser(name, function)
    # With "=" jsonargparse reads an option that may have a value; only its own spelling needs none.
    words = [f"{word}=" if word == "--print-config" else word for word in arguments]
    values = parser.instantiate(parser.parse_args(words))
    options = options_of(function)
    parameters = inspect.signature(options).parameters
    given = {FLAGS.get(k, k): v for k, v in values.as_dict().items()}
    if "config" not in parameters:
        given.pop("config", None)
    if options is not function:
        return function(options(**given)) or 0
    positional = [given.pop(k, p.default) for k, p in parameters.items() if _is_positional(p)]
    if not name.startswith("bench "):
        return function(*positional, **given) or 0
    print_figures(function, positional, given)
    return 0


def print_figures(
    function: Callable[..., Any], positional: list[Any], options: dict[str, Any]
) -> None:
    """Prints what a benchmark returns: one JSON object, on one line with `--json`."""
    import json

    indent = None if options.pop("as_json") else 2
    print(json.dumps(function(*positional, **options), indent=indent))


def load(name: str) -> Callable[..., int | None]:
    """The function behind a command."""
    module, _, attribute = COMMANDS[name].function.partition(":")
    return getattr(importlib.import_module(module), attribute)


def options_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a command's options are the parameters of: its function, or the config that it takes."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    kinds = [parameter.annotation for parameter in parameters]
    takes_config = len(kinds) == 1 and isinstance(kinds[0], type) and is_dataclass(kinds[0])
    return kinds[0] if takes_config else function


def build_parser(name: str, function: Callable[..., Any]) -> Any:
    """A jsonargparse parser for a command: positionals first, everything else as options."""
    import docstring_parser
    import jsonargparse

    jsonargparse.typing.register_type(Path, str, _named_path, type_check=isinstance)
    source = options_of(function)
    documentation = docstring_parser.parse(inspect.getdoc(source) or "")

    class Parser(jsonargparse.ArgumentParser):
        """Answers wrong usage with one line."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            words = plain_words(message, options=self._option_string_actions)
            print(f"mas {name}: error: {words} (see mas {name} --help)", file=sys.stderr)
            raise SystemExit(2)

    parser = Parser(
        prog=f"mas {name}",
        description=documentation.short_description,
        default_env=False,
    )
    if "config" not in inspect.signature(source).parameters:
        parser.add_argument(
            "--config", action="config", help="YAML file with values for the options"
        )
    helps = {p.arg_name: p.description for p in documentation.params}
    special: set[str | int] = set()
    for key, parameter in inspect.signature(source, eval_str=True).parameters.items():
        if _is_positional(parameter):
            optional = parameter.default is not inspect.Parameter.empty
            # Suppressed, or its absence would undo what --config says.
            extra: Any = {"nargs": "?", "default": argparse.SUPPRESS} if optional else {}
            # A text that is not there is left out, so "null" is a word like any other.
            kind = str if parameter.annotation == str | None else parameter.annotation
            parser.add_argument(key, type=kind, help=helps.get(key), **extra)
        elif parameter.annotation is bool and parameter.default is False:
            option = next((o for o, name in FLAGS.items() if name == key), key)
            parser.add_argument(f"--{option}", action="store_true", help=helps.get(key))
        elif item := _item_type(parameter.annotation):
            parser.add_argument(
                f"--{key}", type=item, nargs="+", default=parameter.default, help=helps.get(key)
            )
        else:
            continue
        special.add(key)
    add = parser.add_function_arguments if source is function else parser.add_class_arguments
    add(source, as_group=False, as_positional=False, skip=special, fail_untyped=True)
    if name.startswith("bench "):
        parser.add_argument("--json", action="store_true", help="print the object on one line")
    explain_fields(parser)
    _add_dashed_options(parser)
    return parser


def _named_path(text: str) -> Path:
    """The path that an option names; ValueError where it names none."""
    if text == "":
        raise ValueError(EMPTY_PATH)
    return Path(text)


def _add_dashed_options(parser: Any) -> None:
    """Lets every `--two_words` be written `--two-words` too, as shells are used to."""
    for action in parser._actions:
        for option in list(action.option_strings):
            dashed = option.replace("_", "-")
            if option.startswith("--") and dashed not in parser._option_string_actions:
                action.option_strings.insert(0, dashed)
                parser._option_string_actions[dashed] = action


def plain_words(message: str, *, options: Container[str]) -> str:
    """What jsonargparse says about wrong usage, as the person who typed it would say it.

    Args:
        message: of the parser; one of an unknown form comes back as one line.
        options: all option strings of the parser, to tell `--output` from a positional.
    """

    def written(key: str) -> str:
        option = f"--{key.replace('_', '-')}"
        return option if option in options else key

    message = " ".join(message.split())
    if lacking := re.fullmatch(r"the following arguments are required: (.+)", message):
        return f"{', '.join(map(written, lacking[1].split(', ')))} must be given"
    about = re.fullmatch(r'Parser key "(.+?)": (.+)', message)
    if not about:
        return message
    option, reason = written(about[1]), about[2]
    if EMPTY_PATH in reason:
        return f"{option}: {EMPTY_PATH}"
    reason = re.sub(r"NestedArg\(key='(.+?)', val='(.*?)'\)", r"\1=\2", reason)
    value = re.search(r".*(?:Got|Given) value: (.*)$", reason)
    found = re.findall(r"<class '(\w+)'>|Literal\[(.+?)\]", reason.partition("Given value")[0])
    words = [f"one of {choices}" if choices else TYPES.get(kind) for kind, choices in found]
    if not value or not words or None in words:
        return f"{option}: {reason}"
    wanted = " or ".join(dict.fromkeys(filter(None, words)))
    return f"{option}: {value[1]!r} is not {wanted}"


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mas COMMAND [options]      (mas COMMAND --help explains each)",
            "",
            *lines,
            "",
            "exit status: 0 done, 1 failed, 2 usage; MAS_DEBUG=1 shows tracebacks",
        ]
    )


def _item_type(annotation: Any) -> Any:
    """X of an optional `list[X]`, whose option takes several words; None of anything else."""
    for choice in get_args(annotation):
        if get_origin(choice) is list:
            return get_args(choice)[0]
    return None


def _is_positional(parameter: inspect.Parameter) -> bool:
    return parameter.kind is not inspect.Parameter.KEYWORD_ONLY


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
