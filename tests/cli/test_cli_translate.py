"""``moe-opt translate``: order, blank and long lines, files that are whole or not there, every wrong input."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fairseq_moe_opt.cli.progress import Warnings
from fairseq_moe_opt.cli.text_files import decoded
from hf_integration import from_pretrained
from hf_integration.translate import Truncation, choose_dtype, load_tokenizer, translate_lines
from tests.cli.conftest import LANGUAGES, Run
from tests.helpers.translation_models import POSITIONS

GREEDY = ("--num-beams", "1", "--max-new-tokens", "6", "--threads", "1")
TEXT = ["a cat", "the dog sat. on it, and then on another", "", "b", "   ", "one more of them"]


def reference(checkpoint: Path, lines: list[str], **generation: int) -> list[str]:
    """Each line by itself, through ``model.generate``."""
    model, tokenizer = from_pretrained(checkpoint), load_tokenizer(checkpoint)
    tokenizer.src_lang = "eng_Latn"
    forced = tokenizer.convert_tokens_to_ids("fra_Latn")
    results = []
    for line in lines:
        if not line.strip():
            results.append("")
            continue
        inputs = tokenizer(line, return_tensors="pt", truncation=True, max_length=POSITIONS)
        ids = model.generate(**inputs, forced_bos_token_id=forced, **generation)
        results.append(tokenizer.batch_decode(ids, skip_special_tokens=True)[0])
    return results


def text_file(folder: Path, lines: list[str]) -> Path:
    path = folder / "input.txt"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_lines_come_out_as_they_went_in(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.txt"
    done = run("translate", checkpoint, text_file(tmp_path, TEXT), *LANGUAGES, *GREEDY, "--batch-size", 2, "-o", output)
    assert (done.code, done.out, done.err) == (0, "", "")
    wanted = reference(checkpoint, TEXT, num_beams=1, max_new_tokens=6)
    assert len(set(wanted)) > 2
    assert output.read_text(encoding="utf-8").split("\n") == [*wanted, ""]
    assert sorted(os.listdir(tmp_path)) == ["input.txt", "out.txt"]


@pytest.mark.parametrize("destination", [[], ["-o", "-"]])
def test_from_and_to_the_standard_streams(run: Run, checkpoint: Path, destination: list[str]) -> None:
    # With a byte order mark, both kinds of line ends, and no end at the end.
    done = run("translate", checkpoint, *LANGUAGES, *GREEDY, *destination, stdin=b"\xef\xbb\xbfa cat\r\n\nthe dog sat.")
    wanted = reference(checkpoint, ["a cat", "", "the dog sat."], num_beams=1, max_new_tokens=6)
    assert (done.code, done.out, done.err) == (0, "".join(f"{line}\n" for line in wanted), "")


def test_an_empty_text_gives_an_empty_file(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.txt"
    done = run("translate", checkpoint, text_file(tmp_path, []), *LANGUAGES, "-o", output)
    assert (done.code, output.read_bytes()) == (0, b"")


def test_beams_and_kernels_reach_the_model(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    flags = ("--moe-kernel", "naive", "--moe-profile", "--moe-report", report, "--batch-size", 2)
    done = run(
        "translate", checkpoint, text_file(tmp_path, TEXT), *LANGUAGES, "--num-beams", 3, "--max-length", 8, *flags
    )
    assert done.code == 0
    assert done.out.splitlines() == reference(checkpoint, TEXT, num_beams=3, max_length=8)
    assert "routing" in done.error_line
    content = json.loads(report.read_text(encoding="utf-8"))
    assert content["options"]["kernel"] == "naive"
    assert content["layers"][0]["kernels"] == ["naive"]
    # All batches are in it, not just the last: four lines in batches of two.
    assert content["layers"][0]["calls"] == 2
    assert content["step_seconds"]["experts"] > 0


def test_static_gating_translates_alike(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    text = text_file(tmp_path, TEXT)
    dynamic = run("translate", checkpoint, text, *LANGUAGES, *GREEDY)
    static = run("translate", checkpoint, text, *LANGUAGES, *GREEDY, "--moe-gating", "static")
    assert static.code == 0
    assert static.out == dynamic.out


def test_a_long_line_is_cut_with_one_warning(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    long = " ".join(["dog"] * 5000)
    text = text_file(tmp_path, ["a cat", long, "b"])
    done = run("translate", checkpoint, text, *LANGUAGES, *GREEDY)
    assert done.code == 0
    assert done.out.splitlines() == reference(checkpoint, ["a cat", long, "b"], num_beams=1, max_new_tokens=6)
    assert "warning: line 2 has " in done.error_line
    assert f"more than the {POSITIONS} this model takes" in done.error_line


def test_line_numbers_go_on_from_window_to_window(checkpoint: Path) -> None:
    model, tokenizer = from_pretrained(checkpoint), load_tokenizer(checkpoint)
    lines = ["b"] * 40 + ["dog " * 60]
    cut: list[Truncation] = []
    progress: list[int] = []
    found = translate_lines(
        model,
        tokenizer,
        lines,
        "eng_Latn",
        "fra_Latn",
        batch_size=1,
        generation={"max_new_tokens": 2, "num_beams": 1},
        on_progress=progress.append,
        on_truncated=cut.append,
    )
    assert len(list(found)) == sum(progress) == 41
    assert [(one.line, one.limit) for one in cut] == [(41, POSITIONS)]


def test_lines_are_read_as_they_are_needed(checkpoint: Path) -> None:
    model, tokenizer = from_pretrained(checkpoint), load_tokenizer(checkpoint)
    read: list[int] = []

    def endless():
        while True:
            read.append(1)
            yield "b"

    found = translate_lines(
        model, tokenizer, endless(), "eng_Latn", "fra_Latn", batch_size=1, generation={"max_new_tokens": 1}
    )
    assert next(found) == next(found)
    assert len(read) < 100


def test_many_warnings_are_counted() -> None:
    said: list[str] = []
    warnings = Warnings(said.append)
    for number in range(25):
        warnings.add(str(number))
    warnings.finish()
    assert len(said) == 11
    assert said[-1] == "warning: 15 more like these"


@pytest.mark.parametrize(
    ("languages", "words"),
    [
        (["--src-lang", "eng_Latn", "--tgt-lang", "fra_Latin"], ["'fra_Latin'", "fra_Latn"]),
        (["--src-lang", "English", "--tgt-lang", "fra_Latn"], ["'English'", "eng_Latn"]),
        (["--tgt-lang", "fra_Latn"], ["src_lang", "eng_Latn"]),
        ([], ["src_lang and tgt_lang"]),
    ],
)
def test_unknown_or_missing_languages(run: Run, checkpoint: Path, languages: list[str], words: list[str]) -> None:
    done = run("translate", checkpoint, *languages, stdin=b"a cat\n")
    assert done.code == 2
    assert all(word in done.error_line for word in words)


def test_text_that_is_not_utf_8_is_found_before_the_model_is_loaded(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "latin1.txt"
    text.write_bytes(b"fine\nna\xefve\n")
    done = run("translate", tmp_path / "no-model", text, *LANGUAGES, "-o", tmp_path / "out.txt")
    assert done.code == 2
    assert f"{text}, line 2: is not UTF-8 (byte 0xef at position 3)" in done.error_line
    assert os.listdir(tmp_path) == ["latin1.txt"]


def test_standard_input_that_is_not_utf_8_leaves_no_file(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.txt"
    output.write_text("from before\n", encoding="utf-8")
    text = b"b\n" * 40 + b"\xff\xfeb\n"
    done = run("translate", checkpoint, *LANGUAGES, *GREEDY, "--batch-size", 1, "-o", output, stdin=text)
    assert done.code == 2
    assert "standard input, line 41: is not UTF-8" in done.error_line
    assert output.read_text(encoding="utf-8") == "from before\n"
    assert os.listdir(tmp_path) == ["out.txt"]


def test_decoding_keeps_other_line_separators() -> None:
    lines = list(decoded([b"a\xe2\x80\xa8b\r\n", b"c\x0cd\n", b"e"], "x"))
    assert lines == ["a\u2028b", "c\x0cd", "e"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/nothing.txt"], ["nothing.txt: no such file"]),
        (["{tmp}"], ["is a folder"]),
        (["-o", "{tmp}/no/out.txt"], ["-o", "does not exist"]),
        (["-o", "{tmp}"], ["-o", "is a folder"]),
        (["--moe-report", "{tmp}/no/report.json"], ["--moe-report", "does not exist"]),
        (["--device", "cuda:77"], ["device", "cuda:77"]),
        (["--device", "toaster"], ["device", "toaster"]),
    ],
)
def test_files_and_devices_that_cannot_be_used(
    run: Run, checkpoint: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    done = run("translate", checkpoint, *LANGUAGES, *(one.format(tmp=tmp_path) for one in arguments))
    assert done.code == 2
    assert all(word in done.error_line for word in words)


def copied(checkpoint: Path, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint, folder / "copy"))


def test_checkpoints_that_cannot_be_used(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    broken = copied(checkpoint, tmp_path)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert str(broken) in run("translate", broken, *LANGUAGES, stdin=b"b\n").error_line
    weights.write_bytes(b"")
    assert "empty" in run("translate", broken, *LANGUAGES, stdin=b"b\n").error_line
    weights.write_bytes(whole)
    for name in broken.glob("tokenizer*"):
        name.unlink()
    assert "no tokenizer" in run("translate", broken, *LANGUAGES, stdin=b"b\n").error_line
    (broken / "tokenizer.json").write_text("[]", encoding="utf-8")
    assert "tokenizer cannot be loaded" in run("translate", broken, *LANGUAGES, stdin=b"b\n").error_line
    (broken / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    assert "bert" in run("translate", broken, *LANGUAGES, stdin=b"b\n").error_line
    shutil.rmtree(broken)
    done = run("translate", broken, *LANGUAGES, stdin=b"b\n")
    assert (done.code, "no such folder" in done.error_line) == (2, True)


def test_a_tokenizer_of_another_model(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    mixed = copied(checkpoint, tmp_path)
    codes = [f"x{number:02}_Latn" for number in range(20)]
    other = load_tokenizer(checkpoint)
    other.add_special_tokens({"extra_special_tokens": [*LANGUAGES[1::2], *codes]})
    other.save_pretrained(mixed)
    done = run("translate", mixed, "--src-lang", "eng_Latn", "--tgt-lang", "x19_Latn", stdin=b"b\n")
    assert (done.code, "is of another model" in done.error_line) == (2, True)


def test_a_fairseq_checkpoint_names_convert(run: Run) -> None:
    folder = Path(__file__).resolve().parents[1] / "data" / "goldens" / "A_top2_eom"
    done = run("translate", folder / "checkpoint_single.pt", *LANGUAGES, stdin=b"b\n")
    assert (done.code, "moe-opt convert" in done.error_line) == (2, True)


def test_half_precision_is_computed_in_float32_on_a_cpu(checkpoint: Path, tmp_path: Path) -> None:
    half = copied(checkpoint, tmp_path)
    weights = half / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(weights).items()}, weights)
    config = json.loads((half / "config.json").read_text(encoding="utf-8"))
    (half / "config.json").write_text(json.dumps({**config, "dtype": "float16"}), encoding="utf-8")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_dtype(half, None, cpu) == "float32"
    assert choose_dtype(half, "float16", cpu) == "float16"
    assert choose_dtype(half, None, gpu) is None
    assert choose_dtype(checkpoint, None, cpu) is None


def test_a_device_file_is_written_to_as_it_is(run: Run, checkpoint: Path) -> None:
    assert run("translate", checkpoint, *LANGUAGES, *GREEDY, "-o", os.devnull, stdin=b"b\n").code == 0
    assert not Path(os.devnull).is_file()


def test_a_preset_is_overridden_by_flags(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    report, preset = tmp_path / "report.json", tmp_path / "mine.yaml"
    preset.write_text(f"gating: static\ncapacity: checkpoint\nreport: {report}\n", encoding="utf-8")
    file = text_file(tmp_path, ["a cat"])
    done = run("translate", checkpoint, file, *LANGUAGES, *GREEDY, "--moe-preset", preset, "--moe-capacity", "none")
    assert done.code == 0, done.err
    options = json.loads(report.read_text(encoding="utf-8"))["options"]
    assert (options["gating"], options["capacity"]) == ("static", "none")


def test_a_wrong_preset_names_file_and_key(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("gating: eager\n", encoding="utf-8")
    done = run("translate", checkpoint, "--moe-preset", preset)
    assert done.code == 2
    assert all(word in done.error_line for word in ("mine.yaml", "'gating'", "eager", "dynamic"))
