"""The README's Python runs as it stands there."""

import pathlib
import re


def test_python_of_the_readme_runs() -> None:
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    exec("\n".join(blocks), names)
    assert len(blocks) == 2
    assert names["logits"].shape == (1, 9, 4096)
