"""What dense data sets have in common in a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_bilb.config.options import nearest
from hf_bilb.data.cache import cache_root
from hf_bilb.data.checks import check_at_least
from hf_bilb.errors import OptionError
from hf_bilb.losses.contract import check_task_names


@dataclass(frozen=True)
class DenseOptions:
    """Options of every dense data set.

    Attributes:
        folder: where the files are.
        size: [height, width] to resize to (images bilinear with antialiasing, labels nearest); null: as they are.
        tasks: the tasks, in the order wanted; null: all that the set has, then those of `image_labels`.
        image_labels: file with classes of whole images (`hf_bilb.data.dense.image_labels`), each of its columns a task;
            null: none.
        augment: training images are scaled and cropped at random and mirrored (`hf_bilb.data.dense.augmentation`), as
            in the papers; a pure function of (seed, epoch, image).
        num_train: use so many of the training images, drawn with `seed`; null: all.
        num_validation: so many training images, drawn with `seed`, are the validation part and not trained on; null:
            the test part serves as validation part, as in the papers, which report a mean over the last epochs on
            it (then choose no checkpoint by it).
        num_test: use so many of the test images, drawn with `seed`; null: all.
        seed: of these draws and of the augmentation.
        allow_missing: an image may lack the file of a task, or its line in `image_labels`, and then lacks its labels.
        delta_m_average: which form of depth's and normals' metrics Delta_m takes, the papers' mean over batches or the
            one over all pixels.
        cache_dir: folder of the memory-mapped cache; null: that of Hugging Face's caches.
    """

    folder: str
    size: tuple[int, int] | None = None
    tasks: tuple[str, ...] | None = None
    image_labels: str | None = None
    augment: bool = True
    num_train: int | None = None
    num_validation: int | None = None
    num_test: int | None = None
    seed: int = 0
    allow_missing: bool = False
    delta_m_average: Literal["batch_mean", "exact"] = "batch_mean"
    cache_dir: str | None = None

    def check(self, known_tasks: Sequence[str]) -> None:
        """Raise `OptionError` for what is out of range, or a task that the set does not have (which only the file
        tells where there are `image_labels`)."""
        check_task_names(known_tasks if self.tasks is None else self.tasks, "tasks")
        if self.image_labels is None:
            self.ordered_tasks(known_tasks)
        if self.size is not None and not all(8 <= side <= 4096 for side in self.size):
            raise OptionError(f"size: {list(self.size)} is not valid, expected [height, width], 8 to 4096 each")
        check_at_least("seed", self.seed, 0)
        for key in ("num_train", "num_validation", "num_test"):
            check_at_least(key, getattr(self, key), 1, ", or null")

    def ordered_tasks(self, known_tasks: Sequence[str]) -> tuple[str, ...]:
        """All tasks, in order: those of `tasks`, or all of `known_tasks`.

        Raises:
            OptionError: one that is not known.
        """
        for name in self.tasks or ():
            if name not in known_tasks:
                known = ", ".join(known_tasks)
                raise OptionError(f"tasks: {name!r} is not valid, expected of {known}{nearest(name, known_tasks)}")
        return tuple(known_tasks) if self.tasks is None else self.tasks

    def dense_tasks(self, known_tasks: Sequence[str]) -> tuple[str, ...]:
        """Those of `tasks` with a label at every pixel, in order; all of `known_tasks` for null."""
        return tuple(name for name in (known_tasks if self.tasks is None else self.tasks) if name in known_tasks)

    @property
    def cache_root(self) -> Path:
        """Folder of the cache."""
        return cache_root(self.cache_dir)
