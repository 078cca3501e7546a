"""The pages; conftest.py runs the code in them."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch

from helpers import ROOT
from smca import Predictor
from smca.cli import train


def texts_of_the_code():
    """Every text in the code, with ... where values are filled in, and what the Makefile prints."""
    for folder in ("projects", "tools", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield re.sub(r"%[sdg]", "...", node.value)
                elif isinstance(node, ast.JoinedStr):
                    yield "".join(getattr(part, "value", "...") if isinstance(part, ast.Constant)
                                  else "..." for part in node.values)  # fmt: skip
    yield (ROOT / "Makefile").read_text()


def test_messages_in_the_troubleshooting_page_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    messages = [
        message
        for row in rows
        if "(PyTorch's)" not in row
        for message in re.findall("`(.*?)`", row)
    ]
    texts = list(texts_of_the_code())

    def is_in_the_code(message):
        pieces = [piece.strip(" '\"") for piece in message.split("...") if piece.strip(" '\".:")]
        return any(all(piece in text for piece in pieces) for text in texts)

    assert len(messages) > 20
    assert [message for message in messages if not is_in_the_code(message)] == []


EXTEND = (ROOT / "docs" / "plug_in.md").read_text().partition("## The weight maps in another")[0]
HEAD, *SECTIONS = re.split(r"^## ", EXTEND, flags=re.MULTILINE)


@pytest.mark.parametrize("sections", [SECTIONS[:-1], SECTIONS[-1:]], ids=["parts", "data set"])
def test_a_config_with_sections_of_the_page_trains_and_detects(sections, in_workspace):
    def blocks(text):
        return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)

    modules, configs = zip(*map(blocks, sections))
    name = f"my_parts_{len(sections)}"  # a module is imported once
    Path(f"{name}.py").write_text("\n".join(modules))
    code = "\n".join(blocks(HEAD) + list(configs)).replace("my_parts", name)
    Path("my_config.py").write_text(code)
    settings = ["train.max_iter=1", "train.checkpointer.period=1"]
    settings.append(f"train.output_dir=output/{name}")
    if "del data" not in code:
        settings += [f"data.{split}_json={split}.json" for split in ("train", "val")]
        settings += [f"data.{split}_images=images" for split in ("train", "val")]
    assert train.main(["--config-file", "my_config.py", *settings]) == 0
    weights = f"output/{name}/model_final.pth"
    assert len(Predictor(weights)("photo.jpg", threshold=0)) > 0
    if "GridQueries" in code:  # can be exported for any number of images
        queries = sys.modules[name].GridQueries(2, 8)
        shapes = ([], {0: torch.export.Dim.DYNAMIC})
        torch.export.export(queries, ([], torch.zeros(3, 2)), dynamic_shapes=shapes)
