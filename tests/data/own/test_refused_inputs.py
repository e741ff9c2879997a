"""Every input that the data set `table` refuses, and the line that says so: a table to read.

A case is: what is wrong; the files, by name; what differs from the options below; the line. In the lines `{dir}` is the
folder of the files. The default files are `train.csv`, `validation.csv` and `test.csv` with the columns `body`, `stars`
and `topic`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hf_bilb.config.options import parse_options
from hf_bilb.data import DATA_SETS
from hf_bilb.errors import OptionError
from tests.data.glue_files import write_encoder

GOOD = "body,stars,topic\nthe cat sat,1,cats\na dog ran,2,dogs\nthe dog sat,3,dogs\na cat ran,4.5,cats\n"
LISTS = '{"words": ["the", "cat"], "tags": ["O", "B-animal"]}\n{"words": ["a", "dog"], "tags": ["O", "B-animal"]}\n'
STARS: dict[str, Any] = {"type": "regression"}
TOPIC: dict[str, Any] = {"type": "classification"}
TAGS: dict[str, Any] = {"type": "token_classification"}
PARTS = {part: f"{{dir}}/{part}.csv" for part in ("train", "validation", "test")}
JSONL = {part: f"{{dir}}/{part}.jsonl" for part in ("train", "validation", "test")}
TEXT: dict[str, Any] = {"text": "body"}


def jsonl(train: str = LISTS, test: str = LISTS) -> dict[str, str]:
    return {"train.jsonl": train, "validation.jsonl": LISTS, "test.jsonl": test}


OF_TAGS: dict[str, Any] = {"files": JSONL, "inputs": {"text": "words"}, "tasks": {"tags": TAGS}}
OF_IMAGES: dict[str, Any] = {
    "files": {"train": "{dir}/images.csv", "validation": "{dir}/images2.csv", "test": "{dir}/test.csv"},
    "inputs": {"image": "image"},
    "tasks": {"topic": TOPIC},
}
OF_KINDS = 'body,kind\nx,"[""ad""]"\ny,[]\n'
OF_NUMBERS: dict[str, Any] = {"inputs": {"numeric": ["stars"]}, "tasks": {"topic": TOPIC}}


#: What is wrong -> files, options, line.
REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    # --- the recipe ---
    "no tasks": (
        {}, {"tasks": {}},
        "data.tasks: is empty, expected at least one name",
    ),
    "unknown key of a task": (
        {}, {"tasks": {"stars": {"type": "regression", "colum": "stars"}}},
        "data.tasks.stars.colum: unknown option, value 'stars' (did you mean \"column\"?)",
    ),
    "unknown type": (
        {}, {"tasks": {"stars": {"type": "regresion"}}},
        "data.tasks.stars.type: 'regresion' is not valid, expected one of \"regression\", \"classification\", "
        "\"multi_label\", \"token_classification\", \"segmentation\", \"dense_regression\" (did you mean "
        "\"regression\"?)",
    ),
    "no type": (
        {}, {"tasks": {"stars": {"column": "stars"}}},
        "data.tasks.stars.type: is required, expected one of \"regression\", \"classification\", \"multi_label\", "
        "\"token_classification\", \"segmentation\", \"dense_regression\"",
    ),
    "name with a dot": (
        {}, {"tasks": {"my.stars": {"type": "regression", "column": "stars"}}},
        "data.tasks: 'my.stars' is not valid, expected a name without a full stop",
    ),
    "unknown metric": (
        {}, {"tasks": {"stars": {"type": "regression", "metrics": ["mse", "acuracy"]}}},
        "data.tasks.stars.metrics: 'acuracy' is not known; known: mae, mse, nmse, pearson, r2, rmse, spearman",
    ),
    "metric that stands twice": (
        {}, {"tasks": {"stars": {"type": "regression", "metrics": ["mae", "mae"]}}},
        "data.tasks.stars.metrics: 'mae' stands twice",
    ),
    "metric that does not fit the classes": (
        {"train.csv": GOOD + "x,1,birds\n"}, {"tasks": {"topic": {"type": "classification", "metrics": ["roc_auc"]}}},
        "data.tasks.topic.metrics: 'roc_auc' does not fit classification with 3 classes; these do: accuracy, "
        "f1_macro, balanced_accuracy, matthews",
    ),
    "column and columns": (
        {}, {"tasks": {"stars": {"type": "regression", "column": "stars", "columns": ["stars"]}}},
        "data.tasks.stars.column: 'stars' and columns ['stars'] are both set, expected one",
    ),
    "several columns of classes": (
        {}, {"tasks": {"topic": {"type": "classification", "columns": ["topic", "stars"]}}},
        "data.tasks.topic.columns: says nothing for classification, only for regression, multi_label",
    ),
    "classes of a number": (
        {}, {"tasks": {"stars": {"type": "regression", "classes": [1, 2]}}},
        "data.tasks.stars.classes: says nothing for regression, only for classification, multi_label, "
        "token_classification, segmentation",
    ),
    "class list with a repeat": (
        {}, {"tasks": {"topic": {"type": "classification", "classes": ["cats", "dogs", "cats"]}}},
        "data.tasks.topic.classes: 'cats' stands twice",
    ),
    "class weight of zero": (
        {}, {"tasks": {"topic": {"type": "classification", "class_weights": [1, 0]}}},
        "data.tasks.topic.class_weights: [1.0, 0.0] is not valid, expected numbers > 0",
    ),
    "too few class weights": (
        {"train.csv": GOOD + "x,1,birds\n"}, {"tasks": {"topic": {"type": "classification", "class_weights": [1, 2]}}},
        "data.tasks.topic.class_weights: got 2 values, expected 3",
    ),
    "balanced weights of an absent class": (
        {},
        {"tasks": {"topic": {**TOPIC, "class_weights": "balanced", "classes": ["ox", "cats", "dogs"]}}},
        "data.tasks.topic.class_weights: class 'ox' has no label, so there is no balanced weight for it",
    ),
    "no inputs": (
        {}, {"inputs": None},
        "data.inputs: is required, expected one of text, image, and numeric / categorical",
    ),
    "two kinds of inputs": (
        {}, {"inputs": {"text": "body", "numeric": ["stars"]}, "tasks": {"topic": TOPIC}},
        "data.inputs.text: one of text, image, and numeric / categorical is needed, got text and numeric",
    ),
    "three texts": (
        {}, {"inputs": {"text": ["a", "b", "c"]}},
        "data.inputs.text: got 3 columns, expected one, or two for pairs",
    ),
    "the label is an input": (
        {}, {"inputs": {"numeric": ["stars"]}},
        "data.inputs.numeric: the column 'stars' is the label of the task 'stars'",
    ),
    "files and hub": (
        {}, {"hub": "owner/name"},
        "data.hub: 'owner/name' and files are both set, expected one of them",
    ),
    "neither files nor hub": (
        {}, {"files": None},
        "data.files: is required, or hub, the name of a set on the hub",
    ),
    "unknown part": (
        {}, {"files": {**PARTS, "dev": "x.csv"}},
        "data.files: 'dev' is not known; known: test, train, validation",
    ),
    "no files for training": (
        {}, {"files": {"test": "{dir}/test.csv"}},
        "data.files.train: is required, expected the files of the training part",
    ),
    "files for all and for a task": (
        {}, {"tasks": {"stars": {"type": "regression", "files": PARTS}}},
        "data.files: is set, and the task 'stars' has files of its own, expected one of the two",
    ),
    "files for one task of two": (
        {}, {"files": None, "tasks": {"stars": {"type": "regression", "files": PARTS}, "topic": TOPIC}},
        "data.tasks.topic.files: is required, since the task 'stars' has files of its own",
    ),
    "tasks with inputs of two kinds": (
        {},
        {
            "files": None,
            "tasks": {
                "stars": {"type": "regression", "files": PARTS},
                "topic": {"type": "classification", "files": PARTS, "inputs": {"numeric": ["stars"]}},
            },
        },
        "data.tasks: all need inputs of one kind, got text of 'stars', table of 'topic'",
    ),
    "inputs of a task without files": (
        {}, {"tasks": {"stars": {"type": "regression", "inputs": TEXT}}},
        "data.tasks.stars.inputs: is for a task with files of its own, expected data.inputs",
    ),
    "group_by and stratify_by": (
        {}, {"split": {"group_by": "topic", "stratify_by": "topic"}},
        "data.split.group_by: 'topic' and stratify_by 'topic' do not go together, expected one",
    ),
    "shares that leave nothing": (
        {}, {"split": {"validation": 0.5, "test": 0.5}},
        "data.split.validation: 0.5 and test 0.5 leave no training rows",
    ),
    "share out of range": (
        {}, {"split": {"test": 1.5}},
        "data.split.test: 1.5 is not valid, expected a number > 0 and < 1",
    ),
    "no tokenizer": (
        {}, {"tokenizer": None},
        "data.tokenizer: is required where no model says it, expected a name, such as "
        "google-bert/bert-base-uncased",
    ),
    "longer than the tokenizer takes": (
        {}, {"max_length": 4096},
        "data.max_length: 4096 is not valid, expected at most 128, as the tokenizer 'encoder' says",
    ),
    "encoding that is none": (
        {}, {"csv": {"encoding": "utf-9"}},
        "data.csv.encoding: 'utf-9' is not known (did you mean \"utf-8\"?)",
    ),
    "list separator of two characters": (
        {}, {"csv": {"list_separator": ", "}},
        "data.csv.list_separator: ', ' is not valid, expected one character",
    ),
    # --- files ---
    "pattern without files": (
        {}, {"files": {**PARTS, "train": "{dir}/trian.csv"}},
        "data.files.train: '{dir}/trian.csv' matches no file (did you mean \"train.csv\"?), seen from '...'",
    ),
    "folder that is no data set": (
        {}, {"files": {"train": "{dir}"}},
        "data: {dir} is a folder that was not saved by `datasets`, expected files, such as '{dir}/*.csv'",
    ),
    "kind of file": (
        {"train.xlsx": "x"}, {"files": {**PARTS, "train": "{dir}/train.xlsx"}},
        "data: {dir}/train.xlsx is of no known kind, expected .csv, .data, .test, .txt, .tsv, .tab, .jsonl, .json, "
        ".ndjson, .parquet, or packed (.gz, .xz, .bz2)",
    ),
    "file in two parts": (
        {}, {"files": {**PARTS, "test": "{dir}/t*n.csv"}},
        "data.files: '{dir}/train.csv' is in two parts, train and test",
    ),
    "empty file": (
        {"test.csv": ""}, {},
        "data: {dir}/test.csv has no rows",
    ),
    "empty part": (
        {"test.csv": "body,stars,topic\n"}, {},
        "data: {dir}/test.csv has no rows",
    ),
    "empty JSON": (
        jsonl(test=""), OF_TAGS,
        "data: {dir}/test.jsonl has no rows",
    ),
    "broken quotes": (
        {"test.csv": 'body,stars,topic\nx,1,cats\n"y,2,dogs\n'}, {},
        "data: {dir}/test.csv cannot be read: EOF inside string starting at row 2",
    ),
    "row that is too long": (
        {"test.csv": "body,stars,topic\nx,1,cats\ny,z,2,dogs\n"}, {},
        "data: {dir}/test.csv cannot be read: Expected 3 fields in line 3, saw 4",
    ),
    "first row that is too long": (
        {"test.csv": "body,stars,topic\nx,y,1,cats\n"}, {},
        "data: {dir}/test.csv, row 1: has 4 cells, expected 3, one for each column",
    ),
    "row that is too short": (
        {"test.csv": "body,stars,topic\n\nx,1,\ny,2\nz,3,cats\n"}, {},
        "data: {dir}/test.csv, row 2: has 2 cells, expected 3, one for each column",
    ),
    "more names of columns than cells": (
        {"test.csv": "x,1,cats\ny,2,dogs\n"}, {"csv": {"columns": ["body", "stars", "topic", "more"]}},
        "data: {dir}/test.csv, row 1: has 3 cells, expected 4, one for each column; data.csv.columns names them: a "
        "file with other columns needs their names in its first line",
    ),
    "another delimiter and decimal commas": (
        {"test.csv": "body;stars;topic\nx;1,5;cats\n"}, {},
        "data: {dir}/test.csv, row 1: has 2 cells, expected 1, one for each column; is data.csv.delimiter ';'?",
    ),
    "row that is too short below an empty line": (
        {"test.csv": "\nbody,stars,topic\nx,1,\ny,2\n"}, {},
        "data: {dir}/test.csv, row 2: has 2 cells, expected 3, one for each column",
    ),
    "column that stands twice": (
        {"test.csv": "body,stars,stars\nx,1,2\n"}, {},
        "data: {dir}/test.csv: the column 'stars' stands twice in the first line",
    ),
    "no UTF-8": (
        {"test.csv": "body,stars,topic\ncaf\udce9,1,cats\n"}, {},
        "data: {dir}/test.csv cannot be read: 'utf-8' codec can't decode byte 0xe9 in position 20: invalid "
        "continuation byte; is data.csv.encoding 'cp1252'?",
    ),
    "UTF-16": (
        {"test.csv": "b\0o\0d\0y\0,\0s\0t\0a\0r\0s\0\n\0"}, {},
        "data: {dir}/test.csv cannot be read: its text holds NUL; is data.csv.encoding 'utf-16-le'?",
    ),
    "UTF-8 that is read as UTF-16": (
        {}, {"csv": {"encoding": "utf-16"}},
        "data: {dir}/train.csv cannot be read: UTF-16 stream does not start with BOM; is data.csv.encoding 'utf-8'?",
    ),
    "damaged archive": (
        {"test.csv.gz": "no archive"}, {"files": {**PARTS, "test": "{dir}/test.csv.gz"}},
        "data: {dir}/test.csv.gz cannot be read: Not a gzipped file (b'no')",
    ),
    "broken JSON": (
        jsonl(test=LISTS + '{"words": ["a"\n'), OF_TAGS,
        "data: {dir}/test.jsonl, row 3: is no JSON: Expecting ',' delimiter, character 15",
    ),
    "JSON that is one object with all rows": (
        {"test.json": '{"version": 2, "data": [{"body": "x", "stars": 1}]}'},
        {"files": {**PARTS, "test": "{dir}/test.json"}},
        "data: {dir}/test.json: is one object, expected one for each row, in a list or one a line; its rows are the "
        "list 'data': save that alone",
    ),
    "JSON that is one object with all columns": (
        {"test.json": '{"body": {"0": "x", "1": "y"}, "stars": {"0": 1, "1": 2}}'},
        {"files": {**PARTS, "test": "{dir}/test.json"}},
        "data: {dir}/test.json: is one object, expected one for each row, in a list or one a line; it holds columns: "
        "save rows, in pandas by to_json(file, orient='records')",
    ),
    "JSON that is no object": (
        jsonl(test=LISTS + "3\n"), OF_TAGS,
        "data: {dir}/test.jsonl, row 3: 3 is no JSON object with columns",
    ),
    "damaged parquet": (
        {"test.parquet": "nonsense"}, {"files": {**PARTS, "test": "{dir}/test.parquet"}},
        "data: {dir}/test.parquet cannot be read: Parquet magic bytes not found in footer. Either the file is "
        "corrupted or this is not a parquet file.",
    ),
    # --- columns ---
    "unknown label column": (
        {}, {"tasks": {"stars": {"type": "regression", "column": "strs"}}},
        "data.tasks.stars.column: {dir}/train.csv has no column 'strs' (did you mean \"stars\"?)",
    ),
    "unknown input column": (
        {}, {"inputs": {"text": ["title", "body"]}},
        "data.inputs.text: {dir}/train.csv has no column 'title' (it has body, stars, topic)",
    ),
    "unknown group column": (
        {}, {"split": {"group_by": "customer"}},
        "data.split.group_by: {dir}/train.csv has no column 'customer' (it has body, stars, topic)",
    ),
    "another delimiter": (
        {"train.csv": GOOD.replace(",", ";")}, {},
        "data.tasks.stars.column: {dir}/train.csv has no column 'stars' (it has body;stars;topic; is "
        "data.csv.delimiter ';'?)",
    ),
    "first line that is a row": (
        {"train.csv": "the cat,1.5,cats\na dog,2,dogs\n"}, {},
        "data.tasks.stars.column: {dir}/train.csv has no column 'stars' (it has the cat, 1.5, cats); if its first line "
        "is a row, name the columns in data.csv.columns",
    ),
    "files with different columns": (
        {"train2.csv": "body,topic\nx,cats\n"}, {"files": {**PARTS, "train": ["{dir}/train.csv", "{dir}/train2.csv"]}},
        "data: {dir}/train2.csv has no column 'stars', which {dir}/train.csv has (data.tasks.stars.column)",
    ),
    "test part without a column": (
        {"test.csv": "body,topic\nx,cats\n"}, {},
        "data.tasks.stars.column: {dir}/test.csv has no column 'stars' (it has body, topic)",
    ),
    "unknown column of a task's own files": (
        {}, {"files": None, "tasks": {"stars": {"type": "regression", "files": PARTS, "inputs": {"text": "bdy"}}}},
        "data.tasks.stars.inputs.text: {dir}/train.csv has no column 'bdy' (did you mean \"body\"?)",
    ),
    # --- values ---
    "word where a number should be": (
        {"train.csv": GOOD + "x,good,cats\n"}, {},
        "data: {dir}/train.csv, row 5: column 'stars' is 'good', expected a number",
    ),
    "decimal comma": (
        {"train.csv": GOOD + 'x,"4,5",cats\n'}, {},
        "data: {dir}/train.csv, row 5: column 'stars' is '4,5', expected a number; is data.csv.decimal ','?",
    ),
    "comma between thousands": (
        {"train.csv": GOOD + 'x,"1,234.5",cats\n'}, {},
        "data: {dir}/train.csv, row 5: column 'stars' is '1,234.5', expected a number; write thousands without commas",
    ),
    "decimal point among decimal commas": (
        {}, {"csv": {"decimal": ","}},
        "data: {dir}/train.csv, row 4: column 'stars' is '4.5', expected a number with a decimal comma, as "
        "data.csv.decimal says",
    ),
    "word among numbers in JSON": (
        {"test.jsonl": '{"body": "x", "stars": 1}\n{"body": "y", "stars": "two"}\n'},
        {"files": {**PARTS, "test": "{dir}/test.jsonl"}},
        "data: {dir}/test.jsonl, row 2: column 'stars' is 'two', expected a number",
    ),
    "infinite label": (
        {"train.csv": GOOD + "x,inf,cats\n"}, {},
        "data: {dir}/train.csv, row 5: column 'stars' is infinite, expected a finite number",
    ),
    "label beyond 32 bits": (
        {"train.csv": GOOD + "x,-1e39,cats\n"}, {},
        "data: {dir}/train.csv, row 5: column 'stars' is -1e+39, expected a number that 32 bits hold, up to 3.4e+38",
    ),
    "input beyond 32 bits": (
        {"test.csv": "body,stars,topic\nx,1e200,cats\n"}, OF_NUMBERS,
        "data: {dir}/test.csv, row 1: column 'stars' is 1e+200, expected a number that 32 bits hold, up to 3.4e+38",
    ),
    "word in a numeric input": (
        {"test.csv": "body,stars,topic\nx,?,cats\n"}, OF_NUMBERS,
        "data: {dir}/test.csv, row 1: column 'stars' is '?', expected a number",
    ),
    "infinite input": (
        {"test.csv": "body,stars,topic\nx,1,cats\nx,-inf,cats\n"}, OF_NUMBERS,
        "data: {dir}/test.csv, row 2: column 'stars' is infinite, expected a finite number",
    ),
    "class that training lacks": (
        {"test.csv": "body,stars,topic\nx,1,cats\ny,2,dog\n"}, {"tasks": {"topic": TOPIC}},
        "data: {dir}/test.csv, row 2: column 'topic' is 'dog', which is in no row of the training part (did you "
        "mean \"dogs\"?)",
    ),
    "value that is none of the classes": (
        {}, {"tasks": {"topic": {"type": "classification", "classes": ["birds", "cats"]}}},
        "data: {dir}/train.csv, row 2: column 'topic' is 'dogs', which is no class of the task 'topic' "
        "(classes: birds, cats)",
    ),
    "value that means no class": (
        {}, {"tasks": {"topic": {"type": "classification", "classes": {"pets": ["cats"], "others": ["bird"]}}}},
        "data: {dir}/train.csv, row 2: column 'topic' is 'dogs', which is no class of the task 'topic' "
        "(classes: cats, bird)",
    ),
    "value that means two classes": (
        {}, {"tasks": {"topic": {"type": "classification", "classes": {"a": ["cats", "dogs"], "b": ["dogs"]}}}},
        "data.tasks.topic.classes: 'dogs' stands twice",
    ),
    "values of one class alone": (
        {}, {"tasks": {"topic": {"type": "classification", "classes": {"pets": ["cats", "dogs"], "b": ["bird"]}}}},
        "data.tasks.topic: column 'topic' has only one class in the training part: 'pets'",
    ),
    "one class": (
        {"train.csv": "body,stars,topic\nx,1,cats\ny,2,cats\n"}, {"tasks": {"topic": TOPIC}},
        "data.tasks.topic: column 'topic' has only one class in the training part: 'cats'",
    ),
    "no label in the training part": (
        {"train.csv": "body,stars,topic\nx,,cats\ny,NaN,dogs\nz,null,cats\n"}, {},
        "data.tasks.stars: column 'stars' has no label in the training part",
    ),
    "label that is neither 0 nor 1": (
        {"train.csv": "body,ad,spam\nx,0,1\ny,1,2\nz,0,0\nz,0,0\n"},
        {"tasks": {"kind": {"type": "multi_label", "columns": ["ad", "spam"]}}, "files": "{dir}/train.csv"},
        "data: {dir}/train.csv, row 2: column 'spam' is '2', expected 0, 1, true, false, yes or no",
    ),
    "label without a value": (
        {"train.csv": "body,ad,spam\nx,0,\ny,1,\nz,1,\nz,1,\n"},
        {"tasks": {"kind": {"type": "multi_label", "columns": ["ad", "spam"]}}, "files": "{dir}/train.csv"},
        "data.tasks.kind: column 'spam' has no label in the training part",
    ),
    "list label that training lacks": (
        {"train.csv": OF_KINDS, "validation.csv": OF_KINDS, "test.csv": 'body,kind\nx,"[""spam""]"\n'},
        {"tasks": {"kind": {"type": "multi_label"}}},
        "data: {dir}/test.csv, row 1: column 'kind' is 'spam', which is in no row of the training part (classes: "
        "ad)",
    ),
    "word where a list should be": (
        {"train.csv": OF_KINDS, "validation.csv": OF_KINDS, "test.csv": OF_KINDS + "y,spam\n"},
        {"tasks": {"kind": {"type": "multi_label"}}},
        "data: {dir}/test.csv, row 3: column 'kind' is 'spam', expected a list",
    ),
    "neighbours without a comma": (
        {"train.csv": OF_KINDS, "validation.csv": OF_KINDS, "test.csv": OF_KINDS + "y,\"['ad', 'a' 'd']\"\n"},
        {"tasks": {"kind": {"type": "multi_label"}}},
        "data: {dir}/test.csv, row 3: column 'kind' is \"['ad', 'a' 'd']\", expected a list",
    ),
    "list that NumPy cut short": (
        {"train.csv": OF_KINDS, "validation.csv": OF_KINDS, "test.csv": OF_KINDS + "y,['ad' ... 'ad']\n"},
        {"tasks": {"kind": {"type": "multi_label"}}},
        "data: {dir}/test.csv, row 3: column 'kind' is \"['ad' ... 'ad']\", which is cut short, expected a list",
    ),
    "lists where numbers should be": (
        jsonl(), {**OF_TAGS, "tasks": {"tags": STARS}},
        "data: {dir}/train.jsonl: column 'tags' holds lists, expected numbers",
    ),
    "lists where classes should be": (
        jsonl(), {**OF_TAGS, "tasks": {"tags": TOPIC}},
        "data: {dir}/train.jsonl: column 'tags' holds lists, expected words or numbers",
    ),
    "lists of lists": (
        jsonl(test='{"words": ["the", "cat"], "tags": [["O"], ["O"]]}\n'), OF_TAGS,
        "data: {dir}/test.jsonl: column 'tags' holds lists of list<item: string>, expected lists of words",
    ),
    "another separator of lists": (
        dict.fromkeys(("train.csv", "validation.csv"), "body,kind\nx,a|b\ny,a\n") | {"test.csv": "body,kind\nx,a;b\n"},
        {"tasks": {"kind": {"type": "multi_label"}}, "csv": {"list_separator": "|"}},
        "data: {dir}/test.csv, row 1: column 'kind' is 'a;b', which is in no row of the training part (classes: a, b)",
    ),
    "tags in a cell of another number than the words": (
        {f"{part}.csv": "body,tags\nthe cat,O X\na dog ran,O X\n" for part in PARTS},
        {"tasks": {"tags": TAGS}, "csv": {"list_separator": " "}},
        "data: {dir}/train.csv, row 2: column 'tags' has 2 tags, 'body' has 3 words",
    ),
    "texts where words should be": (
        jsonl(test='{"words": "the cat", "tags": ["O", "O"]}\n'), OF_TAGS,
        "data: {dir}/test.jsonl, row 1: column 'words' is 'the cat', expected a list",
    ),
    "tags of another length": (
        jsonl(test=LISTS + '{"words": ["the", "cat"], "tags": ["O"]}\n'), OF_TAGS,
        "data: {dir}/test.jsonl, row 3: column 'tags' has 1 tags, 'words' has 2 words",
    ),
    "tag that training lacks": (
        jsonl(test='{"words": ["the", "cat"], "tags": ["O", "B-anmal"]}\n'), OF_TAGS,
        "data: {dir}/test.jsonl, row 1: column 'tags' is 'B-anmal', which is in no row of the training part (did "
        "you mean \"B-animal\"?)",
    ),
    "words and a second column": (
        jsonl(), {**OF_TAGS, "inputs": {"text": ["words", "words2"]}},
        "data.inputs.text: the task 'tags' needs one column of lists of words",
    ),
    # --- images ---
    "missing image": (
        {"test.csv": "image,topic\na.png,cats\nb.png,dogs\n"}, OF_IMAGES,
        "data: {dir}/test.csv, row 2: image '{dir}/b.png': No such file or directory",
    ),
    "broken image": (
        {"test.csv": "image,topic\na.png,cats\nc.png,dogs\n", "c.png": "no image"}, OF_IMAGES,
        "data: {dir}/test.csv, row 2: image '{dir}/c.png': does not decode: 8 bytes that are no image",
    ),
    "row without an image": (
        {"test.csv": "image,topic\na.png,cats\n,dogs\n"}, OF_IMAGES,
        "data: {dir}/test.csv, row 2: column 'image' is empty, expected the path of an image",
    ),
    # --- the split ---
    "too few rows": (
        {"train.csv": "body,stars,topic\nx,1,cats\ny,2,dogs\n"}, {"files": "{dir}/train.csv"},
        "data.split: 2 training rows are too few to split",
    ),
    "too few groups": (
        {}, {"files": "{dir}/train.csv", "split": {"group_by": "topic"}},
        "data.split.group_by: 2 groups are too few for 3 parts",
    ),
    "row without a group": (
        {"train.csv": GOOD + "x,1,\n"}, {"files": "{dir}/train.csv", "split": {"group_by": "topic"}},
        "data: {dir}/train.csv, row 5: column 'topic' is empty, expected the row's group",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("encoder")))


def _in(folder: Path, value: Any) -> Any:
    """`value` with the folder's path in place of `{dir}`."""
    if isinstance(value, dict):
        return {key: _in(folder, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_in(folder, inner) for inner in value]
    return value.replace("{dir}", str(folder)) if isinstance(value, str) else value


def write_files(folder: Path, files: dict[str, str]) -> None:
    images = dict.fromkeys(("images.csv", "images2.csv"), "image,topic\na.png,cats\na.png,dogs\n")
    usual = {f"{part}.csv": GOOD for part in PARTS}
    for name, text in {**images, **usual, **files}.items():
        (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    Image.new("RGB", (8, 8)).save(folder / "a.png")


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_is_refused_is_said_in_one_line(tmp_path: Path, tokenizer: str, wrong: str) -> None:
    files, changes, line = REFUSED[wrong]
    write_files(tmp_path, files)
    options = {"files": PARTS, "inputs": TEXT, "tasks": {"stars": STARS}, "tokenizer": tokenizer,
               "cache_dir": str(tmp_path / "cache"), "image_size": 8, **changes}  # fmt: skip
    data_set = DATA_SETS["table"]
    with pytest.raises(OptionError) as error:
        data_set.load(parse_options(data_set.options, _in(tmp_path, options), "data"))
    said = str(error.value).replace(str(tmp_path), "{dir}").replace(tokenizer, "encoder")
    assert re.sub(r"'/[^']*'$", "'...'", said) == line
