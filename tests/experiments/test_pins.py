"""Names of the hub in a config: what is refused of them, which commit a run goes on with. Nothing is fetched here."""

import pytest

from configs import base, quickstart
from dppo_jax.errors import UserError
from dppo_jax.storage.run_config import write_config
from experiments.run import checks
from experiments.run.pins import pinned
from experiments.run.setup import model_directory

COMMIT = "0123456789" * 4


def named(**policy):
    """A config whose model, data and evaluation set are on the hub."""
    config = quickstart.get_config()
    config.policy.update({"path": "acme/none", **policy})
    config.data.update({"kind": "hub", "name": "acme/rows", "commit": COMMIT})
    config.eval.sets.held_out = base.data_section(kind="hub", name="acme/rows", commit="b" * 40)
    return config


def test_a_run_goes_on_with_the_commits_that_it_wrote(tmp_path):
    write_config(tmp_path, named(revision="v1", commit="a" * 40).to_dict())
    again = named(revision="v1")
    again.data.commit = again.eval.sets.held_out.commit = ""
    found = pinned(again, tmp_path)
    assert [found.policy.commit, found.data.commit, found.eval.sets.held_out.commit] == ["a" * 40, COMMIT, "b" * 40]
    assert again.policy.commit == "" and pinned(named(commit=COMMIT), tmp_path).policy.commit == COMMIT
    assert pinned(quickstart.get_config(), tmp_path).policy.commit == ""
    assert pinned(again, tmp_path, unread=("policy",)).policy.commit == ""


def test_a_reward_model_has_a_commit_of_its_own(tmp_path):
    config = quickstart.get_config()
    config.reward.model.path, config.reward.model.commit = "acme/reward", COMMIT
    write_config(tmp_path, config.to_dict())
    config.reward.model.commit = ""
    assert pinned(config, tmp_path).reward.model.commit == COMMIT
    assert pinned(config, tmp_path, unread=("reward.model",)).reward.model.commit == ""
    with pytest.raises(UserError, match="there is no directory 'acme/reward', and not all of the model 'acme/reward'"):
        pinned(config)
    config.reward.model.path, config.reward.model.revision = str(tmp_path), "v1"
    with pytest.raises(UserError, match="reward.model.revision = 'v1' is of a model on the hub, and reward.model.path"):
        model_directory(config, "reward.model")


@pytest.mark.parametrize(
    "written",
    [
        {"policy": {"path": "acme/none", "revision": "v1", "commit": COMMIT}},
        {"policy": {"path": "acme/other", "revision": "", "commit": COMMIT}},
        {"policy": {"path": "acme/none", "revision": "", "commit": "main"}},
        {"policy": {"path": "acme/none"}},
        None,
    ],
)
def test_what_another_run_wrote_is_not_taken(tmp_path, written):
    """The hub is asked, which these tests are kept from."""
    write_config(tmp_path, written or {})
    if written is None:
        (tmp_path / "config.json").write_text("{")
    sentence = "there is no directory 'acme/none', and not all of the model 'acme/none' is in the cache, .*OFFLINE"
    with pytest.raises(UserError, match=sentence):
        pinned(named(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": "hub", "name": "gsm8k"}, "data.kind = 'hub' needs data.name, such as openai/gsm8k, not 'gsm8k'"),
        ({"kind": "hub", "name": "o/n", "path": "x"}, "data.kind = 'hub' reads data.name, but data.path = 'x'; clear"),
        ({"kind": "hub", "name": "o/n", "split": ""}, "data.split is empty: name a split, such as train"),
        ({"kind": "hub", "name": "o/n", "commit": "abc"}, "data.commit = 'abc' is no commit, of 40 hexadecimal digits"),
        ({"kind": "jsonl", "subset": "main"}, "data.kind = 'jsonl' takes no data.subset, but has 'main'; clear it"),
        ({"revision": "v1"}, "data.kind = 'reasoning_gym' takes no data.revision, but has 'v1'; clear it: "),
    ],
)
def test_what_says_nothing_of_the_hub_is_refused(changes, sentence):
    config = quickstart.get_config()
    config.data.update(changes)
    config.data.settings = {} if changes.get("kind") else config.data.settings
    with pytest.raises(UserError) as refused:
        checks.check(config)
    assert sentence in str(refused.value)


def test_a_directory_has_no_revision():
    config = quickstart.get_config()
    config.policy.revision = "v1"
    with pytest.raises(UserError, match="policy.revision = 'v1' is of a model on the hub, and policy.path = "):
        model_directory(config)
