"""What a run keeps of its model directory: policy, critic, reference and base weights, each in memory of its own."""

from contextlib import ExitStack

import jax
import numpy as np
import pytest

from dppo_jax.models.hf import load_params, place_params
from experiments.run.learner import Learner
from experiments.run.load import load_setup
from experiments.run.runs import Runs
from tests.helpers.fixtures import run_config, tiny

KEPT = {
    "critic and reference": dict(advantage__name="gae", loss__name="dppo_binary_tv", reference__coef=0.1),
    "adapters": dict(lora__rank=2, reference__coef=0.1),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_learner_begins_with_the_model_directory(tmp_path_factory, name):
    """The policy's arrays are then overwritten, as an update does that is given them; nothing else changes."""
    folder = tiny(tmp_path_factory)
    whole = load_params(folder / "model")[1]
    with ExitStack() as stack:
        setup = load_setup(run_config(folder, **KEPT[name]), stack)
        learner = Learner(Runs([setup]))
        load = lambda: place_params(setup.directory, setup.model_shardings)[1]  # noqa: E731
        learner.begin(load())
        learner.keep_reference(load)
        begun = jax.device_get(learner.params)
        jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(learner.params)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(learner._reference), begun)
        if name == "adapters":
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(learner.frozen), whole)
            learner.restore({"params": {}, "opt_state": (), "updates": 0}, load)
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(learner.frozen), whole)
        else:
            jax.tree.map(np.testing.assert_array_equal, begun, whole)
            body = {key: value for key, value in whole.items() if key != "head"}
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(learner._critic.state.params["body"]), body)
