"""`rcmae convert` of segmentors: mmsegmentation's UperNet to a segmentor directory that says the same, and back."""

from pathlib import Path, PurePosixPath

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.test_convert_cli import convert, only_error
from tests.test_segmentation_inference import tiny_segmentor
from tests.test_segmentor_directory import export, linear_segmentor
from tools.verify.golden import FOLDER, part, read_golden
from tools.verify.segmentation_model import SLIDE
from transfer.segmentation.directory import load_segmentor
from transfer.segmentation.labels import label_table
from transfer.segmentation.segmentor import SegmentorConfig, build_segmentor
from transfer.segmentation.slide import image_labels
from transfer.segmentation.weights import from_mmseg, to_mmseg

INDEX = "backbone.layers.{}.attn.relative_position_index"


def names_file(folder: Path, count: int) -> Path:
    path = folder / "names.txt"
    path.write_text("".join(f"kind {i} #{i:06x}\n" for i in range(count)))
    return path


def published(num_classes: int) -> dict[str, Tensor]:
    """A tiny network of so many classes under mmsegmentation's names, complete."""
    vit = tiny_segmentor(rel_pos_bias=True, layer_scale=True).backbone
    model = build_segmentor(vit, SegmentorConfig(num_classes=num_classes, ignore_index=999, channels=8, aux_channels=4))
    model.init_weights(torch.Generator().manual_seed(1))
    return to_mmseg(model.state_dict(), vit.config)[0]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_converted_segmentor_says_what_mmsegmentation_says(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    golden, meta = read_golden(FOLDER, "segmentation_slide")
    weights = {name: tensor.clone() for name, tensor in part(golden, "weight.").items()}
    whole = weights | {INDEX.format(i): torch.zeros(17, 17, dtype=torch.int64) for i in range(4)}
    source, out, back = tmp_path / f"iter_160000{suffix}", tmp_path / "new" / "segmentor", tmp_path / f"back{suffix}"
    if suffix == ".pth":
        torch.save({"meta": {"CLASSES": ("a",), "iter": 5}, "state_dict": whole, "optimizer": {}}, source)
    else:
        save_file(whole, source)
    assert convert(source, out, "--classes", names_file(tmp_path, 7)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(whole) + 1 and lines[-1] == f"written  {out}"
    assert f"ignored  {INDEX.format(3)}" in lines
    assert "backbone.layers.0.ln1.bias -> backbone.blocks.0.norm1.bias" in lines

    loaded = load_segmentor(out)
    assert loaded.model.blocks == tuple(meta["config"]["out_indices"])
    assert loaded.classes.names == tuple(f"kind {i}" for i in range(7)) and loaded.classes.palette[3] == (0, 0, 3)
    assert (loaded.inference.crop, loaded.inference.stride, loaded.scale) == (64, 42, (256, 64))
    assert loaded.provenance["layout"] == "mmsegmentation UperNet, MAE backbone"
    windows = SLIDE.model_copy(update={"window_batch_size": loaded.inference.window_batch_size})
    prediction = image_labels(loaded.model, [golden["input.wide"]], tuple(meta["config"]["final_size"]), windows)
    assert torch.equal(prediction[0], golden["wide.prediction"].long())

    assert convert(out, back) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"written  {back}"
    returned = load_file(back) if suffix == ".safetensors" else torch.load(back, weights_only=True)
    if suffix == ".pth":
        assert returned["meta"]["dataset_meta"]["classes"] == loaded.classes.names
        assert returned["meta"]["dataset_meta"]["palette"][3] == [0, 0, 3]
        returned = returned["state_dict"]
    assert returned.keys() == whole.keys() and all(torch.equal(returned[name], weights[name]) for name in weights)


def test_150_classes_are_those_of_ade20k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({name: t.contiguous() for name, t in published(150).items()}, tmp_path / "m.safetensors")
    assert convert(tmp_path / "m.safetensors", tmp_path / "segmentor", "--num-heads", 2) == 0
    loaded = load_segmentor(tmp_path / "segmentor")
    assert loaded.classes.names[0] == "wall" and loaded.classes.names[149] == "flag"
    table = label_table(loaded.labels, 150).table
    assert table[[0, 1, 150, 255]].tolist() == [255, 0, 149, 255]  # "reduce_zero_label"
    capsys.readouterr()
    assert convert(tmp_path / "m.safetensors", tmp_path / "other", "--num-heads", 4) == 4
    assert "its tables are for 2 heads, not 4; leave num_heads out" in only_error(capsys)


def test_many_classes_ignore_another_value(tmp_path: Path) -> None:
    save_file({name: t.contiguous() for name, t in published(300).items()}, tmp_path / "m.safetensors")
    assert convert(tmp_path / "m.safetensors", tmp_path / "segmentor", "--classes", names_file(tmp_path, 300)) == 0
    loaded = load_segmentor(tmp_path / "segmentor")
    assert loaded.labels.ignore_index == loaded.model.config.ignore_index == 65535 and loaded.labels.label_shift == 0


def test_refusals_are_one_line_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    state = published(5)
    names = names_file(folder, 5)
    states = {
        "whole": state,
        "missing": {name: tensor for name, tensor in state.items() if name != "neck.upsample_2x.0.bias"},
        "unknown": {**state, "decode_head.mask.weight": torch.ones(1)},
        "swin": {**state, "backbone.stages.0.blocks.0.norm1.weight": torch.ones(4)},
        "not_finite": {**state, "neck.upsample_2x.0.bias": torch.full((16,), torch.nan)},
        "no_tables": {name: tensor for name, tensor in state.items() if "bias_table" not in name},
        "plain": {"blocks.0.norm1.weight": torch.ones(4)},
    }
    for name, content in states.items():
        save_file({key: tensor.contiguous() for key, tensor in content.items()}, folder / f"{name}.safetensors")
    torch.save({"state_dict": state, "message_hub": PurePosixPath("x")}, folder / "training.pth")
    given = ("--classes", names)
    for name, options, code, text in (
        (
            "whole.safetensors",
            (),
            4,
            "5 classes, ade20k has 150; give the names of these, a class per line, as --classes",
        ),
        ("whole.safetensors", ("--classes", folder / "none.txt"), 2, "none.txt: no such file"),
        ("whole.safetensors", ("--names-json", names), 2, "--names-json: has no effect"),
        ("missing.safetensors", given, 4, "Missing key"),
        ("unknown.safetensors", given, 4, "no place for decode_head.mask.weight"),
        ("swin.safetensors", given, 4, "this is a Swin backbone; only UperNet on mmsegmentation's MAE backbone"),
        ("not_finite.safetensors", given, 5, "holds non-finite values"),
        ("no_tables.safetensors", given, 4, "no weights of UperNet on a ViT"),
        ("plain.safetensors", given, 2, "--classes: has no effect"),
        ("training.pth", (), 4, "refused, it wants to load pathlib.PurePosixPath"),
    ):
        assert convert(folder / name, tmp_path / "out", *options) == code, name
        line = only_error(capsys)
        assert text in line and (code == 2 or line.startswith(f"error: {folder / name}"))
    assert convert(export(folder / "segmentor", tiny_segmentor()), tmp_path / "out") == 2
    assert "a segmentor directory becomes a file of mmsegmentation's names; name it .pth or .saf" in only_error(capsys)
    assert convert(export(folder / "linear", linear_segmentor()), tmp_path / "out.pth") == 4
    assert "a linear head, which mmsegmentation does not have" in only_error(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_plain_segmentor_is_complete_for_mmsegmentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(export(tmp_path / "segmentor", tiny_segmentor()), tmp_path / "out.pth") == 0
    assert "added    backbone.layers.3.gamma_2" in capsys.readouterr().out.splitlines()
    state = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    ours, report = from_mmseg(state)
    assert report.ignored == tuple(INDEX.format(i) for i in range(4))
    assert not ours["backbone.blocks.0.attn.relative_position_bias_table"].any()
