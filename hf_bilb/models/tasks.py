"""The tasks of a model in its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import PretrainedConfig

from hf_bilb.config.options import nearest, unknown_name
from hf_bilb.errors import OptionError
from hf_bilb.losses.contract import check_task_names
from hf_bilb.losses.task_types import TaskType

#: Task -> its type, or that as a dict (`TaskType.to_dict`).
Tasks = Mapping[str, TaskType | Mapping[str, Any]]


class TasksConfig(PretrainedConfig):
    """A config with tasks of any types.

    Attributes:
        supported_types: the types of tasks that the model has.
        task_names: the K names, in order.
        tasks: name -> the task's type as a dict, which is what a file can hold.
        task_types: name -> `TaskType`, in order.
    """

    supported_types: ClassVar[tuple[str, ...]]

    def set_tasks(self, tasks: Tasks, task_names: Sequence[str] | None) -> None:
        """Check the tasks and keep them.

        Args:
            tasks: name -> type.
            task_names: their order; a saved config has it, because its file sorts the names. None: that of `tasks`.

        Raises:
            OptionError: names that are empty, stand twice, hold a dot or are not the same in both, or a type that is
                unknown or that the model does not have; names the task.
        """
        names = check_task_names(list(tasks), "tasks") if task_names is None else check_task_names(task_names)
        for name in tasks:
            if name not in names:
                raise OptionError(f"tasks: {name!r} is not among task_names{nearest(name, names)}")
        found = {}
        for name in names:
            if "." in name:
                raise OptionError(f"tasks: {name!r} is not valid, expected a name without a dot")
            if name not in tasks:
                raise unknown_name("task_names", name, tasks)
            found[name] = _as_task_type(name, tasks[name])
            if found[name].type not in self.supported_types:
                raise OptionError(
                    f"tasks.{name}.type: {found[name].type} is no task of {self.model_type}, expected one of "
                    f"{', '.join(self.supported_types)}"
                )
        self.task_names = list(names)
        self.tasks = {name: task.to_dict() for name, task in found.items()}

    @property
    def task_types(self) -> dict[str, TaskType]:
        return {name: TaskType.from_dict(self.tasks[name]) for name in self.task_names}


def _as_task_type(name: str, given: TaskType | Mapping[str, Any]) -> TaskType:
    if isinstance(given, TaskType):
        return given
    try:
        return TaskType.from_dict(given)
    except (OptionError, TypeError) as error:  # the latter: a key that it does not have
        raise OptionError(f"tasks.{name}: {error}") from None
