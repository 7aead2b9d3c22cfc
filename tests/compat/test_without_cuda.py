"""What importing graftwork.compat changes, seen from fresh interpreters: megatron-core only, and nothing with CUDA."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graftwork.compat import cpu
from graftwork.compat.torch_on_cpu import stand_in

ROOT = Path(__file__).resolve().parents[2]
PRETEND_CUDA = "import torch\ntorch.cuda.is_available = lambda: True\n"


def interpreter(script: str, path: Path | None = None, check: bool = True) -> "subprocess.CompletedProcess[str]":
    roots = [str(ROOT)] if path is None else [str(path), str(ROOT)]
    setup = f"import sys\nsys.path[:0] = {roots!r}\n"
    done = subprocess.run([sys.executable, "-c", setup + script], capture_output=True, text=True, timeout=120)
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(params=["empty meta package", "missing library"])
def broken_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A transformer_engine that fails on import as the real broken installs do."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    error = {
        "empty meta package": 'raise RuntimeError("Found empty `transformer-engine` meta package installed")',
        "missing library": 'raise OSError("libcudnn.so.9: cannot open shared object file")',
    }[request.param]
    (package / "__init__.py").write_text("import sys\nsys.modules['transformer_engine_torch'] = sys\n" + error + "\n")
    return tmp_path


def test_global_torch_is_untouched_and_a_broken_engine_is_survived(broken_engine: Path) -> None:
    interpreter(
        """
import torch, torch.amp, torch.distributed
SPACES = (torch, torch.cuda, torch.amp, torch.Tensor, torch.nn.Module, torch.random, torch.distributed)
before = [dict(vars(space)) for space in SPACES]
import graftwork.compat
import graftwork.core.gpt
for space, names in zip(SPACES, before):
    now = vars(space)
    changed = [name for name, value in names.items() if now.get(name) is not value]
    assert not changed, (space, changed)
import megatron.core.jit as jit, megatron.core.tensor_parallel.random as random, megatron.core.utils as utils
assert utils.torch is not torch and utils.torch.Tensor is torch.Tensor
assert jit.jit_fuser is jit.noop_decorator
assert random.CudaRNGStatesTracker.__name__ == "CPURNGStatesTracker"
from graftwork.compat import transformer_engine
assert transformer_engine.guard() == transformer_engine.Status(False, "there is no CUDA device")
import importlib.util
assert importlib.util.find_spec("transformer_engine") is None
""",
        broken_engine,
    )


@pytest.mark.parametrize("broken_engine", ["empty meta package"], indirect=True)
def test_without_the_guard_a_broken_engine_breaks_megatron(broken_engine: Path) -> None:
    done = interpreter("import megatron.core", broken_engine, check=False)
    assert done.returncode != 0
    assert "meta package" in done.stderr


def test_with_cuda_a_broken_engine_is_hidden(broken_engine: Path) -> None:
    interpreter(
        PRETEND_CUDA
        + """
import graftwork.compat
assert "megatron.core" not in sys.modules
assert "transformer_engine_torch" not in sys.modules
from graftwork.compat import transformer_engine
status = transformer_engine.guard()
assert not status.usable and ("meta package" in status.reason or "libcudnn" in status.reason), status
""",
        broken_engine,
    )


@pytest.mark.parametrize("broken_engine", ["missing library"], indirect=True)
def test_with_cuda_megatron_is_left_as_it_is(broken_engine: Path) -> None:
    interpreter(
        PRETEND_CUDA
        + """
import graftwork.compat
from graftwork.compat import cpu
import megatron.core.tensor_parallel.random as random, megatron.core.utils as utils, megatron.core.jit as jit
import megatron.core.pipeline_parallel.schedules as schedules
assert utils.torch is torch and schedules.torch is torch and random.torch is torch
assert random.CudaRNGStatesTracker.__module__ == "megatron.core.tensor_parallel.random"
assert jit.jit_fuser is torch.compile
cuda = torch.Tensor.cuda
with cpu.tensors_stay_on_cpu():
    assert torch.Tensor.cuda is cuda
""",
        broken_engine,
    )


def test_with_cuda_a_working_engine_is_used(tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    for name in ("__init__", "pytorch"):
        (tmp_path / "transformer_engine" / f"{name}.py").write_text("")
    interpreter(
        PRETEND_CUDA
        + "import graftwork.compat\n"
        + "from graftwork.compat import transformer_engine\n"
        + "assert transformer_engine.usable()\nassert sys.modules['transformer_engine'] is not None\n",
        tmp_path,
    )


def test_importing_megatron_first_is_told() -> None:
    done = interpreter("import megatron.core\nimport graftwork.compat\n")
    assert "megatron.core was imported before graftwork" in done.stderr


def test_every_redirected_module_has_a_reason_and_the_stand_in() -> None:
    present = [sys.modules[name] for name in cpu.REDIRECTED if name in sys.modules]
    assert len(present) >= len(cpu.REDIRECTED) - 3
    assert all(module.torch is stand_in() for module in present if hasattr(module, "torch"))
    assert all(cpu.REDIRECTED.values())


def test_the_stand_in_redirects_cuda_requests_only() -> None:
    fake = stand_in()
    assert fake.zeros(2, device="cuda").device.type == "cpu"
    assert fake.empty(2, device=fake.cuda.current_device(), pin_memory=True).device.type == "cpu"
    assert fake.ones(2, device="meta").device.type == "meta"
    assert fake.nn is torch.nn
    assert fake.cuda.is_available() is torch.cuda.is_available()
    with fake.cuda.stream(fake.cuda.Stream()):
        fake.cuda.current_stream().wait_stream(fake.cuda.default_stream())
    event = fake.cuda.Event(enable_timing=True)
    event.record()
    assert event.query()


def test_tensors_leave_the_noop_cuda_behind() -> None:
    before = torch.Tensor.cuda
    with cpu.tensors_stay_on_cpu():
        value = torch.ones(1)
        assert value.cuda() is value
    assert torch.Tensor.cuda is before
