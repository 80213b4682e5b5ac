"""Which kernel backend is used, what the log says about it, and what a backend in the wrong place ends in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import Running
from tiny_capture import write_capture
from tiny_model import tiny_config, tiny_model

from infnerf_ns.errors import InputError
from infnerf_ns.kernels import backends, choose, explain
from infnerf_ns.kernels.backends import Backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)  # a device is only a name here: nothing is put on it
FLAG = "infnerf: --pipeline.model.field.backend"


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter is off, whatever the environment of the tests says."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def install(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Let these be the optional packages that are installed."""
    monkeypatch.setattr(backends, "_installed", lambda package: package in packages)


@pytest.mark.parametrize(
    "packages, chosen, reason",
    [
        (("triton", "tinycudann"), "triton", "the fastest on CUDA"),
        (("triton",), "triton", "the fastest on CUDA"),
        (("tinycudann",), "tcnn", "as triton is not installed"),
        ((), "torch", "slow: neither triton nor tinycudann is installed"),
    ],
)
def test_auto_on_cuda(packages: tuple[str, ...], chosen: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *packages)
    assert choose("auto", CUDA) == chosen
    assert explain("auto", CUDA) == f"kernels: {chosen}, {reason}"
    assert choose("auto", CUDA, torch.float64) == "torch", "the fast kernels work in float32"


@pytest.mark.parametrize("packages", [("triton", "tinycudann"), ()])
def test_auto_on_a_cpu(packages: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *packages)
    assert choose("auto", CPU) == "numba"
    assert choose("auto", CPU, torch.float64) == "torch"
    assert explain("auto", CPU) == "kernels: numba, the fastest on a CPU"


@pytest.mark.parametrize(
    "backend, device", [("torch", CPU), ("torch", CUDA), ("numba", CPU), ("triton", CUDA), ("tcnn", CUDA)]
)
def test_a_named_backend_where_it_runs(backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "triton", "tinycudann")
    assert choose(backend, device) == backend
    assert explain(backend, device) == f"kernels: {backend}, as configured"


@pytest.mark.parametrize(
    "backend, device, problem",
    [
        ("numba", CUDA, "runs on the CPU, but the model is on cuda:0: use auto"),
        ("triton", CPU, "runs on CUDA, but the model is on cpu: use auto"),
        ("tcnn", CPU, "runs on CUDA, but the model is on cpu: use auto"),
    ],
)
def test_a_named_backend_on_the_wrong_device(
    backend: Backend, device: torch.device, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "triton", "tinycudann")
    for refused in (choose, explain):
        with pytest.raises(InputError) as caught:
            refused(backend, device)
        assert str(caught.value) == f"{FLAG} {backend} {problem}"


@pytest.mark.parametrize("backend, package", [("triton", "triton"), ("tcnn", "tinycudann")])
def test_a_named_backend_that_is_not_installed(backend: Backend, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *{"triton", "tinycudann"} - {package})
    with pytest.raises(InputError) as caught:
        choose(backend, CUDA)
    assert str(caught.value) == f"{FLAG} {backend}: the package {package} is not installed; use auto"


def test_triton_runs_on_a_cpu_in_its_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "triton", "tinycudann")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", CPU) == "triton"
    assert choose("auto", CPU) == "numba", "the interpreter is for tests"
    with pytest.raises(InputError):
        choose("tcnn", CPU)


def test_a_new_model_says_once_which_kernels_it_uses(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "kernels" in line] == ["infnerf: kernels: numba, the fastest on a CPU"]


def test_a_new_model_refuses_a_backend_of_another_device() -> None:
    with pytest.raises(InputError, match="backend tcnn runs on CUDA, but the model is on cpu: use auto"):
        tiny_model(tiny_config(field={"backend": "tcnn"}))


@pytest.mark.slow
def test_the_command_refuses_it_in_one_line(tmp_path: Path) -> None:
    """The command sees no GPU, on any machine."""
    write_capture(tmp_path / "ring")
    flags = ["--vis", "tensorboard", "--output-dir", tmp_path, "--data", tmp_path / "ring"]
    command = ["ns-train", "infnerf", "--pipeline.model.field.backend", "tcnn", *flags]
    line = Running(command, tmp_path / "log").wait().refusal()
    assert line == f"{FLAG} tcnn runs on CUDA, but the model is on cpu: use auto"
