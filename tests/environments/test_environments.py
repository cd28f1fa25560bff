"""Environments: what they say and give, in real workers; and those that are no environments."""

import re
import sys
from typing import cast

import pytest

from dppo_jax.data import environments
from dppo_jax.data.examples import Example, Task
from dppo_jax.data.tasks import load_task
from dppo_jax.environments.calculator import Calculator, worked_out
from dppo_jax.environments.games import GuessTheNumber, TwoSums
from dppo_jax.environments.gym import AGAIN
from dppo_jax.environments.play import Player, Said
from dppo_jax.errors import UserError
from dppo_jax.rewards import worker
from dppo_jax.rewards.scorer import Scorer
from dppo_jax.rewards.worker import Outcome
from tests.helpers.places import ROOT

TALK = ROOT / "tests/helpers/talk.py"


def environment(name, **settings) -> Task:
    numbers = {"size": settings.pop("size", 6), "max_turns": settings.pop("max_turns", 4)}
    return load_task("environment", name=str(name), settings=settings, seed=3, **numbers)


def played(task: Task, turns: list[tuple[str, ...]], examples: list[Example] | None = None, **limits) -> list[Outcome]:
    """What workers make of turns, each in a conversation of its own: by default all with the first example."""
    examples = examples or [task.examples[0]] * len(turns)
    with Scorer(task, workers=2, **{"time_limit_s": 20, **limits}) as scorer:
        return list(scorer.submit(cast(list[str], turns), examples).outcomes())


def test_a_number_is_found_by_hints():
    game = GuessTheNumber(max_turns=4, high=5)
    assert game.reset(8) == GuessTheNumber(max_turns=4, high=5).reset(8) == ("Guess a number from 1 to 5: ", {})
    secrets = set()
    for seed in range(40):
        game.reset(seed)
        found = [game.step(str(guess)) for guess in range(1, 5)]
        (right,) = [i for i, step in enumerate(found) if step[1]] or [4]
        secrets.add(right)
        assert [text for text, *_ in found[:right]] == [" higher: "] * right
        assert right == 4 or found[right] == ("right", 1.0, True, False, {})
        assert all(text == " lower: " for text, *_ in found[right + 1 :])
    assert secrets == set(range(5))
    game.reset(0)
    steps = [game.step(text) for text in ("no idea", "0", "-1", "6")]
    assert [step[0] for step in steps] == [" a number: ", " higher: ", " higher: ", " lower: "]
    assert [step[2] for step in steps] == [False, False, False, True] and not any(step[1] for step in steps)


def test_two_sums_are_worth_a_half_each():
    game = TwoSums(max_turns=2, max_terms=4)
    for seed in range(20):
        first, _ = game.reset(seed)
        value = eval(first.split(":")[1].rstrip("= "))
        text, reward, terminated, truncated, _ = game.step(f"so {value}" if seed % 2 else f"{value + 1}")
        assert (reward, terminated, truncated) == (seed % 2 / 2, False, False)
        assert text.startswith("ok, " if seed % 2 else "no, ")
        assert game.step(str(eval(text.split(", ")[1].rstrip("=")))) == ("", 0.5, True, False, {})


# What is worked out, and what it comes to.
EXPRESSIONS = {
    "3*4": "12", " (1+2)*3 ": "9", "1/4": "0.25", "-7/2": "-3.5", "1/3": "1/3", "7 - 10": "-3", "0.1+0.2": "0.3",
    "1/0": "error: division by zero", "3*": "error: that is no arithmetic", "()": "error: that is no arithmetic",
    "1 2": "error: that is no arithmetic", "(" * 150: "error: that is no arithmetic",
}  # fmt: skip
UNREAD = ["", "9**9**9", "7//2", "1e9", "__import__('os')", "a", "1" * 201, "1_0", "3\n*4", "²"]


@pytest.mark.parametrize("expression", [*EXPRESSIONS, *UNREAD])
def test_a_calculator_works_out_arithmetic_and_nothing_else(expression):
    found = worked_out(expression)
    assert found == EXPRESSIONS[expression] if expression in EXPRESSIONS else found.startswith("error: write at most")


def test_a_call_of_the_tool_is_answered_and_an_answer_is_checked():
    tool = Calculator(max_turns=3, terms=3, digits=2)
    for seed in range(10):
        problem = tool.reset(seed)[0].split("What is ")[1].split("?")[0]
        value = eval(problem)
        assert tool.step(f"<tool>{problem}</tool>") == (str(value), 0.0, False, False, {"use_tool": True})
        assert tool.step("<think><tool>1</tool></think> <tool>2</tool> <tool>1/8</tool>")[0] == "0.125"
        assert tool.step(f"It is {value}.") == ("", 1.0, True, False, {})
    tool.reset(0)
    assert [tool.step("<tool>1</tool>")[2] for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize("name", ["mini_sudoku", "arc_1d", "acre"])
def test_a_set_of_reasoning_gym_is_asked_again(name):
    task = environment(name, max_turns=3)
    assert [example.meta["seed"] for example in task.examples] == list(range(3, 9))
    label = task.examples[0].answer
    turns = [("no",), ("no", label), ("no", "no", "no"), (label,), ("no", "no", "no", label)]
    one, two, three, four, five = played(task, turns)
    assert (one.score, one.said) == (0, Said(AGAIN)) and (two.score, two.said) == (1, Said("", True))
    assert (three.score, three.said.terminated) == (0, True) and four.score == 1
    assert five.kind == "failed" and "end it earlier" in five.message


def test_an_environment_in_a_file_and_what_it_may_not_do():
    bad = {"4": "raise", "5": "hang", "6": "eat", "7": "number", "8": "swap"}
    task = environment(f"{TALK}:Talk", bad=bad)
    assert [example.prompt for example in task.examples] == ["0+1=", "1+0=", "2+1=", "0+0=", "1+1=", "2+0="]
    alone = played(task, [("1", "0")] * 6, list(task.examples), time_limit_s=3, memory_limit_mib=256)
    assert [one.kind for one in alone] == ["scored", "failed", "killed", "killed", "failed", "failed"]
    assert alone[0].score == 1 and "no idea" in alone[1].message and "int, not text" in alone[4].message
    assert "step gave 0.0 where it says whether the conversation ends" in alone[5].message
    again = played(task, [("1",), ("1", "0")] * 2)
    assert again[:2] == again[2:]  # what it draws is a function of the seed
    other = [Example("another", "", {"seed": 3})]
    assert "another observation than before" in played(task, [("1",)], other)[0].message


def test_the_environment_of_the_page_is_one(tmp_path):
    page = (ROOT / "docs/conversation.md").read_text()
    (tmp_path / "my_game.py").write_text(re.search(r"```python\n(.*?)```", page, re.S).group(1))
    task = environment(f"{tmp_path / 'my_game.py'}:Game", low=2)
    assert task.examples[0].prompt == "Guess a number."
    one, two, three = played(task, [("6",), ("6", "5"), ("5",)])
    assert one.said == Said("No. Guess again.") and one.score == 0
    assert two == three and two.score == 1 and two.said.terminated


GEM = """
class Game:
    def __init__(self, id, size=1):
        self.id, self.size = id, size

    def reset(self, seed=None):
        return "Guess.\\n", {"suffix": "Enter your guess."}

    def step(self, action):
        return f"{self.id} {self.size} {action}", 0.5, False, True, {}


make = Game
"""


def test_an_environment_of_gem_by_its_id(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'game:Some-v0' is an environment of gem-llm, which is not installed"):
        environment("game:Some-v0")
    (tmp_path / "gem.py").write_text(GEM)
    monkeypatch.syspath_prepend(tmp_path)
    task = environment("game:Some-v0", size=2)
    assert task.examples[0].prompt == "Guess.\nEnter your guess."
    (one,) = played(task, [("up",)])
    assert one.score == 0.5 and one.said == Said("game:Some-v0 1 up", False, True)
    sys.modules.pop("gem", None)


REFUSED = {
    "data.kind = 'environment' needs data.name: calculator, guess_the_number, two_sums, or FILE": ("", {}),
    "unknown environment 'two_sum'; the nearest is 'two_sums'": ("two_sum", {}),
    "data.settings holds 'max_turns'; set data.max_turns instead": ("two_sums", {"max_turns_": 3}),
    "data.settings: two_sums has no setting 'min_term'; the nearest is 'min_terms'": ("two_sums", {"min_term": 3}),
    "data.name = 'two_sums' cannot be made from data.settings = {\"min_terms\": 0}": ("two_sums", {"min_terms": 0}),
    "data.name must be FILE.py:CLASS, such as my_game.py:Game, not 'talk.py'": ("talk.py", {}),
    "data.name: there is no file 'none.py'": ("none.py:Talk", {}),
    f"data.name: {TALK} has no class 'Tak'; the nearest is 'Talk'": (f"{TALK}:Tak", {}),
    f"data.name: NoSteps of {TALK} has no method step(action)": (f"{TALK}:NoSteps", {}),
    f"data.settings: {TALK}:Talk has no setting 'words'": (f"{TALK}:Talk", {"words": 3}),
    f"data.name = '{TALK}:Silent': reset(seed=3) says nothing": (f"{TALK}:Silent", {}),
    f"data.name = '{TALK}:Waits': reset(seed=3) ran over its time or memory, or": (f"{TALK}:Waits", {}),
    f"data.name = '{TALK}:Odd': reset(seed=3) fails: ValueError: the observation has a lone s": (f"{TALK}:Odd", {}),
    f"data.name = '{TALK}:Forgetful': reset(seed=3) gave two different observations": (f"{TALK}:Forgetful", {}),
    f"data.name = '{TALK}:BadReset': reset(seed=3) fails: ValueError: reset must": (f"{TALK}:BadReset", {}),
    f"data.name = '{TALK}:Fails': reset(seed=3) fails: KeyError: 'nothing'": (f"{TALK}:Fails", {}),
    f"data.settings: {TALK}:make has no setting 'none'": (f"{TALK}:make", {"none": 1}),
    f"data.name = '{TALK}:make' cannot be made": (f"{TALK}:make", {"max_guesses": -1}),
    "two sums": ("two_sums", {"max_turns": 1}),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_no_environment_is_refused_in_one_sentence(sentence, monkeypatch):
    monkeypatch.setattr(environments, "TIME_LIMIT_S", 3.0 if "Waits" in sentence else 60.0)
    name, settings = REFUSED[sentence]
    max_turns = settings.get("max_turns", 4)
    settings = {key.rstrip("_"): value for key, value in settings.items() if key != "max_turns"}
    with pytest.raises(UserError) as caught:
        load_task("environment", name=name, settings=settings, size=2, seed=3, max_turns=max_turns)
    said = str(caught.value)
    assert "\n" not in said and (sentence in said if sentence == "two sums" else said.startswith(sentence))


def test_a_file_that_waits_when_it_is_loaded_is_named(tmp_path, monkeypatch):
    (tmp_path / "waits.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(worker, "LOAD_LIMIT_S", 0.2)
    player = Player(f"{tmp_path}/waits.py:Game", "{}", 3)
    with pytest.raises(UserError, match=r"could not load data.name = .*waits.py:Game within 0.2 s: does some"):
        worker._load(player.load)
