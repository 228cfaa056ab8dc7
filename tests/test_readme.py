"""The README's Python runs as it stands there."""

import pathlib
import re
from typing import Any

from hetmoe.sweep.config import read_config
from hetmoe.sweep.points import expand


def test_python_of_the_readme_runs() -> None:
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    assert len(blocks) == 7
    assert (names["rms"] > 0).all() and (names["tail"] > names["rms"]).all() and len(names["tail"]) == 5
    assert names["per_seed"].shape == (2, 1, 9, 4096) and (names["per_seed"][0] != names["per_seed"][1]).any()
    assert names["logits"].shape == (1, 9, 4096)


def test_the_sweep_of_the_readme_is_understood(tmp_path: pathlib.Path) -> None:
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "rules.toml"
    path.write_text(block)
    assert {p.placement for p in expand(read_config(path))} == {
        "all_digital", "experts_analog", "all_analog", "max_neuron_norm", "noise_sensitivity", "random",
    }  # fmt: skip
