"""What PyTorch's own CUDA library does with the models, on GPUs that are not there."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import ROOT, child_environment, needs_fake_gpu

TRITON = importlib.util.find_spec("triton")  # comes with PyTorch, and has CUDA's headers
HEADERS = TRITON and Path(TRITON.origin).parent / "backends/nvidia/include"

pytestmark = [
    needs_fake_gpu,
    pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch has no CUDA library"),
    pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler"),
    pytest.mark.skipif(not (HEADERS and HEADERS.is_dir()), reason="there are no headers of CUDA"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    options = ["-shared", "-fPIC", f"-Wl,-soname,{path.name}", f"-I{HEADERS}", "-o", path]
    subprocess.run(["cc", *options, ROOT / "tests" / "fake_cuda.c"], check=True)
    return path


def ask(library, capability, *configs):
    """What gpu_operations.py prints on a GPU of a capability (90 is 9.0)."""
    settings = {"LD_PRELOAD": str(library), "FAKE_CAPABILITY": str(capability)}
    return json.loads(
        subprocess.run(
            [sys.executable, ROOT / "tests" / "gpu_operations.py", *configs],
            env={**child_environment(), **settings},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )


# Upper bounds: operations of an image, and of a training step.
OPERATIONS = {"smca_r50_50ep": (1050, 3300)}


@pytest.fixture(scope="module")
def hopper(library):
    return ask(library, 90, *OPERATIONS)


@pytest.mark.parametrize("capability", [75, 90])
def test_attention_takes_fused_kernels(library, hopper, capability):
    answer = hopper if capability == 90 else ask(library, capability)
    for case, kernel in answer["kernels"].items():
        plain_half = "plain" in case and "float32" not in case
        expected = "flash" if capability >= 80 and plain_half else "efficient"
        if capability < 80 and "bfloat16" in case:
            expected = "math"  # of which users are warned
        assert kernel == expected, case


@pytest.mark.parametrize("config", OPERATIONS)
def test_a_model_has_few_operations_and_its_forward_pass_does_not_wait(hopper, config):
    (inference, training), found = OPERATIONS[config], hopper[config]
    assert found["inference"][0] <= inference and found["training"][0] <= training
    assert found["inference"][1] == found["training"][1] == 0
