"""Run files: includes, overrides, and what a user is told when something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from rae_scale.config import Config, ConfigError, dump_config, load_config, parse_config


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A configs folder with two includes and one run file that uses both."""
    files = {
        "engine/one.yaml": "engine: {name: zero, zero_stage: 2}\nparallel: {dp_shard: 2}\n",
        "engine/two.yaml": "engine: {zero_stage: 3}\n",
        "run/mine.yaml": "include: [engine/one, engine/two]\nrun: {max_steps: 7}\nengine: {precision: fp32}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_includes_merge_in_order_and_the_file_itself_wins(configs: Path) -> None:
    config = load_config(configs / "run/mine.yaml")
    assert config.engine.name == "zero"
    assert config.engine.zero_stage == 3
    assert config.engine.precision == "fp32"
    assert config.parallel.dp_shard == 2
    assert config.run.max_steps == 7


def test_includes_are_found_from_inside_the_run_folder(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(configs / "run")
    assert load_config("mine.yaml").engine.zero_stage == 3


def test_overrides_win_over_files(configs: Path) -> None:
    config = load_config(configs / "run/mine.yaml", ["run.max_steps=9", "engine.zero_stage=1"])
    assert config.run.max_steps == 9
    assert config.engine.zero_stage == 1


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.max_grad_norm=1e-4", 1e-4),
        ("flow.shift=null", None),
        ("run.tensorboard=false", False),
        ("run.dir=runs/a=b", "runs/a=b"),
        ("run.sample_prompts=[a red circle, two squares]", ("a red circle", "two squares")),
        ("data.prompt_template=Please draw {caption}", "Please draw {caption}"),
    ],
)
def test_override_values_are_typed(override: str, value: object) -> None:
    section, _, rest = override.partition(".")
    config = parse_config({}, [override])
    assert getattr(getattr(config, section), rest.partition("=")[0]) == value


def test_overrides_leave_the_given_tree_alone() -> None:
    tree = {"run": {"seed": 1}}
    assert parse_config(tree, ["run.seed=2"]).run.seed == 2
    assert tree == {"run": {"seed": 1}}


def test_a_dumped_config_loads_as_an_equal_one(tmp_path: Path) -> None:
    config = parse_config(
        {
            "stage": "decoder",
            "optim": {"groups": {"decoder": {"lr": 5e-5}}, "ema_decay": 0.9978},
            "data": {"sources": [{"path": "somewhere", "weight": 2}]},
            "sampler": {"guidance_interval": [0.1, 0.9]},
        }
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_the_defaults_are_the_papers_pretraining_recipe() -> None:
    config = Config()
    assert config.data.global_batch_size == 2048
    assert config.run.max_steps == 30_000
    assert config.optim.groups["llm"].lr == 5e-5
    assert config.optim.groups["dit"].lr == 5e-4
    assert config.optim.groups["dit"].betas == (0.9, 0.95)
    assert config.flow.flow_weight == 2.0


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"rnu": {}}, "unknown key 'rnu': did you mean 'run'"),
        ({"run": {"max_step": 3}}, "unknown key 'run.max_step': did you mean 'max_steps'"),
        ({"engine": {"zzzz": 3}}, "unknown key 'engine.zzzz': known keys here are name, zero_stage"),
        ({"data": {"sources": [{"path": "x", "wieght": 1}]}}, "'data.sources.0.wieght': did you mean 'weight'"),
        ({"optim": {"groups": {"llm": {"lr": 1, "lrr": 1}}}}, "'optim.groups.llm.lrr': did you mean 'lr'"),
        ({"data": {"sources": [{"weight": 1}]}}, "data.sources.0.path is missing"),
        ({"engine": {"zero_stage": 4}}, "engine.zero_stage=4: Input should be 1, 2 or 3"),
        ({"run": {"max_steps": 0}}, "run.max_steps=0: Input should be greater than 0"),
        ({"run": None}, "run=None: Input should be a valid dictionary"),
    ],
)
def test_a_wrong_key_or_value_is_named(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(tree, origin="my.yaml")
    assert message in str(raised.value)
    assert str(raised.value).startswith("my.yaml: ")


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config({"run": {"seed": -1}, "engine": {"name": "horovod"}})
    assert len(str(raised.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.max_steps", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("run.dir={", "not valid YAML"),
        ("run.dir.name=x", "run.dir is a value, not a section"),
        ("data.sources.0.path=x", "data.sources is a list; give it whole"),
        ("run.max_stepz=4", "did you mean 'max_steps'"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        parse_config({"run": {"dir": "x"}, "data": {"sources": []}}, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"run: [", "not valid YAML"),
        (b"- a\n- b\n", "is a mapping of sections, this is list"),
        (b"", "is a mapping of sections, this is NoneType"),
        (b"run: {seed: 1}\nrun: {dir: x}\n", "found the key 'run' twice"),
        (b"run: {seed: 1, seed: 2}\n", "found the key 'seed' twice"),
        (b"run: {dir: \xff}\n", "not a UTF-8 text file"),
        (b"include: engine/one\n", "must be a list"),
        (b"include: [engine/missing]\n", "missing.yaml, which does not exist"),
        (b"include: [run/mine]\n", "cannot include others"),
    ],
)
def test_a_broken_file_is_named(configs: Path, text: bytes, message: str) -> None:
    broken = configs / "run/broken.yaml"
    broken.write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        load_config(broken)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such config file"):
        load_config(tmp_path / "nothing.yaml")


def test_yaml_cannot_construct_python_objects(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("run: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "evil.yaml")
