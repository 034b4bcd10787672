"""The command line: help fits a screen and shows an example, errors are one sentence, machines get JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparseling.cli import build_parser, main, parse

from .test_accounting import PUBLISHED

VERBS = ["run", "data", "recipe", "info", "merge", "convert", "chat", "serve", "eval", "report", "bench"]


def test_every_verb_has_help_that_fits_a_screen_and_shows_an_example(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    actions = build_parser()._subparsers._group_actions[0].choices
    assert sorted(actions) == sorted(VERBS)
    for arguments in [[], *([verb] for verb in VERBS)]:
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        assert len(text.splitlines()) <= 40, arguments
        assert "Example: sparseling" in text


def test_examples_in_the_help_parse() -> None:
    parser = build_parser()
    for sub in parser._subparsers._group_actions[0].choices.values():
        words = sub.epilog.removeprefix("Example: sparseling ").split()
        assert parser.parse_args(words).function


def test_a_question_may_stand_before_or_behind_the_options() -> None:
    for words in (["hi there", "--think"], ["--think", "hi there"], ["--think", "--seed", "3", "hi there"]):
        options = parse(build_parser(), ["chat", "runs/laptop", *words])
        assert options.prompt == "hi there" and options.think and options.model == "runs/laptop"
    assert parse(build_parser(), ["chat", "runs/laptop", "--think"]).prompt is None
    for wrong in (["chat", "m", "a", "b"], ["chat", "m", "a", "--thimk"], ["report", "m", "a"]):
        with pytest.raises(SystemExit):
            parse(build_parser(), wrong)


@pytest.mark.parametrize("name", PUBLISHED)
def test_info_json_prints_the_published_figures(name: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["info", name, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["parameters_total"], got["parameters_active"], got["parameters_active_non_embedding"]) == PUBLISHED[name][:3]
    assert got["flops_per_token"] > 0 and got["kv_bytes_per_token"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["info", "ling-mini"], 1, "ling-mini-2.0"),
        (["run", "missing.yaml"], 2, "missing.yaml"),
        (["recipe"], 2, "--keys"),
        (["merge", "nothere", "--out", "x"], 1, "nothere"),
        (["merge", "a", "b", "--out", "x", "--decay", "1,b"], 2, "--decay"),
        (["report", "nothere"], 2, "nothere"),
        (["chat", "nothere", "hi"], 1, "nothere"),
        (["eval", "nothere"], 1, "nothere"),
        (["convert", "nothere", "--out", "x"], 1, "nothere"),
        (["run", "recipes/laptop.yaml", "--until", "smt"], 2, "--until"),
        (["run", "recipes/laptop.yaml", "--runs", "/dev/null/x"], 1, "/dev/null"),
        (["chat", "nothere", "--threads", "0"], 2, "--threads"),
        (["eval", "nothere", "--problems", "none"], 2, "--problems"),
        (["info", "list.json"], 1, "list.json: is not a JSON object"),
        (["info", "yarn.json"], 1, "rope_scaling is 'yarn'"),
        (["info", "words.json"], 1, "hidden_size is 'wide'"),
    ],
)
def test_mistakes_are_one_sentence_without_a_traceback(arguments: list[str], code: int, says: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    arguments = [str(root / a) if a.startswith("recipes/") else a for a in arguments]
    for name, text in (("list", "[]"), ("yarn", '{"hidden_size": 64, "rope_scaling": "yarn"}'), ("words", '{"hidden_size": "wide"}')):
        (tmp_path / f"{name}.json").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "sparseling.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and says in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 or (code == 2 and lines[0].startswith("usage:"))
    assert not list(tmp_path.glob("x*"))


def test_starting_the_program_does_not_import_torch() -> None:
    code = "import sys; import sparseling.cli as c; c.build_parser(); assert 'torch' not in sys.modules and 'tokenizers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_recipe_verb_prints_a_recipe_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from sparseling.recipe import load_recipe

    file = Path(__file__).parents[1] / "recipes" / "ling-1t.yaml"
    assert main(["recipe", str(file)]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "again.yaml") == load_recipe(file)


def test_a_trillion_parameters_are_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = Path(__file__).parents[1] / "recipes" / "ling-1t.yaml"
    assert main(["run", str(file), "--runs", str(tmp_path / "runs")]) == 1
    assert "GiB" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
