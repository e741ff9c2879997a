"""`hf-bilb push`, and `trainer.push_to_hub` of a recipe: what is pushed, when, and what is said where that fails."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_bilb.hub.paths import without_machine
from hf_bilb.hub.repository import push_files
from hf_bilb.trainer import hub_trainer
from tests.data.glue_files import write_encoder
from tests.hub.runs import REPO, error_line, run, use, write_recipe
from tests.hub.server import TOKEN, Hub

ALWAYS = {
    "README.md", "config.json", "hf_bilb.json", "model.safetensors", "recipe.yaml", "results.json", "table.md",
    "losses.png", "weights.png", "trainer_state.json",
}  # fmt: skip


#: Code of the model, for whom has no hf_bilb: its config and model, and what they are made of.
CODE = {"hf_bilb_models_tabular_mlp.py", "hf_bilb_models_base.py", "hf_bilb_errors.py"}


def names(files: dict[str, bytes]) -> set[str]:
    """Those of a repository, without the code's, which is there."""
    assert files.keys() >= CODE
    return {path for path in files if not path.startswith("hf_bilb_")}


def push(folder: Path, *arguments: object) -> None:
    done = run("push", folder, REPO, *arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].startswith("pushed to http://")


# --- what is pushed -----------------------------------------------------------------------------------------------


def test_a_finished_run_is_pushed_in_one_commit(hub: Hub, a_run: Path) -> None:
    push(a_run)
    assert names(hub.repos[REPO]) == ALWAYS
    assert [(repo, message) for repo, message, _ in hub.commits] == [(REPO, "mine, tasks balanced by bilb")]
    for name in ("model.safetensors", "hf_bilb.json", "weights.png"):
        assert hub.repos[REPO][name] == (a_run / name).read_bytes()
    config, local = json.loads(hub.repos[REPO]["config.json"]), json.loads((a_run / "config.json").read_text())
    assert config.pop("auto_map").keys() == {"AutoConfig", "AutoModel"} and config == local
    assert not list(a_run.glob("*.py"))
    assert REPO not in hub.private


def test_nothing_pushed_tells_of_the_machine(hub: Hub, a_run: Path) -> None:
    push(a_run)
    home = a_run.parents[1].as_posix()
    assert not [name for name, content in hub.repos[REPO].items() if home.encode() in content]
    recipe = yaml.safe_load(hub.repos[REPO]["recipe.yaml"])
    before = yaml.safe_load((a_run / "recipe.yaml").read_text())
    assert (recipe["data"]["files"], recipe["trainer"]["output_dir"]) == ("people.csv", "run")
    assert recipe == without_machine(before) and before["data"]["files"].startswith("/")
    results = json.loads(hub.repos[REPO]["results.json"])
    local = json.loads((a_run / "results.json").read_text())
    assert {**results, "settings": 0} == {**local, "settings": 0}


def test_a_token_in_an_old_recipe_is_not_pushed(hub: Hub, a_run: Path) -> None:
    with (a_run / "recipe.yaml").open("a") as file:
        file.write("more: {hub_token: hf_secret}\n")
    push(a_run)
    assert not [name for name, content in hub.repos[REPO].items() if b"hf_secret" in content]


def test_options_of_the_command(hub: Hub, a_run: Path) -> None:
    push(a_run, "--private", "--revision", "second", "--commit-message", "Try it", "--license", "mit")
    assert hub.repos[REPO] == {} and REPO in hub.private
    pushed = hub.branches[REPO, "second"]
    assert names(pushed) == ALWAYS and [message for _, message, _ in hub.commits] == ["Try it"]
    assert yaml.safe_load(pushed["README.md"].decode().split("---\n")[1])["license"] == "mit"
    push(a_run, "--private", "--revision", "second")


def test_what_others_have_in_the_repository_stays(hub: Hub, a_run: Path) -> None:
    hub.repos[REPO] = {"LICENSE": b"mine", "README.md": b"old", "checkpoint-7/optimizer.pt": b"kept"}
    hub.repos[REPO] |= {"adapter_model.safetensors": b"stale", "gallery.png": b"stale", "training_args.bin": b"stale"}
    hub.repos[REPO]["hf_bilb_models_text_encoder.py"] = b"stale"
    push(a_run)
    assert names(hub.repos[REPO]) == ALWAYS | {"LICENSE", "checkpoint-7/optimizer.pt"}
    assert "hf_bilb_models_text_encoder.py" not in hub.repos[REPO]
    assert hub.repos[REPO]["LICENSE"] == b"mine" and hub.repos[REPO]["README.md"] != b"old"


def test_a_card_that_somebody_wrote_is_left_alone(hub: Hub, a_run: Path) -> None:
    card = (a_run / "README.md").read_text()
    changed = "".join(line for line in card.splitlines(True) if "Written by hf-bilb" not in line) + "\nMine.\n"
    (a_run / "README.md").write_text(changed)
    push(a_run)
    assert hub.repos[REPO]["README.md"].decode() == changed
    refused = run("push", a_run, REPO, "--license", "mit")
    assert refused.exit_code == 2 and "changed by hand" in error_line(refused)


def test_a_run_of_an_earlier_version(hub: Hub, a_run: Path) -> None:
    """Without what this version adds to results.json, and with a card of peft's."""
    results = json.loads((a_run / "results.json").read_text())
    del results["about"], results["training"]["device_name"]
    (a_run / "results.json").write_text(json.dumps(results))
    (a_run / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n")
    (a_run / "hf_bilb.json").unlink()
    push(a_run)
    card = hub.repos[REPO]["README.md"].decode()
    assert "sigma_i(W) l_i" in card and "2502.08585" in card and "345" not in card.partition("## Results")[0]


# --- a recipe that pushes -----------------------------------------------------------------------------------------


def test_a_recipe_pushes_once_when_all_is_measured(hub: Hub, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    done = run("train", recipe, "trainer.push_to_hub=true", f"trainer.hub_model_id={REPO}")
    assert done.exit_code == 0, done.output
    assert [message for _, message, _ in hub.commits] == ["End of training"]
    assert names(hub.repos[REPO]) == ALWAYS
    assert f"hf_bilb.load('{REPO}')" in (tmp_path / "run" / "README.md").read_text()
    assert hub.repos[REPO]["README.md"] == (tmp_path / "run" / "README.md").read_bytes()


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints", "every_save"])
def test_strategies_of_trainers(hub: Hub, tmp_path: Path, strategy: str) -> None:
    settings = {"push_to_hub": "true", "hub_model_id": REPO, "hub_strategy": strategy, "hub_always_push": "true"}
    done = run("train", write_recipe(tmp_path), *(f"trainer.{key}={value}" for key, value in settings.items()))
    assert done.exit_code == 0, done.output
    ending = "" if strategy == "every_save" else ", checkpoint"
    messages = [message for _, message, _ in hub.commits]
    assert messages == [*(f"Training in progress, step {step}{ending}" for step in (10, 20, 30)), "End of training"]
    assert "README.md" not in hub.commits[0][2], "nothing is measured yet"
    assert hub.repos[REPO].keys() >= ALWAYS
    places = {path.partition("/")[0] for path in names(hub.repos[REPO]) - ALWAYS}
    saves = {"checkpoint-10", "checkpoint-20", "checkpoint-30"}
    assert places == {"checkpoint": {"last-checkpoint"}, "all_checkpoints": saves, "every_save": set()}[strategy]
    place = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-30"}.get(strategy)
    local = {file.name: file.read_bytes() for file in (tmp_path / "run" / "checkpoint-30").iterdir()}
    there = {path: content for path, content in hub.repos[REPO].items() if place and path.startswith(f"{place}/")}
    assert there == ({f"{place}/{name}": content for name, content in local.items()} if place else {})


def test_a_slow_push_is_not_overtaken(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def push_slowly_at_first(*given: Any) -> Any:
        begun.append(given)
        time.sleep(2.0 if len(begun) == 1 else 0.0)
        return push_files(*given)

    monkeypatch.setattr(hub_trainer, "push_files", push_slowly_at_first)
    settings = {"push_to_hub": "true", "hub_model_id": REPO, "hub_strategy": "checkpoint", "hub_always_push": "true"}
    done = run("train", write_recipe(tmp_path), *(f"trainer.{key}={value}" for key, value in settings.items()))
    assert done.exit_code == 0, done.output
    steps = [message.partition(", step ")[2] for _, message, _ in hub.commits]
    assert steps == ["10, checkpoint", "20, checkpoint", "30, checkpoint", ""]
    newest = (tmp_path / "run" / "checkpoint-30" / "trainer_state.json").read_bytes()
    assert hub.repos[REPO]["last-checkpoint/trainer_state.json"] == newest


NETWORK = """
from torch import nn
class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 4)
    def forward(self, numeric):
        out = self.layer(numeric.nan_to_num())
        return out[:, :1], out[:, 1:2], out[:, 2:]
def build():
    return Network()
"""


def test_a_plain_module_is_pushed_with_its_factory(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.py").write_text(NETWORK)
    changes = ["model={name: torch_module, factory: network.py:build}", "trainer.push_to_hub=true"]
    done = run("train", write_recipe(tmp_path), *changes, f"trainer.hub_model_id={REPO}")
    assert done.exit_code == 0, done.output
    pushed = hub.repos[REPO]
    assert {"model.safetensors", "network.py", "hf_bilb.json", "README.md", "results.json"} <= pushed.keys()
    assert f"hf_bilb.load('{REPO}', trust_remote_code=True)" in pushed["README.md"].decode()


def test_a_comparison_does_not_push(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    done = run("compare", recipe, "trainer.push_to_hub=true", "--balancers", "ls,si")
    assert done.exit_code == 2 and "push the one that you choose" in error_line(done)


# --- before the training ------------------------------------------------------------------------------------------


def refused(folder: Path, *changes: str) -> tuple[int, str]:
    done = run("train", write_recipe(folder), "trainer.push_to_hub=true", *changes)
    assert not list((folder / "run").glob("checkpoint-*")), "it has trained"
    return done.exit_code, error_line(done)


@pytest.mark.parametrize(("token", "said"), [(None, "there is no token"), ("hf_other", "does not take the token")])
def test_a_token_is_looked_at_before_training(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, said: str
) -> None:
    use(hub, monkeypatch, token)
    code, line = refused(tmp_path)
    assert code == 2 and said in line and "hf auth login" in line and "hf_other" not in line


def test_a_namespace_of_others(hub: Hub, tmp_path: Path) -> None:
    code, line = refused(tmp_path, "trainer.hub_model_id=else/people")
    assert (code, hub.repos) == (2, {})
    assert line == (
        "trainer.hub_model_id: 'else/people' is in the namespace of 'else', and the token is that of 'somebody' (and "
        "of lab)"
    )


def test_a_namespace_that_the_hub_refuses(hub: Hub, a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some servers do not say to which organizations a token belongs."""
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {"name": "somebody"})
    done = run("push", a_run, "else/people")
    hub.unanswered.clear()  # whether there is such a repository is asked, too
    assert done.exit_code == 2 and "may not write there" in error_line(done)


@pytest.mark.parametrize("name", ["a b", "x/y/z", "-people"])
def test_names_that_no_repository_can_have(hub: Hub, a_run: Path, name: str) -> None:
    done = run("push", a_run, "--", name) if name.startswith("-") else run("push", a_run, name)
    assert done.exit_code == 2 and name in error_line(done)


def test_a_public_repository_does_not_become_private_unseen(hub: Hub, a_run: Path) -> None:
    hub.repos[REPO] = {}
    done = run("push", a_run, REPO, "--private")
    assert done.exit_code == 2 and "is public" in error_line(done) and hub.commits == []


def test_no_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.stop()
    code, line = refused(tmp_path)
    assert code == 1 and "the Hub cannot be reached" in line and line.startswith("trainer.hub_model_id:")
    hub.start_again()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, line = refused(tmp_path)
    assert code == 1 and "HF_HUB_OFFLINE" in line


def test_a_token_in_a_recipe_is_refused_and_not_shown(tmp_path: Path) -> None:
    code, line = refused(tmp_path, "trainer.hub_token=hf_secret")
    assert code == 2 and "hf_secret" not in line and "HF_TOKEN" in line


def test_adapters_on_a_model_of_this_machine(hub: Hub, tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder")
    model = f"model={{name: multi_task_text, encoder: {tmp_path}/encoder, lora: {{r: 4}}}}"
    code, line = refused(tmp_path, model, "data.inputs={text: job}")
    assert code == 2 and "nobody else could load them" in line and hub.repos == {}


@pytest.mark.parametrize("missing", ["results.json", "model.safetensors"])
def test_folders_that_are_no_finished_run(hub: Hub, a_run: Path, missing: str) -> None:
    (a_run / missing).unlink()
    done = run("push", a_run, REPO)
    assert done.exit_code == 2 and hub.repos == {}
    assert ("has not finished" if missing == "results.json" else "no weights") in error_line(done)


def test_a_card_that_the_hub_refuses(hub: Hub, a_run: Path) -> None:
    done = run("push", a_run, REPO, "--license", "mine-alone")
    assert done.exit_code == 1 and "license" in error_line(done) and hub.commits == []


# --- in the middle ------------------------------------------------------------------------------------------------


def test_an_upload_that_broke_off_goes_on(hub: Hub, a_run: Path) -> None:
    hub.dies_in_upload = 2
    broken = run("push", a_run, REPO)
    assert broken.exit_code == 1 and "people" in error_line(broken)
    came = list(hub.uploads)
    assert len(came) >= 2 and hub.repos[REPO] == {}, "a reader sees all or nothing"
    hub.start_again()
    push(a_run)
    assert names(hub.repos[REPO]) == ALWAYS and len(hub.commits) == 1
    assert hub.uploads[: len(came)] == came
    assert len(set(hub.uploads)) == len(hub.uploads), "what came is not sent again"


def test_a_training_loses_nothing_where_its_push_fails(hub: Hub, tmp_path: Path) -> None:
    hub.dies_in_upload = 0
    failed = run("train", write_recipe(tmp_path), "trainer.push_to_hub=true", f"trainer.hub_model_id={REPO}")
    line = error_line(failed)
    assert failed.exit_code == 1 and (tmp_path / "run" / "results.json").is_file()
    command = line.rpartition("this pushes it: ")[2]
    assert command == f"hf-bilb push {tmp_path}/run {REPO}"
    hub.start_again()
    assert run(*shlex.split(command)[1:]).exit_code == 0
    assert names(hub.repos[REPO]) == ALWAYS


def test_the_token_is_in_no_message(hub: Hub, a_run: Path) -> None:
    hub.dies_in_upload = 0
    assert TOKEN not in run("push", a_run, REPO).output
