"""Models as people have them: activation checkpointing, LoRA, bf16 weights, BatchNorm."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, TrainerCallback
from transformers.utils import ModelOutput

from hf_bilb import BilevelMTLTrainer
from hf_bilb.losses.masked import masked_mse
from tests.trainer.harness import BATCH, FLOAT, TASK_NAMES, arguments, build_data, build_model, flat_parameters, run


@dataclass
class Output(ModelOutput):
    losses: Tensor | None = None
    num_items: Tensor | None = None
    logits: Tensor | None = None


class ThreeTaskBert(BertPreTrainedModel):
    """A transformer with one vectorised head for three tasks."""

    accepts_loss_kwargs = False

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.heads = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.heads(self.bert(input_ids).last_hidden_state[:, 0])
        losses, num_items = (None, None) if labels is None else masked_mse(logits, labels)
        return Output(losses=losses, num_items=num_items, logits=logits)


def bert() -> ThreeTaskBert:
    torch.manual_seed(0)
    return ThreeTaskBert(
        BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            task_names=["a", "b", "c"],
        )
    )


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = [
        {
            "input_ids": torch.randint(0, 30, (8,), generator=generator),
            "labels": torch.randn(3, generator=generator),
        }
        for _ in range(3 * BATCH)
    ]
    made[1]["labels"][2] = torch.nan
    return made


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_the_same_training(reentrant: bool, tmp_path: Path) -> None:
    plain = run(tmp_path, bert(), rows())
    again = run(
        tmp_path,
        bert(),
        rows(),
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert torch.equal(plain.parameters, again.parameters) and plain.steps == again.steps


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_lora_trains_its_adapters_and_heads_alone(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["heads"])
    model = get_peft_model(bert(), config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    data = [{**row, "comment": torch.tensor(0)} for row in rows()]
    found = run(tmp_path, model, data, remove_unused_columns=False, learning_rate=0.1, save_strategy="epoch")
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all("lora_" in name or "heads.modules_to_save" in name for name in moved)
    assert found.trainer.task_names == ("a", "b", "c") and found.logged("loss/b")[0] is not None
    assert found.trainer.balancer.coefficients.isfinite().all()
    saved = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert {"adapter_model.safetensors", "balancer.safetensors", "balancer.json"} <= saved


def test_weights_in_bf16(tmp_path: Path) -> None:
    found = run(tmp_path, build_model(torch.bfloat16), build_data(3 * BATCH, dtype=torch.bfloat16))
    assert found.parameters.isfinite().all() and found.trainer.balancer.dtype == torch.float32
    full = run(tmp_path, build_model(torch.float32), build_data(3 * BATCH, dtype=torch.float32))
    assert found.logged("loss") == pytest.approx(full.logged("loss"), rel=0.1)


def test_autocast_in_bf16(tmp_path: Path) -> None:
    found = run(tmp_path, build_model(torch.float32), build_data(3 * BATCH), bf16=True)
    full = run(tmp_path, build_model(torch.float32), build_data(3 * BATCH))
    assert found.logged("loss") == pytest.approx(full.logged("loss"), rel=0.05)
    assert found.logged("loss") != full.logged("loss")


def test_the_model_holds_nothing_of_the_balancer(tmp_path: Path) -> None:
    model = build_model()
    names = set(model.state_dict())
    trainer = BilevelMTLTrainer(model=model, args=arguments(tmp_path), train_dataset=build_data(2 * BATCH))
    trainer.train()
    assert set(model.state_dict()) == names
    groups = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert groups == {id(p) for p in model.parameters()}
    assert all(parameter.grad is None for parameter in trainer.balancer.objective.parameters())


def test_follow_model_follows_the_schedule(tmp_path: Path) -> None:
    balancer = {"name": "uw", "optimizer": "sgd", "learning_rate": "follow_model"}
    seen: list[Any] = []

    class Reader(TrainerCallback):
        def on_step_end(self, *args: Any, balancer: Any, **kwargs: Any) -> None:
            seen.append(balancer.state_dict()["objective.log_variance"])

    found = run(
        tmp_path,
        data=build_data(6 * BATCH, dtype=FLOAT),
        trainer_arguments={"callbacks": [Reader()]},
        balancer=balancer,
        lr_scheduler_type="linear",
    )
    losses = torch.tensor([[entry[f"loss/{task}"] for task in TASK_NAMES] for entry in found.steps], dtype=FLOAT)
    variance = torch.zeros(4, dtype=FLOAT)
    for step, row in enumerate(losses):
        # The rate the model's optimizer has just stepped with.
        rate = 0.05 * (1 - step / 6)
        variance = variance - rate * 0.5 * (1 - torch.exp(-variance) * row)
        torch.testing.assert_close(seen[step], variance, rtol=1e-12, atol=0)


def test_clipping_and_weight_decay_leave_the_router_alone(tmp_path: Path) -> None:
    # With the model at a standstill the router sees the same losses, whatever is done to the model's gradients.
    common: dict[str, Any] = {"learning_rate": 0.0, "balancer": {"name": "bilb", "learning_rate": 0.1}}
    free = run(tmp_path, **common)
    clipped = run(tmp_path, max_grad_norm=1e-3, weight_decay=0.5, **common)
    ours, theirs = clipped.trainer.balancer.state_dict(), free.trainer.balancer.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert torch.equal(flat_parameters(free.trainer.model), flat_parameters(clipped.trainer.model))
