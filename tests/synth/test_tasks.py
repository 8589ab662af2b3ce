"""Tasks: the same seed draws the same anywhere, another seed another; Pillow alone is enough."""

from __future__ import annotations

import hashlib
import pickle
import random
import subprocess
import sys

import pytest

from finesight.errors import UserError
from finesight.synth import grammar, tasks, vocabulary
from finesight.synth.tasks import FIRST, HELD_OUT, MIXTURE, TASKS, Task, mixed, of_kind, sample

PILLOW_ONLY = ("word", "words", "lines", "sign", "street", "receipt", "scene", "crowd")


def _digest(task, seed, index):
    """Of everything that a sample is."""
    drawn = sample(task, seed, index)
    said = repr((drawn.picture.size, drawn.question, drawn.answer, drawn.kind, drawn.meta))
    return hashlib.sha256(drawn.picture.tobytes() + said.encode()).hexdigest()


@pytest.mark.parametrize("name", PILLOW_ONLY)
def test_samples_are_a_function_of_seed_and_number(name):
    task = Task(name, "built-in")
    forwards = [_digest(task, 7, index) for index in range(12)]
    backwards = [_digest(task, 7, index) for index in reversed(range(12))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) == 12
    assert not set(forwards) & {_digest(task, 8, index) for index in range(12)}


def test_another_process_draws_the_same():
    program = f"""
import hashlib
from finesight.synth.tasks import Task, sample
for name in {PILLOW_ONLY!r}:
    drawn = sample(Task(name, "built-in"), 3, 1)
    print(hashlib.sha256(drawn.picture.tobytes() + repr(drawn.answer).encode()).hexdigest())
"""
    here = []
    for name in PILLOW_ONLY:
        drawn = sample(Task(name, "built-in"), 3, 1)
        told = drawn.picture.tobytes() + repr(drawn.answer).encode()
        here.append(hashlib.sha256(told).hexdigest())
    assert _printed(program).split() == here


def _printed(program):
    """What another Python prints, whose hashes of texts are its own."""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_tasks_with_all_fonts_are_a_function_of_seed_and_number(installed_fonts, mathtext):
    for name in (*PILLOW_ONLY, "formula"):
        for fonts in ("seen", "unseen"):
            first, again = (_digest(Task(name, fonts), 5, 2) for _ in "ab")
            assert first == again


def test_chinese_is_a_function_of_seed_and_number(chinese_fonts):
    assert _digest(Task("chinese"), 5, 2) == _digest(Task("chinese"), 5, 2)


def test_seen_and_unseen_fonts_draw_the_same_words_otherwise(installed_fonts):
    words = [
        {sample(Task("word", fonts), 1, index).picture.tobytes() for index in range(30)}
        for fonts in ("seen", "unseen")
    ]
    assert not words[0] & words[1]


def test_no_picture_of_one_seed_is_one_of_another():
    pictures = [
        {sample(Task(name, "built-in"), seed, index).picture.tobytes() for index in range(100)}
        for name in ("word", "scene")
        for seed in (0, 1)
    ]
    assert not pictures[0] & pictures[1]
    assert not pictures[2] & pictures[3]


def test_few_formulas_of_one_seed_are_labels_of_another():
    train, held_out = (
        [grammar.formula(random.Random(f"formula {seed} {i}")) for i in range(number)]
        for seed, number in ((0, 20_000), (1, 1000))
    )
    known = set(train)
    assert sum(label in known for label in held_out) < 40


def test_tasks_and_samples_can_be_pickled():
    task = pickle.loads(pickle.dumps(Task("scene", "built-in")))
    drawn = sample(task, 0, 0)
    again = pickle.loads(pickle.dumps(drawn))
    assert (again.question, again.answer) == (drawn.question, drawn.answer)
    assert again.picture.tobytes() == drawn.picture.tobytes()


def test_an_unknown_task_is_refused():
    with pytest.raises(UserError, match="no task 'wrod'") as raised:
        Task("wrod")
    assert "word, words" in raised.value.expected


def test_an_unknown_choice_of_fonts_is_refused():
    with pytest.raises(UserError, match="no choice of fonts 'all'"):
        Task("word", "all")


def test_a_kind_that_is_never_asked_is_refused():
    with pytest.raises(UserError, match="no question of the kind 'sing'") as raised:
        next(of_kind(Task("crowd", "built-in"), 0, "sing"))
    assert "all_shapes, count, find_shapes, shape_at" in raised.value.expected


def test_the_mixture_draws_each_task_by_its_share():
    assert sum(MIXTURE.values()) == pytest.approx(1)
    assert sum(FIRST.values()) == pytest.approx(1)
    assert set(FIRST) < set(TASKS)
    assert set(MIXTURE) == set(TASKS)
    shares = {"scene": 0.75, "crowd": 0.25}
    crowds = sum(mixed(shares, 0, index, "built-in").kind == "count" for index in range(300))
    assert 15 < crowds < 60, f"{crowds} of 300 are counts, of a quarter crowds"
    first, again = (mixed(shares, 4, 9, "built-in") for _ in "ab")
    assert first.picture.tobytes() == again.picture.tobytes()


def test_held_out_sets_ask_what_they_measure(installed_fonts, chinese_fonts, mathtext):
    for name, held_out in HELD_OUT.items():
        numbers, drawn = zip(*_first(held_out, 3), strict=True)
        assert {each.kind for each in drawn} == {held_out.kind}, name
        assert len(set(numbers)) == 3


def _first(held_out, number):
    found = of_kind(held_out.task, 99, held_out.kind)
    return [next(found) for _ in range(number)]


def test_pillow_alone_is_enough():
    program = f"""
import sys
from finesight.synth.tasks import Task, sample
for name in {PILLOW_ONLY!r}:
    sample(Task(name, "built-in"), 0, 0)
loaded = {{name.partition(".")[0] for name in sys.modules}}
print(sorted(loaded & {{"matplotlib", "torch", "fontTools", "fontpkg_inter"}}))
"""
    assert _printed(program).strip() == "[]"


def test_formulas_without_matplotlib_are_explained():
    program = """
import sys
sys.modules["matplotlib"] = None
from finesight.errors import UserError
from finesight.synth.tasks import Task, sample
try:
    sample(Task("formula"), 0, 0)
except UserError as error:
    print(error)
"""
    told = _printed(program)
    assert "matplotlib is not installed" in told
    assert "pip install 'finesight[synth]'" in told


def test_words_are_not_all_from_the_list():
    rng = random.Random(0)
    words = [vocabulary.word(rng).lower() for _ in range(2000)]
    listed = sum(word in vocabulary.COMMON for word in words) / len(words)
    assert 0.2 < listed < 0.5


def test_every_task_says_what_it_draws():
    for name, draw in tasks.TASKS.items():
        assert draw.__doc__, f"the task {name} has no docstring"
