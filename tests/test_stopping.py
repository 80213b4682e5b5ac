"""Signals end commands with one line and the shell's exit code, in every phase.

The processes here import nothing heavy, so the phases are made up; those of real commands are in
test_end_to_end_stopping.py.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infnerf_ns.training.stopping import StopSignals, exit_code

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
_COMMAND = """
import os, signal, sys, time
from infnerf_ns.cli import scripts
from infnerf_ns.training import stopping
stopping._PATIENCE = 0.5

def wait():
    print("waiting", flush=True)
    time.sleep(60)

def importing():
    wait()

def cleaning():
    try:
        wait()
    finally:
        print("cleaned", flush=True)

def keeping():
    with stopping.kept("finished tiles are kept"):
        wait()

def dropped():  # Python prints and drops what is raised in a finaliser
    class Finalised:
        def __del__(self):
            wait()
    Finalised()
    while True:
        time.sleep(0.01)

def drawing():  # as a viewer does, in a thread that Python does not wait for
    import threading
    import numpy as np
    import torch
    def draw():
        numbers = torch.ones(1 << 20)
        while True:
            numbers.exp_()
    threading.Thread(target=draw, daemon=True).start()
    time.sleep(0.5)
    wait()

scripts.run({})
"""


def start(body: str, hang_up: signal.Handlers = signal.SIG_DFL) -> subprocess.Popen:
    """A command with that body, which has said that it waits.

    Args:
        body: one of the functions above.
        hang_up: what SIGHUP does when it starts.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND.format(body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, hang_up),
    )
    assert process.stdout.readline() == "waiting\n"
    return process


def _ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_ends_with_one_line_and_the_shells_code(number: int) -> None:
    process = start("importing")
    process.send_signal(number)
    assert _ended(process) == (exit_code(number), "", "infnerf: stopped\n")
    assert exit_code(number) == {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}[signal.Signals(number).name]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_cleans_up(number: int) -> None:
    process = start("cleaning")
    process.send_signal(number)
    assert _ended(process) == (exit_code(number), "cleaned\n", "infnerf: stopped\n")


def test_a_thread_in_compiled_code_does_not_abort_it() -> None:
    """Regression: Ctrl-C of ns-viewer while it drew a picture ended with "terminate called" and SIGABRT, as Python ends
    the threads that are left wherever they are."""
    process = start("drawing")
    process.send_signal(signal.SIGINT)
    assert _ended(process) == (130, "", "infnerf: stopped\n")


def test_the_line_says_what_is_kept() -> None:
    process = start("keeping")
    process.send_signal(signal.SIGTERM)
    assert _ended(process) == (143, "", "infnerf: stopped; finished tiles are kept\n")


def test_an_interrupt_that_python_drops_is_not_lost() -> None:
    """Regression: what a signal handler raises within a finaliser, or a callback of the import system, is printed and
    dropped, and the command ran on."""
    process = start("dropped")
    process.send_signal(signal.SIGINT)
    code, _, err = _ended(process)
    assert code == 130 and err.startswith("infnerf: stopped\n")


def test_nohup_keeps_its_word() -> None:
    process = start("importing", hang_up=signal.SIG_IGN)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert _ended(process)[0] == 143


def test_an_interrupt_of_what_a_script_has_put_into_the_background_is_not_lost() -> None:
    """Regression: the shell starts it with SIGINT ignored, and Python leaves that so."""
    command = f'"{sys.executable}" -c "$0" & echo $!; wait $!; echo $?'
    shell = subprocess.Popen(["sh", "-c", command, _COMMAND.format("importing")], stdout=subprocess.PIPE, text=True)
    first, second = shell.stdout.readline(), shell.stdout.readline()
    (process,) = (int(line) for line in (first, second) if line != "waiting\n")
    os.kill(process, signal.SIGINT)
    assert shell.communicate(timeout=60)[0] == "130\n"


def test_a_reader_that_has_gone_is_no_error() -> None:
    code = "import sys; from infnerf_ns.cli import scripts; scripts.run(lambda: print('x' * 10**6))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 141


_REQUEST = """
import sys, time
from infnerf_ns.training.stopping import StopSignals, exit_code, say
with StopSignals(lambda number: say("stopping")) as stop:
    print("training", flush=True)
    while stop.received is None:
        time.sleep(0.01)
    for line in range(1000):
        print("the end of the step", flush=True)  # as nerfstudio's writer does
    with open(sys.argv[1], "w") as file:
        file.write("saved")
sys.exit(exit_code(stop.received))
"""


def test_a_training_whose_terminal_is_closed_finishes_its_step_and_saves(tmp_path: Path) -> None:
    """A terminal that has gone answers every line with an error, and the kernel and the shell both send SIGHUP."""
    checkpoint = tmp_path / "checkpoint"
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "-c", _REQUEST, str(checkpoint)])
    said = b""
    while b"training" not in said:
        said += os.read(terminal, 100)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 129 and checkpoint.read_text() == "saved"


def test_two_hang_ups_are_one_request() -> None:
    asked, before = [], signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    with StopSignals(asked.append) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == signal.SIGHUP and asked == [signal.SIGHUP]
        with pytest.raises(SystemExit) as end:
            os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == 143
    signal.signal(signal.SIGHUP, before)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(lambda number: None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
