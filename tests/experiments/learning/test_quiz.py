"""The general questions: well-formed, and the same for lm-eval."""

import os
from collections import Counter
from pathlib import Path

import pytest
import yaml

from pkmem.experiments.family import config_folder
from pkmem.experiments.learning.quiz import quiz

TASK = config_folder() / "quiz" / "general.yaml"


def test_every_question_has_four_answers_one_of_them_right() -> None:
    questions = quiz()
    assert 50 <= len(questions) <= 100
    assert len({question.prompt for question in questions}) == len(questions)
    for question in questions:
        assert question.prompt.startswith("Question: ")
        assert question.prompt.endswith("?\nAnswer:")
        assert len(set(question.choices)) == 4
    places = Counter(question.answer for question in questions)
    assert sorted(places) == [0, 1, 2, 3]
    assert max(places.values()) < len(questions) / 2  # always the same place would be no question
    assert (
        questions[0].choices[questions[0].answer],
        questions[0].prompt.split("\n")[0].removeprefix("Question: "),
    ) == ("Paris", "What is the capital of France?")


def test_the_task_of_lm_eval_reads_the_same_file_in_the_same_words() -> None:
    task = yaml.safe_load(TASK.read_text(encoding="utf-8"))
    file = Path(task["dataset_kwargs"]["data_files"]["test"])
    assert (TASK.parents[2] / file).samefile(TASK.with_suffix(".jsonl"))
    assert task["doc_to_text"] == "Question: {{question}}\nAnswer:"


@pytest.mark.slow
def test_lm_eval_asks_a_saved_model_with_memories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    import pkmem
    from taught import llama, tokenizer

    memory = pkmem.MemoryConfig(num_sub_keys=8, heads=2, knn=4, query_dim=16)
    pkmem.add_memory(llama(), [1], memory, placement="parallel").save_pretrained(tmp_path)
    tokenizer.__wrapped__().save_pretrained(tmp_path)
    monkeypatch.chdir(TASK.parents[2])
    monkeypatch.setitem(os.environ, "HF_DATASETS_OFFLINE", "1")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path), "device": "cpu"},
        tasks=["pkmem_general"],
        task_manager=TaskManager(include_path=str(TASK.parent)),
        limit=8,
    )
    assert 0 <= found["results"]["pkmem_general"]["acc,none"] <= 1
