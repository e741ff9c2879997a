"""A `transformers.Trainer` whose models come back whole: on a resume, and as the best one at the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer
from transformers.trainer_utils import TrainOutput
from transformers.utils import CONFIG_NAME, is_sagemaker_mp_enabled

from hf_bilb.errors import CheckpointError
from hf_bilb.storage.adapter_weights import has_adapters, load_adapters, moved_beside, save_beside
from hf_bilb.storage.tensor_files import Differences, weight_files
from hf_bilb.storage.weights import (
    check_savable,
    is_plainly_saved,
    load_weights,
    named_tensors,
    state_to_save,
    unwrapped,
)

logger = logging.getLogger(__name__)


class RestoringTrainer(Trainer):
    """Loads weights through the mapping of `from_pretrained`, to the bit; what does not match is a `CheckpointError`.

    `Trainer` loads them with `strict=False` and a warning: a model that transformers saves under other names than its
    own goes on with some weights of the checkpoint and some of its own. Layers that parts of a plain module share are
    saved once, and are still shared when they come back. Under DeepSpeed and FSDP, `Trainer` loads strictly.

    Attributes:
        model_files: name -> content of further files, written wherever the model is: at the end, and in checkpoints.
    """

    model_files: Mapping[str, bytes] = MappingProxyType({})

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Here and not in `train`: the model may be built there.
        if self.args.save_strategy != "no" and not self._loads_otherwise():
            self._check_savable()
        return super()._inner_training_loop(*args, **kwargs)

    def _check_savable(self) -> None:
        bare = unwrapped(self.model)
        if not has_adapters(bare):
            check_savable(bare)
        elif beside := list(moved_beside(bare)):
            logger.warning(
                "%d tensors that training moves are no part of the adapters (%s, ...): checkpoints hold them, but "
                "PeftModel.from_pretrained does not read them; name their modules in modules_to_save",
                *(len(beside), beside[0]),
            )

    def _loads_otherwise(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled or is_sagemaker_mp_enabled()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        bare = unwrapped(self.model)
        adapters = has_adapters(bare)
        if not self.args.should_save:
            state = state_dict
        elif adapters:
            compiled = state_dict is None and bare is not self.model
            state = named_tensors(bare) if compiled else state_dict
        elif isinstance(bare, PreTrainedModel) and bare is self.model and is_plainly_saved(bare):
            state = state_dict
        else:
            state = state_to_save(bare, state_dict)
        super()._save(output_dir, state)
        if adapters and self.args.should_save and not self._loads_otherwise():
            save_beside(bare, self.args.output_dir if output_dir is None else output_dir)
        if self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            for name, content in self.model_files.items():
                (folder / name).write_bytes(content)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._loads_otherwise():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            _say_other_version(Path(resume_from_checkpoint) / CONFIG_NAME)
            self._restore(resume_from_checkpoint, self.model if model is None else model)

    def _load_best_model(self) -> None:
        if self._loads_otherwise():
            super()._load_best_model()
            return
        best = self.state.best_model_checkpoint
        logger.info("loading the best model from %s (score: %s)", best, self.state.best_metric)
        self._restore(best, self.model)

    def _restore(self, folder: str, model: nn.Module) -> None:
        bare = unwrapped(model)
        if has_adapters(bare) and not weight_files(folder):
            load_adapters(bare, folder)
        else:
            load_weights(bare, folder)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Where `Trainer` itself has loaded (`_loads_otherwise`).
        differences = Differences(list(load_result.missing_keys), list(load_result.unexpected_keys))
        if differences:
            raise CheckpointError(f"the weights of the checkpoint do not match the model: {differences}")


def _say_other_version(config: Path) -> None:
    """As `Trainer` does: the names of weights, and what a model computes, may change with transformers."""
    if not config.is_file():
        return
    saved = PretrainedConfig.from_json_file(str(config)).transformers_version
    if saved is not None and saved != transformers.__version__:
        logger.warning("%s: was saved with transformers %s, this is %s", config, saved, transformers.__version__)
