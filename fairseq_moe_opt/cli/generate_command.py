"""``moe-opt generate``: language models continue text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from fairseq_moe_opt.cli.commands import BatchSize, Checkpoint, ComputeDtype, Device, OutputFile, Threads, app, say
from fairseq_moe_opt.cli.flags import taking, with_moe_flags
from fairseq_moe_opt.cli.generating import Generation
from fairseq_moe_opt.cli.translating import translate_file

_OF_SAMPLING: Mapping[str, str] = {
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "seed": "--seed",
}


@with_moe_flags()
def generation(
    path: Checkpoint,
    file: Annotated[str, typer.Argument(metavar="[FILE|-]", help="UTF-8 prompts, one a line")] = "-",
    output: OutputFile = None,
    batch_size: BatchSize = 16,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="most tokens to add; default: the checkpoint's setting, else 64")
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="beams; 1 is greedy; default: the checkpoint's setting, else 1")
    ] = None,
    do_sample: Annotated[
        bool | None, typer.Option("--do-sample/--no-sample", help="draw tokens; default: the checkpoint's setting")
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=1e-6, help="below 1: likelier tokens more often")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="draw from so many likeliest tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=1e-6, max=1.0, help="draw from the likeliest tokens of so much probability")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="another one draws other tokens; default: 0")] = None,
    with_prompt: Annotated[bool, typer.Option("--prompt/--no-prompt", help="write the prompt before its end")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="an object a line, prompt and text: keeps line breaks, which become spaces")
    ] = False,
    dtype: ComputeDtype = None,
    device: Device = None,
    threads: Threads = None,
    *,
    moe_options: dict[str, Any],
) -> Generation:
    """What the flags of ``generate`` ask for."""
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    if do_sample is False or (do_sample is None and num_beams is not None):
        unused = [_OF_SAMPLING[name] for name, value in sampling.items() if value is not None]
        if unused:
            raise typer.BadParameter(f"{unused[0]} has no effect without --do-sample")
    if as_json and not with_prompt:
        raise typer.BadParameter("--no-prompt has no effect with --json")
    if do_sample is None and any(value is not None for value in sampling.values()):
        do_sample = True
    del sampling["seed"]
    settings = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": do_sample, **sampling}
    return Generation(
        checkpoint=path,
        source=file,
        destination=None if output is None or str(output) == "-" else output,
        languages=(None, None),
        batch_size=batch_size,
        generation={name: value for name, value in settings.items() if value is not None},
        dtype=None if dtype is None else dtype.value,
        device=device,
        threads=threads,
        options=moe_options,
        seed=seed or 0,
        with_prompt=with_prompt,
        as_json=as_json,
    )


@app.command()
@taking(generation)
def generate(job: Generation) -> None:
    """Continue prompts with a language model: one line out for each line in, in the same order.

    Greedily, with beams, or drawing tokens. An empty line is continued from the beginning of a text.
    Of a prompt that leaves no room for new tokens the end is taken, with a warning.
    """
    translate_file(job, say)
