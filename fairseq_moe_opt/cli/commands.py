"""The commands, and how their errors look: one line on standard error, and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

import fairseq_moe_opt
from fairseq_moe_opt.cli.flags import Dtype, ExpertDtype, taking, with_moe_flags
from fairseq_moe_opt.cli.translating import Translation, translate_file
from fairseq_moe_opt.errors import MoEError

NAME = "moe-opt"
FAILURE, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
_PIPED_WIDTH = 120
_DEBUG = "--debug"
# What typer raises for a wrong command line; its own name for the class has moved between releases.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(name=NAME, add_completion=False, pretty_exceptions_enable=False)

Checkpoint = Annotated[str, typer.Argument(metavar="PATH", help="folder of a checkpoint, or its id on the hub")]
SrcLang = Annotated[str | None, typer.Option("--src-lang", metavar="CODE", help="language of the text")]
TgtLang = Annotated[str | None, typer.Option("--tgt-lang", metavar="CODE", help="language to translate to")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="lines computed together")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; a GPU if there is one")
]
ComputeDtype = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype", help="dtype to compute in; the checkpoint's own if not given, but float32 for float16 on a CPU"
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; fewer are faster beside busy processes")
]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", metavar="OUT", help="file to write, whole or not at all; - or none: standard output"
    ),
]


def main(argv: Sequence[str] | None = None, commands: typer.Typer = app) -> int:
    """Run the command line ``argv`` (without the program's name); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Taken out here, so that it works before and after the name of a command.
    debug = _DEBUG in arguments
    arguments = [argument for argument in arguments if argument != _DEBUG]
    try:
        code = commands(arguments, prog_name=commands.info.name, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _failed(error)


def say(message: str) -> None:
    """One line on standard error, with the program's name."""
    typer.echo(f"{NAME}: {message}", err=True)


def _failed(error: Exception) -> int:
    """Say what went wrong in one line; returns the exit code."""
    if isinstance(error, MoEError):
        say(" ".join(str(error).split()))
        return BAD_INPUT
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        message = " ".join(getattr(error, "format_message", error.__str__)().split())
        message = message.replace("Value error, ", "")  # how pydantic, inside typer, begins its reasons
        say(f"{message} (see {context.command_path if context else NAME} --help)")
        return BAD_INPUT
    reason = (str(error).strip().splitlines() or ["no message"])[0]
    if isinstance(error, OSError):
        say(reason)
    else:
        say(f"unexpected {type(error).__name__}: {reason} ({_DEBUG} shows where)")
    return FAILURE


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{NAME} {fairseq_moe_opt.__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="show a full trace of any error")] = False,
) -> None:
    """Mixture-of-Experts translation models: look into, convert, run and verify checkpoints."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def info(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="checkpoint: a Transformers folder, or fairseq's x.pt or folder")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    expert_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="say what would be resident with so much memory for experts")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="and how many bytes a token would read, from this trace")
    ] = None,
    static_memory_table: Annotated[
        bool, typer.Option("--static-memory-table", help="weights on each device by slots; config.json is enough")
    ] = False,
    ranks: Annotated[int, typer.Option(min=1, help="devices the table is for")] = 8,
) -> None:
    """Family, Mixture-of-Experts layers, bytes of dense and expert weights, and what fits where.

    Only headers are read, so it is quick for any size.
    """
    from fairseq_moe_opt.cli import buffer_info
    from fairseq_moe_opt.cli.info import info_as_json, inspect_checkpoint, render_info

    if trace is not None and expert_memory is None:
        raise typer.BadParameter("--trace has no effect without --expert-memory")
    console = output_console()
    if static_memory_table:
        tables = buffer_info.static_memory_tables(path, ranks)
        buffer_info.render_static_memory(tables, ranks, console, as_json=as_json)
        return
    found = inspect_checkpoint(path)
    plan = None if expert_memory is None else buffer_info.plan_buffer(found, expert_memory, trace)
    if as_json:
        typer.echo(info_as_json(found, plan))
        return
    render_info(found, console)
    if plan is not None:
        buffer_info.render_plan(plan, console)


@app.command()
def convert(
    src: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="fairseq checkpoint (x.pt, x-shared.pt, folder), or a Transformers folder or .bin"
        ),
    ],
    dst: Annotated[
        Path,
        typer.Argument(metavar="DST", help="hf: folder to write, new or empty; fairseq: x.pt, new under all its names"),
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="format to write: hf or fairseq")] = "hf",
    ranks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="fairseq only: x-shared.pt and N rank files, N dividing the experts; 0 or not given: one file",
        ),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="dtype to store; each tensor's own if not given")] = None,
    expert_dtype: Annotated[
        ExpertDtype | None, typer.Option(help="dtype to store the experts in, where it is to be another")
    ] = None,
    spm: Annotated[
        Path | None,
        typer.Option(help="SentencePiece model; default: spm.model (or sentencepiece.bpe.model) beside the checkpoint"),
    ] = None,
    dictionary: Annotated[
        Path | None, typer.Option("--dict", help="fairseq dictionary; default: dict.txt beside the checkpoint")
    ] = None,
    src_lang: Annotated[
        str | None, typer.Option(metavar="CODE", help="hf only: source language the tokenizer starts with")
    ] = None,
) -> None:
    """Write a checkpoint as a Transformers folder or in fairseq's layout, tensor by tensor.

    --to hf: safetensors, configuration and tokenizer.

    --to fairseq: one file, or a shared file and rank files, with dict.txt and
    spm.model; rank files of a fairseq checkpoint are merged or spread anew.

    The way there and back is exact, bit for bit.
    """
    from fairseq_moe_opt.checkpoints import convert as convert_checkpoint
    from fairseq_moe_opt.cli.progress import status
    from fairseq_moe_opt.sizes import readable

    with status(f"converting {src}"):
        done = convert_checkpoint(
            src,
            dst,
            to,
            None if dtype is None else dtype.value,
            ranks=ranks,
            spm=spm,
            dictionary=dictionary,
            src_lang=src_lang,
            expert_dtype=None if expert_dtype is None else expert_dtype.value,
        )
    files = f"{len(done.files)} file{'s' if len(done.files) > 1 else ''}"
    kind = "tokenizer" if to == "hf" else "texts"
    texts = f"no {kind} (--spm and --dict give one)" if done.tokenizer is None else f"{kind}: {done.tokenizer}"
    typer.echo(f"{done.path}: {done.tensors} tensors, {readable(done.nbytes)} in {files}; {texts}")
    for note in done.notes:
        typer.echo(f"note: {note}")


@with_moe_flags()
def translation(
    path: Checkpoint,
    file: Annotated[str, typer.Argument(metavar="[FILE|-]", help="UTF-8 text, a sentence a line")] = "-",
    src_lang: SrcLang = None,
    tgt_lang: TgtLang = None,
    output: OutputFile = None,
    batch_size: BatchSize = 16,
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="beams; 1 is greedy; default: the checkpoint's setting, else 4")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="most tokens of a translation, start and end included")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="the same, start not included")] = None,
    dtype: ComputeDtype = None,
    device: Device = None,
    threads: Threads = None,
    *,
    moe_options: dict[str, Any],
) -> Translation:
    """What the flags of ``translate`` ask for."""
    if max_length is not None and max_new_tokens is not None:
        raise typer.BadParameter("--max-length and --max-new-tokens say the same thing: give one of them")
    generation = {"num_beams": num_beams, "max_length": max_length, "max_new_tokens": max_new_tokens}
    return Translation(
        checkpoint=path,
        source=file,
        destination=None if output is None or str(output) == "-" else output,
        languages=(src_lang, tgt_lang),
        batch_size=batch_size,
        generation={name: value for name, value in generation.items() if value is not None},
        dtype=None if dtype is None else dtype.value,
        device=device,
        threads=threads,
        options=moe_options,
    )


@app.command()
@taking(translation)
def translate(job: Translation) -> None:
    """Translate text, a line a sentence: one line out for each line in, in the same order.

    An empty line stays empty. A line of more tokens than the model takes is cut, with a warning.
    """
    translate_file(job, say)


@app.command()
@with_moe_flags(
    "capacity", "expert_dtype", "expert_memory", "host_memory", "eviction", "expert_pool", "prefetch", "host_compute"
)
def verify(
    path: Checkpoint,
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="lines to compute; default: a few of its own")
    ] = None,
    src_lang: SrcLang = None,
    tgt_lang: TgtLang = None,
    batch_size: BatchSize = 8,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="largest relative difference of logits that counts as agreeing")
    ] = 1e-4,
    dtype: Annotated[Dtype, typer.Option(help="dtype to compute in")] = Dtype.FLOAT32,
    device: Device = None,
    stock: Annotated[
        bool, typer.Option("--stock", help="also show the installed Transformers' own layers, which do not count")
    ] = False,
    *,
    moe_options: dict[str, Any],
) -> None:
    """Compute one text with the naive loop, static gating, every kernel and buffered experts if asked for; compare.

    Exits with 1 when logits are further apart than the tolerance, or greedy tokens differ.
    """
    from fairseq_moe_opt.cli.verifying import Verification, run_verification

    request = Verification(path, text, (src_lang, tgt_lang), batch_size, dtype.value, device, moe_options, stock)
    found = run_verification(request)
    console = output_console()
    console.print(found.description, highlight=False)
    table = Table(box=box.SIMPLE)
    for name in ("computed with", "largest difference", "relative", "greedy tokens", "verdict"):
        table.add_column(name, no_wrap=True)
    for one in found.comparisons:
        verdict = "agrees" if one.agrees(tolerance) else "DIFFERS"
        tokens = "same" if one.tokens_agree else "different"
        table.add_row(one.name, f"{one.max_abs:.2e}", f"{one.max_rel:.2e}", tokens, verdict)
    console.print(table)
    wrong = [one.name for one in found.counted if not one.agrees(tolerance)]
    if wrong:
        say(f"{', '.join(wrong)} differ from the naive loop (tolerance {tolerance:g}, relative)")
        raise typer.Exit(FAILURE)
    console.print(f"all agree with the naive loop to {tolerance:g}, relatively", highlight=False)


@app.command("user-dir")
def user_dir() -> None:
    """Print the folder to give to fairseq as --user-dir."""
    typer.echo(str(Path(fairseq_moe_opt.__file__).resolve().parent))


def output_console() -> Console:
    """Standard output; wide enough for a table's lines where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=_PIPED_WIDTH)
