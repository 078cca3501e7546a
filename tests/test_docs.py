"""The pages; conftest.py runs the code in them."""

import ast
import re

from helpers import ROOT


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
