"""sensitivity.py: gradients in what memories give, against giving something else."""

import torch

from lessons import FACTS, pupil, tokenizer
from pkmem.editing.questions import answer_losses, as_questions
from pkmem.editing.sensitivity import sensitivities
from pkmem.layer.memory import memories_in


@torch.no_grad()
def test_losses_grow_as_the_gradient_says():
    model = pupil().double().requires_grad_(False)
    questions = [*as_questions(FACTS[:2], tokenizer()), *as_questions(FACTS[2:3], tokenizer())]
    questions[1] = questions[1]._replace(prompt=questions[1].prompt * 2)  # the others are padded
    parts = sensitivities(model, questions)
    before = answer_losses(model, questions)[0]
    assert len(parts) == 3
    step = 3e-5 * torch.randn(32, dtype=torch.float64)
    for part, memory in zip(parts, memories_in(model).values(), strict=True):
        lengths = torch.tensor([len(question.prompt) + len(question.answer) for question in questions])
        assert len(part.gradient) == len(part.reads.slots) == lengths.sum()
        of_tokens = torch.arange(len(questions)).repeat_interleave(lengths)
        hook = memory.register_forward_hook(lambda _, __, out: out + step)
        after = answer_losses(model, questions)[0]
        hook.remove()
        expected = torch.zeros(len(questions)).index_add(0, of_tokens, part.gradient @ step.float())
        torch.testing.assert_close(after - before, expected, rtol=5e-2, atol=1e-6)
