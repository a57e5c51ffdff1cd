"""Help of options that are fields of a config: the comments that stand beside the fields.

In: a jsonargparse parser whose options come from config dataclasses. Out: the same parser, whose
`--help` says of each field what the comment in the code says.
"""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from dataclasses import is_dataclass
from textwrap import dedent
from typing import Any


def explain_fields(parser: Any) -> None:
    """Gives the options below a dataclass the comments of its fields as their help."""
    comments: dict[str, str] = {}
    for action in parser._actions:
        config = getattr(action, "basetype", None)
        if isinstance(config, type) and is_dataclass(config):
            for part in filter(is_dataclass, reversed(config.__mro__)):
                found = field_comments(part).items()
                comments |= {f"{action.dest}.{name}": text for name, text in found}
    for action in parser._actions:
        if not action.help and action.dest in comments:
            action.help = comments[action.dest]


def field_comments(config: type) -> dict[str, str]:
    """The comment behind each field that a dataclass adds, else the lines of comment above it.

    Empty where a program was installed without its sources.
    """
    try:
        source = dedent(inspect.getsource(config))
    except OSError:
        return {}
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    alone = {i for i, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("#")}
    found = {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            text = [comments[i] for i in lines if i in comments]
            above = node.lineno - 1
            while not any(i in comments for i in lines) and above in alone:
                text.insert(0, comments[above])
                above -= 1
            found[node.target.id] = " ".join(text)
    return {name: text for name, text in found.items() if text}
