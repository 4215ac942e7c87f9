"""The command-line program. Commands import what they need when they run, so that help needs no torch."""

from __future__ import annotations

import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lynx.cli.calibrate import calibrate
from lynx.errors import ConfigError, LynxError

app = typer.Typer(
    name="lynx",
    help="Batch-aware expert selection for Mixture-of-Experts decoding.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output instead of a table.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--strategy", help="'NAME option=value ...', or a configuration file. May be given again."),
]
Ranges = Annotated[
    list[str] | None, typer.Option("--sweep", help="An option to go through, option=from:to or option=from:to:count.")
]
WithStandIns = Annotated[
    Path | None, typer.Option("--standins", help="File of `lynx calibrate`: every setting is measured with it, too.")
]
Similar = Annotated[bool, typer.Option("--similar", help="Batches of one domain each, not mixed.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="How often batches are formed anew.")]
Batches = Annotated[int | None, typer.Option("--batches", min=1, help="Most batches of a seed.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest generated answer.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N; a GPU where there is one.")]
Dtype = Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32; auto for the file's.")]


class Experts(StrEnum):
    """What runs the experts under Lynx."""

    auto = "auto"
    model = "model"
    lynx = "lynx"


class Controls(StrEnum):
    """What stands beside the settings asked for."""

    all = "all"
    exact = "exact"


class Clock(StrEnum):
    """What times steps on a CPU."""

    wall = "wall"
    thread = "thread"


@app.callback()
def common(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and log events.")] = False,
) -> None:
    """Options of every command."""
    context.obj = debug
    if debug:
        logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
        logging.getLogger("lynx").setLevel(logging.DEBUG)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer settings and batches; under a minute.")] = False,
    plot: Annotated[
        bool, typer.Option("--plot", help="Also draw quality against active experts (PNG and SVG).")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for results.json, results.csv and the plot.")] = Path(
        "lynx-demo"
    ),
    as_json: AsJson = False,
) -> None:
    """Measure a dozen settings on the reference model: what they cost and what they buy."""
    from lynx.cli.demo import run_demo

    run_demo(quick, plot, out, as_json)


@app.command()
def strategies(
    name: Annotated[str | None, typer.Argument(help="Show one strategy with its options.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the registered strategies, or describe one."""
    from lynx.cli.strategies import show_strategies

    show_strategies(name, as_json)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="Folder or config.json of a model, `module:function` that makes one, or `reference`.")
    ],
    as_json: AsJson = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="Configuration whose `layers` describe hand-written MoE blocks.")
    ] = None,
) -> None:
    """Show what would be attached to in a model, and why not; builds it without its weights."""
    from lynx.cli.inspect import inspect_model

    inspect_model(model, as_json, config)


@app.command(name="eval")
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of a model with its tokenizer, or `reference`.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Text to measure on: .jsonl with one example a line, or plain text.")
    ] = None,
    strategy: Settings = None,
    ranges: Ranges = None,
    standins: WithStandIns = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences of a decode batch.")] = 16,
    columns: Annotated[int, typer.Option("--columns", min=2, help="Decode steps of each batch.")] = 64,
    similar: Similar = False,
    seeds: Seeds = 3,
    batches: Batches = None,
    stress: Annotated[bool, typer.Option("--stress", help="Put prompts under the setting, too.")] = False,
    questions: Annotated[
        int, typer.Option("--questions", min=0, help="Examples with an answer to generate for, in true batches.")
    ] = 0,
    max_new_tokens: MaxNewTokens = 128,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks", help="Tasks of lm-evaluation-harness or YAML files of such, as A,B. May be given again."
        ),
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option("--include-path", help="Folder with tasks of your own. May be given again.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Most documents of a task.")] = None,
    fewshot: Annotated[
        int | None, typer.Option("--fewshot", min=0, help="Solved examples before each question of a task.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put prompts of tasks into the model's chat template.")
    ] = False,
    controls: Annotated[
        Controls, typer.Option("--controls", help="exact leaves out all controls of tasks but exact routing.")
    ] = Controls.all,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure what settings do to a model on your text or on benchmarks, beside the controls."""
    from lynx.cli.invocation import given

    if not strategy:
        raise ConfigError("give at least one --strategy, for instance --strategy 'importance-threshold ratio=0.4'.")
    of_text = ("data", "columns", "similar", "seeds", "batches", "questions")
    of_tasks = ("include_path", "limit", "fewshot", "chat_template", "controls")
    strangers = given(context, *(of_text if tasks else of_tasks))
    if strangers:
        raise ConfigError(f"{', '.join(strangers)} {'does not go with' if tasks else 'goes with'} --tasks.")
    if tasks:
        # read when tqdm is imported, which the harness uses: progress is for terminals, and this command has its own
        os.environ.setdefault("TQDM_DISABLE", "1")
        from lynx.cli.tasks import run_tasks
        from lynx.measuring.harness import TaskProtocol

        task_protocol = TaskProtocol(
            batch=batch,
            limit=limit,
            fewshot=fewshot,
            chat=chat_template,
            stress=stress,
            max_new_tokens=max_new_tokens if given(context, "max_new_tokens") else None,
            all_controls=controls is Controls.all,
        )
        asked = strategy, ranges or [], standins
        run_tasks(model, tasks, include_path or [], *asked, task_protocol, (device, dtype), as_json)
        return
    from lynx.cli.evaluate import run_eval
    from lynx.measuring.evaluate import Protocol

    protocol = Protocol(
        batch=batch,
        columns=columns,
        mix="similar" if similar else "mixed",
        seeds=tuple(range(seeds)),
        most_batches=batches,
        stress=stress,
        questions=questions,
        max_new_tokens=max_new_tokens,
    )
    run_eval(model, data, strategy, ranges or [], standins, protocol, (device, dtype), as_json)


@app.command()
def trace(
    model: Annotated[str, typer.Argument(help="Folder of a model with its tokenizer, or `reference`.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Text to record: .jsonl with one example a line, or plain text.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="File that is written.")] = Path("trace.safetensors"),
    columns: Annotated[int, typer.Option("--columns", min=1, help="Most decode steps of an example.")] = 64,
    prompts: Annotated[bool, typer.Option("--prompts", help="Record prompts, too.")] = False,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Examples that are read in one pass.")] = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Record what a model's routers decide on your text, for `lynx simulate`."""
    from lynx.cli.trace import run_trace

    run_trace(model, data, out, columns, prompts, batch, (device, dtype), as_json)


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(help="File that `lynx trace` wrote.")],
    strategy: Settings = None,
    ranges: Ranges = None,
    batch: Annotated[str, typer.Option("--batch", help="Sequences of a decode batch; several as 4,8,16.")] = "16",
    columns: Annotated[
        int | None, typer.Option("--columns", min=1, help="Decode steps of each batch; as many as were recorded.")
    ] = None,
    similar: Similar = False,
    seeds: Seeds = 3,
    batches: Batches = None,
    stress: Annotated[bool, typer.Option("--stress", help="Put prompts under the setting, too.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Replay settings on recorded routing: active experts and kept mass, without the model."""
    from lynx.cli.simulate import run_simulate, sizes_of
    from lynx.measuring.simulate import Traffic

    if not strategy:
        raise ConfigError("give at least one --strategy, for instance --strategy 'importance-threshold ratio=0.4'.")
    traffic = Traffic(
        sizes=sizes_of(batch),
        columns=columns,
        mix="similar" if similar else "mixed",
        seeds=tuple(range(seeds)),
        most_batches=batches,
        stress=stress,
    )
    run_simulate(trace, strategy, ranges or [], traffic, layers, as_json)


@app.command()
def bench(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of a model, or `reference`.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Text to time on: .jsonl or plain text; random tokens without it.")
    ] = None,
    strategy: Settings = None,
    ranges: Ranges = None,
    batch: Annotated[str, typer.Option("--batch", help="Sequences of a decode batch, as 1,4,16.")] = "1,4,16",
    rounds: Annotated[int, typer.Option("--rounds", min=3, help="Interleaved rounds of measurement.")] = 9,
    experts: Annotated[
        Experts, typer.Option("--experts", help="What runs the experts under Lynx; auto leaves it to each setting.")
    ] = Experts.auto,
    similar: Similar = False,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens in the cache, where they are random.")] = 128,
    device: Device = None,
    dtype: Dtype = "auto",
    clock: Annotated[
        Clock, typer.Option("--clock", help="Of a CPU: wall, or thread to leave out what else the machine does.")
    ] = Clock.wall,
    fit: Annotated[
        Path | None, typer.Option("--fit", help="Write the fitted latency model to this file, as JSON.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time decode steps on this machine, exact against settings, and say whether selection helps here."""
    from lynx.cli.bench import counts_of, run_bench
    from lynx.cli.invocation import command_line
    from lynx.measuring.bench import BenchPlan

    plan = BenchPlan(
        batches=counts_of(batch),
        rounds=rounds,
        experts=experts.value,
        mix="similar" if similar else "mixed",
        prompt=prompt,
        clock=clock.value,
    )
    run_bench(model, data, strategy or [], ranges or [], plan, (device, dtype), fit, as_json, command_line(context))


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="Folder of a model with its tokenizer, or `reference`.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Text like that served: .jsonl with one example a line, or plain text."),
    ] = None,
    max_kl: Annotated[float | None, typer.Option("--max-kl", help="Most KL(exact || policy), nats per token.")] = None,
    max_drop: Annotated[
        str | None, typer.Option("--max-drop", help="Most answers lost, as 1% or 0.01; needs --questions.")
    ] = None,
    target_active: Annotated[
        float | None, typer.Option("--target-active", help="Most active experts, as a share of the model's.")
    ] = None,
    target_tpot: Annotated[
        float | None, typer.Option("--target-tpot", help="Most milliseconds per output token; needs --latency.")
    ] = None,
    latency: Annotated[
        Path | None, typer.Option("--latency", help="Latency model that `lynx bench --fit` wrote on this machine.")
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", help="Sequences of a decode batch; several as 4,16, for a setting each.")
    ] = "16",
    columns: Annotated[int, typer.Option("--columns", min=2, help="Decode steps of each batch.")] = 64,
    seeds: Seeds = 2,
    batches: Batches = None,
    questions: Annotated[
        int, typer.Option("--questions", min=0, help="Examples with an answer to verify with, in true batches.")
    ] = 0,
    max_new_tokens: MaxNewTokens = 128,
    standins: Annotated[
        Path | None, typer.Option("--standins", help="File of `lynx calibrate`: what answers for lost experts.")
    ] = None,
    candidates: Annotated[int, typer.Option("--candidates", min=0, help="Settings to try in a layer; 0 for all.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Where the configuration goes, with its report beside it.")] = Path(
        "lynx.yaml"
    ),
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Choose a setting for every layer of a model, within the loss that you allow."""
    from lynx.cli.tune import goal_of, run_tune, sizes_of
    from lynx.measuring.evaluate import Protocol
    from lynx.standins import StandIns
    from lynx.tuning.tune import Effort

    goal = goal_of(max_kl, max_drop, target_active, None if target_tpot is None else target_tpot / 1000)
    sizes = sizes_of(batch)
    protocol = Protocol(
        columns=columns,
        seeds=tuple(range(seeds)),
        most_batches=batches,
        questions=questions,
        max_new_tokens=max_new_tokens,
    )
    effort = Effort(candidates=candidates, standins=None if standins is None else StandIns(file=standins.resolve()))
    run_tune(model, data, goal, sizes, protocol, effort, latency, (device, dtype), out, as_json)


app.command()(calibrate)


@app.command()
def doctor(
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown for an issue report.")] = False,
    vllm: Annotated[
        str | None, typer.Option("--vllm", metavar="MODEL", help="Start vLLM on this model, and show what is armed.")
    ] = None,
) -> None:
    """Show versions, devices, live execution paths and plugins."""
    from lynx.cli.doctor import examine

    examine(as_json, markdown, vllm)


def main(arguments: list[str] | None = None) -> None:
    """Run the program: exit code 2 on misuse, 1 on failure, no traceback unless ``--debug``."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    try:
        app(arguments, prog_name="lynx")
    except LynxError as error:
        if debug:
            raise
        typer.secho(f"lynx: {error}", fg=typer.colors.RED, err=True)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
