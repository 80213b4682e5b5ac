"""Settings: what a wrong key, type, value or combination says, and that the presets in configs/ are right."""

import ast
import dataclasses
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import pytest
import torch
import tyro
import yaml
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from infnerf_ns import presets
from infnerf_ns.errors import InputError
from infnerf_ns.validation import Range, Report, apply_yaml, enforce, read_yaml, validate_config


@dataclass
class Tree:
    max_level: Annotated[int, Range(0, 20, warn_above=15)] = 6
    """deepest level"""
    kind: Literal["independent", "residual"] = "residual"
    """kind of children"""
    sharpness: Annotated[float, Range(0.1, 100.0)] = 2.0
    box: Annotated[Optional[tuple[float, ...]], Range(-1.0, 1.0)] = None
    min_level: int = 0

    def check(self) -> list[str]:
        return [f"--tree.min-level {self.min_level} > {self.max_level}"] if self.min_level > self.max_level else []


@dataclass
class Settings:
    tree: Tree = field(default_factory=Tree)
    folder: Path = Path("outputs")
    verbose: bool = False
    optimizers: dict[str, Any] = field(default_factory=lambda: {"grids": {"optimizer": Tree()}})


def changed(**values: Any) -> Settings:
    return Settings(tree=dataclasses.replace(Tree(), **values))


def test_defaults_are_without_findings():
    report = validate_config(Settings())
    assert report.problems == [] and report.warnings == []


@pytest.mark.parametrize(
    "values, line",
    [
        ({"max_level": 21}, "--tree.max-level 21: allowed is 0 to 20"),
        ({"max_level": -1, "min_level": -1}, "--tree.max-level -1: allowed is 0 to 20"),
        ({"max_level": 2.5}, "--tree.max-level 2.5: must be a whole number"),
        ({"max_level": True}, "--tree.max-level True: must be a whole number"),
        ({"kind": "mixed"}, "--tree.kind mixed: must be one of independent, residual"),
        ({"sharpness": "high"}, "--tree.sharpness high: must be a number"),
        ({"sharpness": float("inf")}, "--tree.sharpness inf: allowed is 0.1 to 100"),
        ({"box": (0.0, 3.0)}, "--tree.box 0.0 3.0: allowed is -1 to 1"),
        ({"min_level": 9}, "--tree.min-level 9 > 6"),
    ],
)
def test_each_problem_is_a_line_with_flag_value_and_what_is_allowed(values, line):
    report = validate_config(changed(**values))
    assert report.problems == [line]
    with pytest.raises(InputError) as error:
        enforce(report)
    assert str(error.value) == f"infnerf: {line}"


def test_not_a_number_is_a_problem():
    assert "--tree.sharpness nan: is not a number" in validate_config(changed(sharpness=float("nan"))).problems


def test_infinity_is_no_value_of_an_open_range():
    @dataclass
    class Open:
        length: Annotated[float, Range(0.0)] = 1.0

    assert validate_config(Open(float("inf"))).problems == ["--length inf: give a finite number"]
    assert validate_config(Open(1e30)).problems == []


def test_a_dictionary_of_settings_is_checked_too():
    settings = Settings()
    settings.optimizers["grids"]["optimizer"].max_level = 99
    assert validate_config(settings).problems == ["--optimizers.grids.optimizer.max-level 99: allowed is 0 to 20"]


def test_large_but_legal_values_warn(capsys):
    enforce(validate_config(changed(max_level=16)))
    assert capsys.readouterr().err == "infnerf: warning: --tree.max-level 16 is unusually large (above 15)\n"


def test_several_problems_are_a_line_each(capsys):
    with pytest.raises(InputError, match="2 settings are wrong"):
        enforce(validate_config(changed(max_level=50, kind="mixed")))
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_command_line_parser_takes_annotated_ranges():
    assert tyro.cli(Settings, args=["--tree.max-level", "5", "--tree.box", "0.5", "0.25"]).tree.box == (0.5, 0.25)


def test_yaml_sets_nested_values_with_the_types_of_the_fields():
    settings = Settings()
    text = """
        tree: {max-level: 4, sharpness: 1e-1, box: [0, 1]}
        folder: runs
        optimizers: {grids: {optimizer: {max_level: 3}}}
    """
    apply_yaml(settings, yaml.safe_load(text), "my.yaml")
    assert settings.tree == Tree(max_level=4, sharpness=0.1, box=(0.0, 1.0))
    assert isinstance(settings.tree.sharpness, float) and settings.folder == Path("runs")
    assert settings.optimizers["grids"]["optimizer"].max_level == 3


@pytest.mark.parametrize(
    "mapping, words",
    [
        (
            {"tree": {"max_levle": 3}},
            ["my.yaml: unknown key 'tree.max_levle', did you mean 'max_level'?", "allowed here: max_level"],
        ),
        ({"optimizers": {"grid": {}}}, ["unknown key 'optimizers.grid', did you mean 'grids'?"]),
        ({"tree": {"max_level": "four"}}, ["my.yaml: 'tree.max_level' must be a whole number, found 'four' (str)"]),
        ({"tree": {"kind": "mixed"}}, ["'tree.kind' must be one of independent, residual, found 'mixed'"]),
        ({"tree": 3}, ["'tree' is a section with keys of its own, found 3 (int)"]),
        ({"verbose": 1}, ["'verbose' must be True or False, found 1 (int)"]),
        ({"tree": {"box": 3}}, ["'tree.box' must be a list of a number or empty"]),
    ],
)
def test_wrong_yaml_names_the_file_the_key_and_the_remedy(mapping, words):
    with pytest.raises(InputError) as error:
        apply_yaml(Settings(), mapping, "my.yaml")
    assert all(part in str(error.value) for part in words), str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\nb: [2\n", "bad.yaml, line 3: not valid YAML"),
        ("a: 1\na: 2\n", "bad.yaml, line 2: not valid YAML: the key 'a' is given twice"),
        ("- a\n- b\n", "bad.yaml: expected 'key: value' lines"),
    ],
)
def test_unreadable_yaml_names_the_file_and_line(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_yaml(tmp_path / "bad.yaml")


def test_missing_yaml_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot read the settings file .*none.yaml"):
        read_yaml(tmp_path / "none.yaml")


# ------------------------------------------------------------------------------------------------ the shipped presets


@pytest.mark.parametrize("name", ["infnerf", "infnerf-small", "infnerf-big"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shipped_presets_load_without_findings(name, device):
    config = presets.load_preset(name, device)
    report = validate_config(config)
    assert report.problems == [] and report.warnings == []
    assert config.method_name == name and config.machine.device_type == device
    assert config.viewer.quit_on_train_completion, "ns-train must end by itself"
    assert presets.preset_description(name)


def test_presets_are_the_files_in_configs():
    assert presets.preset_names() == ["infnerf", "infnerf-big", "infnerf-small"]
    with pytest.raises(
        InputError, match="there is no preset 'infnerf-tiny'; there are infnerf, infnerf-big, infnerf-small"
    ):
        presets.load_preset("infnerf-tiny")


def advised(**changes: Any) -> Report:
    """Findings on the preset infnerf with some options changed; keys are dotted, with ``__`` for the dots."""
    config = presets.load_preset("infnerf", "cpu")
    for path, value in changes.items():
        *sections, name = path.split("__")
        section = config if not sections else config.pipeline.model
        for part in sections:
            section = getattr(section, part)
        setattr(section, name, value)
    return validate_config(config)


def test_combinations_that_cannot_work_or_are_rarely_wanted_are_named():
    resolution = advised(octree__node_resolution=16).problems
    assert len(resolution) == 1 and "--pipeline.model.octree.node-resolution 16: must be above" in resolution[0]
    (rounds,) = advised(sampler__proposal_samples=()).problems
    assert "--pipeline.model.sampler.proposal-samples: at least one round is needed" in rounds
    deep = advised(octree__max_level=16, max_num_iterations=100_000)
    assert deep.problems == []
    assert deep.warnings == ["--pipeline.model.octree.max-level 16 is unusually large (above 15)"]
    short = advised(max_num_iterations=3000)
    assert short.problems == [] and len(short.warnings) == 1
    assert "--max-num-iterations 3000: octree levels above 1 never start" in short.warnings[0]


def test_presets_do_not_share_values():
    first, second = presets.load_preset("infnerf"), presets.load_preset("infnerf")
    first.optimizers["grids"]["optimizer"].lr = 7.0
    first.pipeline.datamanager.train_num_rays_per_batch = 7
    assert second.optimizers["grids"]["optimizer"].lr != 7.0
    assert second.pipeline.datamanager.train_num_rays_per_batch != 7


def test_the_device_section_comes_on_top_of_the_common_one(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("common: {max_num_iterations: 10, steps_per_save: 4}\ncuda: {max_num_iterations: 20}\n")
    assert presets.load_preset(path, "cpu").max_num_iterations == 10
    config = presets.load_preset(path, "cuda")
    assert (config.max_num_iterations, config.steps_per_save, config.method_name) == (20, 4, "infnerf")


@pytest.mark.parametrize(
    "text, message",
    [
        ("max_num_iterations: 10", "mine.yaml: unknown section 'max_num_iterations'; a preset has the sections"),
        ("common: {max_num_iterations: 0}", "mine.yaml: --max-num-iterations 0: allowed is at least 1"),
        ("common: 3", "the section 'common' must hold"),
    ],
)
def test_a_wrong_preset_file_is_one_line(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        presets.load_preset(tmp_path / "mine.yaml")


def test_settings_from_the_environment_come_on_top_of_each_preset(tmp_path, monkeypatch):
    from infnerf_ns.methods import method

    path = tmp_path / "mine.yaml"
    path.write_text("common: {max_num_iterations: 123}")
    monkeypatch.setenv(presets.SETTINGS_VARIABLE, str(path))
    specification = method("infnerf-small")
    assert specification.config.max_num_iterations == 123 and specification.config.method_name == "infnerf-small"
    monkeypatch.setenv(presets.SETTINGS_VARIABLE, str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match="INFNERF_SETTINGS=.*none.yaml: there is no such file"):
        method("infnerf-small")


def test_an_installed_package_finds_its_presets_inside_itself(tmp_path, monkeypatch):
    (tmp_path / "infnerf_ns" / "configs").mkdir(parents=True)
    monkeypatch.setattr(presets, "__file__", str(tmp_path / "infnerf_ns" / "presets.py"))
    assert presets.presets_folder() == tmp_path / "infnerf_ns" / "configs"


def test_every_method_is_registered_with_nerfstudio_under_its_name():
    entries = metadata.entry_points(group="nerfstudio.method_configs")
    methods = {entry.name: entry.load() for entry in entries if entry.value.startswith("infnerf_ns.")}
    assert sorted(methods) == presets.preset_names()
    for name, specification in methods.items():
        assert specification.config.method_name == name
        assert specification.config.machine.device_type == ("cuda" if torch.cuda.is_available() else "cpu")


OPTIONS = [
    *("model.py", "field_config.py", "sampler.py", "tree_building.py", "pipeline.py"),
    *("losses/config.py", "losses/schedules.py", "streaming/config.py"),
    *("data/pyramid_datamanager.py", "data/demo_dataparser.py", "training/*.py", "cli/*.py"),
]
"""Where the options of ``ns-train infnerf`` and of the own commands are defined."""


def undocumented(path: Path) -> dict[str, list[str]]:
    """The option classes of a module, and which of their fields no string follows."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", [])]
        if not any("dataclass" in each for each in decorators):
            continue
        if node.name.endswith("Config") or path.parent.name == "cli":
            following = zip(node.body, [*node.body[1:], None])
            fields = [(each, after) for each, after in following if isinstance(each, ast.AnnAssign)]
            found[node.name] = [
                each.target.id
                for each, after in fields
                if not each.target.id.startswith("_")
                and not (isinstance(after, ast.Expr) and isinstance(getattr(after.value, "value", None), str))
            ]
    return found


def test_every_option_says_what_it_does():
    package = Path(presets.__file__).parent
    found = {}
    for pattern in OPTIONS:
        for path in package.glob(pattern):
            found.update(undocumented(path))
    assert {"InfNeRFModelConfig", "LossConfig", "StabilityConfig", "NodeAdamOptimizerConfig", "Quality"} < set(found)
    assert {name: fields for name, fields in found.items() if fields} == {}


def test_the_settings_module_needs_neither_nerfstudio_nor_torch():
    """Regression guard: a dataparser entry point may import it, and nerfstudio would then import itself in a circle."""
    import subprocess

    code = "import sys, infnerf_ns.validation; sys.exit(any(m in sys.modules for m in ('torch', 'nerfstudio')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_with_transforms_json_needs_no_parser_name() -> None:
    """``ns-train infnerf --data SCENE``, as with nerfacto; nerfstudio itself reads Blender scenes by default."""
    for name in presets.preset_names():
        dataparser = presets.load_preset(name).pipeline.datamanager.dataparser
        assert type(dataparser) is NerfstudioDataParserConfig


def test_runs_of_earlier_versions_get_the_defaults_of_what_they_lack():
    """Their config.yml has no word of growth and of schedules, nor of any option that came later."""
    config = presets.load_preset("infnerf", "cpu")
    config.pipeline.model.losses.distortion = 0.123
    for holder, names in (
        (config.pipeline.model, ("growth", "streaming")),
        (config.pipeline.model.losses, ("schedules", "multi_scale")),
        (config.pipeline.model.octree, ("start",)),
    ):
        for name in names:
            del holder.__dict__[name]
    model = yaml.load(yaml.dump(config), Loader=yaml.Loader).pipeline.model
    new = presets.load_preset("infnerf", "cpu").pipeline.model
    assert model.growth == new.growth and model.streaming == new.streaming and model.octree == new.octree
    assert model.losses.schedules == new.losses.schedules and model.losses.multi_scale == 0
    assert model.losses.distortion == 0.123
