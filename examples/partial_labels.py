"""One model for pixels and for whole images from partial labels: every NYUv2 image keeps the labels of some tasks only.

    python ../shared/data/unpack.py data --only nyuv2        # data/nyuv2 in MTAN's layout, 144 x 192
    python examples/partial_labels.py                         # ten minutes on a CPU core; finished runs are kept
    python examples/partial_labels.py --data data/nyuv2 --seed 1 trainer.num_train_epochs=2 --output runs/short

Of the training images one third keeps the 13 classes, one third the depth, one third the normals. Two tasks with one
class per image are made of the classes (as somebody would note them who looks at an image): `room`, which a bed makes a
bedroom and else a sofa a living room, and `floor`, whether it fills a tenth of the image; each is known of half of the
training images.
Test images keep all labels. The same small network, with fresh weights, learns it all once with the tasks summed and
once balanced by BiLB: recipes/nyuv2/scenes_{ls,bilb}.yaml with the settings below.

With seed 0 we saw (327 test images; the best constant answer in brackets): mIoU .100 with the sum and .091 with BiLB
(.022), depth error .83 and .88 m (1.04), mean angle of the normals 36.4 and 36.9 degrees (44.6), accuracy of `room` .61
and .60 (.59) and of `floor` .71 and .69 (.58): the sum is a little ahead of BiLB's defaults on all of them, with one
seed and ten epochs.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small batches: a second thread gains nothing

import click
import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.dense.nyuv2_labels import CLASSES_13
from hf_bilb.errors import OptionError, one_line
from hf_bilb.experiments.recipe import read_recipe
from hf_bilb.reporting.results import FILE_NAME, RunResults, read_results
from hf_bilb.reporting.side_by_side import compare_runs, runs_text

RECIPES = Path("recipes/nyuv2")
METHODS = ("ls", "bilb")
PIXEL_FOLDERS = ("label", "depth", "normal")
LABELS_FILE = "image_labels.csv"
#: What makes the runs small; a recipe's other settings stay.
SETTINGS = (
    "model.encoder={model_type: resnet, embedding_size: 24, hidden_sizes: [24, 48, 96, 192], depths: [1, 1, 2, 2], "
    "layer_type: basic}",
    "model.decoder_size=32",
    "data.allow_missing=true",
    "data.num_validation=null",  # too few of the images have labels of a task as it is: the last epoch is measured
    "trainer.eval_strategy=no",
    "trainer.num_train_epochs=10",
    "trainer.learning_rate=2e-3",
    "trainer.warmup_steps=50",
    "trainer.per_device_eval_batch_size=16",
    "trainer.dataloader_num_workers=0",
    "trainer.dataloader_persistent_workers=false",
)


# --- the labels ---------------------------------------------------------------------------------------------------


def image_classes(pixels: NDArray[np.floating]) -> dict[str, str]:
    """What somebody who sees an image could say of it, from its classes `[H, W]`."""
    share = {name: float((pixels == number).mean()) for number, name in enumerate(CLASSES_13)}
    room = "bedroom" if share["bed"] > 0.02 else "living room" if share["sofa"] > 0.02 else "other"
    return {"room": room, "floor": "yes" if share["floor"] > 0.1 else "no"}


def make_partial(source: Path, target: Path, seed: int) -> None:
    """A set with part of the labels of `source` (MTAN's layout), as links to its files, and the image-level labels."""
    for link in target.glob("*/*/*.npy"):  # of another seed
        link.unlink()
    generator = np.random.default_rng(seed)
    lines = []
    for part in ("train", "val"):
        numbers = sorted(int(file.stem) for file in (source / part / "image").glob("*.npy"))
        if not numbers:
            raise OptionError(f"--data: {str(source / part / 'image')!r} holds no .npy files, expected MTAN's layout")
        for file in (source / part / kind / f"{number}.npy" for kind in PIXEL_FOLDERS for number in numbers):
            if not file.is_file():
                raise OptionError(f"--data: {str(file)!r} is missing, expected a set with all labels of its images")
        kept = generator.permutation(np.arange(len(numbers)) % len(PIXEL_FOLDERS))
        said = generator.random((len(numbers), 2)) < 0.5
        for place, number in enumerate(numbers):
            of_pixels = PIXEL_FOLDERS if part == "val" else (PIXEL_FOLDERS[kept[place]],)
            for kind in ("image", *of_pixels):
                _link(source / part / kind / f"{number}.npy", target / part / kind / f"{number}.npy")
            classes = image_classes(np.load(source / part / "label" / f"{number}.npy"))
            known = [
                name if part == "val" or told else "" for name, told in zip(classes.values(), said[place], strict=True)
            ]
            lines.append([part, number, *known])
    with (target / LABELS_FILE).open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["part", "image", *classes], *lines])


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve())


def kept_labels(folder: Path) -> Iterator[str]:
    """A line for each task: how many training images have its labels."""
    total = len(list((folder / "train" / "image").iterdir()))
    for kind in PIXEL_FOLDERS:
        yield f"{kind:8}{len(list((folder / 'train' / kind).iterdir())):5} of {total} training images"
    with (folder / LABELS_FILE).open(encoding="utf-8", newline="") as stream:
        lines = [line for line in csv.DictReader(stream) if line["part"] == "train"]
    for task in list(lines[0])[2:]:
        yield f"{task:8}{sum(bool(line[task]) for line in lines):5} of {total} training images"


# --- the runs -----------------------------------------------------------------------------------------------------


def train(method: str, data: Path, run: Path, seed: int, overrides: Sequence[str]) -> RunResults:
    """Train with a method into the folder `run`, unless that holds the results already."""
    own = [
        f"data.folder={data}",
        f"data.image_labels={data / LABELS_FILE}",
        f"data.cache_dir={data.parent / 'cache'}",
        f"trainer.seed={seed}",
        f"trainer.output_dir={run}",
    ]
    recipe = read_recipe(RECIPES / f"scenes_{method}.yaml", [*SETTINGS, *own, *overrides])
    if not (run / FILE_NAME).is_file():
        from hf_bilb.experiments.train import run_recipe  # only now: takes ten seconds

        run_recipe(recipe, resume=any(run.glob("checkpoint-*")))
    return read_results(run)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), default=Path("data/nyuv2"), show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of labels and runs.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/partial_labels"))
def main(overrides: tuple[str, ...], data: Path, seed: int, output: Path) -> None:
    """Make the partial labels, train with every method, and print the table."""
    if not RECIPES.is_dir():
        raise click.UsageError(f"there is no folder {RECIPES} here; start it from the project's root")
    folder = output / f"seed-{seed}"
    try:
        make_partial(data, folder / "data", seed)
        click.echo("\n".join(kept_labels(folder / "data")))
        runs = [train(method, folder / "data", folder / method, seed, overrides) for method in METHODS]
    except OptionError as error:
        raise click.ClickException(one_line(error)) from None
    text = runs_text(compare_runs(runs, list(METHODS)))
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    click.echo(
        f"\n{text}\nimages, truth and predictions: {', '.join(str(folder / m / 'gallery.png') for m in METHODS)}"
    )


if __name__ == "__main__":
    main()
