"""The stress test with few kills; docs/reliability.md has the figures of many."""

import re

import kill
from helpers import error_of
from smca.errors import UserError


def test_a_training_that_is_killed_again_and_again_ends_with_the_bits_of_an_unbroken_one(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("SMCA_CACHE", "")  # which the command changes
    overrides = ["train.max_iter=6", "train.eval_period=0"]
    assert kill.main(["--kills", "3", "--output-dir", str(tmp_path / "kill"), *overrides]) == 0
    output = capsys.readouterr().out
    assert "3 kills" in output
    # A process that ends before its kill begins another training.
    assert re.search(r"(\d+) of \1 trainings ended with the bits of the unbroken one", output)


def test_a_folder_that_it_did_not_make_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMCA_CACHE", "")
    (tmp_path / "work").write_text("mine")
    text = error_of(capsys, kill.main, "--output-dir", tmp_path)
    assert "would be removed" in text and (tmp_path / "work").read_text() == "mine"

    def fail(*args):
        raise UserError("it began")

    monkeypatch.setattr(kill, "Experiment", fail)
    for _ in range(2):  # over its own folder
        assert "it began" in error_of(capsys, kill.main, "--output-dir", tmp_path / "kill")
