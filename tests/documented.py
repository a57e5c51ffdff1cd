"""Commands and figures of the documentation, so that tests can hold it to its word."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]


def section(page, heading):
    """The text of docs/PAGE below a heading, down to the next one of its level or above."""
    text = (ROOT / "docs" / page).read_text()
    marks, _, _ = heading.partition(" ")
    start = text.index(f"\n{heading}\n") + len(heading) + 2
    following = re.search(rf"^#{{1,{len(marks)}}} ", text[start:], re.MULTILINE)
    return text[start : start + following.start()] if following else text[start:]


def blocks(text):
    """The ```sh blocks of a text, in order."""
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """The `mas` commands of a text's blocks, each as a list of words without `mas`."""
    lines = "".join(blocks(text)).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    assert all(words[0] == "mas" for words in found if words)
    return [words[1:] for words in found if words]


def table(text):
    """The rows of a text's only table, as dicts by its head."""
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    head, _, *body = rows
    return [dict(zip(head, row, strict=True)) for row in body]
