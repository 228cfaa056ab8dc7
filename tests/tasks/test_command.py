"""Options of `hetmoe tasks` that are refused, and settings recorded, before lm-eval is needed."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from hetmoe import cli
from hetmoe.commands import tasks
from hetmoe.evaluate.noise_sweep import Placement
from hetmoe.placement.plan import experts_analog
from tests.tasks.tiny import tiny_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `hetmoe tasks reference -o OUT ARGUMENTS`: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(
            "sys.argv", ["hetmoe", "tasks", "reference", "-o", str(tmp_path / "out"), *map(str, arguments)]
        )
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def test_without_lm_eval_the_install_command_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hetmoe.commands.tasks.find_spec", lambda _: None)
    assert run() == (2, "", "hetmoe: hetmoe tasks needs lm-eval: pip install 'hetmoe[eval]'\n")


BAD = [
    (("--seeds", "0"), "--seeds 0 must be at least 1"),
    (("--limit", "0"), "--limit 0 must be at least 1"),
    (("--num-fewshot", "-1"), "--num-fewshot -1 must be at least 0"),
    (("--batch-tokens", "0"), "--batch-tokens 0 must be at least 1"),
    (("--plan", "p.json", "--digital", "0"), "give only one of --plan, --rule or --digital"),
    (("--placement", "all_analog", "--rule", "random"), "give only one of --placement, --rule or --digital"),
    (("--placement", "some"), "unknown placement 'some': use one of all_digital, experts_analog, all_analog"),
    (("--rule", "largest"), "unknown rule 'largest'"),
    (("--digital", "1.5"), "1.5 must be within"),
    (("--task", "piqa", "--task", "piqa"), "only once"),
    (("--device", "memristor"), "unknown device 'memristor'"),
    (("--noise-scale", "-1"), "noise_scale=-1.0 must be"),
    (("--input-range", "guess"), "method 'guess' is unknown"),
    (("--dtype", "int8"), "dtype 'int8' is unknown"),
    (("--data", "absent"), "--data absent: no such directory"),
    (("--json", "/"), "is a directory"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_bad_options(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("hetmoe.commands.tasks.find_spec", lambda _: "installed")
    code, out, err = run(*arguments)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not out and not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hetmoe.commands.tasks.find_spec", lambda _: "installed")
    (tmp_path / "out").write_text("mine")
    code, _, err = run()
    assert code == 2 and "is not a directory" in err


def test_settings_of_a_folder_record_the_implementation(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of different kernels are never kept in one folder, whose settings must be the same."""
    requests: list[tasks.TasksRequest] = []
    monkeypatch.setattr(tasks, "run", requests.append)
    run()
    run("--implementation", "interpret_tpu")
    monkeypatch.setattr(tasks, "metadata", SimpleNamespace(version=lambda package: f"version of {package}"))
    model = tiny_model()
    placement = Placement(name="experts analog", plans=[experts_analog(model.config)])
    plain, kernel = (tasks._settings(request, model, placement, []) for request in requests)
    assert (plain["implementation"], kernel["implementation"]) == ("xla", "interpret_tpu")
    assert plain | {"implementation": "interpret_tpu"} == kernel
    assert plain["lm_eval"] == "version of lm_eval"
