"""The benchmark tool: what it measures, writes and compares. No test says how fast anything is."""

import json
import os
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import instantiate
from fvcore.nn import FlopCountAnalysis
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmark as tool
import benchmark_cases as cases
from analyze_model import analyze, analyze_training, attention_flops
from helpers import ROOT, assert_same_gradients, child_environment, leaves, write_smca_config
from smca.config import load_config
from smca.errors import ConfigError, UserError

FIELDS = {"name", "config", "size", "overrides", "dtype", "compiled", "device", "threads", "torch"}
FIELDS |= {"median_s", "times_s", "peak_bytes", "extra_bytes"}
SPEED_FIELDS = {"gflops", "matmul_gflops", "share"}
TINY = ["--cells", "4", "6", "--num-queries", "5", "--image-size", "64", "96"]
TINY += ["--train-size", "64", "96", "--repeats", "3", "--warmup", "1"]


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Runs the tool in this process on a tiny config, gives its records."""
    monkeypatch.setattr(tool, "in_fresh_process", lambda f, *args, **kwargs: f(*args, **kwargs))
    monkeypatch.setattr(tool, "matmul_gflops", lambda options: 100.0)
    config = write_smca_config(tmp_path)

    def run(*words):
        output = tmp_path / "output.json"
        tool.main([*words, "--config", config, "--output", str(output), *TINY])
        return json.loads(output.read_text())["records"]

    return run


# ---- Measurements


@pytest.mark.parametrize(
    "words, count",
    [
        (["co_attention"], 4),
        (["co_attention", "--dtype", "bf16"], 4),
        (["co_attention_scaling"], 12),
        (["encoder"], 1),
        (["matcher"], 1),
        (["criterion"], 1),
        (["inference"], 1),
        (["inference", "--dtype", "bf16"], 1),
        (["train_step"], 1),
        (["train_step", "--dtype", "bf16"], 1),
        (["train_mapper"], 1),
    ],
)
def test_each_measurement_gives_its_records(measure, words, count):
    records = measure(*words)
    assert len(records) == count
    for record in records:
        has_speed = words[0] in ("inference", "train_step")
        assert set(record) == FIELDS | (SPEED_FIELDS if has_speed else set())
        assert len(record["times_s"]) == 3 and min(record["times_s"]) > 0
        assert record["median_s"] == statistics.median(record["times_s"])
        assert record["peak_bytes"] > record["extra_bytes"] >= 0
        assert record["dtype"] == ("bf16" if "bf16" in words else "float32")


def test_speed_is_two_operations_for_each_multiply_add(measure, tmp_path):
    (record,) = measure("inference", "model.num_queries=3")
    cfg = load_config(str(tmp_path / "tiny_smca.py"), ["model.num_queries=3"])
    # PyTorch's counter counts convolutions and matrix products, ours norms as well.
    model, image = instantiate(cfg.model).eval(), torch.zeros(3, 64, 96, dtype=torch.uint8)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model([{"image": image}])
    counted = counter.get_total_flops()
    operations = 2 * analyze(cfg, 64, 96)[2]
    assert counted < operations < 1.02 * counted
    assert record["overrides"] == ["model.num_queries=3"]
    assert record["gflops"] == pytest.approx(operations / record["median_s"] / 1e9)
    assert record["share"] == pytest.approx(record["gflops"] / 100)


def test_work_of_a_training_step_is_that_of_forward_and_backward(tmp_path):
    config = write_smca_config(tmp_path)
    overrides = ["model.dropout=0.0", "model.backbone.width=64"]
    options = SimpleNamespace(batch_size=2, overrides=overrides)
    operations = 2 * cases.training_multiply_adds(options, config, (64, 96))
    model = instantiate(load_config(config, overrides).model).train()
    batch = cases.random_batch(2, (64, 96), num_classes=3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(model(batch).values()).backward()
    # Norms count here, and the first layers' gradients of their inputs, which nobody needs.
    assert counter.get_total_flops() < operations < 1.1 * counter.get_total_flops()


def test_frozen_stages_have_no_backward_pass(tmp_path):
    cfg = load_config(write_smca_config(tmp_path))
    forward = analyze(cfg, 64, 96)[2]
    whole = analyze_training(cfg, 64, 96)
    cfg.model.backbone.freeze_at = 5
    frozen = analyze_training(cfg, 64, 96)
    assert forward < frozen < whole <= 3 * forward


@pytest.mark.parametrize(
    ("operator", "group"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("aten::addmm", "matrix products"),
        ("aten::bmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::native_layer_norm_backward", "norms"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::add_", "sums, ReLU and the like"),
        ("aten::copy_", "copies"),
        ("aten::as_strided", "the rest"),
    ],
)
def test_operators_are_told_apart_by_their_names(operator, group):
    assert tool.group_of(operator) == group


def test_profile_has_the_share_of_each_group(measure, capsys):
    (record,) = measure("inference", "--profile")
    shares = record["profile"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["convolution"] > 0 and shares["matrix products"] > 0
    table = capsys.readouterr().out.splitlines()
    assert all(group in table[-3] for group in shares)


def test_attentions_multiply_adds_are_those_of_its_two_products():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    sizes = [(2, 4, 5, 3), (2, 4, 7, 3), (2, 4, 7, 6)]  # 5 queries, 7 keys, widths 3 and 6
    flops = FlopCountAnalysis(Attention(), tuple(torch.ones(size) for size in sizes))
    flops.set_op_handle("aten::scaled_dot_product_attention", attention_flops)
    assert flops.total() == 2 * 4 * (5 * 7 * 3 + 5 * 7 * 6)


def test_training_step_changes_the_weights(tmp_path):
    config = write_smca_config(tmp_path)
    options = SimpleNamespace(
        device="cpu", dtype="float32", compile=False, batch_size=2, overrides=["model.dropout=0.0"]
    )
    step = cases.build_train_step(options, config, (64, 96))
    model = step.__self__.model
    weights = model.class_embed.weight, model.backbone.stem.conv1.weight
    before = [weight.detach().clone() for weight in weights]
    step()
    assert model.training
    assert all((a != b).any() for a, b in zip(weights, before, strict=True))


def test_both_co_attentions_compute_the_same():
    torch.manual_seed(0)
    inputs = leaves(
        {
            "query": torch.randn(2, 8, 5, 32),
            "key": torch.randn(2, 8, 24, 32),
            "value": torch.randn(2, 8, 24, 32),
            "centers": 6 * torch.rand(2, 8, 5, 2),
            "spreads": 2 * torch.rand(2, 8, 5, 2),
        }
    )
    slow = cases.slow_co_attention(*inputs.values(), (4, 6))
    fast = cases.fast_co_attention(*inputs.values(), (4, 6))
    assert torch.allclose(slow, fast, atol=1e-5)
    assert_same_gradients(fast, slow, inputs)


def test_scaling_covers_sizes_and_numbers_of_queries():
    jobs = list(cases.co_attention_scaling_jobs(tool.parse_options(["co_attention_scaling"])))
    forward = [job.size for job in jobs if job.name == "co_attention forward"]
    cells = ["25 x 42", "50 x 84", "100 x 168", "200 x 336"]
    assert forward[:4] == [f"2 x 300 queries, {size} cells" for size in cells]
    assert forward[4:] == [f"2 x {n} queries, 50 x 84 cells" for n in (100, 900)]
    assert len(jobs) == 2 * len(forward)


def test_table_has_the_gain_over_the_reference(measure, tmp_path, capsys):
    records = measure("co_attention")
    slow, fast = records[1], records[0]
    assert slow["name"] == fast["name"] + ", reference"
    content = json.loads((tmp_path / "output.json").read_text())
    column = content["columns"].index("time, reference / here")
    gain = f"{slow['median_s'] / fast['median_s']:.2f}"
    assert [bool(row[column]) for row in content["rows"]] == [True, False, True, False]
    assert content["rows"][0][column] == gain
    assert gain in capsys.readouterr().out


def test_models_are_measured_with_each_size(measure):
    more = ["--image-size", "32", "64", "--train-size", "32", "64", "--batch-size", "1"]
    sizes = [record["size"] for record in measure("encoder", "train_step", *more)]
    assert sizes == ["1 x 32 x 64", "1 x 64 x 96"] * 2


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_peak_memory_counts_what_was_freed_again():
    memory = tool.PeakMemory("cpu")
    torch.ones(2**24)  # 64 MiB
    first = memory.read()
    assert 60 < first["extra_bytes"] / 2**20 < 100
    assert tool.PeakMemory("cpu").read()["extra_bytes"] < 2**23


# ---- Processes and command line


def run_script(*words):
    command = [sys.executable, str(ROOT / "benchmarks" / "benchmark.py"), *map(str, words)]
    return subprocess.run(command, env=child_environment(), capture_output=True, text=True)


def test_script_measures_in_its_own_process_and_writes_json(tmp_path):
    output = tmp_path / "output.json"
    done = run_script("matcher", "--threads", 1, "--output", output, "--profile", *TINY)
    assert done.returncode == 0, done.stderr
    assert "Self CPU" in done.stdout and "aten::" in done.stdout
    content = json.loads(output.read_text())
    assert "matcher --threads 1" in content["command"] and content["date"]
    (record,) = content["records"]
    assert set(record) == FIELDS | {"profile"}
    assert (record["name"], record["config"], record["size"]) == ("matcher", None, "16 images")
    assert (record["threads"], record["torch"]) == (1, torch.__version__)
    assert f"{record['median_s']:.3g}" in done.stdout
    assert content["rows"][0][:4] == ["matcher", "", "16 images", f"{record['median_s']:.3g}"]


def test_error_is_one_sentence(tmp_path):
    done = run_script("no_such_measurement")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert lines == done.stderr.splitlines()[-1:]
    assert "no_such_measurement" in lines[0] and "train_step" in lines[0]


def test_no_repeats_are_refused(capsys):
    with pytest.raises(SystemExit):
        tool.main(["matcher", "--repeats", "0"])
    assert "--repeats: has to be a whole number of at least 1, not 0" in capsys.readouterr().err


def test_process_that_is_killed_is_reported():
    with pytest.raises(UserError, match="lack of memory"):
        tool.in_fresh_process(os._exit, 1)


def test_config_and_overrides_are_checked_before_anything_runs():
    with pytest.raises(ConfigError, match="no_such_file.py does not exist"):
        tool.main(["inference", "--config", "no_such_file.py"])
    with pytest.raises(ConfigError, match="model.num_querys"):
        tool.main(["inference", "model.num_querys=5"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_gpu_is_reported():
    with pytest.raises(UserError, match="--device cpu"):
        tool.main(["matcher", "--device", "cuda"])


# ---- Comparing


def record(name="inference", config="a", size="1 x 8 x 8", seconds=1.0, extra=100, peak=1000):
    memory = {"extra_bytes": extra, "peak_bytes": peak}
    return {"name": name, "config": config, "size": size, "median_s": seconds, **memory}


def write_records(path, *records):
    path.write_text(json.dumps({"records": records}))
    return str(path)


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_compare_prints_the_ratios_of_what_both_files_hold(tmp_path, capsys):
    a = write_records(
        tmp_path / "a.json",
        record(seconds=3.0, extra=500, peak=900),
        record("matcher", None, "16 images", seconds=0.01, extra=10, peak=20),
        record(size="1 x 9 x 9"),
    )
    b = write_records(
        tmp_path / "b.json",
        record("matcher", None, "16 images", seconds=0.04, extra=0, peak=30),
        record(seconds=2.0, extra=2000, peak=1000),
        record(config="b"),
    )
    tool.main(["--compare", a, b])
    rows = [cells_of(line) for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert rows[2:] == [
        ["inference", "a", "1 x 8 x 8", "3000.0", "2000.0", "1.50", "0.25", "0.90"],
        ["matcher", "-", "16 images", "10.0", "40.0", "0.25", "-", "0.67"],
    ]


@pytest.mark.parametrize(
    "text", ["", "no JSON", "[]", "{}", '{"records": 3}', '{"records": [{"name": "x"}]}']
)
def test_file_of_another_kind_is_named(tmp_path, text):
    good = write_records(tmp_path / "good.json", record())
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    with pytest.raises(UserError, match="bad.json is not a file"):
        tool.main(["--compare", good, str(bad)])


def test_absent_file_is_named(tmp_path):
    good = write_records(tmp_path / "good.json", record())
    with pytest.raises(UserError, match="absent.json cannot be read: No such file"):
        tool.main(["--compare", good, str(tmp_path / "absent.json")])


def test_files_without_a_common_measurement_are_named(tmp_path):
    a = write_records(tmp_path / "a.json", record(config="a"))
    b = write_records(tmp_path / "b.json", record(config="b"))
    with pytest.raises(UserError, match="a.json and .*b.json have no measurement in common"):
        tool.main(["--compare", a, b])
