"""config.yml: what a run writes is read as it was, a stranger's executes nothing, wrong values end in one line."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
import yaml
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from tiny_packed import tiny_run

from infnerf_ns.cli.inspect_run import Inspect
from infnerf_ns.cli.ortho import Ortho
from infnerf_ns.cli.pack import pack_run
from infnerf_ns.cli.picture import Picture
from infnerf_ns.cli.rewrite_config import BEFORE, RewriteConfig
from infnerf_ns.cli.runs import load_run_config
from infnerf_ns.data.demo_dataparser import InfNeRFDemoDataParserConfig
from infnerf_ns.errors import InputError
from infnerf_ns.presets import load_preset, preset_names
from infnerf_ns.run_config import make_paths_absolute, read_run_config
from infnerf_ns.training.trainer import InfNeRFTrainerConfig


def write(folder: Path, text: str) -> Path:
    (folder / "config.yml").write_text(text)
    return folder / "config.yml"


@pytest.fixture(scope="module")
def usual() -> str:
    """A run's config.yml."""
    config = load_preset("infnerf-small", "cpu")
    config.data = Path("/somewhere/cap")
    return yaml.dump(config)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_run_config(path)
    line = str(caught.value)
    assert line.startswith(f"infnerf: {path}: ") and "\n" not in line
    return line


# -- what runs hold


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_preset_writes_is_read_as_it_was(preset: str, device: str, tmp_path: Path) -> None:
    config = load_preset(preset, device)
    read = read_run_config(write(tmp_path, yaml.dump(config)))
    assert read == config and yaml.dump(read) == yaml.dump(config)


@pytest.mark.parametrize("name", sorted(all_dataparsers))
def test_a_run_of_every_registered_dataparser_is_read(name: str, tmp_path: Path) -> None:
    config = load_preset("infnerf", "cpu")
    config.pipeline.datamanager.dataparser = all_dataparsers[name]
    path = write(tmp_path, yaml.dump(config))
    if name == "minimal-parser":  # nerfstudio unpickles its captures
        assert "files can execute code" in refusal(path)
    else:
        assert read_run_config(path) == config


def test_what_a_run_of_an_earlier_version_lacks_has_its_default(usual: str, tmp_path: Path) -> None:
    for line in ("      prefetch: true\n", "level_lr_factor: 1.0\n"):
        assert line in usual
        usual = usual.replace(line, "")
    usual = re.sub(r"    streaming: .*\n(      .*\n)+", "", usual)
    config = read_run_config(write(tmp_path, usual))
    assert config.level_lr_factor == 1.0 and config.pipeline.model.streaming.prefetch is True


def test_a_setting_of_a_later_version_is_left_out_and_said(
    usual: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, usual.replace("level_lr_factor:", "wings: 2\nlevel_lr_factor:"))
    assert not hasattr(read_run_config(path), "wings")
    line = f"infnerf: warning: {path}: this version knows no setting 'InfNeRFTrainerConfig.wings'; it is left out\n"
    assert capsys.readouterr().err == line


# -- what strangers write

SHELL = "touch {mark}"
HOSTILE = {
    "call": "!!python/object/apply:os.system ['{shell}']",
    "call of a builtin": "!!python/object/apply:eval [\"__import__('os').system('{shell}')\"]",
    "new": "!!python/object/new:os.system ['{shell}']",
    "new with state": "!!python/object/new:type {{args: [x, !!python/tuple [], {{}}], state: {{a: 1}}}}",
    "new with listitems": "!!python/object/new:list {{listitems: !!python/object/apply:os.system ['{shell}']}}",
    "subprocess": "!!python/object/apply:subprocess.Popen [[touch, '{mark}']]",
    "name": "!!python/name:os.system ''",
    "module": "!!python/module:antigravity ''",
    "object of another class": "!!python/object:subprocess.Popen {{}}",
    "object with __setstate__": "!!python/object:test_run_config.Armed {{mark: '{mark}'}}",
    "allowed class that is called": "!!python/object/apply:infnerf_ns.field_config.FieldConfig []",
    "path of other parts": "!!python/object/apply:pathlib.PosixPath [!!python/object/apply:os.system ['{shell}']]",
    "enumeration of another module": "!!python/object/apply:signal.Signals [9]",
    "binary": "!!binary aGVsbG8=",
    "set": "!!set {{a, b}}",
}


class Armed:
    """Does something when it is unpickled, or read by yaml.Loader."""

    def __setstate__(self, state: dict) -> None:
        Path(state["mark"]).touch()


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", ["whole", "field", "target", "path", "list", "key"])
def test_a_strangers_file_executes_nothing(kind: str, place: str, usual: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    value = HOSTILE[kind].format(shell=SHELL.format(mark=mark), mark=mark)
    text = {
        "whole": value,
        "field": usual.replace("level_lr_factor: 1.0", f"level_lr_factor: {value}"),
        "target": re.sub(r"(?m)^_target: .*$", lambda _: f"_target: {value}", usual),
        "path": re.sub(r"(?m)^output_dir: .*\n- outputs$", lambda _: f"output_dir: {value}", usual),
        "list": usual.replace("gradient_accumulation_steps: {}", f"gradient_accumulation_steps: {{a: [{value}]}}"),
        "key": usual + f"? {value}\n: 1\n",
    }[place]
    assert text != usual
    refusal(write(tmp_path, text))
    assert not mark.exists()


def test_the_files_are_hostile_to_yaml_loader(usual: str, tmp_path: Path) -> None:
    """Or the tests above would say nothing."""
    mark = tmp_path / "executed"
    for kind in ("call", "call of a builtin", "new with listitems", "object with __setstate__"):
        mark.unlink(missing_ok=True)
        yaml.load(HOSTILE[kind].format(shell=SHELL.format(mark=mark), mark=mark), Loader=yaml.Loader)
        for _ in range(100):  # os.system waits, Popen does not
            if mark.exists():
                break
            time.sleep(0.02)
        assert mark.exists(), kind


def test_a_target_is_that_of_its_class(usual: str, tmp_path: Path) -> None:
    other = usual.replace("name:infnerf_ns.model.InfNeRFModel ", "name:infnerf_ns.training.trainer.InfNeRFTrainer ")
    assert other != usual
    assert "'_target' names infnerf_ns.training.trainer.InfNeRFTrainer" in refusal(write(tmp_path, other))
    plain = re.sub(r"(?m)^_target: .*$", "_target: os.system", usual)
    assert "'_target' must be infnerf_ns.training.trainer.InfNeRFTrainer" in refusal(write(tmp_path, plain))
    collate = usual.replace("nerfstudio_collate.nerfstudio_collate", "nerfstudio_collate.os.system")
    assert "'collate_fn' names" in refusal(write(tmp_path, collate))


def test_the_other_commands_refuse_it_too(usual: str, tmp_path: Path) -> None:
    """All of them read it at one place."""
    run, mark = tiny_run(tmp_path), tmp_path / "executed"
    path = write(run, f"!!python/object/apply:os.system ['touch {mark}']")
    commands = [
        lambda: Inspect(run=run).main(),
        lambda: pack_run(run, half=False, overwrite=False, progress=iter),
        lambda: Ortho(run=run, output=tmp_path / "map.png").main(),
        lambda: Picture(load_config=path, output=tmp_path / "picture.png").main(),
        lambda: RewriteConfig(run=run).main(),
        lambda: InfNeRFTrainerConfig(load_config=path),  # ns-train infnerf --load-config
    ]
    for command in commands:
        with pytest.raises(InputError, match="asks for a call of os.system, which is no part of a run's configuration"):
            command()
    assert not mark.exists()


BOMB = "\n".join(
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]",
        *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)),
    ]
)


@pytest.mark.parametrize(
    "text, message",
    [
        (BOMB, "more than 50000 values"),
        ("&a [*a]", "part of itself"),
        ("[" * 20_000 + "]" * 20_000, "nested too deeply"),
        ("x: " + "9" * 5000, "a number is too large"),
        ("x: 0x" + "f" * 40, "a number is too large"),
        ("x" * (1 << 20) + "x", "larger than 1 MiB"),
        ("", "it is empty"),
        ("a: [1", "line 1"),
        ("{a: 1}", "this is not a run of infnerf"),
        ("5", "this is not a run of infnerf"),
        ("!!python/object:nerfstudio.engine.optimizers.AdamOptimizerConfig {}", "this is not a run of infnerf"),
        ("!!python/object:infnerf_ns.training.trainer.InfNeRFTrainerConfig [1]", "no 'key: value' lines"),
        ("a: 1\na: 2", "given twice"),
        ("a: 2026-11-27", "could not determine a constructor"),
    ],
)
def test_what_is_no_configuration_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(write(tmp_path, text))


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_bytes(b"\xff\xfe\x00a")
    assert "cannot be read as the configuration of a run" in refusal(tmp_path / "config.yml")


@pytest.mark.parametrize(
    "before, after, message",
    [
        (
            "max_level: 3",
            "max_level: deep",
            "pipeline.model.octree.max_level must be a whole number, found 'deep' (str)",
        ),
        ("max_level: 3", "max_level: 10000000000", "pipeline.model.octree.max-level 10000000000: allowed is 0 to 20"),
        (
            "max_level: 3",
            "max_level: .nan",
            "pipeline.model.octree.max_level must be a whole number, found nan (float)",
        ),
        ("level_lr_factor: 1.0", "level_lr_factor: .nan", "level-lr-factor nan: is not a number"),
        ("prefetch: true", "prefetch: 1", "pipeline.model.streaming.prefetch must be True or False, found 1 (int)"),
        ("children: residual", "children: many", "pipeline.model.field.children must be one of"),
        ("timestamp: '{timestamp}'", "timestamp: [a]", "timestamp must be a text, found ['a'] (list)"),
        ("load_dir: null", "load_dir: 7", "load_dir must be a path or empty, found 7 (int)"),
        ("profiler: basic", "profiler: fast", "logging.profiler must be one of"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(before: str, after: str, message: str, usual: str, tmp_path: Path) -> None:
    assert before in usual
    assert message in refusal(write(tmp_path, usual.replace(before, after)))


def test_a_section_of_another_kind_is_named(usual: str, tmp_path: Path) -> None:
    model = "!!python/object:infnerf_ns.model.InfNeRFModelConfig"
    data = "!!python/object:infnerf_ns.data.pyramid_datamanager.PyramidDataManagerConfig"
    assert model in usual and data in usual
    shared = yaml.compose(usual)
    (pipeline,) = (value for key, value in shared.value if key.value == "pipeline")
    for pair in list(pipeline.value):
        if pair[0].value == "model":
            pipeline.value.remove(pair)
            pipeline.value.append((pair[0], next(v for k, v in pipeline.value if k.value == "datamanager")))
    line = refusal(write(tmp_path, yaml.serialize(shared)))
    assert "pipeline.model must be ModelConfig, found PyramidDataManagerConfig" in line
    line = refusal(write(tmp_path, re.sub(r"optimizers:\n(  .*\n)+", "optimizers:\n  grids: 5\n", usual)))
    assert "optimizers.grids must hold an optimizer, found 5 (int)" in line


def test_a_path_that_was_written_as_text_is_a_path(usual: str, tmp_path: Path) -> None:
    text = re.sub(r"(?m)^output_dir: .*\n- outputs$", "output_dir: a/b", usual)
    config = read_run_config(write(tmp_path, text))
    assert config.output_dir == Path("a/b") and isinstance(config.output_dir, Path)
    assert isinstance(config.method_name, str)


# -- where a run is


def test_paths_of_a_training_lead_to_the_same_files_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cap").mkdir()
    monkeypatch.chdir(tmp_path / "cap")
    config = load_preset("infnerf", "cpu")
    config.data = config.pipeline.datamanager.data = Path(".")
    config.output_dir, config.load_dir, config.timestamp = Path("../out"), Path("../old"), "run"
    config.save_config()
    monkeypatch.chdir("/")
    (folder,) = tmp_path.glob("out/*/*/run")
    assert folder == tmp_path / "out" / "cap" / "infnerf" / "run", "'.' has a name, which is the experiment's"
    read, _ = load_run_config(folder)
    assert read.data == read.pipeline.datamanager.data == read.pipeline.datamanager.dataparser.data == tmp_path / "cap"
    assert (read.output_dir, read.load_dir) == (tmp_path / "out", tmp_path / "old"), "whatever becomes of the capture"
    assert read.get_base_dir() == folder
    assert read.relative_model_dir == Path("nerfstudio_models"), "starts from the run"


def test_paths_of_dataparsers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What starts from the capture stays; what starts from where the command is given becomes absolute."""
    (tmp_path / "cap" / "sparse" / "0").mkdir(parents=True)
    (tmp_path / "masks").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_preset("infnerf", "cpu")
    config.pipeline.datamanager.dataparser = ColmapDataParserConfig(
        data=Path("cap"), colmap_path=Path("sparse/0"), masks_path=Path("masks")
    )
    make_paths_absolute(config)
    parser = config.pipeline.datamanager.dataparser
    assert (parser.data, parser.colmap_path, parser.masks_path) == (
        tmp_path / "cap",
        Path("sparse/0"),
        tmp_path / "masks",
    )
    config.pipeline.datamanager.dataparser = InfNeRFDemoDataParserConfig(cache_dir=Path("towns"))
    make_paths_absolute(config)
    assert config.pipeline.datamanager.dataparser.cache_dir == tmp_path / "towns"
    config.pipeline.datamanager.dataparser = NerfstudioDataParserConfig(data=Path("cap"))
    config.pipeline.datamanager.data = Path("cap/transforms.json")
    make_paths_absolute(config)
    assert config.pipeline.datamanager.dataparser.data == tmp_path / "cap" / "transforms.json", "as it will be read"


def test_a_moved_run_is_written_anew_for_nerfstudio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path / "there")
    before = (run / "config.yml").read_text()
    here = tmp_path / "x"  # not three deep, and named after no method
    run.rename(here)
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    RewriteConfig(run=Path("x"), data=Path("photos")).main()
    monkeypatch.chdir("/")
    assert f"ns-viewer --load-config {here}/config.yml" in capsys.readouterr().out
    config = yaml.load((here / "config.yml").read_text(), Loader=yaml.Loader)  # as nerfstudio does
    assert config.get_checkpoint_dir() == here / "nerfstudio_models" and config.load_step == 7
    assert config.method_name == "infnerf", "by which nerfstudio finds the data manager"
    assert config.pipeline.datamanager.data == tmp_path / "photos"
    assert (here / BEFORE).read_text() == before
    here.rename(tmp_path / "y")
    RewriteConfig(run=tmp_path / "y").main()
    config = yaml.load((tmp_path / "y" / "config.yml").read_text(), Loader=yaml.Loader)
    assert config.get_base_dir() == tmp_path / "y" and (tmp_path / "y" / BEFORE).read_text() == before
    assert sorted(file.name for file in (tmp_path / "y").iterdir()) == [BEFORE, "config.yml", "nerfstudio_models"]


def test_a_run_that_is_back_in_its_place_needs_no_other(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    run.rename(tmp_path / "x")
    RewriteConfig(run=tmp_path / "x").main()
    (tmp_path / "x").rename(run)
    config, folder = load_run_config(run)
    assert folder == run and config.run_folder == tmp_path / "x"
    RewriteConfig(run=run).main()
    assert load_run_config(run)[0].run_folder is None and load_run_config(run)[0].get_base_dir() == run


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path)
    before = (run / "config.yml").read_text()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match="config.yml cannot be written .Permission denied.: allow writing there"):
        RewriteConfig(run=run).main()
    assert (run / "config.yml").read_text() == before
    with pytest.raises(InputError, match="--data .*nowhere: there is no such folder"):
        RewriteConfig(run=run, data=tmp_path / "nowhere").main()


def test_no_configuration_is_read_by_nerfstudios_loader() -> None:
    """The one place that reads config.yml is this package's."""
    package = Path(load_run_config.__code__.co_filename).parents[1]
    unsafe = re.compile(r"yaml\.(Loader|UnsafeLoader|FullLoader|load\(|unsafe_load|full_load)|import eval_setup")
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        for line in path.read_text().splitlines()
        if unsafe.search(line) and "Loader=UniqueKeyLoader" not in line
    ]
    assert found == []
