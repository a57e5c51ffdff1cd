"""`--help` explains what the fields of a config mean, in the words that stand beside them."""

from dataclasses import dataclass

import jsonargparse
import pytest

from mas.field_help import explain_fields, field_comments
from train import runner


@dataclass(frozen=True, kw_only=True)
class Base:
    """A config."""

    width: int = 4  # channels


@dataclass(frozen=True, kw_only=True)
class Sizes(Base):
    """A config that adds to another."""

    # Of the pixels,
    # 0 to 100 %.
    share: float = 0.5
    grid: int = 8  # tokens a side
    bare: int = 1

    def count(self) -> int:
        """Tokens."""
        grid: int = self.grid**2  # no field
        return grid


def make(sizes: Sizes = Sizes(), *, own: int = 1) -> None:
    """Makes something."""


def test_comments_stand_behind_a_field_or_above_it():
    assert field_comments(Sizes) == {"share": "Of the pixels, 0 to 100 %.", "grid": "tokens a side"}


def test_without_sources_there_are_options_without_words(monkeypatch):
    def no_source(thing):
        raise OSError("could not get source code")

    monkeypatch.setattr("inspect.getsource", no_source)
    parser = jsonargparse.ArgumentParser()
    parser.add_function_arguments(make)
    explain_fields(parser)
    assert "--sizes.width" in parser.format_help()


def test_options_below_a_config_get_its_comments_inherited_ones_too():
    parser = jsonargparse.ArgumentParser()
    parser.add_function_arguments(make)
    explain_fields(parser)
    words = " ".join(parser.format_help().split())
    for text in ("channels (type: int", "Of the pixels, 0 to 100 %. (type: float", "tokens a side"):
        assert text in words


@pytest.mark.parametrize("stage", runner.JOBS)
def test_every_option_of_a_training_is_explained(stage, monkeypatch, capsys):
    parsers = []
    monkeypatch.setattr(runner, "explain_fields", lambda p: parsers.append(p) or explain_fields(p))
    with pytest.raises(SystemExit):
        runner.run(stage, ["--help"])
    own = ("model.", "data.", "checkpoints.", "pictures.")
    bare = [a.dest for a in parsers[0]._actions if a.dest.startswith(own) and not a.help]
    assert bare == []
    assert "--model" in capsys.readouterr().out
