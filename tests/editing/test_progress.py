import pytest
import torch

from decoders import decoder
from pkmem.editing import progress
from pkmem.editing.progress import Progress
from pkmem.editing.questions import Question


@torch.no_grad()
def test_the_share_is_that_which_greedy_decoding_writes():
    model = decoder()
    prompts = [[3, 4], [7, 8, 9], [11]]
    right = [model(torch.tensor([prompt])).logits[0, -1].argmax().item() for prompt in prompts]
    asked = [Question(prompt, [token]) for prompt, token in zip(prompts, right, strict=True)]
    asked.append(Question([3, 4], [(right[0] + 1) % 64]))
    model.train()
    asking = Progress(asked, 2, 0)
    assert asking.share == 0
    assert asking.check(model) == asking.share == 0.75
    assert model.training


@pytest.fixture
def answered(monkeypatch):
    """200 questions, and how each is answered: losses and whether right, which a test may change."""
    losses, rights = [0.01] * 200, [True] * 200

    def answer(model, questions):
        places = [question.prompt[0] for question in questions]
        return torch.tensor([losses[place] for place in places]), torch.tensor([rights[place] for place in places])

    monkeypatch.setattr(progress, "answer_losses", answer)
    return Progress([Question([place], [0]) for place in range(200)], 50, 0), losses, rights


def test_an_epoch_asks_what_is_not_sure_and_little_else(answered):
    asking, losses, rights = answered
    batches = list(asking.epoch())
    assert [len(batch) for batch in batches] == [50] * 4
    assert sorted(place for batch in batches for place in batch) == list(range(200))
    assert batches[0] != sorted(batches[0])
    losses[7], rights[9] = 0.1, False
    for batch in batches:
        assert asking.ask(None, batch).tolist() == pytest.approx([losses[place] for place in batch])
    assert asking.share == 199 / 200
    again = [place for batch in asking.epoch() for place in batch]
    assert {7, 9} <= set(again)
    assert 10 < len(again) < 60


def test_a_check_finds_what_was_forgotten_and_has_it_asked_again(answered):
    asking, _, rights = answered
    for batch in asking.epoch():
        asking.ask(None, batch)
    rights[3:103] = [False] * 100
    assert asking.share == 1
    assert asking.check(decoder()) == asking.share == 0.5
    assert set(range(3, 103)) <= {place for batch in asking.epoch() for place in batch}


def test_what_is_right_must_be_so_in_all_circumstances(answered):
    asking, losses, rights = answered

    def circumstances():
        rights[7] = False
        yield
        rights[7], losses[9] = True, 0.1
        yield
        losses[9] = 0.01
        yield

    assert asking.check(decoder(), circumstances()) == asking.share == 199 / 200
    assert {7, 9} <= {place for batch in asking.epoch() for place in batch}


def test_a_check_that_goes_on_forgives_nothing(answered):
    asking, _, rights = answered
    rights[7] = False
    assert asking.check(decoder()) == 199 / 200
    rights[7], rights[9] = True, False
    assert asking.check(decoder(), goes_on=True) == asking.share == 198 / 200
    assert asking.check(decoder(), (), goes_on=True) == 198 / 200
    assert asking.check(decoder()) == 199 / 200


def test_a_question_is_asked_where_it_is_named(answered):
    asking, _, rights = answered

    def circumstances():
        rights[7] = rights[9] = False
        yield [3, 7]
        rights[7] = rights[9] = True
        yield range(200)

    assert asking.check(decoder(), circumstances()) == 199 / 200
    assert asking.right == set(range(200)) - {7}
    assert asking.hard == [0]
    assert asking.check(decoder()) == 1.0
    assert asking.hard == []


@pytest.mark.parametrize(("least", "num_tried"), [(1.0, 1), (199 / 200, 3), (0.99, 5), (0.0, 5)])
def test_a_check_ends_early_where_the_share_wanted_is_out_of_reach(least, num_tried, answered):
    steady, _, rights = answered
    asking = Progress(steady._questions, 50, 0, firm=0.05)
    tried = []

    def circumstances():
        for number in range(5):
            rights[7], rights[9] = number not in (0, 2), number != 2  # wrong in the first and the third
            tried.append(number)
            yield

    asking.check(decoder(), circumstances(), least)
    assert tried == list(range(num_tried))
    assert asking.hard == [0, 2][: num_tried // 2 + 1]
    wrong = {7, 9} if num_tried > 1 else {7}
    assert asking.share_learned == 1 - len(wrong) / 200
    again = {place for batch in asking.epoch() for place in batch}
    assert wrong <= again
    assert (len(again) == 200) == (num_tried < 5)  # nothing is sure that was not tried everywhere


def test_where_circumstances_do_not_change_what_is_sure_stays_so_when_a_check_fails(answered):
    asking, _, rights = answered
    rights[7] = False
    assert asking.check(decoder(), least=1.0) == 199 / 200
    again = {place for batch in asking.epoch() for place in batch}
    assert 7 in again
    assert len(again) < 60


def test_where_circumstances_change_an_answer_is_learned_if_it_is_firm(answered):
    steady, losses, rights = answered
    losses[3], rights[5] = 0.2, False
    changing = Progress([Question([place], [0]) for place in range(200)], 50, 0, firm=0.05)
    for asking, learned in ((steady, 199), (changing, 198)):
        assert asking.share_learned == 0
        assert asking.check(decoder()) == asking.share == 199 / 200
        assert asking.share_learned == learned / 200
    losses[3] = 0.04
    changing.ask(None, [3])
    assert changing.share_learned == 199 / 200


def test_what_is_not_sure_comes_next(answered):
    asking, losses, _ = answered
    losses[3:6] = [0.1] * 3
    asking.check(decoder())
    among = [2, 3, 5, 8, 9]
    assert set(asking.next(among, 3, 0)) == {3, 5}
    assert set(asking.next(among, 1, 0)) <= {3, 5}
    assert set(asking.next(among, 0, 2)) <= {2, 8, 9}
    assert len(asking.next(among, 2, 1)) == 3
    assert sorted(asking.next(among, 9, 9)) == among
    assert asking.next([], 3, 3) == []


def test_where_circumstances_change_checks_alone_are_sure(answered):
    asking = Progress(answered[0]._questions, 50, 0, firm=0.05)
    for batch in asking.epoch():
        asking.ask(None, batch)
    assert len([place for batch in asking.epoch() for place in batch]) == 200
    asking.check(decoder())
    assert len([place for batch in asking.epoch() for place in batch]) < 60
    answered[1][7] = 0.1
    asking.ask(None, [7])
    answered[1][7] = 0.01
    asking.ask(None, [7])
    assert asking.next(list(range(200)), 9, 0) == [7]
