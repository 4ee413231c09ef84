"""The README's tables are those of the committed results, and its example runs."""

import re
from pathlib import Path

from benchmarks import recipe_tables

README = Path(__file__).parents[2] / "README.md"


def test_tables_of_the_recipes_are_up_to_date():
    text = README.read_text()
    assert recipe_tables.filled(text) == text
    for name, file in recipe_tables.TABLES.items():
        assert (f"<!-- {name}:start -->" in text) == (recipe_tables.FOLDER / "results" / file).exists()


def test_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    found: dict = {}
    exec(code[1], found)
    assert found["half"].shape == (8, 10)
    assert type(found["plain"]).__name__ == "CifarResNet"
    assert (tmp_path / "net.safetensors").is_file()
