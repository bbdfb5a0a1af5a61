from lessons import FACTS, pupil, tokenizer
from pkmem.editing.questions import as_questions, questions_of
from pkmem.editing.surroundings import in_other_text, surrounded
from pkmem.text.facts import Fact

WORDS = "Alda Boris Celia Dario Edna Felix They live with Home of"
TEXTS = [tokenizer()(text)["input_ids"] for text in (WORDS, "Rome")]


def test_a_prompt_stands_behind_a_piece_of_other_text():
    made = surrounded(FACTS, TEXTS, tokenizer(), 0)
    pieces = set()
    for fact, other in zip(FACTS, made, strict=True):
        assert other.completion == fact.completion
        for prompt, behind in zip(fact.prompts, other.prompts, strict=True):
            piece = behind.removesuffix(f" {prompt}")
            assert piece != behind
            assert piece in WORDS or piece == "Rome"
            pieces.add(piece)
    assert len(pieces) > 3


def test_the_seed_decides():
    one, again, other = (surrounded(FACTS, TEXTS, tokenizer(), seed) for seed in (1, 1, 2))
    assert one == again != other


def test_what_ends_in_the_middle_of_a_character_is_cut():
    """A tokenizer of bytes splits characters that it was not trained on."""
    texts = [tokenizer()("日本語のテキスト")["input_ids"]]
    for seed in range(20):
        (made,) = surrounded([Fact(("Home of Alda is",), "Rome")], texts, tokenizer(), seed)
        piece = made.prompts[0].removesuffix("Home of Alda is").strip()
        assert not piece.startswith("\ufffd")
        assert not piece.endswith("\ufffd")


def test_white_space_at_the_end_of_a_prompt_stays():
    (made,) = surrounded([Fact(("Home of Alda is ",), "Rome")], TEXTS, tokenizer(), 0)
    assert made.prompts[0].endswith("Home of Alda is ")


def test_questions_in_several_phrasings_are_asked_in_other_text():
    model, facts = pupil(), [FACTS[0], Fact(("Home of Boris Venudo",), "Oslo"), FACTS[2]]
    asked = questions_of(facts, tokenizer(), model)
    made = in_other_text(model, tokenizer(), facts, TEXTS, 0)
    assert set(made) == {0, 1, 3, 4}  # the third stands alone
    for place, questions in made.items():
        assert len(questions) == 4
        for question in questions:
            assert question.answer == asked[place].answer
            assert question.prompt != asked[place].prompt


def test_what_would_be_longer_than_the_context_is_left_out():
    model = pupil()
    long = "Home of "
    while sum(map(len, as_questions([Fact((long,), "Rome")], tokenizer())[0])) < 64:
        long += "x"
    questions_of([Fact((long,), "Rome")], tokenizer(), model)  # it just fits
    made = in_other_text(model, tokenizer(), [Fact((long, "They live with xq"), "Rome")], [[10, 11, 12, 13]], 0)
    assert set(made) == {1}
