"""Configuration: YAML 1.2 numbers, one-level extends, overrides, and one line per fault with its place."""

import ast
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from core.config import (
    MAX_FILE_BYTES,
    Config,
    as_overrides,
    config_hash,
    differences,
    dotted_keys,
    dump_config,
    load_config,
    read_yaml,
)
from core.errors import ConfigError
from pretrain.settings import PretrainConfig
from robustness.settings import RobustConfig
from tools.chain import ChainConfig, load_chain
from transfer.classification.settings import ClassifyConfig
from transfer.detection.settings import DetectConfig
from transfer.segmentation.settings import SegmentConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("core", "pretrain", "transfer", "robustness", "tools")
CHAINS = sorted((ROOT / "configs" / "chain").glob("*.yaml"))
RECIPES = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(CHAINS))
STAGES: dict[str, tuple[type[Config], tuple[str, ...]]] = {  # what a recipe, or a folder of them, configures and needs
    "pretrain": (PretrainConfig, ()),
    "demo/pretrain": (PretrainConfig, ()),
    "demo/finetune": (ClassifyConfig, ("backbone=z",)),
    "demo/robust": (RobustConfig, ()),
    "demo/detect": (DetectConfig, ()),
    "demo/segment": (SegmentConfig, ()),
    "transfer": (ClassifyConfig, ("backbone=z",)),
    "transfer/detect": (DetectConfig, ("backbone=z",)),  # recipes whose name begins so
    "transfer/segment": (SegmentConfig, ("backbone=z",)),
    "robustness": (RobustConfig, ("model=z",)),
}
NEEDED = ("data=x", "out=y")

WriteYaml = Callable[..., Path]


@pytest.fixture
def write_yaml(tmp_path: Path) -> WriteYaml:
    def write(text: str | bytes, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def load(*overrides: str, path: Path | None = None) -> PretrainConfig:
    return load_config(PretrainConfig, path, [*NEEDED, *overrides])


def faults(*overrides: str, path: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*overrides, path=path)
    return str(caught.value).splitlines()


def yaml_fault(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path.parent}/", "")


# --- YAML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1.5e-4", 1.5e-4), ("1E3", 1000.0), (".5", 0.5), ("5.", 5.0), ("-0.25", -0.25), ("0.0", 0.0),
        ("010", 10), ("-7", -7), ("+7", 7), ("0o17", 15), ("0x1F", 31), ("true", True), ("False", False),
        ("null", None), ("~", None), ("", None), ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"),
        ('"1e-4"', "1e-4"), ("'12'", "12"), ('"true"', "true"), ("'null'", "null"), ("1_000", "1_000"),
        ("12:30:45", "12:30:45"), ("2001-01-01", "2001-01-01"), ("1e", "1e"), ("inf", "inf"), ("=", "="),
        ("[1, 1e-2, no]", [1, 0.01, "no"]), ("{b: 010}", {"b": 10}),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(write_yaml: WriteYaml, text: str, value: Any) -> None:
    tree, _ = read_yaml(write_yaml(f"a: {text}\n"))
    assert tree == {"a": value}
    assert type(tree["a"]) is type(value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: 1\nb: 2\na: 3\n", "recipe.yaml:3: a: the key is given twice"),
        ("g:\n  a: 1\n  a: 2\n", "recipe.yaml:3: a: the key is given twice"),
        ("a: &x 1\nb: *x\n", "recipe.yaml:1: YAML anchors and aliases are not read"),
        ("a: *x\n", "recipe.yaml:1: YAML anchors and aliases are not read"),
        ("\na: !!python/object/apply:os.system [id]\n", "recipe.yaml:2: YAML tags are not read"),
        ("a: !!str 1\n", "recipe.yaml:1: YAML tags are not read"),
        ("a: 1e999\n", "recipe.yaml:1: 1e999: too large for a number"),
        ("a: .inf\n", "recipe.yaml:1: .inf: expected a finite number"),
        ("a: .nan\n", "recipe.yaml:1: .nan: expected a finite number"),
        ("a: 1\n? [b]\n: 2\n", "recipe.yaml:2: expected a plain key"),
        ("- 1\n", "recipe.yaml: expected `key: value` lines"),
        ("just words\n", "recipe.yaml: expected `key: value` lines"),
        ("a: 1\n---\nb: 2\n", "recipe.yaml:2: not YAML"),
        ("a: 1\n  b: 2\n", "recipe.yaml:2: not YAML"),
        ("a: [1, 2\n", "recipe.yaml:2: not YAML"),
        ("a: \x00\n", "recipe.yaml: not YAML: unacceptable character #x0000"),
        (b"a: caf\xe9\n", "recipe.yaml: not UTF-8 text"),
    ],
)
def test_what_is_no_plain_yaml_is_one_line(write_yaml: WriteYaml, text: str | bytes, fault: str) -> None:
    assert yaml_fault(write_yaml(text)).startswith(fault)


BILLION_LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: " + "[" * 15_000, "nested deeper than 16 levels"),
        ("a: " + "{a: " * 7_000, "nested deeper than 16 levels"),
        ("\n".join(" " * i + "a:" for i in range(200)), "nested deeper than 16 levels"),
        (BILLION_LAUGHS, "anchors and aliases"),
        ("a: 1\n" * (MAX_FILE_BYTES // 5 + 1), "larger than"),
        ("a: 0x" + "f" * 20_000 + "\nb: [", "not YAML"),
    ],
)
def test_bombs_are_refused_quickly(write_yaml: WriteYaml, text: str, reason: str) -> None:
    path = write_yaml(text)
    start = time.process_time()
    assert reason in yaml_fault(path)
    assert time.process_time() - start < 1


def test_a_sparse_file_of_a_gigabyte_is_not_read(write_yaml: WriteYaml) -> None:
    path = write_yaml("a: 1\n")
    with path.open("r+b") as file:
        file.truncate(2**30)
    start = time.process_time()
    assert "larger than" in yaml_fault(path)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("digits", ["9" * 6000, "0x" + "f" * 6000, "0o" + "7" * 6000])
def test_endless_numbers_are_a_short_line(write_yaml: WriteYaml, digits: str) -> None:
    (line,) = faults(path=write_yaml(f"data: x\nseed: {digits}\n"))
    assert "recipe.yaml:2: " in line
    assert len(line) < 400


def test_a_number_beyond_floating_point_is_refused(write_yaml: WriteYaml) -> None:
    (line,) = faults(path=write_yaml(f"data: x\nblr: {'9' * 399}\n"))
    assert "recipe.yaml:2: blr: expected a finite number, got 999" in line


def test_a_byte_order_mark_and_an_empty_file_are_fine(write_yaml: WriteYaml) -> None:
    assert load(path=write_yaml(b"\xef\xbb\xbfepochs: 90\n")).epochs == 90
    assert load(path=write_yaml("# nothing but a comment\n")) == load()


# --- extends --------------------------------------------------------------------------------------------------------


def test_extends_merges_groups_key_by_key(write_yaml: WriteYaml) -> None:
    write_yaml("epochs: 90\nvit: {embed_dim: 64, depth: 2, num_heads: 4}\nmean: [0.1, 0.2, 0.3]\n", "base.yaml")
    config = load(path=write_yaml("extends: base.yaml\nbatch_size: 8\nvit: {depth: 3}\nmean: [0.4, 0.5, 0.6]\n"))
    assert (config.epochs, config.batch_size) == (90, 8)
    assert config.vit.model_dump(exclude_none=True) == {"embed_dim": 64, "depth": 3, "num_heads": 4}
    assert config.mean == (0.4, 0.5, 0.6)


def test_extends_is_relative_to_the_file_and_names_the_file_of_each_fault(
    write_yaml: WriteYaml, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    write_yaml("\nepochs: ten\n", "base.yaml")
    lines = faults(path=write_yaml("extends: ../base.yaml\nseed: -1\n", "sub/top.yaml"))
    assert [line.replace(str(tmp_path), "") for line in lines] == [
        "/sub/top.yaml:2: seed: expected greater than or equal to 0, got -1",
        '/sub/../base.yaml:2: epochs: expected a valid integer, got "ten"',
    ]


def test_extends_goes_one_level(write_yaml: WriteYaml) -> None:
    write_yaml("epochs: 90\n", "a.yaml")
    write_yaml("epochs: 91\nextends: a.yaml\n", "b.yaml")
    (line,) = faults(path=write_yaml("extends: b.yaml\n"))
    assert "b.yaml:2: extends: only one level" in line


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("extends: missing.yaml\n", "missing.yaml: No such file or directory"),
        ("extends: .\n", "Is a directory"),
        ("seed: 1\nextends: 3\n", "recipe.yaml:2: extends: expected a file name, got 3"),
        ('extends: "a\\0b"\n', "recipe.yaml:1: extends: expected a file name"),
    ],
)
def test_a_base_that_cannot_be_read_is_named(write_yaml: WriteYaml, text: str, fault: str) -> None:
    (line,) = faults(path=write_yaml(text))
    assert fault in line


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    (line,) = faults(path=tmp_path / "typo.yaml")
    assert "typo.yaml: No such file or directory" in line


# --- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_reach_into_groups(write_yaml: WriteYaml) -> None:
    path = write_yaml("epochs: 90\nloader: {num_workers: 3, timeout_s: 7}\n")
    config = load("epochs=95", "loader.num_workers=2", "blr=1e-3", "optim.beta2=0.9", path=path)
    assert (config.epochs, config.blr, config.optim.beta2) == (95, 1e-3, 0.9)
    assert (config.loader.num_workers, config.loader.timeout_s) == (2, 7)


def test_plain_values_become_overrides_that_read_back_the_same() -> None:
    class Free(Config):
        tree: dict[str, Any]

    odd = [
        "true",
        "1e-4",
        "",
        "~",
        "x y",
        "#x",
        "[x",
        "{a",
        "'",
        "\\n",
        'a "b"\nc: d',
        "- x",
        "é\u2028🙂: ",
        "a #b",
        " a ",
        "a=b",
    ]
    tree = {"n": 1, "group": {"x": 1e-4, "none": None, "flag": True, "deep": {"list": [1, "2", {"0": 3}], "empty": {}}},
        "map": {"0": 1, "11": 255}, **{f"odd_{i}": text for i, text in enumerate(odd)}}  # fmt: skip
    texts = as_overrides(tree)
    assert {"n=1", "group.x=0.0001", "group.none=null", 'map={"0": 1, "11": 255}', "odd_4=x y"} <= set(texts)
    assert load_config(Free, None, [f"tree.{text}" for text in texts]).tree == tree


def test_overrides_take_flow_lists_groups_and_null() -> None:
    config = load("img_size=[224, 112]", "vit={patch_size: 14, num_heads: 12}", "optim.lr=0.1", "optim.lr=null")
    assert config.img_size == (224, 112)
    assert (config.vit.patch_size, config.vit.num_heads) == (14, 12)
    assert config.optim.lr is None


@pytest.mark.parametrize(
    "name",
    [
        "/photos of 2019/a b", "a: b", "/photos #1", "#1", "- a", "@x", "*.tar", "&a", "!x", "%a", "`x", "a\nb", " a ",
        "a\tb", "dir/{000..127}.tar", "{000..127}.tar", "http://h/s-{0..9}.tgz", "日本", "a=b", "C:\\x", "it's",
        "a'b\"c",
        "x: {y", "~/x", "?", "a,b", "[x", "1e5/x",
    ],
)  # fmt: skip
def test_paths_with_odd_characters_arrive_as_they_are(name: str) -> None:
    config = load(f"data={name}", f"out={name}", "loader.stream_images=9")
    assert config.data == name
    assert config.out == Path(name)


def test_quotes_make_text_of_a_number() -> None:
    assert load("data='123'").data == "123"
    assert load('data="a\\tb"').data == "a\tb"
    assert faults("data=123") == ["command line: data: expected a valid string, got 123"]


@pytest.mark.parametrize("override", ["epochs", "=3", "a..b=1", ".a=1", "a.=1", "a b=1", "\x1b[1m=2"])
def test_what_is_no_override_is_refused(override: str) -> None:
    (line,) = faults(override)
    assert line.startswith("command line: ")
    assert line.endswith(": expected key=value, as in epochs=10 or loader.num_workers=2")
    assert line.isprintable()


def test_a_value_is_not_a_group_nor_a_group_a_value(write_yaml: WriteYaml) -> None:
    path = write_yaml("epochs: 3\n")
    assert faults("epochs.x=2", path=path) == ["command line: epochs.x: epochs is a single value, not a group of keys"]
    path = write_yaml("seed: 3\n")
    assert faults("epochs.x=2", path=path) == ['command line: epochs: expected a valid integer, got {"x": 2}']
    (line,) = faults("loader=3")
    assert line.startswith("command line: loader: ")


def test_bytes_that_are_no_utf8_are_named() -> None:
    assert faults("data=caf\udce9") == [
        "command line: data: caf\\udce9: not UTF-8 text; rename the file, or give a link to it"
    ]


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("num_workers", "loader.num_workers"), ("epoch", "epochs"), ("batchsize", "batch_size"), ("lr", "optim.lr"),
        ("vit.embed_dm", "vit.embed_dim"), ("decoder.embed_dm", "decoder.embed_dim"), ("loader.momentun", "momentum"),
        ("log.evry_steps", "log.every_steps"), ("checkpoint.evry_steps", "checkpoint.every_steps"),
        ("patch_size", "vit.patch_size"),
        ("accumulation", "engine.accumulation"), ("mask_ration", "mask_ratio"), ("probe.crop", "probe.crop_ratio"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    assert faults(f"{key}=1") == [f"command line: {key}: unknown key; did you mean '{nearest}'?"]


def test_an_unknown_key_far_from_all_names_the_documentation(write_yaml: WriteYaml) -> None:
    (line,) = faults("zzzz=1")
    assert line.startswith("command line: zzzz: unknown key; ") and "did you mean" not in line
    (line,) = faults(path=write_yaml("seed: 1\nloader.num_workers: 2\n"))
    assert "recipe.yaml:2: loader.num_workers: unknown key; in a file a group is written as a key of its own" in line


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("epochs=ten", 'epochs: expected a valid integer, got "ten"'),
        ("epochs=1.5", "epochs: expected a valid integer, got 1.5"),
        ("epochs='3'", 'epochs: expected a valid integer, got "3"'),
        ("norm_pix_loss=yes", 'norm_pix_loss: expected a valid boolean, got "yes"'),
        ("norm_pix_loss=1", "norm_pix_loss: expected a valid boolean, got 1"),
        ("blr=high", 'blr: expected a valid number, got "high"'),
        ("blr=true", "blr: expected a valid number, got true"),
        ("blr=.nan", 'blr: expected a valid number, got ".nan"'),
        ("blr=1e999", 'blr: expected a valid number, got "1e999"'),
        ("data=null", "data: expected a valid string, got null"),
        ("mean=[0.1, a, 0.3]", 'mean: expected a valid number, got "a"'),
        ("method=rcmae", "method: expected 'rc_mae' or 'mae', got \"rcmae\""),
        ("batch_size=0", "batch_size: expected greater than 0, got 0"),
        ("mask_ratio=1", "mask_ratio: expected less than 1, got 1"),
        ("mask_ratio=0.0", "mask_ratio: expected greater than 0, got 0.0"),
        ("momentum=1.1", "momentum: expected less than or equal to 1, got 1.1"),
        ("seed=4294967296", "seed: expected less than 4294967296, got 4294967296"),
        ("checkpoint.keep=1", "checkpoint.keep: expected greater than or equal to 2, got 1"),
        ("augment.max_ratio=0.5", "augment.max_ratio: expected greater than or equal to 1, got 0.5"),
        ("optim.clip_grad=0", "optim.clip_grad: expected greater than 0, got 0"),
    ],
)
def test_wrong_types_and_ranges_say_what_was_expected(override: str, fault: str) -> None:
    assert faults(override) == [f"command line: {fault}"]


def test_several_faults_come_at_once_each_with_its_place(write_yaml: WriteYaml) -> None:
    path = write_yaml("data: x\nepochs: ten\nloader:\n  num_wrokers: 2\nvit: {patch_size: 16}\nmask_ratio: 2\n")
    lines = faults("seed=-3", "vit={patch_sise: 8}", "augment.flip_ratio=no", path=path)
    places = sorted(
        line.replace(f"{path.parent}/", "").partition(": expected")[0].partition(": unknown")[0] for line in lines
    )
    assert places == [
        "command line: augment.flip_ratio",
        "command line: seed",
        "command line: vit.patch_sise",
        "recipe.yaml:2: epochs",
        "recipe.yaml:4: loader.num_wrokers",
        "recipe.yaml:6: mask_ratio",
    ]


def test_missing_keys_say_how_to_give_them() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, None, [])
    assert str(caught.value).splitlines() == [
        f"command line: {key}: missing; give it in the file or as {key}=VALUE on the command line"
        for key in ("data", "out")
    ]


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ("method=mae gamma=2.0", "gamma: has no effect with method=mae"),
        ("method=mae momentum=0.9", "momentum: has no effect with method=mae"),
        ("method=mae teacher.mask=own", "teacher: has no effect with method=mae"),
        ("warmup_epochs=10 epochs=10", "warmup_epochs=10: must be below epochs=10"),
        ("optim.lr=0.1 blr=0.1", "optim.lr and blr: both give the learning rate"),
        ("engine.accumulation=3 batch_size=8", "engine.accumulation=3: does not divide batch_size=8"),
        ("teacher.update=micro_batch", "teacher.update=micro_batch: needs engine.accumulation"),
        ("data=https://h/s.tar", "loader.stream_images: needed with shard URLs"),
        ("img_size=225", "img_size=225 is not divisible by patch_size=16"),
        ("img_size=[224,100]", "img_size=100 is not divisible by patch_size=16"),
        ("vit.patch_size=15", "img_size=224 is not divisible by patch_size=15"),
        ("vit.num_heads=5", "embed_dim=768 is not divisible by num_heads=5"),
        ("vit.embed_dim=30 vit.num_heads=5", "embed_dim=30 is not divisible by 4"),
        ("decoder.num_heads=3", "decoder.embed_dim=512 is not divisible by decoder.num_heads=3"),
        ("decoder.embed_dim=30 decoder.num_heads=5", "decoder.embed_dim=30 is not divisible by 4"),
        ("mask_ratio=0.999", "mask_ratio=0.999: leaves no patch to see or none to predict of 196"),
        ("img_size=16", "mask_ratio=0.75: leaves no patch to see or none to predict of 1"),
        ("mean=[0.5]", "mean and std: need 3 values each, as vit.in_chans says"),
        ("vit.in_chans=1", "mean and std: need 1 values each, as vit.in_chans says"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(overrides: str, fault: str) -> None:
    (line,) = faults(*overrides.split())
    assert line.startswith(f"command line: {fault}")


def test_all_contradictions_come_at_once(write_yaml: WriteYaml) -> None:
    path = write_yaml("method: mae\nmomentum: 0.9\ngamma: 2\n")
    lines = faults("warmup_epochs=900", "decoder.num_heads=3", path=path)
    assert len(lines) == 4
    assert all("recipe.yaml: " in line for line in lines)


# --- the models -----------------------------------------------------------------------------------------------------


def test_models_are_frozen() -> None:
    config = load()
    with pytest.raises(ValidationError, match="frozen"):
        config.epochs = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.loader.num_workers = 3  # type: ignore[misc]


IN_RANGE = (
    "method=mae", "data='1e-4'", "out=runs/no", "model=tiny", "img_size=[64, 32]", "batch_size=12", "epochs=3",
    "blr=1e-7",
    "warmup_epochs=0.25", "weight_decay=0", "mask_ratio=0.6", "norm_pix_loss=false", "seed=4294967295", "device=cpu",
    "mean=[0.1, 0, 1]", "picture_images=1", "vit={patch_size: 8, mlp_ratio: 2.5}", "decoder.depth=1",
    "optim.clip_grad=1e-3",
    "augment.max_ratio=2", "loader.num_workers=0", "engine.accumulation=4", "checkpoint.keep_every_steps=7",
    "cache='yes'", "probe.data='007'",
)  # fmt: skip


def reloaded(config: PretrainConfig, write_yaml: WriteYaml) -> PretrainConfig:
    return load_config(PretrainConfig, write_yaml(dump_config(config), "dumped.yaml"))


def test_a_dumped_configuration_reads_back_the_same(write_yaml: WriteYaml) -> None:
    config = load(*IN_RANGE)
    assert (config.data, config.cache, config.probe.data) == ("1e-4", Path("yes"), "007")
    again = reloaded(config, write_yaml)
    assert again == config
    assert config_hash(again) == config_hash(config) != config_hash(load())


@pytest.mark.parametrize(
    "name", ["1e-4", "0o17", "+.5", "-", "null", "no", "a #b", " a", "a\nb", "\x1b", "日本", "x" * 300, ""]
)
def test_any_text_survives_a_dump(write_yaml: WriteYaml, name: str) -> None:
    config = PretrainConfig(data=name, out=Path("y"))
    assert reloaded(config, write_yaml).data == name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_loads_and_reads_back_the_same(write_yaml: WriteYaml, path: Path) -> None:
    folder = path.parent.name
    names = (f"{folder}/{path.stem}", f"{folder}/{path.stem.partition('_')[0]}", folder)
    kind, needed = next(STAGES[name] for name in names if name in STAGES)
    config = load_config(kind, path, [*NEEDED, *needed])
    assert (config.data, config.out) == ("x", Path("y"))
    assert load_config(kind, write_yaml(dump_config(config), "dumped.yaml")) == config


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.stem)
def test_every_chain_loads_with_all_its_stages_and_reads_back_the_same(write_yaml: WriteYaml, path: Path) -> None:
    config, planned = load_chain(path, [])
    assert [stage.name for stage in planned] == list(config.stages)
    assert load_config(ChainConfig, write_yaml(dump_config(config), "dumped.yaml")) == config


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2


def test_differences_name_dotted_keys() -> None:
    old, new = load().model_dump(mode="json"), load("seed=3", "vit.depth=2", "mean=[0, 0, 0]").model_dump(mode="json")
    assert differences(old, new) == [
        "seed: 0 -> 3",
        "mean: [0.485, 0.456, 0.406] -> [0.0, 0.0, 0.0]",
        "vit.depth: None -> 2",
    ]
    assert differences(old, old) == []


def read_attributes() -> set[tuple[str, str]]:
    """(owner, name) of every attribute that the packages read, as in `config.epochs` or `config.loader.timeout_s`."""
    found = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add((ast.unparse(node.value).rpartition(".")[2], node.attr))
    return found


def unread_keys(model: type[BaseModel]) -> list[str]:
    reads = read_attributes()
    unread = []
    for key in dotted_keys(model):
        groups, _, leaf = key.rpartition(".")
        group = groups.rpartition(".")[2]
        owners = {"self", "config", "_config", group, f"{group}_config"}
        if not any((owner, leaf) in reads for owner in owners):
            unread.append(key)
    return unread


@pytest.mark.parametrize(
    "kind", [PretrainConfig, ClassifyConfig, DetectConfig, SegmentConfig, RobustConfig, ChainConfig]
)
def test_every_key_is_read_somewhere(kind: type[Config]) -> None:
    assert unread_keys(kind) == []


def test_a_key_that_nobody_reads_is_found() -> None:
    class Group(Config):
        timeout_s: int = 1
        never_read_a: int = 1

    class WithStaleKeys(Config):
        epochs: int = 1
        never_read_b: int = 1
        loader: Group = Group()

    assert unread_keys(WithStaleKeys) == ["never_read_b", "loader.never_read_a"]


def test_a_key_of_several_types_is_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, None, ["data=x", "out=y", "img_size=big", "mean=[a, b, c]"])
    assert str(caught.value).splitlines() == [
        'command line: img_size: expected a valid integer, got "big"',
        'command line: mean: expected a valid number, got "a"',
    ]


def test_faults_of_encoder_and_decoder_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, None, ["data=x", "out=y", "vit.num_heads=5", "decoder.num_heads=7"])
    assert [line.split(": ", 1)[1] for line in str(caught.value).splitlines()] == [
        "embed_dim=768 is not divisible by num_heads=5",
        "decoder.embed_dim=512 is not divisible by decoder.num_heads=7",
    ]
