import pytest
import torch

from decoders import FAMILIES, decoder
from lessons import FACTS, pupil, tokenizer
from pkmem.editing.questions import Question, answer_logits, answer_losses, batches, questions_of
from pkmem.text.facts import Fact

ASKED = [Question([5, 6, 7], [8]), Question([9], [10, 11, 12]), Question([1, 2, 3, 4, 5, 6], [7, 8])]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_losses_and_answers_are_those_of_each_question_alone(family):
    model = decoder(family)
    losses, is_right = answer_losses(model, ASKED)
    expected_logits, labels = answer_logits(model, ASKED)
    assert [row[row >= 0].tolist() for row in labels] == [question.answer for question in ASKED]
    for place, (prompt, answer) in enumerate(ASKED):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(expected_logits[place][labels[place] >= 0], logits, rtol=1e-4, atol=1e-5)
        expected = -logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).mean()
        assert losses[place].item() == pytest.approx(expected.item(), abs=1e-5)
        written = model.generate(
            torch.tensor([prompt]), max_new_tokens=len(answer), do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert is_right[place] == (written[0, len(prompt) :].tolist() == answer)


def test_each_phrasing_is_a_question_and_a_space_belongs_to_the_answer():
    facts = [Fact(("one two", "three"), "four"), Fact(("one two ",), "four"), Fact(("one\n",), "four")]
    told = tokenizer()
    asked = questions_of(facts, told, pupil())
    assert [(told.decode(question.prompt), told.decode(question.answer)) for question in asked] == [
        ("one two", " four"),
        ("three", " four"),
        ("one two", " four"),
        ("one\n", "four"),
    ]


def test_facts_that_do_not_fit_the_context_are_named():
    long = [*FACTS, Fact(("word " * 64,), "x")]
    with pytest.raises(ValueError, match=rf"fact {len(long)}, 'word word .* but the model's context is 64: shorten it"):
        questions_of(long, tokenizer(), pupil())
    with pytest.raises(ValueError, match="there are no facts"):
        questions_of([], tokenizer(), pupil())


def test_batches_keep_the_order():
    assert [list(batch) for batch in batches(ASKED, 2)] == [ASKED[:2], ASKED[2:]]
