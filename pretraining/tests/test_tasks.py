"""Tasks: the same seed draws the same anywhere, another seed another; Pillow alone is enough."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import subprocess
import sys

import pytest
from synthetic_tasks import formula_grammar, tasks, vocabulary
from synthetic_tasks.tasks import (
    EVAL_TASKS,
    MAIN_MIXTURE,
    TASK_GENERATORS,
    WARMUP_MIXTURE,
    SyntheticTask,
    generate_mixture_sample,
    generate_sample,
    iter_samples_of_kind,
)

from finesight.errors import UserError

PILLOW_ONLY = ("word", "words", "lines", "sign", "street", "receipt", "scene", "crowd")


def _digest(task, seed, index):
    """Of everything that a sample is."""
    drawn = generate_sample(task, seed, index)
    output = repr((drawn.image.size, drawn.question, drawn.answer, drawn.task_kind, drawn.meta))
    return hashlib.sha256(drawn.image.tobytes() + output.encode()).hexdigest()


@pytest.mark.parametrize("name", PILLOW_ONLY)
def test_samples_are_a_function_of_seed_and_index(name):
    task = SyntheticTask(name, "built-in")
    forward_order = [_digest(task, 7, index) for index in range(12)]
    backward_order = [_digest(task, 7, index) for index in reversed(range(12))]
    assert forward_order == backward_order[::-1]
    assert len(set(forward_order)) == 12
    assert not set(forward_order) & {_digest(task, 8, index) for index in range(12)}


def test_samples_are_equal_across_processes():
    program = f"""
import hashlib
from synthetic_tasks.tasks import SyntheticTask, generate_sample
for name in {PILLOW_ONLY!r}:
    drawn = generate_sample(SyntheticTask(name, "built-in"), 3, 1)
    print(hashlib.sha256(drawn.image.tobytes() + repr(drawn.answer).encode()).hexdigest())
"""
    here = []
    for name in PILLOW_ONLY:
        drawn = generate_sample(SyntheticTask(name, "built-in"), 3, 1)
        result = drawn.image.tobytes() + repr(drawn.answer).encode()
        here.append(hashlib.sha256(result).hexdigest())
    assert _printed(program).split() == here


def _printed(program):
    """What another Python prints, whose hashes of texts are its own."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_tasks_with_all_fonts_are_deterministic(installed_fonts, mathtext):
    for name in (*PILLOW_ONLY, "formula"):
        for fonts in ("seen", "unseen"):
            first, again = (_digest(SyntheticTask(name, fonts), 5, 2) for _ in "ab")
            assert first == again


def test_chinese_task_is_deterministic(chinese_fonts):
    assert _digest(SyntheticTask("chinese"), 5, 2) == _digest(SyntheticTask("chinese"), 5, 2)


def test_seen_and_unseen_fonts_give_different_images(installed_fonts):
    words = [
        {
            generate_sample(SyntheticTask("word", fonts), 1, index).image.tobytes()
            for index in range(30)
        }
        for fonts in ("seen", "unseen")
    ]
    assert not words[0] & words[1]


def test_different_seeds_share_no_image():
    images = [
        {
            generate_sample(SyntheticTask(name, "built-in"), seed, index).image.tobytes()
            for index in range(100)
        }
        for name in ("word", "scene")
        for seed in (0, 1)
    ]
    assert not images[0] & images[1]
    assert not images[2] & images[3]


def test_different_seeds_share_few_formulas():
    train, validation = (
        [
            formula_grammar.sample_formula(random.Random(f"formula {seed} {i}"))
            for i in range(number)
        ]
        for seed, number in ((0, 20_000), (1, 1000))
    )
    known = set(train)
    assert sum(label in known for label in validation) < 40


def test_tasks_and_samples_are_picklable():
    task = pickle.loads(pickle.dumps(SyntheticTask("scene", "built-in")))
    drawn = generate_sample(task, 0, 0)
    again = pickle.loads(pickle.dumps(drawn))
    assert (again.question, again.answer) == (drawn.question, drawn.answer)
    assert again.image.tobytes() == drawn.image.tobytes()


def test_unknown_task_is_rejected():
    with pytest.raises(UserError, match="no task 'wrod'") as raised:
        SyntheticTask("wrod")
    assert "word, words" in raised.value.expected


def test_unknown_font_split_is_rejected():
    with pytest.raises(UserError, match="no choice of fonts 'all'"):
        SyntheticTask("word", "all")


def test_unavailable_task_kind_is_rejected():
    with pytest.raises(UserError, match="no question of the kind 'sing'") as raised:
        next(iter_samples_of_kind(SyntheticTask("crowd", "built-in"), 0, "sing"))
    assert "all_shapes, count, find_shapes, shape_at" in raised.value.expected


def test_mixture_samples_tasks_by_weight():
    assert sum(MAIN_MIXTURE.values()) == pytest.approx(1)
    assert sum(WARMUP_MIXTURE.values()) == pytest.approx(1)
    assert set(WARMUP_MIXTURE) < set(TASK_GENERATORS)
    assert set(MAIN_MIXTURE) == set(TASK_GENERATORS)
    shares = {"scene": 0.75, "crowd": 0.25}
    crowds = sum(
        generate_mixture_sample(shares, 0, index, "built-in").task_kind == "count"
        for index in range(300)
    )
    assert 15 < crowds < 60, f"{crowds} of 300 are counts, of a quarter crowds"
    first, again = (generate_mixture_sample(shares, 4, 9, "built-in") for _ in "ab")
    assert first.image.tobytes() == again.image.tobytes()


def test_eval_tasks_ask_their_question_kind(installed_fonts, chinese_fonts, mathtext):
    for name, validation in EVAL_TASKS.items():
        values, drawn = zip(*_first(validation, 3), strict=True)
        assert {each.task_kind for each in drawn} == {validation.task_kind}, name
        assert len(set(values)) == 3


def _first(validation, number):
    found = iter_samples_of_kind(validation.task, 99, validation.task_kind)
    return [next(found) for _ in range(number)]


def test_pillow_is_the_only_dependency():
    program = f"""
import sys
from synthetic_tasks.tasks import SyntheticTask, generate_sample
for name in {PILLOW_ONLY!r}:
    generate_sample(SyntheticTask(name, "built-in"), 0, 0)
loaded = {{name.partition(".")[0] for name in sys.modules}}
print(sorted(loaded & {{"matplotlib", "torch", "fontTools", "fontpkg_inter"}}))
"""
    assert _printed(program).strip() == "[]"


def test_missing_matplotlib_is_reported():
    program = """
import sys
sys.modules["matplotlib"] = None
from finesight.errors import UserError
from synthetic_tasks.tasks import SyntheticTask, generate_sample
try:
    generate_sample(SyntheticTask("formula"), 0, 0)
except UserError as error:
    print(error)
"""
    result = _printed(program)
    assert "matplotlib is not installed" in result
    assert "pip install matplotlib" in result


def test_words_mix_dictionary_and_pseudowords():
    rng = random.Random(0)
    words = [vocabulary.sample_word(rng).lower() for _ in range(2000)]
    listed = sum(word in vocabulary.COMMON_WORDS for word in words) / len(words)
    assert 0.2 < listed < 0.5


def test_every_task_has_a_docstring():
    for name, draw in tasks.TASK_GENERATORS.items():
        assert draw.__doc__, f"the task {name} has no docstring"
