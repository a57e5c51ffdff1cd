"""The `mas` command: its table, its exit statuses, its one-line errors."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import mas.__main__ as cli


@dataclass(frozen=True, kw_only=True)
class Crop:
    short_side: int = 512  # pixels


def paint(
    caption: str | None = None,
    *,
    output: Path,
    vocab_size: int = 5,
    crop: Crop = Crop(),
    as_json: bool = False,
) -> int | None:
    """Paints a caption.

    Args:
        caption: what to paint.
        output: folder for the pictures.
        vocab_size: number of words.
        crop: how to crop.
        as_json: print JSON.
    """
    if caption == "nothing":
        raise ValueError("there is nothing\nto paint; say something")
    if caption == "disk":
        open(output / "missing" / "file")
    print(json.dumps([caption, str(output), vocab_size, crop.short_side, as_json]))
    return 3 if caption == "three" else None


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setattr(cli, "load", lambda name: paint)

    def run(*arguments):
        try:
            status = cli.main(["sample", *arguments])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_options_may_be_written_with_dashes_or_underscores(run):
    expected = ["a dog", "out", 7, 64, True]
    for option in ("vocab-size", "vocab_size"):
        status, out, _ = run(
            "a dog", "--output", "out", f"--{option}", "7", "--json", "--crop.short-side=64"
        )
        assert status == 0 and json.loads(out) == expected


@pytest.mark.parametrize("text", ["null", "~", "true", "5", "[a]", "a: b"])
def test_a_positional_text_stays_as_it_is(run, text):
    assert json.loads(run(text, "--output", "out")[1])[0] == text


def test_values_come_from_a_config_file_and_unknown_keys_are_refused(run, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("output: there\nvocab_size: 9\ncrop:\n  short_side: 32\njson: true\n")
    assert json.loads(run("--config", str(config))[1]) == [None, "there", 9, 32, True]
    config.write_text("output: there\nvocabulary: 9\n")
    status, _, err = run("--config", str(config))
    assert status == 2 and "vocabulary" in err


@pytest.mark.parametrize("option", ["--print_config", "--print-config"])
def test_print_config_can_be_read_back(run, tmp_path, option):
    status, out, _ = run("--output", "there", option)
    assert status == 0
    (tmp_path / "a.yaml").write_text(out)
    assert json.loads(run("--config", str(tmp_path / "a.yaml"))[1])[1] == "there"


@pytest.mark.parametrize("wrong", [["--output"], ["--size", "3"], ["--vocab-size", "many"], []])
def test_wrong_usage_exits_with_2(run, wrong):
    assert run(*wrong)[0] == 2


def test_user_errors_are_one_line_and_exit_with_1(run, tmp_path):
    status, out, err = run("nothing", "--output", "out")
    assert (status, out) == (1, "")
    assert err == "mas: error: there is nothing to paint; say something\n"
    status, _, err = run("disk", "--output", str(tmp_path))
    assert status == 1 and err.count("\n") == 1 and "missing" in err


def test_a_function_may_choose_its_exit_status(run):
    assert run("three", "--output", "out")[0] == 3


def test_help_explains_every_option(run):
    status, out, _ = run("--help")
    assert status == 0
    for words in ("Paints a caption", "what to paint", "folder for the pictures", "--vocab-size"):
        assert words in out


def test_the_overview_lists_every_command_and_all_of_them_exist(capsys):
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in overview
        assert callable(cli.load(name))


def test_unknown_commands_and_no_command_exit_with_2(capsys):
    assert cli.main(["paint"]) == 2
    assert "no command 'paint'" in capsys.readouterr().err
    assert cli.main([]) == 2


@pytest.mark.parametrize("words", [["bench"], ["bench", "--help"], ["bench", "memory"]])
def test_half_a_command_is_told_its_other_halves(words, capsys):
    assert cli.main(words) == 2
    known = "bench sample, bench preprocess, bench train, bench vqseg"
    assert capsys.readouterr().err == f"mas: error: no command 'bench'; there are {known}\n"


def test_a_missing_package_names_the_extra(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'ray'", name="ray")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert cli.main(["preprocess"]) == 1
    assert "mini-make-a-scene[preprocess]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (["preprocess"], "ray", "preprocess"),
        (["bench", "preprocess"], "ray", "preprocess"),
        (["bench", "train"], "pytorch_lightning", "train"),
    ],
)
def test_a_package_that_is_missed_on_the_way_names_the_extra(
    words, package, extra, monkeypatch, capsys
):
    def missing() -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(cli, "load", lambda name: missing)
    assert cli.main(words) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"mini-make-a-scene[{extra}]" in err


def test_a_stage_without_lightning_names_the_extra(monkeypatch, capsys):
    def missing(stage, arguments):
        raise ModuleNotFoundError("No module named …", name="pytorch_lightning")

    monkeypatch.setattr("train.runner.run", missing)
    assert cli.main(["train", "vqseg", "--help"]) == 1
    assert capsys.readouterr().err == (
        "mas: error: mas train needs the package 'pytorch_lightning': "
        "pip install 'mini-make-a-scene[train]'\n"
    )


@pytest.mark.parametrize("distribution", ["wooden-easel", None])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import easel.paper", "No module named 'easel.paper'"),
        ("from easel import paper", "cannot import name 'paper' from 'easel' (FILE)"),
    ],
)
def test_a_package_that_lacks_a_part_is_called_unfit_and_not_missing(
    line, reason, distribution, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "easel" / "__init__.py"
    file.parent.mkdir()
    file.touch()
    found = "easel"
    if distribution:
        about = tmp_path / "wooden_easel-1.4.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Name: {distribution}\nVersion: 1.4\n")
        (about / "top_level.txt").write_text("easel\n")
        found = "wooden-easel 1.4"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "easel", raising=False)
    monkeypatch.setattr(cli, "load", lambda name: lambda: exec(line))
    assert cli.main(["bench", "train"]) == 1
    assert capsys.readouterr().err == (
        f"mas: error: mas bench train does not fit the installed {found}: "
        f"{reason.replace('FILE', str(file))}; "
        f"pip install -U {distribution or 'easel'} 'mini-make-a-scene[train]'\n"
    )


def test_a_module_of_our_own_that_is_missing_is_no_matter_of_extras(monkeypatch):
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'preprocess.nothing'", name="preprocess.nothing")

    monkeypatch.setattr(cli, "load", lambda name: missing)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["preprocess"])


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["sample", "--help"], []])
def test_a_reader_that_has_gone_gets_no_traceback(words):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "mas", *words]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    result = subprocess.run(
        command, env=buffered, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, "")


def test_doctor_reports_the_installation(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["extras"][""]["torch"] and "ray" in report["extras"]["preprocess"]
    assert {"panoptic", "human", "face"} <= {weights["stage"] for weights in report["weights"]}
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "plain install: complete" in text
    assert f"fast step of int8 sampling: {report['machine']['fast_step']}" in text


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes packages look installed, by name and version, with what they require."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, version, *lines):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        about = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines]
        (folder / "METADATA").write_text("\n".join(about) + "\n")

    return install


def test_doctor_reports_what_is_older_than_asked_for(install, capsys):
    install(
        "mini-make-a-scene", "1", "Requires-Dist: seen>=2.9", "Requires-Dist: early[all]>=1.5",
        "Requires-Dist: of-other-pythons; python_version < '3'", "Provides-Extra: paint",
        "Requires-Dist: brush>=2.10; extra == 'paint'", "Requires-Dist: oil; extra == 'paint'",
        "Provides-Extra: all", "Requires-Dist: oil; extra == 'all'",
    )  # fmt: skip
    install("seen", "2.13.0+cpu")
    install("early", "1.6rc1")
    install("brush", "2.9")
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["extras"] == {
        "": {"seen": "2.13.0+cpu", "early": "1.6rc1"},
        "paint": {"brush": "2.9", "oil": None},
    }
    assert report["too_old"] == {"paint": {"brush": ">=2.10"}}
    assert cli.main(["doctor"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "plain install: complete" in lines
    start = lines.index("paint: missing oil; too old brush")
    assert lines[start + 1] == "  pip install 'mini-make-a-scene[paint]'"
    assert lines[start + 2].split() == ["brush", "2.9", "needs", ">=2.10"]


def test_doctor_reports_a_plain_install_that_is_too_old(install, capsys):
    install("mini-make-a-scene", "1", "Requires-Dist: seen>=2.9")
    install("seen", "2.1")
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "plain install: too old seen\n  pip install 'mini-make-a-scene'\n" in text


def test_doctor_reports_a_step_that_does_not_run_here(monkeypatch, capsys):
    monkeypatch.setenv("MAS_STEP", "abacus")
    assert cli.main(["doctor", "--json"]) == 0
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert machine["fast_step"].startswith("MAS_STEP=abacus: there is no such step here")


def test_doctor_works_where_the_package_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr("mas.doctor.DISTRIBUTION", "mas-from-a-folder")
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["extras"] == report["too_old"] == {} and report["machine"]["cores"]
    assert cli.main(["doctor"]) == 0
    assert "mas-from-a-folder runs without being installed" in capsys.readouterr().out


def test_a_benchmark_prints_one_json_object(monkeypatch, capsys):
    def bench(*, photos: int = 3) -> dict[str, int]:
        """Counts photos."""
        return {"photos": photos}

    monkeypatch.setattr(cli, "load", lambda name: bench)
    assert cli.main(["bench", "preprocess", "--photos", "5", "--json"]) == 0
    assert capsys.readouterr().out == '{"photos": 5}\n'
    assert cli.main(["bench", "preprocess"]) == 0
    assert json.loads(capsys.readouterr().out) == {"photos": 3}
