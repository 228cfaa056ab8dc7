"""Exports on disk: written whole or not at all, read with every check, and run by a process without hetmoe."""

import json
import re
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.export import fresh_process, load
from hetmoe.export.about import about_export
from hetmoe.export.check import compare_here, size_to_compare
from hetmoe.export.directory import write_export
from hetmoe.export.load import load_exported
from hetmoe.export.program import export_forward
from hetmoe.ops.dispatch import ANY_LOAD, choose_block_size
from tests.export.models import case
from tests.models.tiny import random_tokens, tiny_config


def write(directory, name, check=lambda _staged, _exported: None):
    chosen = case(name)
    exported = export_forward(chosen.model, platforms=["cpu"], **chosen.analog)
    parts = {part: chosen.analog.get(part) for part in ("plan", "spec", "programmed")}
    about = about_export(
        chosen.model, implementation=None, calibration=None, placement="partly" if chosen.analog else None, **parts
    )
    write_export(directory, exported, about=about, check=lambda staged: check(staged, exported))
    return exported


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "plain"
    return path, write(path, "plain")


@pytest.fixture
def copied(written, tmp_path):
    target = tmp_path / "copy"
    target.mkdir()
    for path in written[0].iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def change(directory, edit):
    path = directory / "export.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


def refuses(directory, *words, platform=None):
    with pytest.raises(InputError) as caught:
        load_exported(directory, platform)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_new_process_without_hetmoe_gives_the_same_logits(tmp_path):
    """A mixed model: experts at 2, 3 and 8 bits, experts on crossbars, and plain ones."""
    chosen, compared = case("mixed"), []

    def check(staged, exported):
        compared.append(compare_here(staged, exported, chosen.model, chosen.analog, None))
        assert not (staged / "export.json").exists()
        return {"largest_difference": compared[0].largest_difference}

    write(tmp_path / "mixed", "mixed", check)
    found = compared[0]
    assert (
        found.platform == "cpu" and found.tokens == [2, 64] and found.largest_difference <= 1e-5 * found.largest_logit
    )
    record = json.loads((tmp_path / "mixed" / "export.json").read_text())
    assert record["experts"]["up"] == {"3 bits": 3, "2 bits": 2, "8 bits": 2, "float32": 5}
    assert record["analog"]["plan"]["experts"] == [4, 12] and record["analog"]["plan"]["lm_head"] is None
    assert record["check"] == {"largest_difference": found.largest_difference}
    assert {"jax", "jaxlib", "hetmoe"} <= record["provenance"]["versions"].keys()


def test_the_documented_snippet_is_the_one_that_is_run():
    block = re.search(r"\n\n((?: {8}.*\n|\n)+)", load.load_exported.__doc__).group(1)
    assert textwrap.dedent(block).strip() == fresh_process.SNIPPET.replace("PLATFORM", "cpu").strip()


def test_loaded_exports_are_called_like_functions(written):
    path, exported = written
    loaded, chosen = load_exported(path), case("plain")
    tokens = np.asarray(random_tokens(chosen.model.config, 2, (2, 9)))
    np.testing.assert_allclose(loaded(tokens), chosen.logits(tokens), rtol=0, atol=1e-6)
    assert list(loaded.arguments) == list(exported.arguments)
    assert sorted(file.name for file in path.iterdir()) == [
        "arguments.safetensors", "export.json", "forward.cpu.jaxexport", "forward.cpu.mlir",
    ]  # fmt: skip
    assert (path / "forward.cpu.mlir").stat().st_size < 3e5  # weights are arguments
    for wrong, words in (
        (tokens[0], "[batch, seq]"),
        (tokens.astype(np.float32), "integer"),
        (tokens[:, :0], "non-empty"),
        (np.full((1, 2), 40), "id 40 is outside the vocabulary, 0 to 39"),
        (np.full((1, 2), -1), "id -1"),
        (np.zeros((1, 65), int), "at most 64"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            loaded(wrong)


def test_sixteen_bit_weights_keep_their_dtype(written, tmp_path):
    chosen = case("plain")
    params = chosen.model.params.replace(final_norm=chosen.model.params.final_norm.astype(jnp.bfloat16))
    exported = written[1]._replace(arguments=written[1].arguments | {"params/final_norm": params.final_norm})
    write_export(tmp_path / "out", exported, about={"model": {"vocab_size": 40}}, check=lambda _: None)
    refuses(tmp_path / "out", "takes other arguments")  # read back as bfloat16, which this program does not take


@pytest.mark.parametrize("name", ["export.json", "arguments.safetensors", "forward.cpu.jaxexport"])
def test_missing_files_are_named(copied, name):
    (copied / name).unlink()
    refuses(copied, name, "make one with" if name == "export.json" else "no such file")


@pytest.mark.parametrize("name", ["arguments.safetensors", "forward.cpu.jaxexport"])
def test_changed_files_are_refused(copied, name):
    content = (copied / name).read_bytes()
    for spoilt in (content[:-1] + bytes([content[-1] ^ 1]), content[:100], b""):
        (copied / name).write_bytes(spoilt)
        refuses(copied, str(copied / name), "the file was changed; export again")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda r: r.update(format="hetmoe-export-2"), ("hetmoe-export-2", "hetmoe-export-1")),
        (lambda r: r.update(calling_convention_version=99), ("99", "supports 9 to 10", "newer jax")),
        (lambda r: r.update(calling_convention_version=1), ("older jax",)),
        (lambda r: r.update(platforms=["tpu"]), ("exported for tpu, not for cpu", "--platform cpu")),
        (lambda r: r.update(arguments=r["arguments"][1:]), ("do not belong together",)),
        (lambda r: r["arguments"][0].update(shape=[1]), ("do not belong together", "params/embed")),
        (lambda r: r.update(arguments=None), ("arguments=None must be list",)),
        (lambda r: r["model"].pop("vocab_size"), ("vocab_size=None",)),
        (lambda r: r["tokens"].update(batch="x"), ("batch='x'",)),
        (lambda r: r["files"].clear(), ("lists None",)),
    ],
)
def test_other_records_are_refused(copied, edit, words):
    change(copied, edit)
    refuses(copied, *words)


@pytest.mark.parametrize("content", ["", "[]", "{", "3"])
def test_unreadable_records_are_refused(copied, content):
    (copied / "export.json").write_text(content)
    refuses(copied, "export.json")


def test_kernels_for_gpu_need_the_jaxlib_that_made_them(copied):
    def edit(record):
        record.update(implementation="pallas", platforms=["cuda"])
        record["provenance"]["versions"]["jaxlib"] = "0.0.1"

    change(copied, edit)
    refuses(copied, "made by jaxlib 0.0.1", platform="cuda")


def test_interrupted_writing_leaves_nothing(tmp_path):
    class Stop(BaseException):
        pass

    def stop(_staged, _exported):
        raise Stop

    with pytest.raises(Stop):
        write(tmp_path / "new", "plain", stop)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        write(tmp_path / "full", "plain")


def test_a_program_that_computes_something_else_is_not_kept(written, monkeypatch):
    chosen = case("plain")
    off = [1e-3]

    def other_logits(_staged, _platform, tokens):
        return np.asarray(chosen.logits(tokens)) + np.float32(off[0])

    monkeypatch.setattr("hetmoe.export.check.fresh_logits", other_logits)
    for off[0], words in ((1e-3, "more than rounding"), (np.nan, "NaN")):
        with pytest.raises(InputError, match=words):
            compare_here(written[0], written[1], chosen.model, {}, None)
    off[0] = 0.0
    assert compare_here(written[0], written[1], chosen.model, {}, None).largest_difference == 0


def test_processes_that_fail_say_why(written):
    with pytest.raises(InputError, match=r"does not run in a new process: FileNotFoundError: .*forward\.tpu"):
        fresh_process.fresh_logits(written[0], "tpu", np.zeros((1, 1), np.int32))


@pytest.mark.parametrize(("experts", "copies"), [(8, 2), (64, 8), (6, 4), (256, 8)])
@pytest.mark.parametrize("batch", [None, 3])
def test_comparisons_have_the_blocks_of_the_program(written, experts, copies, batch):
    config = tiny_config(num_experts=experts, experts_per_token=copies)
    rows, length = size_to_compare(written[1]._replace(tokens=(batch, None), most_length=512), config)
    assert length <= 512 and batch in (None, rows)
    assert choose_block_size(rows * length * copies, experts) == ANY_LOAD
