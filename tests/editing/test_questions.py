import pytest
import torch

from decoders import FAMILIES, decoder
from lessons import FACTS, pupil, tokenizer
from pkmem.editing.questions import Question, answer_losses, batches, questions_of, recall_of
from pkmem.text.facts import Fact

ASKED = [Question([5, 6, 7], [8], 0), Question([9], [10, 11, 12], 1), Question([1, 2, 3, 4, 5, 6], [7, 8], 2)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_losses_and_answers_are_those_of_each_question_alone(family):
    model = decoder(family)
    losses, is_right = answer_losses(model, ASKED)
    for place, (prompt, answer, _) in enumerate(ASKED):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = -logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).mean()
        assert losses[place].item() == pytest.approx(expected.item(), abs=1e-5)
        written = model.generate(
            torch.tensor([prompt]), max_new_tokens=len(answer), do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert is_right[place] == (written[0, len(prompt) :].tolist() == answer)


@torch.no_grad()
def test_recall_is_the_share_that_greedy_decoding_writes():
    model = decoder()
    prompts = [[3, 4], [7, 8, 9], [11]]
    right = [model(torch.tensor([prompt])).logits[0, -1].argmax().item() for prompt in prompts]
    asked = [Question(prompt, [token], place) for place, (prompt, token) in enumerate(zip(prompts, right, strict=True))]
    asked.append(Question([3, 4], [(right[0] + 1) % 64], 3))
    model.train()
    assert recall_of(model, asked) == 0.75
    assert model.training


def test_each_phrasing_is_a_question_and_a_space_belongs_to_the_answer():
    facts = [Fact(("one two", "three"), "four"), Fact(("one two ",), "four"), Fact(("one\n",), "four")]
    told = tokenizer()
    asked = questions_of(facts, told, pupil())
    assert [(told.decode(question.prompt), told.decode(question.answer), question.fact) for question in asked] == [
        ("one two", " four", 0),
        ("three", " four", 0),
        ("one two", " four", 1),
        ("one\n", "four", 2),
    ]


def test_facts_that_do_not_fit_the_context_are_named():
    long = [*FACTS, Fact(("word " * 64,), "x")]
    with pytest.raises(ValueError, match=rf"fact {len(long)}, 'word word .* but the model's context is 64: shorten it"):
        questions_of(long, tokenizer(), pupil())
    with pytest.raises(ValueError, match="there are no facts"):
        questions_of([], tokenizer(), pupil())


def test_batches_keep_the_order():
    assert [list(batch) for batch in batches(ASKED, 2)] == [ASKED[:2], ASKED[2:]]
