"""``generate``: text from a run directory or a Hugging Face model."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.commands.model_arguments import add_model_arguments, load_requested_run
from megatron_hybrid.commands.output_file import check_output_file
from megatron_hybrid.interruption import leave_at_once_on

if TYPE_CHECKING:
    from megatron_hybrid.config import RunConfig
    from megatron_hybrid.generate.scheduler import Event, Request
    from megatron_hybrid.generate.session import Session
    from megatron_hybrid.substrate import ExitCode, Substrate

_EPILOG = """examples:
  python -m megatron_hybrid generate runs/quickstart/model --prompt "import os" --prompt "class Queue:" --temperature 0.7 --top-p 0.9
  python -m megatron_hybrid generate runs/quickstart/model --prompt-file prompt.txt --max-new-tokens 200 --temperature 0 --stop "def "
  python -m megatron_hybrid generate runs/quickstart/model --input prompts.jsonl --output texts.jsonl --batch-size 16
  python -m megatron_hybrid generate models/nemotron-h-8b --tensor 2 --prompt "def main(" --seed 7

The text goes to stdout as it comes, prompt first; what else there is to say goes to stderr. A text ends where the model ends the document,
or before a stop string. With --input every line is a JSON object with a "prompt", and may set max_new_tokens, temperature, top_k, top_p,
min_p, repetition_penalty, seed and stop for itself; the lines of --output have all that the input's have, and the text. They are written to
FILE.partial, which takes FILE's name when all are there; an interrupted run begins anew.
"""
_OWN = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
"""What a line of --input may set for itself."""
_WHOLE_NUMBERS = {"max_new_tokens", "top_k", "seed"}
_LIKE_AN_OPTION = 0.8
"""How much of a key's and an option's letters agree where one is taken for a mistyped other (``difflib``'s ratio)."""


def main(argv: Sequence[str]) -> int:
    """Parse the command line and generate; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_hybrid generate",
        description="Continue prompts with a trained model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    prompt = {"dest": "prompts", "action": "append"}
    parser.add_argument("--prompt", **prompt, metavar="TEXT", help="text to continue, the beginning of a document; may be repeated")
    parser.add_argument("--prompt-file", **prompt, metavar="FILE", type=_read_text, help="file whose whole text is a prompt")
    parser.add_argument("--input", metavar="FILE", help="JSON lines with a prompt each; - for stdin")
    parser.add_argument("--output", metavar="FILE", help="where the JSON lines with texts go (default: stdout); only with --input")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="tokens after which to stop (default: %(default)s)")
    parser.add_argument("--temperature", metavar="T", type=float, default=1.0, help="0: always the most probable token (default: 1)")
    parser.add_argument("--top-k", metavar="K", type=int, help="choose among the K most probable tokens (default: all)")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="choose among the fewest tokens with this total probability")
    parser.add_argument("--min-p", metavar="P", type=float, default=0.0, help="choose among tokens this many times as probable as the best")
    parser.add_argument("--repetition-penalty", metavar="R", type=float, default=1.0, help="above 1: make what was there less probable")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be repeated")
    parser.add_argument("--seed", type=int, help="the first prompt's seed; each further one has one more (default: a random one, reported)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=16, help="prompts at a time at most (default: %(default)s)")
    parser.add_argument(
        "--max-length", metavar="N", type=int, default=131072, help="tokens of a sequence at most, prompt included (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if (arguments.input is None) == (not arguments.prompts):
        parser.error("give a --prompt or a --prompt-file, or an --input")
    if arguments.output is not None and arguments.input is None:
        parser.error("--output is for the texts of an --input; without one they go to stdout")
    for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("max_length", 2)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    if arguments.seed is None:
        arguments.seed = secrets.randbelow(2**31)
    if not 0 <= arguments.seed < 2**63:
        parser.error(f"--seed must be a number from 0 to 2^63 - 1, got {arguments.seed}")
    try:
        if arguments.output is not None:
            _check_output(arguments.input, Path(arguments.output))
        arguments.lines = None if arguments.input is None else _read_lines(arguments.input)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    # Only now: torch and megatron-core take seconds that a typing error should not have to wait for.
    from megatron_hybrid.substrate.quiet import silence_known_warnings

    silence_known_warnings()
    from megatron_hybrid.substrate.launch import run_on_ranks

    try:
        _wishes(arguments)
        run = load_requested_run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_on_ranks(partial(_generate, arguments), run)


def _read_text(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{name} is no text in UTF-8: {error.reason} at byte {error.start}") from None


def _read_lines(name: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; empty lines are passed over."""
    from megatron_hybrid.config.errors import nearest

    text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}, line {number}, is no JSON: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ValueError(f'{name}, line {number}: expected an object with a text "prompt"')
        for key in entry.keys() - {*_OWN, "prompt"}:
            if meant := nearest(key, _OWN, _LIKE_AN_OPTION):
                raise ValueError(f"{name}, line {number}: there is no option {key!r}{meant} If not, rename the key")
        lines.append(entry)
    if not lines:
        raise ValueError(f"{name} has no prompts")
    return lines


def _check_output(source: str, target: Path) -> None:
    """Look at --output before the work.

    Raises:
        ValueError: it cannot be written, or it is the --input.
    """
    for file in _places(target):
        check_output_file(file)
        if source != "-" and file.exists() and file.samefile(source):
            raise ValueError(f"--output {target} would overwrite {file}, which is the --input; give another file")


def _places(target: Path) -> tuple[Path, Path]:
    """Where the lines end up, which a link may lead to, and where they are until all are there; a device or pipe takes them at once."""
    if target.exists() and not target.is_file():
        return target, target
    final = Path(os.path.realpath(target))
    return final, final.with_name(f"{final.name}.partial")


def _wishes(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is wanted for every prompt, checked: the prompt, a ``Sampling`` and the rest of ``_OWN``.

    Raises:
        ValueError: a line of --input asks for what there is not; names the line.
    """
    from megatron_hybrid.generate.sampling import Sampling

    wishes = []
    for number, entry in enumerate(arguments.lines or [{"prompt": prompt} for prompt in arguments.prompts]):
        own = {name: entry[name] for name in _OWN if entry.get(name) is not None}
        values = {name: getattr(arguments, name) for name in _OWN} | own
        if "seed" not in own:
            values["seed"] += number
        try:
            for name in own.keys() - {"stop"}:
                if not isinstance(own[name], int if name in _WHOLE_NUMBERS else int | float) or isinstance(own[name], bool):
                    kind = "whole number" if name in _WHOLE_NUMBERS else "number"
                    raise ValueError(f"{name} must be a {kind}, got {json.dumps(own[name])}")
            settings = {name: values.pop(name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
            values["sampling"] = Sampling(**settings)
            values["stop"] = (values["stop"],) if isinstance(values["stop"], str) else tuple(values["stop"])
            if not all(isinstance(stop, str) and stop for stop in values["stop"]):
                raise ValueError("stop must be texts of at least one character")
            for name, least, end in (("max_new_tokens", 1, arguments.max_length), ("seed", 0, 2**63)):
                if not least <= values[name] < end:
                    more = "; raise --max-length for more" if name == "max_new_tokens" else ""
                    raise ValueError(f"{name} must be a whole number from {least} to {end - 1}, got {values[name]}{more}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"prompt {number + 1}: {error}" if arguments.lines else str(error)) from None
        wishes.append({"prompt": entry["prompt"]} | values)
    return wishes


def _generate(arguments: argparse.Namespace, run: RunConfig, substrate: Substrate) -> ExitCode:
    """Load the model and continue every prompt."""
    leave_at_once_on(signal.SIGINT)
    from megatron_hybrid.generate.load import load_language_model
    from megatron_hybrid.generate.scheduler import Request
    from megatron_hybrid.generate.session import lead
    from megatron_hybrid.generate.text import encode_prompt
    from megatron_hybrid.substrate import ExitCode

    language_model = load_language_model(run, arguments.model, substrate, step=arguments.checkpoint)
    companions, requests = language_model.companions, []
    for number, wish in enumerate(_wishes(arguments)):
        prompt = encode_prompt(wish.pop("prompt"), language_model.tokenizer, companions.prompt_prefix)
        requests.append(Request(key=number, prompt=prompt, stop_tokens=companions.end_tokens, **wish))
    max_length = max(len(request.prompt) + request.max_new_tokens for request in requests)
    if max_length > arguments.max_length:
        raise ValueError(f"a prompt and its new tokens are {max_length:,} tokens; raise --max-length, which is {arguments.max_length:,}")
    if substrate.rank == 0:
        carried = sorted({key for line in arguments.lines or () for key in line} - {*_OWN, "prompt"})
        if carried:
            _report(f"carried from --input to the lines with the texts: {', '.join(carried)}")
        _report(f"{language_model.checkpoint} in {run.train.precision} on {substrate.device}, seed {arguments.seed}")
    lead(
        language_model,
        substrate,
        partial(_write_lines if arguments.lines else _print_texts, arguments, requests),
        max_batch_size=min(arguments.batch_size, len(requests)),
        max_length=max_length,
    )
    return ExitCode.FINISHED


def _run(session: Session, requests: Sequence[Request]) -> Iterator[Event]:
    """Events of all requests as they come.

    Raises:
        ValueError: one cannot be met.
    """
    scheduler = session.new_scheduler()
    for request in requests:
        scheduler.submit(request)
    while scheduler.has_work:
        for event in scheduler.advance():
            if event.error is not None:
                raise ValueError(event.error)
            yield event


@contextlib.contextmanager
def _until_nobody_reads() -> Iterator[None]:
    """End the body quietly where the text goes to a program that has enough, such as head."""
    try:
        yield
    except BrokenPipeError:
        # What is still buffered goes where it does not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@_until_nobody_reads()
def _print_texts(arguments: argparse.Namespace, requests: Sequence[Request], session: Session) -> None:
    """Print each prompt's continuation, the first unfinished one as it comes, and then how fast it came."""
    # A terminal that cannot show a character shows a question mark.
    sys.stdout.reconfigure(errors="replace")
    waiting: list[list[tuple[float, Event]]] = [[] for _ in requests]
    shown = 0
    times_s = [time.perf_counter()]
    _print_heading(arguments, shown)
    for event in _run(session, requests):
        waiting[event.key].append((time.perf_counter(), event))
        while shown < len(requests) and waiting[shown]:
            moment_s, next_event = waiting[shown].pop(0)
            print(next_event.text, end="", flush=True)
            times_s.append(moment_s)
            if next_event.ending is not None:
                print(flush=True)
                _report_speed(len(requests[shown].prompt), times_s, next_event.ending)
                times_s, shown = times_s[:1], shown + 1
                if shown < len(requests):
                    _print_heading(arguments, shown)


def _print_heading(arguments: argparse.Namespace, number: int) -> None:
    if len(arguments.prompts) > 1:
        print(f"=== {number + 1} of {len(arguments.prompts)} ===")
    print(arguments.prompts[number], end="", flush=True)


def _report_speed(prompt_tokens: int, times_s: list[float], ending: str) -> None:
    num_tokens = len(times_s) - 1
    speed = f" at {(num_tokens - 1) / (times_s[-1] - times_s[1]):.1f} tokens/s" if num_tokens > 1 else ""
    reason = {"stop": "end of text", "length": "--max-new-tokens reached"}[ending]
    _report(f"{prompt_tokens} prompt tokens in {times_s[1] - times_s[0]:.2f} s, {num_tokens} new ones{speed}; {reason}")


@_until_nobody_reads()
def _write_lines(arguments: argparse.Namespace, requests: Sequence[Request], session: Session) -> None:
    """Write a JSON line for each prompt, in their order, each as soon as it and those before it are done."""
    from tqdm import tqdm

    texts, done = [""] * len(requests), [None] * len(requests)
    num_tokens, written = [0] * len(requests), 0
    start_s = time.perf_counter()
    target, place = (None, sys.stdout.fileno()) if arguments.output is None else _places(Path(arguments.output))
    with open(place, "w", encoding="utf-8", closefd=target is not None) as file:
        with tqdm(total=len(requests), unit="prompt", disable=None) as progress:
            for event in _run(session, requests):
                texts[event.key] += event.text
                num_tokens[event.key] += 1
                if event.ending is None:
                    continue
                done[event.key] = event.ending
                progress.update()
                while written < len(requests) and done[written] is not None:
                    facts = {
                        "text": texts[written],
                        "finish_reason": done[written],
                        "prompt_tokens": len(requests[written].prompt),
                        "new_tokens": num_tokens[written],
                        "seed": requests[written].seed,
                    }
                    print(json.dumps(arguments.lines[written] | facts, ensure_ascii=False), file=file, flush=True)
                    written += 1
    if target is not None and place != target:
        os.replace(place, target)
    seconds = time.perf_counter() - start_s
    _report(f"{len(requests)} prompts, {sum(num_tokens):,} new tokens in {seconds:.2f} s, {sum(num_tokens) / seconds:.1f} tokens/s")


def _report(line: str) -> None:
    print(f"[{line}]", file=sys.stderr, flush=True)
