"""What the kernels were compiled to: point 10."""

from __future__ import annotations

from dataclasses import replace

from pkmem.doctor.checks import Case, DoesNotApply, NotChecked, check

_SLIGHT_SPILLS = 16  # registers: nothing is wrong with so few, and the race tells what they cost


@check(10, "every kernel that the other checks had compiled", ("",))
def kernels(case: Case) -> str:
    """Looks at the compiled code, which the checks before this one left in the process."""
    if case.backend != "triton":
        raise DoesNotApply("no Triton kernel runs")
    from pkmem.ops.triton import compiled_kernels
    from pkmem.ops.triton.code import complaints, facts_of
    from pkmem.ops.triton.device import shared_bytes

    if case.device.type == "cpu":
        raise DoesNotApply("the interpreter compiles nothing")
    found = compiled_kernels()
    if not found:
        raise NotChecked("no kernel was compiled")
    most = shared_bytes(case.device)
    facts = {name: facts_of(compiled) for name, compiled in found.items()}
    slight = {name: fact for name, fact in facts.items() if 0 < (fact.spills or 0) <= _SLIGHT_SPILLS}
    facts |= {name: replace(fact, spills=0) for name, fact in slight.items()}
    lines = [f"{name} {' and '.join(what)}" for name, fact in facts.items() if (what := complaints(fact, most))]
    assert not lines, f"{len(lines)} of {len(found)} kernels: {'; '.join(lines)}"
    return f"{len(found)} kernels" + "".join(
        f"; {name} spills {fact.spills} registers" for name, fact in slight.items()
    )


CHECKS = (kernels,)
