"""The pretrained encoder is looked at before texts are tokenized or images decoded."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import ViTConfig

from hf_bilb.cli import main
from tests.data.glue_files import write_encoder

RECIPE = """
model: {{name: {model}, encoder: {encoder}}}
data: {{name: table, files: rows.csv, inputs: {{{inputs}: column}}, tasks: {{y: {{type: regression}}}}}}
balancer: ls
trainer: {{output_dir: run}}
"""
TEXT, IMAGE, DENSE = "multi_task_text", "image_encoder", "dense_backbone"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def load_data(*arguments: object) -> None:
        raise AssertionError("data are loaded")

    monkeypatch.setattr("hf_bilb.experiments.train.load_data", load_data)
    monkeypatch.chdir(tmp_path)
    write_encoder(tmp_path / "texts")
    ViTConfig().save_pretrained(tmp_path / "images")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("model", "encoder", "said"),
    [
        (TEXT, "nofolder/", "model.encoder: there is no folder 'nofolder/'"),
        (IMAGE, "./imags", "model.encoder: there is no folder './imags' (did you mean \"images\"?)"),
        (DENSE, "/no/folder", "model.encoder: there is no folder '/no/folder'"),
        (TEXT, "images", "model.encoder: 'images' takes pixel_values, expected a text encoder"),
        (IMAGE, "texts", "model.encoder: 'texts' takes input_ids, expected an image encoder"),
        (DENSE, "images", "model.encoder: 'vit' is no backbone of transformers' AutoBackbone, expected one such as "
                          "resnet, convnext, swin, dinov2, pvt_v2"),
        (TEXT, "package:no_such_model_1", "model.encoder: 'package:no_such_model_1': the package no_such_model_1 is "
                                          "not installed, install it with: pip install \"no-such-model-1\""),
    ],
)  # fmt: skip
def test_an_encoder_that_does_not_do_is_one_line_before_data_are_loaded(
    folder: Path, model: str, encoder: str, said: str
) -> None:
    inputs = "text" if model == TEXT else "image"
    (folder / "mine.yaml").write_text(RECIPE.format(model=model, encoder=encoder, inputs=inputs))
    done = CliRunner().invoke(main, ["train", "mine.yaml"])
    assert (done.exit_code, done.stderr) == (2, f"hf-bilb: error: {said}\n")
    assert not (folder / "run").exists()


def test_a_folder_without_a_model(folder: Path) -> None:
    (folder / "mine.yaml").write_text(RECIPE.format(model=TEXT, encoder="empty", inputs="text"))
    done = CliRunner().invoke(main, ["train", "mine.yaml"])
    assert done.exit_code == 2 and done.stderr.startswith("hf-bilb: error: model.encoder: 'empty' cannot be loaded: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("model", "encoder"), [(TEXT, "texts"), (IMAGE, "images")])
def test_an_encoder_that_does_is_not_refused(folder: Path, model: str, encoder: str) -> None:
    inputs = "text" if model == TEXT else "image"
    (folder / "mine.yaml").write_text(RECIPE.format(model=model, encoder=encoder, inputs=inputs))
    assert isinstance(CliRunner().invoke(main, ["train", "mine.yaml"]).exception, AssertionError)
