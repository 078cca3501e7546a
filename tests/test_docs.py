"""The documentation: commands and code are right, generated pages fresh, links whole."""

import ast
import functools
import json
import re
import sys
from pathlib import Path

import pytest

import check_docs
import run_notebook
import update_docs
from check_docs import Block, blocks_of, check_block, commands_of
from figures import render, write_figures
from helpers import error_of
from smca.errors import UserError, exit_code

ROOT = Path(__file__).resolve().parents[1]
PAGES = [path for pattern in check_docs.PAGES for path in sorted(ROOT.glob(pattern))]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_command_and_piece_of_python_in_the_documentation_is_right(capsys):
    assert check_docs.main([]) == 0, capsys.readouterr().err
    num_checked = int(re.search(r"(\d+) blocks and commands", capsys.readouterr().out).group(1))
    assert num_checked > 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python no_such.py --help", "no_such.py does not exist"),
        ("python train_net.py --config configs/smca_shapes.py --resum", "--resum"),
        ("python train_net.py --config-file configs/smca_shape.py", "smca_shape.py does not exist"),
        ("python train_net.py --config-file configs/smca_shapes.py train.max_itr=1", "max_iter"),
        ("python train_net.py --config-file configs/custom_coco.py", "data.train_json"),
        ("torchrun --nproc-per-node=2 train_net.py --config-file configs/gone.py", "gone.py"),
        ("sbatch tools/slurm_train.sh --config-file configs/gone.py", "gone.py"),
        ("python demo.py --weights FILE", "--input"),
        ("python tools/evaluate.py --output report", "--weights"),
        ("python benchmarks/benchmark.py matcher --repeats many", "many"),
        ("python tools/draw_official_log.py --size 3", "--size"),
        ("python tools/figures.py --size 3", "no options"),
        ("python -m pytest tests/test_gone.py", "test_gone.py does not exist"),
        ("smca-train --config-file configs/smca_shapes.py optimizer.rl=1", "optimizer.lr"),
        ("make tests", "no tests"),
        ("make setup EXTRA=all", "no EXTRA"),
        ('pip install -e ".[exports]"', "no extra exports"),
        ("trian_net.py --resume", "no program"),
        ("python demo.py --input 'a", "No closing quotation"),
    ],
)
def test_a_wrong_command_is_found(text, message):
    (problem,) = check_block(Block("page.md", 7, "", text))
    assert problem.startswith("page.md:7: ") and message in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "was never closed"),
        ("from smca import Predicter", "smca has no Predicter"),
        ("import smca.modell", "smca.modell cannot be imported"),
        ("from smca import model_zoo\nmodel_zoo.get_cfg('a')", "model_zoo has no get_cfg"),
        ("from smca import Predictor\nPredictor('a', weight='ema')", "no argument weight"),
        ("from smca import Predictor\nPredictor.from_files('a')", "Predictor has no from_files"),
        ("from .smca_r50_50ep import dataloaders", "has no dataloaders"),
    ],
)
def test_wrong_python_is_found(text, message):
    (problem,) = check_block(Block("page.md", 7, "python", text))
    assert message in problem


@pytest.mark.parametrize(
    "text",
    [
        "OMP_NUM_THREADS=1 pytest -n 2  # a comment",
        "python train_net.py --config-file CONFIG --resume",
        "python train_net.py --config-file configs/smca_shapes.py \\\n    train.max_iter=3",
        "make setup EXTRAS=all",
        'pip install -e ".[convert,report]"',
    ],
)
def test_right_commands_pass(text):
    assert check_block(Block("page.md", 1, "bash", text)) == []


def test_blocks_and_commands_in_the_text_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(check_docs, "ROOT", tmp_path)
    page = (
        "Run `make test` or `tools/draw.py\n--help`, not `train.seed`.\n\n"
        "<!-- run: train.seed=1 -->\n```\npython a.py \\\n  --b\n```\n\n"
        "```text\npython c.py\n```\n\n```python\nx = 1\n```\n\n    python d.py \\\n      --e\n"
    )
    (tmp_path / "page.md").write_text(page)
    blocks = list(blocks_of("page.md"))
    first, *_ = blocks
    assert first == Block("page.md", 5, "", "python a.py \\\n  --b", True, "train.seed=1")
    assert commands_of(first.text) == [["python", "a.py", "--b"]]
    found = {(block.language, block.text, block.is_run) for block in blocks[1:]}
    assert found == {
        ("text", "python c.py", False),
        ("python", "x = 1", False),
        ("", "make test", False),
        ("", "python d.py \\\n      --e", False),
        ("", "python tools/draw.py --help", False),
    }


def test_a_page_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_docs, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("```\nmake test\n")
    check = functools.partial(exit_code, check_docs.main)
    assert "page.md has a fence that is not closed" in error_of(capsys, check, "page.md")
    assert "The page gone.md does not exist" in error_of(capsys, check, "gone.md")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.decoder.betas", "no config has the key model.decoder.betas"),
        ("'train.amp.dtype=fp8'", "train.amp.dtype has to be bf16 or fp16"),
        ("train.accumulate=0", "train.accumulate has to be"),
    ],
)
def test_a_wrong_setting_in_the_text_is_found(tmp_path, monkeypatch, capsys, setting, message):
    page = "Right: `train.seed`, `model.encoder.kernel_size=5`, `train.seed=N`, `data.names=[a]`.\n"
    (tmp_path / "page.md").write_text(f"{page}Wrong: `{setting}`.\n")
    monkeypatch.setattr(check_docs, "ROOT", tmp_path)
    assert check_docs.main(["page.md"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("page.md:2: ") and message in line


def test_marked_blocks_run_and_failures_are_told(tmp_path):
    block = Block("page.md", 3, "python", "import sys; sys.exit('it failed')", True)
    (problem,) = check_docs.run_block(block, tmp_path)
    assert problem.startswith("page.md:3: ended with 1") and "it failed" in problem
    command = Block("page.md", 3, "", "python -c 'import sys; print(sys.argv)' a", True, "b c")
    assert check_docs.run_block(command, tmp_path) == []


def test_generated_pages_are_fresh(capsys):
    assert update_docs.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_page_is_named_and_written_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(update_docs, "ROOT", tmp_path)
    monkeypatch.setattr(update_docs, "pages", lambda: {"page.md": lambda: "new\n"})
    (tmp_path / "page.md").write_text("old\n")
    assert update_docs.main(["--check"]) == 1
    assert "page.md" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == "old\n"
    assert update_docs.main([]) == 0
    assert (tmp_path / "page.md").read_text() == "new\n"
    assert update_docs.main(["--check"]) == 0


def test_a_table_follows_the_results_of_the_study(tmp_path, monkeypatch):
    folder = tmp_path / "docs" / "convergence"
    folder.mkdir(parents=True)
    for study in ("shapes", "blood_cells"):
        runs = [
            {"name": name, "final": {"AP": ap, "AP50": ap50}}
            for name, ap, ap50 in [("A", 1.0, 3.0), ("B", 7.0, 8.26), ("A", 2.0, 5.0), ("C", 9, 9)]
        ]
        runs.append({"name": "A", "final": None})  # not finished
        report = {"comparisons": {"main": ["B", "A"]}, "runs": runs}
        (folder / f"{study}.json").write_text(json.dumps(report))
    published = [{"model": "X", "epochs": 5, "AP": [12.5], "config": "x"}]
    (tmp_path / "docs" / "published.json").write_text(json.dumps(published))
    page = "Before\n<!-- table: convergence -->\nold\n<!-- end -->\nafter\n"
    (tmp_path / "README.md").write_text("<!-- table: published -->\n\n<!-- end -->\n" + page)
    monkeypatch.setattr(update_docs, "ROOT", tmp_path)
    tables = {
        "published": update_docs.published_in_readme,
        "convergence": update_docs.convergence_in_readme,
    }
    monkeypatch.setattr(update_docs, "TABLES", {"README.md": tables})
    text = update_docs.pages()["README.md"]()
    assert "\n| X | 5 | 12.5 | | | | | | [`x`](configs/x.py) |\n<!-- end -->\nBefore\n<!--" in text
    assert text.endswith("\n<!-- end -->\nafter\n")
    assert "old" not in text and "| AP (AP50) | B | A |" in text
    assert text.count("| 7.0 (8.3) | 1.5 (4.0) |") == 2

    report["runs"] = [run for run in runs if run["name"] != "B"]
    (folder / "shapes.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="shapes.json has no finished training of B"):
        update_docs.pages()["README.md"]()


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Writes a page with a table of a file; checks and updates it."""
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(update_docs, "ROOT", tmp_path)
    monkeypatch.setattr(update_docs, "TABLES", {})
    monkeypatch.setattr(update_docs, "configuration_page", lambda: "page\n")
    (tmp_path / "docs" / "configuration.md").write_text("page\n")
    path = tmp_path / "docs" / "page.md"
    file = tmp_path / "docs" / "figures" / "speed.json"
    write_figures(str(file), "python tools/x.py", ["", "s", "MiB"], [["a", "1.5"], ["b", "2", "3"]])
    mark = "docs/figures/speed.json"
    path.write_text(f"Before\n\n<!-- table: {mark} -->\n<!-- end -->\n\nafter\n")
    return path


def test_a_measured_table_comes_from_its_file(page):
    assert update_docs.main(["--check"]) == 1
    assert update_docs.main([]) == 0
    table = "| | s | MiB |\n| --- | --- | --- |\n| a | 1.5 | |\n| b | 2 | 3 |\n"
    mark = "<!-- table: docs/figures/speed.json -->\n"
    assert page.read_text() == f"Before\n\n{mark}{table}<!-- end -->\n\nafter\n"
    assert update_docs.main(["--check"]) == 0


def test_a_number_that_was_changed_by_hand_is_found(page, capsys):
    update_docs.main([])
    right = page.read_text()
    page.write_text(right.replace("1.5", "1.2"))
    assert update_docs.main(["--check"]) == 1
    assert "docs/page.md" in capsys.readouterr().err
    update_docs.main([])
    assert page.read_text() == right


def test_a_mark_chooses_columns_in_its_order(page):
    page.write_text(page.read_text().replace("speed.json", "speed.json: MiB | "))
    update_docs.main([])
    assert "| MiB | |\n| --- | --- |\n| | a |\n| 3 | b |\n" in page.read_text()


@pytest.mark.parametrize(
    ("mark", "content", "message"),
    [
        ("none.json", None, "none.json cannot be read"),
        ("bad.json", "[", "is no JSON file"),
        ("bad.json", '{"columns": ["a"], "rows": []}', 'needs "columns", "rows" and "command"'),
        ("bad.json", '{"columns": ["a"], "rows": [["1", "2"]], "command": "x"}', "another length"),
        ("speed.json: hours", None, "no table with the columns hours"),
    ],
)
def test_a_mark_without_a_table_is_told(page, mark, content, message):
    if content is not None:
        (page.parent / "figures" / mark).write_text(content)
    page.write_text(page.read_text().replace("speed.json", mark))
    with pytest.raises(UserError, match=message) as error:
        update_docs.main(["--check"])
    assert str(error.value).startswith("docs/page.md: ")


def test_a_table_of_a_study_is_that_of_its_report():
    pytest.importorskip("pandas")
    report = json.loads((ROOT / "docs" / "convergence" / "shapes.json").read_text())
    finals = [run["final"]["AP"] for run in report["runs"] if run["name"] == "fixed spread"]
    table = render(ROOT, "docs/convergence/shapes.json", "spread", "run | AP")
    assert f"| fixed spread | {finals[0]:.1f} |" in table.splitlines()
    with pytest.raises(UserError, match="no comparison speed"):
        render(ROOT, "docs/convergence/shapes.json", "speed", None)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "figures").glob("*.json")), ids=lambda path: path.stem
)
def test_every_figure_has_a_command_that_is_right_and_a_page(path):
    content = json.loads(path.read_text())
    for words in commands_of(content["command"]):
        try:
            check_docs.check_command(words)
        except check_docs.Unchecked as error:
            pytest.skip(str(error))
    name = f"docs/figures/{path.name}"
    assert any(name in page.read_text() for page in PAGES)
    assert content["date"] and content["machine"]


def test_published_ap_stands_with_each_config_that_has_one(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    published = [{"model": "X", "epochs": 5, "AP": [12.5, 20], "config": "smca_r50_50ep"}]
    (tmp_path / "docs" / "published.json").write_text(json.dumps(published))
    rows = ["| `smca_r50_50ep.py` | the paper's | 1.0 |", "| `smca_r101_50ep.py` | more | 3.0 |"]
    rows.append("| `model.num_queries` | numbers |")
    (tmp_path / "page.md").write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(update_docs, "ROOT", tmp_path)
    expected = [rows[0].replace("1.0", "12.5"), rows[1].replace("3.0 ", ""), rows[2], ""]
    assert update_docs.with_published_ap("page.md") == "\n".join(expected)


def test_the_configuration_page_has_every_key_of_the_main_config():
    from smca import model_zoo

    page = (ROOT / "docs" / "configuration.md").read_text()

    def keys(node, prefix):
        for name, value in node.items():
            if name != "_target_":
                yield f"{prefix}.{name}"
                if hasattr(value, "items"):
                    yield from keys(value, f"{prefix}.{name}")

    config = model_zoo.get_config("smca_r50_50ep")
    for section in ("model", "dataloader", "optimizer"):
        for key in keys(config[section], section):
            assert f"| `{key}` |" in page
    for key in ("train.amp.dtype", "train.model_ema.decay", "data.train_json"):
        assert f"| `{key}` |" in page


def anchors(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text()), target


def texts_of_the_code():
    """Every text in the code, with ... where values are filled in, and what the Makefile prints."""
    for folder in ("projects", "tools"):
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


# The notebook


NOTEBOOKS = sorted(ROOT.glob("docs/*.ipynb"))


def cells(path):
    notebook = json.loads(path.read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


class Node(dict):
    """A dict whose keys are attributes, as nbformat's."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def texts_of(output):
    """What an output says: its text, and that of each of its types but pictures."""
    yield "".join(output.get("text", ""))
    for kind, content in output.get("data", {}).items():
        if not kind.startswith("image/"):
            yield "".join(content)


def test_a_notebook_is_there():
    assert [path.name for path in NOTEBOOKS] == ["tour.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_was_run_from_top_to_bottom_without_errors(path):
    assert [cell["execution_count"] for cell in cells(path)] == [*range(1, len(cells(path)) + 1)]
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_small_and_says_nothing_of_the_machine(path):
    assert path.stat().st_size < 1_000_000
    for cell in cells(path):
        for text in (text for output in cell["outputs"] for text in texts_of(output)):
            assert not re.search(r"(?<![\w.~/])/(?:home|root|tmp|work|usr|opt|Users)/", text), text
            assert "Warning" not in text and "Traceback" not in text


def test_a_wrong_cell_of_a_notebook_is_found():
    sources = ["x = (", "from smca import Predicter", "log = !python train_net.py \\\n    --resum"]
    sources.append("if True:\n    !python tools/gone.py")
    notebook = {"cells": [{"cell_type": "code", "source": [source]} for source in sources]}
    blocks = list(check_docs.cells_of("a.ipynb", notebook))
    problems = [problem for block in blocks for problem in check_block(block)]
    for number, words in enumerate(("never closed", "Predicter", "--resum", "gone.py"), 1):
        assert any(p.startswith(f"a.ipynb:{number}: ") and words in p for p in problems)
    assert len(problems) == 4


def test_what_is_no_notebook_is_named(tmp_path, monkeypatch, capsys):
    pytest.importorskip("nbclient")
    for text in ("# Title", "{}"):
        (tmp_path / "page.md").write_text(text)
        monkeypatch.setattr(sys, "argv", ["run_notebook.py", str(tmp_path / "page.md")])
        assert "page.md is no notebook." in error_of(capsys, lambda words: run_notebook.main())


@pytest.mark.parametrize("kind", ["DeadKernelError", "CellTimeoutError"])
def test_a_notebook_that_does_not_end_is_named(tmp_path, monkeypatch, capsys, kind):
    exceptions = pytest.importorskip("nbclient.exceptions")

    def execute(self):
        raise getattr(exceptions, kind)("Kernel died\nat once")

    path = tmp_path / "a.ipynb"
    path.write_text('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}')
    monkeypatch.setattr("nbclient.NotebookClient.execute", execute)
    monkeypatch.setattr(sys, "argv", ["run_notebook.py", str(path)])
    text = error_of(capsys, lambda words: run_notebook.main())
    assert text == f"Error: {path} did not end: Kernel died"


def test_outputs_are_joined_and_name_no_folder_of_the_machine():
    home = f"{Path.home()}/.cache/a.json and {ROOT}/docs in {ROOT}"
    first, second = ({"output_type": "stream", "name": "stdout", "text": t} for t in ("a", "b"))
    shown = {"output_type": "display_data", "data": {"text/plain": [home]}}
    assert run_notebook.joined([Node(first), Node(second), Node(shown)]) == [
        {**first, "text": "ab"},
        shown,
    ]
    assert run_notebook._portable(shown)["data"]["text/plain"] == ["~/.cache/a.json and docs in ."]
    printed = "a\r\n 0%|  | 0/2\r50%|# | 1/2\r100%|##| 2/2\r\n\x1b[32mb\x1b[0m\n"
    assert run_notebook._portable(printed) == "a\n100%|##| 2/2\nb\n"
