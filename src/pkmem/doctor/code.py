"""What the kernels were compiled to: point 10."""

from __future__ import annotations

from pkmem.doctor.checks import Case, DoesNotApply, NotChecked, check


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
    wrong = {name: complaints(facts_of(compiled), most) for name, compiled in found.items()}
    lines = [f"{name} {' and '.join(what)}" for name, what in wrong.items() if what]
    assert not lines, f"{len(lines)} of {len(found)} kernels: {'; '.join(lines)}"
    return f"{len(found)} kernels"


CHECKS = (kernels,)
