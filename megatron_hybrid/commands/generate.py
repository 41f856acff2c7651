"""``generate``: text from a run directory."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_hybrid.config import RunConfig
    from megatron_hybrid.generate.load import LanguageModel
    from megatron_hybrid.generate.sampling import Sampling
    from megatron_hybrid.substrate import ExitCode, Substrate

_EPILOG = """examples:
  python -m megatron_hybrid generate runs/quickstart/model --prompt "import os" --prompt "class Queue:" --temperature 0.7 --top-p 0.9
  python -m megatron_hybrid generate runs/quickstart/model --prompt-file prompt.txt --max-new-tokens 200 --temperature 0
  python -m megatron_hybrid generate runs/quickstart/model --prompt "def main(" --checkpoint 200 --seed 7

The text goes to stdout as it comes, prompt first; what else there is to say goes to stderr. Generation stops where the model ends the
document. One rank generates, whatever layout trained the model.
"""


def main(argv: Sequence[str]) -> int:
    """Parse the command line and generate; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_hybrid generate",
        description="Continue prompts with a pretrained model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, help="run directory of a pretraining run")
    prompt = {"dest": "prompts", "action": "append"}
    parser.add_argument("--prompt", **prompt, metavar="TEXT", help="text to continue, the beginning of a document; may be repeated")
    parser.add_argument("--prompt-file", **prompt, metavar="FILE", type=_read_prompt, help="file whose whole text is a prompt")
    parser.add_argument("--checkpoint", metavar="STEP", type=int, help="use the checkpoint of this step (default: the newest sound one)")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="tokens after which to stop (default: %(default)s)")
    parser.add_argument("--temperature", metavar="T", type=float, default=1.0, help="0: always the most probable token (default: 1)")
    parser.add_argument("--top-k", metavar="K", type=int, help="choose among the K most probable tokens (default: all)")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="choose among the fewest tokens with this total probability")
    parser.add_argument("--seed", type=int, help="the first prompt's seed; each further one has one more (default: a random one, reported)")
    arguments = parser.parse_args(argv)
    if not arguments.prompts:
        parser.error("give a --prompt or a --prompt-file")
    if arguments.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    if arguments.seed is None:
        arguments.seed = secrets.randbelow(2**31)
    if not 0 <= arguments.seed < 2**63:
        parser.error(f"--seed must be a number from 0 to 2^63 - 1, got {arguments.seed}")
    # Only now: torch and megatron-core take seconds that a typing error should not have to wait for.
    from megatron_hybrid.substrate.quiet import silence_known_warnings

    silence_known_warnings()
    from megatron_hybrid.generate.load import load_run
    from megatron_hybrid.generate.sampling import Sampling
    from megatron_hybrid.substrate.launch import run_on_ranks

    try:
        sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
        run = load_run(arguments.run_dir)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_on_ranks(partial(_generate, arguments, sampling), run)


def _read_prompt(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{name} is no text in UTF-8: {error.reason} at byte {error.start}") from None


def _generate(arguments: argparse.Namespace, sampling: Sampling, run: RunConfig, substrate: Substrate) -> ExitCode:
    """Load the model and continue every prompt."""
    from megatron_hybrid.generate.load import load_language_model
    from megatron_hybrid.generate.text import encode_prompt
    from megatron_hybrid.substrate import ExitCode

    language_model = load_language_model(run, arguments.run_dir, substrate, step=arguments.checkpoint)
    tokenizer, resets_at_documents = language_model.tokenizer, language_model.resets_at_documents
    encoded = [encode_prompt(prompt, tokenizer, resets_at_documents=resets_at_documents) for prompt in arguments.prompts]
    _report(f"{language_model.checkpoint} in {run.train.precision} on {substrate.device}, seed {arguments.seed}")
    # A terminal that cannot show a character shows a question mark.
    sys.stdout.reconfigure(errors="replace")
    for number, (prompt, tokens) in enumerate(zip(arguments.prompts, encoded, strict=True)):
        if len(encoded) > 1:
            print(f"=== {number + 1} of {len(encoded)} ===")
        print(prompt, end="", flush=True)
        _continue(language_model, tokens, arguments.max_new_tokens, sampling, arguments.seed + number)
    return ExitCode.FINISHED


def _continue(language_model: LanguageModel, prompt: list[int], max_new_tokens: int, sampling: Sampling, seed: int) -> None:
    """Print a prompt's continuation as it comes, and then how fast it came."""
    from megatron_hybrid.generate.text import stream_text

    times_s, last = [time.perf_counter()], None
    for piece in stream_text(language_model, prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed):
        print(piece.text, end="", flush=True)
        times_s.append(time.perf_counter())
        last = piece.token
    print(flush=True)
    num_tokens = len(times_s) - 1
    speed = f" at {(num_tokens - 1) / (times_s[-1] - times_s[1]):.1f} tokens/s" if num_tokens > 1 else ""
    ending = "end of document" if last == language_model.tokenizer.eod_id else "--max-new-tokens reached"
    _report(f"{len(prompt)} prompt tokens in {times_s[1] - times_s[0]:.2f} s, {num_tokens} new ones{speed}; {ending}")


def _report(line: str) -> None:
    print(f"[{line}]", file=sys.stderr, flush=True)
