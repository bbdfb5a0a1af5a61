"""Teaches a pretrained model 50 facts, shows what that costs elsewhere, and takes them back, bit by bit.

    python docs/scripts/teach.py OUT [MODEL] [NUM]

OUT is a folder to make. MODEL is a Hugging Face directory, SmolLM2-135M-Instruct unless given; NUM another number of facts.
"""

import hashlib
import json
import shlex
import sys
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from pkmem import cli
from pkmem.experiments.learning.examination import Examination, Size
from pkmem.experiments.learning.kinds import made_up

START = time.perf_counter()


def pkmem(*arguments: object) -> None:
    """What a user types, and what it prints."""
    words = [str(argument) for argument in arguments]
    print(f"\n[{time.perf_counter() - START:.0f} s] $ pkmem {shlex.join(words)}", flush=True)
    cli.main(words)


def load(folder: Path):
    """As any program loads a Hugging Face directory."""
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def show(examination: Examination, folder: Path) -> dict:
    """Asks the model in a folder, prints a few of its answers and what it knows, and returns the figures."""
    model, tokenizer = load(folder)
    for prompt in [fact.taught[0] for fact in examination.facts[:3]] + ["The capital of France is"]:
        tokens = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**tokens, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        print(f"  {tokenizer.decode(written[0], skip_special_tokens=True)!r}")
    figures = examination.briefly(model)
    print(
        f"  recall {figures['recall']:.0%} as taught, {figures['held_out']:.0%} in phrasings that were not taught\n"
        f"  elsewhere: {figures['background_nats']:+.4f} nats per token on the Python reference "
        f"({figures['background_bits_per_byte']:+.4f} bits per byte); "
        f"questions about persons that nobody was taught: KL {figures['near_miss_kl']:.2f} nats"
    )
    return figures


def bits(folder: Path) -> str:
    """A hash of every bit of the weights in a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def main(out: Path, model: str = "smollm2", num: int = 50) -> None:
    logging.disable_progress_bar()
    folder, facts_file, edit = out / "model", out / "facts.jsonl", out / "persons.edit"
    pkmem("retrofit", model, "--out", folder)
    before = bits(folder)

    facts = made_up("person", num, seed=0)
    lines = [json.dumps({"prompts": fact.taught, "completion": fact.answer}) for fact in facts]
    facts_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n{facts_file} has {num} made-up facts, each in {len(facts[0].taught)} phrasings. The first:\n  {lines[0]}")

    print("\nBefore it is taught, the model guesses:")
    examination = Examination(*load(folder), facts, len(facts[0].taught), 0, Size())
    show(examination, folder)

    pkmem("learn", folder, facts_file, "--out", edit)
    pkmem("apply", folder, edit)
    pkmem("edits", folder)
    print(f"\nThe edit is a file of {edit.stat().st_size / 1e6:.1f} MB. With it, the model knows:")
    taught = show(examination, folder)

    pkmem("forget", folder, edit)
    print("\nWithout it, the model guesses as before:")
    forgotten = show(examination, folder)
    assert bits(folder) == before
    assert forgotten["background_kl"] == forgotten["near_miss_kl"] == 0
    print(f"\nEvery bit of the weights is as before: sha256 {before[:16]}...")
    assert taught["recall"] > forgotten["recall"]
    print(f"All of this took {time.perf_counter() - START:.0f} seconds.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3], *map(int, sys.argv[3:4]))
