"""The number of threads: what is chosen on made-up clocks, where it is set, and that results do not depend on it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numba
import pytest
import torch
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from tiny_capture import write_capture
from tiny_model import tiny_camera, tiny_model
from tiny_trainer import TinyPipeline, run, tiny_config

from infnerf_ns import threads
from infnerf_ns.errors import InputError
from infnerf_ns.presets import load_preset
from infnerf_ns.thread_choice import BUDGET, ROUNDS, WARM_UP, Change, ThreadChoice
from infnerf_ns.threads import MeasuredThreads, fix_threads


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No number is fixed, whatever ran before; torch's threads are those of the other tests afterwards."""
    monkeypatch.delenv(threads.THREADS_VARIABLE, raising=False)
    monkeypatch.setattr(threads, "_fixed", None)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def work(choice: ThreadChoice, seconds: Callable[[int], float], pieces: int) -> tuple[list[int], list[Change]]:
    """Does pieces of work that take so long with a number of threads; which numbers did them, and the changes."""
    numbers, changes = [], []
    for _ in range(pieces):
        numbers.append(choice.next())
        change = choice.record(numbers[-1], seconds(numbers[-1]))
        changes += [] if change is None else [change]
    return numbers, changes


def idle(number: int) -> float:
    """Seconds of a step on a machine that does nothing else: half of it in parallel."""
    return 0.020 + 0.020 / number


def busy(number: int) -> float:
    """Seconds where another program keeps one of two cores busy."""
    return 0.040 if number == 1 else 0.8


def test_all_threads_stay_where_they_are_the_fastest() -> None:
    choice = ThreadChoice(8)
    numbers, changes = work(choice, idle, 2000)
    assert changes == [] and choice.current == 8
    assert numbers[:WARM_UP] == [8] * WARM_UP, "nothing is measured while kernels are compiled"
    assert sorted(set(numbers)) == [1, 2, 4, 8], "the others have been tried"
    assert numbers[60:] == [8] * (len(numbers) - 60), "once: nothing has become slow"


def test_what_is_hopeless_is_tried_twice() -> None:
    numbers, _ = work(ThreadChoice(4), lambda number: 4.0 / number, 40)
    assert [numbers.count(1), numbers.count(2)] == [2, 2] and numbers[-1] == 4


def test_fewer_threads_are_taken_where_they_are_faster() -> None:
    choice = ThreadChoice(2)
    numbers, (change,) = work(choice, busy, 40)
    assert change == Change(2, 1, 0.8, pytest.approx(0.040))
    assert numbers.count(2) == WARM_UP + 2, "twice in the measurement"
    assert numbers[-20:] == [1] * 20


def test_more_threads_return_when_the_other_program_has_ended_and_go_when_it_is_back() -> None:
    choice = ThreadChoice(2)
    work(choice, busy, 5000)
    assert choice.current == 1
    _, (change,) = work(choice, idle, 5000)
    assert (change.before, change.after) == (1, 2) and choice.current == 2
    numbers, (change,) = work(choice, busy, 5000)
    assert (change.before, change.after) == (2, 1)
    assert numbers.index(1) <= 2 * 20, "slow steps are noticed within two looks"


@pytest.mark.parametrize("seconds", [idle, busy])
def test_measuring_costs_little(seconds: Callable[[int], float]) -> None:
    choice, total, best = ThreadChoice(2), 0.0, min(seconds(1), seconds(2))
    work(choice, seconds, 40)
    for _ in range(50_000):
        number = choice.next()
        choice.record(number, seconds(number))
        total += seconds(number)
    assert total / (50_000 * best) < 1 + 1.1 * BUDGET


def test_noise_changes_nothing() -> None:
    """Two numbers that are as fast: differences of 5 % to and fro, and single pieces that take ten times as long."""
    choice = ThreadChoice(2)
    noise = iter(torch.rand(20_000, generator=torch.Generator().manual_seed(0)).tolist())

    def seconds(number: int) -> float:
        drawn = next(noise)
        return 0.4 if drawn > 0.97 else 0.040 * (0.975 + 0.05 * drawn) * (1.02 if number == 2 else 1.0)

    assert work(choice, seconds, 20_000)[1] == []


def test_small_pieces_do_not_count() -> None:
    """The last chunk of an image has few rays, which take longer each."""
    choice = ThreadChoice(2)
    for _ in range(400):
        for rays in (1000, 1000, 10):
            number = choice.next()
            choice.record(number, busy(number) if rays == 1000 else 0.04, rays)
    assert choice.current == 1


def test_one_thread_is_never_measured() -> None:
    numbers, changes = work(ThreadChoice(1), busy, 100)
    assert numbers == [1] * 100 and changes == []


def test_an_odd_number_of_cores_is_halved_down_to_one() -> None:
    numbers, _ = work(ThreadChoice(6), lambda number: 1.0, WARM_UP + 3 * ROUNDS)
    assert set(numbers) == {6, 3, 1}


class Clock:
    """Time that only work takes: ``busy`` on what numba has been told."""

    def __init__(self) -> None:
        self.now, self.used = 0.0, []

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter

    def work(self) -> None:
        self.used.append((numba.get_num_threads(), torch.get_num_threads()))
        self.now += busy(numba.get_num_threads())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(threads, "time", SimpleNamespace(perf_counter=clock.perf_counter, monotonic=clock.monotonic))
    numba.set_num_threads(2)
    torch.set_num_threads(2)
    return clock


def test_both_pools_are_set_for_a_piece_and_put_back(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    measured = MeasuredThreads("trains", "a step", "--threads N")
    for _ in range(30):
        with measured.piece():
            clock.work()
        assert (numba.get_num_threads(), torch.get_num_threads()) == (2, 2)
    assert set(clock.used) == {(2, 2), (1, 1)} and clock.used[-1] == (1, 1)
    assert capsys.readouterr().out == (
        f"infnerf: trains with 1 of {numba.config.NUMBA_NUM_THREADS} threads from now on: a step takes 40 ms, with 2 it"
        " takes 800 ms (do other programs use the processor?); --threads N fixes the number\n"
    )


def test_what_fails_is_not_timed_and_leaves_the_threads_as_they_were(clock: Clock) -> None:
    measured = MeasuredThreads("trains", "a step", "--threads N")
    for _ in range(30):
        with pytest.raises(KeyError), measured.piece():
            clock.work()
            raise KeyError
    assert set(clock.used) == {(2, 2)} and numba.get_num_threads() == 2


def test_a_fixed_number_is_used_and_nothing_measured(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = MeasuredThreads("renders", "a chunk of rays", "--threads N")
    fix_threads(1)
    assert (numba.get_num_threads(), torch.get_num_threads()) == (1, 1)
    monkeypatch.setenv(threads.THREADS_VARIABLE, "2")
    for _ in range(30):
        with measured.piece():
            clock.work()
    assert set(clock.used) == {(1, 1)}, "the flag comes before the variable"
    fix_threads(0)
    assert (numba.get_num_threads(), torch.get_num_threads()) == (2, 2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value, line", [("two", "INFNERF_THREADS=two: give a whole number"), ("999", "999: allowed")])
def test_a_wrong_variable_is_one_line(monkeypatch: pytest.MonkeyPatch, value: str, line: str) -> None:
    monkeypatch.setenv(threads.THREADS_VARIABLE, value)
    with pytest.raises(InputError, match=line):
        fix_threads(0)


@pytest.mark.parametrize("number", [-1, numba.config.NUMBA_NUM_THREADS + 1])
def test_threads_that_are_not_there_are_refused(tmp_path: Path, number: int) -> None:
    with pytest.raises(InputError, match=f"--threads {number}: allowed is 1 to {numba.config.NUMBA_NUM_THREADS} on"):
        tiny_config(tmp_path, threads=number).setup()


@pytest.mark.usefixtures("quiet_writers")
def test_the_flag_reaches_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numba.set_num_threads(2)
    used: list[int] = []
    original = TinyPipeline.get_train_loss_dict
    monkeypatch.setattr(
        TinyPipeline,
        "get_train_loss_dict",
        lambda self, step: (used.append(numba.get_num_threads()), original(self, step))[1],
    )
    run(tiny_config(tmp_path / "fixed", threads=1))
    assert set(used) == {1}
    used.clear()
    numba.set_num_threads(2)
    run(tiny_config(tmp_path / "measured"))
    assert set(used) == {1, 2}, "both have been tried"


def test_pictures_are_measured_by_their_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a thread that is not the main one, as the viewer's are."""
    model, used = tiny_model().eval(), []
    model.config.eval_num_rays_per_chunk = 64
    model.on_evaluated = lambda _: used.append(numba.get_num_threads())
    camera = tiny_camera(CameraType.PERSPECTIVE, 60.0, 48, 32)
    numba.set_num_threads(2)
    first = model.get_outputs_for_camera(camera)
    assert set(used) == {1, 2}
    fix_threads(1)
    used.clear()
    second = model.get_outputs_for_camera(camera)
    assert set(used) == {1}
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} does not depend on the number of threads"


@pytest.mark.usefixtures("quiet_writers")
def test_what_is_learnt_does_not_depend_on_the_threads_of_the_kernels(tmp_path: Path) -> None:
    """To the last bit; fixed numbers, and one that changes in every step. Regression: the sums of the decoders'
    gradients were split by the threads that took part. (torch's own functions round differently: one thread.)"""
    write_capture(tmp_path / "capture")

    def learnt(numbers: list[int]) -> int:
        config = load_preset("infnerf-small", "cpu")
        config.pipeline.datamanager.data = tmp_path / "capture"
        config.output_dir, config.timestamp, config.vis = tmp_path, f"run{len(numbers)}{numbers[0]}", "tensorboard"
        config.logging.local_writer.enable = False
        config.pipeline.model.octree.level_start_steps = 3
        config.pipeline.datamanager.train_num_rays_per_batch = 512
        torch.manual_seed(0)
        trainer = config.setup(local_rank=0, world_size=1)
        trainer.setup()
        for step in range(8):
            threads.fix_threads(numbers[step % len(numbers)])
            torch.set_num_threads(1)
            for callback in trainer.callbacks:
                callback.run_callback_at_location(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
            trainer.train_iteration(step)
        state = trainer.pipeline.model.state_dict()
        return zlib.crc32(b"".join(value.numpy().tobytes() for value in state.values()))

    most = numba.config.NUMBA_NUM_THREADS
    assert learnt([1]) == learnt([most]) == learnt([1, most, 2])
