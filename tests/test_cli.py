"""The command line: what a user types works, and what goes wrong is one line that names the fix."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from pkmem.cli import main
from pkmem.lm.build import build_model
from pkmem.ops import backends
from pkmem.training.checkpoint import verify_checkpoint
from pkmem.training.saved import load_saved
from tiny import MEMORY, MODEL, tiny

pytest_plugins = "tiny"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


def error_of(arguments: list[object], capsys: pytest.CaptureFixture) -> str:
    """The one line a failing command says, after exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "pkmem: error: " in line]
    assert errors == captured.err.splitlines()[-1:]
    assert "Traceback" not in captured.err
    return errors[0].removeprefix("pkmem: error: ")


def output_of(arguments: list[object], capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def printed_config(arguments: list[object], capsys: pytest.CaptureFixture) -> dict:
    with pytest.raises(SystemExit) as caught:
        main(["train", *map(str, arguments), "--print_config"])
    assert caught.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


# Help and options -------------------------------------------------------------------------------------------


def test_help_needs_no_heavy_import() -> None:
    script = """
import sys
from pkmem.cli import build_parser
build_parser().format_help()
heavy = {"torch", "transformers", "numpy", "matplotlib", "tokenizers", "numba"} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    "verb",
    [[], ["train"], ["eval"], ["generate"], ["inspect"], ["demo"], ["experiment"], ["report"], ["warmup"], ["bench"]],
)
def test_help_names_verbs_and_options(verb: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*verb, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    expected = {
        "train": [
            "--config",
            "--data",
            "--out",
            "--memory.knn",
            "--training.lr",
            "--resume",
            "--overwrite",
            "Example:",
        ],
        "eval": ["--data", "--speed", "--max_tokens", "--context_tokens", "Example:"],
        "generate": ["--prompt", "--temperature", "--top_k", "--seed", "Example:"],
        "inspect": ["--data", "--hottest", "--page", "--compare", "Example:"],
        "demo": ["--out", "--overwrite", "ten minutes"],
        "experiment": ["--scale", "--seeds", "--out", "--data", "--resume", "--dry_run", "table1", "Example:"],
        "report": ["--out", "folders", "Example:"],
        "warmup": ["Example:"],
        "bench": ["Example:"],
    }
    for name in expected[verb[0]] if verb else expected:
        assert name in text


@pytest.mark.case("Environments", "a recipe with other letters than ASCII, in the C locale, on a console that cannot show them",
    "works: with a question mark for each", "https://github.com/coqui-ai/TTS/pull/394")  # fmt: skip
def test_any_letter_in_a_recipe_is_read_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "größe.yaml"
    file.write_text(
        "data: Bücher\nout: läufe/дом\n", encoding="utf-8-sig"
    )  # with a mark, as editors on Windows save it
    places = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    script = """
import sys
from pathlib import Path
from pkmem.cli import build_parser, main
options = build_parser().parse_args(["train", "--config", sys.argv[1]]).train
assert (options.data, str(options.out)) == ("B\\xfccher", str(Path("l\\xe4ufe/\\u0434\\u043e\\u043c"))), ascii(options.data)
main(["train", "--config", sys.argv[1], "--print_config"])
"""
    said = subprocess.run([sys.executable, "-c", script, str(file)], env=os.environ | places, capture_output=True)
    assert said.returncode == 0, said.stderr
    assert b"data: B?cher" in said.stdout


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 0
    assert "generate" in capsys.readouterr().out


def test_every_option_of_train_is_explained(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    options = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert len(options) > 40
    assert [line for line in options if re.fullmatch(r"  --[^(]*\S  +\(type: .*", line)] == []


def test_options_override_the_file_with_and_without_dashes(config: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--config", config, "memory.knn=3", "--training.lr", "0.5", "training.beta2=0.5", "--model.width=64"]
    document = printed_config([*options, "model.memory_layers=[0,1]", "data=other"], capsys)
    assert document["memory"]["knn"] == 3
    assert document["training"]["lr"] == 0.5
    assert document["training"]["beta2"] == 0.5
    assert document["training"]["batch_tokens"] == 128
    assert document["model"]["width"] == 64
    assert document["model"]["memory_layers"] == [0, 1]
    assert document["data"] == "other"


def test_a_printed_config_can_be_given_back(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    document = printed_config(["--config", config, "memory.gate=true"], capsys)
    assert document["memory"]["gate"] is True
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(document))
    assert printed_config(["--config", tmp_path / "printed.yaml"], capsys) == document


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[1] / "configs").glob("tiny*.yaml")), ids=lambda f: f.name
)
def test_the_configs_of_the_repository_are_valid(file: Path, capsys: pytest.CaptureFixture) -> None:
    document = printed_config(["--config", file], capsys)
    given = yaml.safe_load(file.read_text())
    assert document["model"] == document["model"] | given["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "modle.width=3"], "unknown option 'modle.width': did you mean 'model.width'?"),
        (["train", "--memory.kn", "3"], "unknown option 'memory.kn': did you mean 'memory.knn'?"),
        (["train", "training.beta3=0.9"], "unknown option 'training.beta3': did you mean 'training.beta2'?"),
        (["train", "--xyz", "3"], "unknown option 'xyz'; `pkmem train --help` lists them"),
        (["train", "--split", "train"], "unknown option 'split'; `pkmem train --help` lists them"),
        (["eval", "runs/x", "--max_tokns", "3"], "unknown option 'max_tokns': did you mean 'max_tokens'?"),
        (["trian"], "argument VERB: invalid choice: 'trian' (choose from"),
        (["eval"], "the following arguments are required: eval.model"),
        (["train", "--out"], "argument --out: expected one argument"),
        (["train", "memory.knn=many"], "memory.knn is many but must be of type int"),
        (["train", "memory.dim=wide"], "memory.dim is wide but must be of type int or null"),
        (["train", "training.lr="], "training.lr is empty but must be of type float"),
        (["train", "training.lr=null"], "training.lr is None but must be of type float"),
        (["train", "memory=null"], "memory is 'null' but must be a mapping of options"),
        (["train", "data.x=3"], "unknown option 'data.x': did you mean 'data'?"),
        (["train", "training.lr=fast"], "training.lr is fast but must be of type float"),
        (["train", "training.schedule=step"], "training.schedule is step but must be one of 'cosine', 'linear', "),
        (["train", "memory.knn=40", "memory.num_sub_keys=30"], "lower knn or raise num_sub_keys"),
        (["train", "model.width=33"], "must be a multiple of model.num_heads = 4: try width 36"),
        (["train", "training.batch_tokens=100"], "must be a multiple of context_tokens * micro_batches = 256: try 256"),
        (["train", "model.memory_layers=[4]"], "layer 4 in model.memory_layers is outside [0, 4)"),
        (["train", "model.memory_layers=[1,1]"], "layer 1 is named twice"),
        (["generate", "x", "--top_k", "0"], "max_new_tokens and top_k must be >= 1, temperature >= 0"),
        (["inspect", "x", "--hottest", "-1"], "hottest is -1 but must be >= 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_line_with_the_fix(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert message in error_of(arguments, capsys)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("modle: {width: 3}", "unknown option 'modle.width': did you mean 'model.width'?"),
        ("model: {wdth: 3}", "unknown option 'model.wdth': did you mean 'model.width'?"),
        ("dat: python", "unknown option 'dat': did you mean 'data'?"),
        ("split: train", "unknown option 'split'; `pkmem train --help` lists them"),  # it is an option of eval
        ("training: {lr: null}", "training.lr is None but must be of type float"),
        ("model: {width: wide}", "model.width is wide but must be of type int"),
        ("model: {memory_layers: [one]}", "model.memory_layers is one but must be of type int"),
        ("model: 3", "model is 3 but must be a mapping of options"),
        ("model: [", "parsing"),
        ("just words", "Unexpected config: just words"),
    ],
)
def test_a_bad_file_is_one_line_with_the_fix(
    document: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "bad.yaml").write_text(document)
    assert message in error_of(["train", "--config", tmp_path / "bad.yaml"], capsys)
    assert "does not exist" in error_of(["train", "--config", tmp_path / "absent.yaml"], capsys)


# Training ---------------------------------------------------------------------------------------------------


def test_train_prints_the_summary_and_leaves_the_resolved_config(
    config: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    options = ["--config", config, "--data", text, "--out", out, "training.num_tokens=256", "memory.knn=3"]
    printed = output_of(["train", *options], capsys)
    summary = json.loads((out / "summary.json").read_text())
    lines = dict(line.split() for line in printed.splitlines()[:-1])
    assert lines.keys() == summary.keys()
    assert lines["bits_per_byte"] == f"{summary['bits_per_byte']:,.4f}"
    assert lines["dense_params"] == f"{summary['dense_params']:,}"
    assert str(out / "model") in printed.splitlines()[-1]
    assert yaml.safe_load((out / "config.yaml").read_text()) == (
        tiny(text, out, memory={"knn": 3}, training={"num_tokens": 256}).to_dict()
    )
    assert "--overwrite it, or --resume it" in error_of(["train", *options], capsys)
    again = output_of(["train", "--config", out / "config.yaml", "--overwrite"], capsys)  # the saved config runs
    assert again.splitlines()[2:5] == printed.splitlines()[2:5]


def test_ctrl_c_exits_with_130_and_resume_finishes_the_run(
    config: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from runs import assert_same_run, before_update, ctrl_c

    out = tmp_path / "run"
    with before_update(5, ctrl_c), pytest.raises(SystemExit) as caught:
        main(["train", "--config", str(config), "--out", str(out)])
    assert caught.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "pkmem: stopped at step 5; continue with --resume"
    verify_checkpoint(out / "checkpoints" / "step-5")
    main(["train", "--out", str(out), "--resume"])
    assert_same_run(out, run)


def test_ctrl_c_anywhere_else_says_interrupted(
    run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkmem.training.saved.find_saved", lambda path: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(run)])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "pkmem: interrupted\n"


def test_a_resumed_run_keeps_its_options(
    config: Path, run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = shutil.copytree(run, tmp_path / "run")
    (out / "config.yaml").write_text(yaml.safe_dump(tiny(text, out, training={"lr": 0.002}).to_dict()))
    resume = ["train", "--out", out, "--resume"]
    for option, message in (
        ("memory.knn=3", f"memory.knn is 4 in {out / 'config.yaml'} and cannot become 3: leave it out"),
        ("memory.knn=32", "memory.knn is 4 in"),  # 32 is the default, but not this run's
        ("data=python", "data is"),
        ("model.memory_layers=[0]", "model.memory_layers is [1] in"),
    ):
        assert message in error_of([*resume, option], capsys)
    options = ["--config", config, "--out", out, "--resume", "training.lr=0.002", "memory.knn=4"]
    same = output_of(["train", *options], capsys)
    assert same == output_of(resume, capsys)
    assert "has no config.yaml to resume from" in error_of(["train", "--out", tmp_path / "no", "--resume"], capsys)
    shutil.rmtree(out / "checkpoints")
    assert "no checkpoint to resume from: start it without --resume" in error_of(resume, capsys)
    for damaged, message in (("model: [", "config.yaml is not YAML: "), ("words", "a recipe is 'words' but must be")):
        (out / "config.yaml").write_text(damaged)
        assert message in error_of(resume, capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data=nowhere"], "'nowhere': no such file or directory; give one, a glob, 'python', 'python+', 'hf:NAME' or"),
        (["data=empty"], "empty: no file to read there; read are .txt .md"),
        (["data=short.txt"], "give more data"),
        (["model.family=lama"], "did you mean 'llama'?"),
        (["training.lr=1e30"], "nothing was updated with it: start a new --out with a lower training.lr"),
        (["memory.value_dim=8"], "leave value_dim out, or set gate=True"),
        (["tokenizer=nowhere"], "cannot load the tokenizer nowhere: name a directory"),
        (["out=thesis", "--overwrite"], "thesis is not a run directory"),
        (["out=short.txt/run"], "Not a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_trained_is_one_line_with_the_fix(
    options: list[str], message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("thesis").mkdir()
    Path("thesis/thesis.txt").touch()
    Path("short.txt").write_text("one two three four five six seven eight nine ten\n")
    assert message in error_of(["train", "--config", config, "--out", "run", *options], capsys)


def test_a_file_that_is_no_text_is_counted_and_the_run_goes_on(
    config: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = shutil.copytree(text, tmp_path / "data")
    (data / "broken.txt").write_bytes(b"\xff\xfe\xfd")
    main(["train", "--config", str(config), f"--data={data}", f"--out={tmp_path / 'run'}", "training.num_tokens=128"])
    assert "skipped 1 files or lines of the training text" in capsys.readouterr().err
    main(["eval", str(tmp_path / "run"), "--data", str(data)])
    assert "skipped 1 files or lines" in capsys.readouterr().err


@pytest.mark.linux
def test_a_full_disk_is_one_line_and_the_previous_checkpoint_is_intact(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import resource

    from runs import before_update

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "run"
    try:
        with before_update(4, lambda model: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))):
            message = error_of(["train", "--config", config, "--out", out], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no space left" in message
    assert "the previous checkpoint step-3 is intact" in message
    verify_checkpoint(out / "checkpoints" / "step-3")


# Saved models -----------------------------------------------------------------------------------------------


def test_eval_of_a_run_is_its_summary(run: Path, text: Path, capsys: pytest.CaptureFixture) -> None:
    figures = json.loads(output_of(["eval", run, "--data", text], capsys))
    summary = json.loads((run / "summary.json").read_text())
    assert figures == {name: summary[name] for name in figures}
    assert {"dense_params", "memory_params", "loss", "perplexity", "bits_per_byte", "memory_0/kl"} < figures.keys()


def test_eval_of_a_checkpoint_and_of_any_saved_model(
    run: Path, plain_gpt2: Path, text: Path, capsys: pytest.CaptureFixture
) -> None:
    of_run = output_of(["eval", run, "--data", text], capsys)
    assert output_of(["eval", run / "checkpoints" / "step-10", "--data", text], capsys) == of_run
    assert output_of(["eval", run / "checkpoints" / "step-9", "--data", text], capsys) != of_run
    plain = json.loads(output_of(["eval", plain_gpt2, "--data", text, "--speed"], capsys))
    assert plain["memory_params"] == 0
    assert plain["bits_per_byte"] > 0
    assert plain["prefill_tokens_per_s"] > 0
    assert plain["decode_tokens_per_s"] > 0
    assert not [name for name in plain if name.startswith("memory_0")]


def test_eval_takes_split_tokens_and_context(run: Path, text: Path, capsys: pytest.CaptureFixture) -> None:
    few = json.loads(
        output_of(
            ["eval", run, "--data", text, "--max_tokens", 100, "--context_tokens", 10, "--split", "train"], capsys
        )
    )
    assert few["num_tokens"] == 10 * 9
    for options, message in (
        (["--context_tokens", 33], "context_tokens is 33 but must be in [2, 32], the model's"),
        (["--context_tokens", 1], "context_tokens is 1 but must be in [2, 32]"),
        (["--split", "test"], "split is 'test'; it must be 'train' or 'validation'"),
    ):
        assert message in error_of(["eval", run, "--data", text, *options], capsys)


def test_generate_is_repeatable_and_greedy_at_temperature_0(
    run: Path, plain_gpt2: Path, capsys: pytest.CaptureFixture
) -> None:
    for model in (run, plain_gpt2):
        write = ["generate", model, "--prompt", "the cat", "--max_new_tokens", 10]
        sampled, same, other = (output_of([*write, "--seed", seed], capsys) for seed in (1, 1, 2))
        assert sampled == same != other
        assert sampled.startswith("the cat")
        greedy = [output_of([*write, "--temperature", 0, "--seed", seed], capsys) for seed in (1, 2)]
        assert greedy[0] == greedy[1]
        assert greedy[0] == output_of([*write, "--top_k", 1], capsys)


def test_generate_writes_as_the_model_does(run: Path, capsys: pytest.CaptureFixture) -> None:
    from pkmem.training.saved import load_saved

    model, tokenizer = load_saved(run)
    tokens = tokenizer("x=1", return_tensors="pt").input_ids  # not an option, though it looks like one
    for _ in range(5):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    expected = tokenizer.decode(tokens[0], skip_special_tokens=True)
    options = ["--prompt", "x=1", "--temperature", 0, "--max_new_tokens", 5]
    assert output_of(["generate", run, *options], capsys) == expected + "\n"


def test_generate_takes_an_empty_prompt_and_stops_at_the_context(run: Path, capsys: pytest.CaptureFixture) -> None:
    last_tokens = set()
    for seed in range(4):
        write = ["generate", run, "--prompt", "", "--seed", seed, "--max_new_tokens"]
        to_the_end, whole, shorter = (output_of([*write, count], capsys) for count in (1000, 31, 30))
        assert to_the_end == whole  # 1 token for the empty prompt and 31 fill the context of 32
        assert whole.startswith(shorter.rstrip("\n\ufffd"))
        last_tokens.add(whole.removeprefix(shorter.rstrip("\n\ufffd")).strip("\n\ufffd"))
    assert last_tokens != {""}  # of the four at most three show nothing, as a part of a letter does
    message = error_of(["generate", run, "--prompt", "x" * 40], capsys)
    assert "tokens but the model's context is 32: shorten it" in message


def test_inspect_describes_memories_and_their_reads(
    run: Path, plain_gpt2: Path, text: Path, capsys: pytest.CaptureFixture
) -> None:
    shapes = output_of(["inspect", run], capsys)
    assert "64 slots (8 x 8 sub-keys), 2 heads x 4 neighbours" in shapes
    reads = output_of(["inspect", run, "--data", text, "--max_tokens", 320, "--hottest", 2], capsys)
    assert reads.startswith(shapes)
    assert "memory_0 over 320 tokens: usage" in reads
    assert reads.count("  slot ") == 2
    assert output_of(["inspect", plain_gpt2], capsys) == "no memories in this model\n"


@pytest.mark.parametrize("verb", ["eval", "generate", "inspect"])
def test_models_that_cannot_be_read_are_one_line_with_the_fix(
    verb: str, run: Path, plain_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert "is not a directory: give a run" in error_of([verb, tmp_path / "absent"], capsys)
    pickled = shutil.copytree(plain_gpt2, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    assert "a pickle can run any code when loaded; convert it to safetensors" in error_of([verb, pickled], capsys)
    checkpoint = run / "checkpoints" / "step-10"
    for saved, name in ((checkpoint, "shard-00001-of-00001.safetensors"), (run / "model", "model.safetensors")):
        broken = shutil.copytree(saved, tmp_path / saved.name)
        os.truncate(broken / name, 1000)
        assert "another checkpoint" in error_of([verb, broken], capsys).replace("an earlier", "another")


def test_resuming_skips_a_broken_checkpoint_and_says_so_in_one_line(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = shutil.copytree(run, tmp_path / "run")
    (out / "config.yaml").write_text(yaml.safe_dump(tiny(text, out).to_dict()))
    os.truncate(out / "checkpoints" / "step-10" / "shard-00001-of-00001.safetensors", 1000)
    main(["train", "--out", str(out), "--resume"])
    said = capsys.readouterr()
    assert "bits_per_byte" in said.out
    (line,) = [line for line in said.err.splitlines() if line.startswith("skipped")]
    assert "skipped step-10" in line
    assert "1000 bytes instead of" in line
    for step in (9, 10):
        (out / "checkpoints" / f"step-{step}" / "manifest.json").write_text("{")
    assert "step-9/manifest.json: not JSON" in error_of(["train", "--out", out, "--resume"], capsys)


def test_export_writes_the_model_of_a_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "exported"
    assert output_of(["export", run, "--out", out], capsys) == f"{out}\n"
    names = {path.name for path in (run / "model").iterdir()}
    assert {path.name for path in out.iterdir()} == names
    assert all((out / name).read_bytes() == (run / "model" / name).read_bytes() for name in names)
    assert "exported already exists: choose another --out, or --overwrite it" in error_of(
        ["export", run, "--out", out], capsys
    )
    output_of(["export", run, "--out", out, "--step", 9, "--overwrite"], capsys)
    assert (out / "model.safetensors").read_bytes() != (run / "model" / "model.safetensors").read_bytes()
    assert "step-8" in error_of(["export", run, "--step", 8], capsys)
    assert "has no checkpoint to export" in error_of(["export", tmp_path], capsys)


def test_convert_stores_values_in_few_bits(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "few"
    assert f"saved in {out}" in output_of(["convert", run, "--values", "int4", "--out", out], capsys)
    assert "int4" in output_of(["inspect", out], capsys)
    assert "already exists" in error_of(["convert", run, "--values", "int4", "--out", out], capsys)


def test_values_may_stay_in_their_file(run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for verb in (["eval", "--data", text], ["generate", "--max_new_tokens", 4]):
        told = [output_of([*verb, run, *how], capsys) for how in ([], ["--values", "mmap"])]
        assert told[0] == told[1]
    checkpoint = run / "checkpoints" / "step-10"
    assert "`pkmem export" in error_of(["generate", checkpoint, "--values", "mmap"], capsys)
    dense = tmp_path / "dense"
    build_model(replace(MODEL, memory_layers=[]), MEMORY, 300, eos_token_id=0).save_pretrained(dense)
    load_saved(run)[1].save_pretrained(dense)
    assert "the model has no memories" in error_of(["generate", dense, "--values", "mmap"], capsys)


def test_warmup_reads_the_tables_of_a_model_ahead(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("pkmem.ops.cpu.warmup", lambda: 7)
    num_bytes = 4 * MEMORY.num_slots * MODEL.width
    for share, read in ((1.0, num_bytes), (0.25, num_bytes // 4)):
        said = output_of(["warmup", run, "--share", share], capsys)
        assert f"read {read / 1e6:,.1f} MB of 1 tables" in said
    for share in (0, 1.5):
        assert "share is" in error_of(["warmup", run, "--share", share], capsys)
    checkpoint = run / "checkpoints" / "step-10"
    assert "`pkmem export" in error_of(["warmup", checkpoint], capsys)


def test_the_demo_is_called_with_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr("pkmem.experiments.demo.demo", lambda *arguments: calls.append(arguments))
    main(["demo", "--out", str(tmp_path), "--data", "some", "--seed", "3", "--overwrite"])
    main(["demo"])
    assert calls == [(tmp_path, True, "some", 3), (Path("runs/demo"), False, "python", 0)]


@pytest.mark.parametrize("module", ["pkmem", "pkmem.cli"])
def test_a_command_prints_its_answer_and_no_noise_of_libraries(module: str, run: Path, text: Path) -> None:
    command = [sys.executable, "-m", module, "eval", str(run), "--data", str(text)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(said.stdout)["num_tokens"] > 0
    assert [line for line in said.stderr.replace("\r", "\n").splitlines() if line and "evaluating" not in line] == []


@pytest.mark.skipif(os.name == "nt", reason="a pipe of POSIX")
def test_a_command_ends_without_a_word_where_nobody_reads_on() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pkmem", "experiment", "size", "--dry_run"]
    with os.fdopen(writer, "wb") as pipe:
        said = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE)
    assert (said.returncode, said.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_an_error(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("pkmem.experiments.grid.experiment", broken)
    assert "Broken pipe" in error_of(["experiment", "size"], capsys)


def test_warmup_says_how_many_kernels_it_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("pkmem.ops.cpu.warmup", lambda: 7)
    main(["warmup"])
    assert capsys.readouterr().out == "7 CPU kernels are compiled\n"


def test_warmup_without_numba_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    for function in (backends._why_no_kernels, backends.backend_module):
        function.cache_clear()
    with pytest.raises(SystemExit) as caught:
        main(["warmup"])
    assert caught.value.code == 2
    assert "backend 'cpu' cannot run: numba is not installed: pip install 'pkmem[cpu]'" in capsys.readouterr().err
    backends._why_no_kernels.cache_clear()


def test_bench_names_the_benchmarks_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "layer_foward"])
    assert stop.value.code == 2
    assert "layer_forward, training_step" in capsys.readouterr().err


# Experiments ------------------------------------------------------------------------------------------------


def test_a_dry_run_trains_nothing(capsys: pytest.CaptureFixture) -> None:
    printed = output_of(["experiment", "position", "--scale", "paper", "--dry_run", "--data", "mine"], capsys)
    assert "hours of one" in printed
    assert "--config configs/paper.yaml" in printed
    assert "data=mine" in printed
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["experiment", "tabel1"],
            "no experiment 'tabel1': did you mean 'table1'? they are dead_slots, depth, facts, hashed, heads, keys",
        ),
        (["experiment", "size", "--scale", "phone"], "no scale 'phone': they are laptop, gpu, paper"),
        (["experiment", "size", "--seeds", "0"], "seeds is 0 but must be >= 1"),
        (["report", "."], "no result in .: make one with `pkmem experiment NAME --out .`"),
    ],
)
def test_a_bad_experiment_is_one_line_with_the_fix(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert message in error_of(arguments, capsys)


def test_an_experiment_may_be_a_part_of_a_family(capsys: pytest.CaptureFixture) -> None:
    listed = output_of(["experiment", "position", "--dry_run", "--cells", "layer_2", "layer_4"], capsys)
    assert [name for name in re.findall(r"^\w+", listed, re.MULTILINE) if "layer" in name] == ["layer_2", "layer_4"]


def test_what_an_experiment_left_undone_ends_it_with_an_error(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = {"failed": [], "elsewhere": [], "waiting": [], "unused": []}
    monkeypatch.setattr("pkmem.experiments.grid.experiment", lambda *_: left)
    assert "next: pkmem report runs/experiments" in output_of(["experiment", "size"], capsys)
    left["failed"] = ["a__b__seed0: killed", "c"]
    assert error_of(["experiment", "size"], capsys) == "2 runs have no result; run this again for a__b__seed0: killed"
    left["failed"], left["elsewhere"] = [], ["d__e__seed0"]
    assert error_of(["experiment", "size"], capsys).startswith(
        "another process is training d__e__seed0: run this again"
    )
    left["elsewhere"], left["unused"] = [], ["x.json is of another recipe"]
    with pytest.raises(SystemExit):
        main(["experiment", "size"])
    assert capsys.readouterr().err.splitlines() == [
        "x.json is of another recipe",
        "pkmem: error: not all runs have a usable result: see above",
    ]
