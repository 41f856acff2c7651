"""Stage 3: native checkpoint in, native checkpoint out, a tensor at a time; any layout wrote the one and any can read the other.

The conversion's machinery does the writing (journal, digests, disk space, tokenizer), so that an interrupted prune continues and a pruned
model is a run directory like any other: ``python -m megatron_hybrid generate`` speaks with it, training starts from it.

nvidia-modelopt's Minitron mode prunes megatron-core's GPTModel and MambaModel in memory, at one tensor rank. Our model is neither, and
checkpoints larger than the host's memory are to be pruned, so cutting is our own; modelopt stands in the tests.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.convert.companions import Companions
from megatron_hybrid.convert.correspondence import correspondences
from megatron_hybrid.convert.job import PARTIAL, plan_conversion, publish, run_conversion
from megatron_hybrid.convert.native import NativeSource, NativeTarget
from megatron_hybrid.convert.source import Form
from megatron_hybrid.convert.specs import TensorSpec, check_specs
from megatron_hybrid.convert.target import Layout
from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.parent import weights_digest
from tools.minipuzzle.pruning import Selection, cut_tensor, select_parts
from tools.minipuzzle.scores import Scores, read_json, write_json

_CHOICE = "pruned.json"


class PrunedSource:
    """A parent's checkpoint as if it were the candidate's: what is read is cut on the way (a ``convert.source.Source``).

    Args:
        parent: the parent's checkpoint.
        candidate: what is kept of it.
        selection: the parts of the parent.
    """

    form: Form = "native"

    def __init__(self, parent: NativeSource, candidate: Candidate, selection: Selection) -> None:
        self._parent, self._selection = parent, selection
        self.path = parent.path
        self.model: ModelConfig = candidate.model(parent.model)
        shapes = {tensor.key: tensor.shape for each in correspondences(self.model) for tensor in each.native}
        self.specs = {key: TensorSpec(shape, parent.specs[self.parent_key(key)].dtype) for key, shape in shapes.items()}

    @property
    def companions(self) -> Companions:
        """The parent's."""
        return self._parent.companions

    def parent_key(self, key: str) -> str:
        """Return the key of the parent's tensor that one of the candidate's is cut from: its layer has another number there.

        >>> PrunedSource.__new__(PrunedSource).parent_key("output_layer.weight")
        'output_layer.weight'
        """
        prefix = "decoder.layers."
        if not key.startswith(prefix):
            return key
        number, rest = key[len(prefix) :].split(".", 1)
        return f"{prefix}{self._selection.layers[int(number)]}.{rest}"

    def read(self, name: str) -> Tensor:
        """Return a tensor of the candidate.

        Raises:
            ValueError: the parent's tensor is not what was saved.
        """
        key = self.parent_key(name)
        tensor = cut_tensor(key, self._parent.read(key), self._selection, self._parent.model)
        assert tuple(tensor.shape) == self.specs[name].shape, (name, tuple(tensor.shape), self.specs[name].shape)
        return tensor


def prune(parent: NativeSource, candidate: Candidate, scores: Scores | None, directory: Path, layout: Layout | None = None) -> Path:
    """Write a candidate's weights as a run directory, and return it.

    One that is complete already is left as it is, unless it was cut from other weights or other scores keep other parts of them: then it
    is made anew.

    Args:
        parent: the parent's checkpoint.
        candidate: what to keep.
        scores: what is kept where widths shrink.
        directory: the run directory to make.
        layout: how its files are cut; any layout reads them.

    Raises:
        ValueError: the widths do not divide by the layout, were not scored, or ``directory`` holds another candidate.
    """
    selection = select_parts(parent.model, candidate, scores)
    choice = {"candidate": candidate.to_json(), "parent": weights_digest(parent), "kept": selection.digest}
    partial = directory.with_name(directory.name + PARTIAL)
    if directory.exists():
        held = read_json(directory / _CHOICE, f"remove {directory} and prune again")
        if held == choice:
            return directory
        if held.get("candidate") != choice["candidate"]:
            raise ValueError(f"{directory} holds another candidate's weights (see {_CHOICE} in it); remove it and prune again")
        # What was left unfinished is removed below, so that a crash leaves nothing that looks complete.
        shutil.rmtree(partial, ignore_errors=True)
        directory.rename(partial)
    source = PrunedSource(parent, candidate, selection)
    beside = directory.with_name(directory.name + ".choice.json")
    if partial.exists() and not (beside.is_file() and read_json(beside, "") == choice):
        shutil.rmtree(partial)
    write_json(beside, choice)
    plan = plan_conversion(source, layout or Layout())
    target = NativeTarget(plan, directory)
    partial = run_conversion(source, target, plan, directory)
    # Read back as anybody would: every tensor has the candidate's shape, and no other.
    check_specs(partial, target.read_back(partial).specs, {key: spec.shape for key, spec in source.specs.items()})
    write_json(partial / _CHOICE, choice)
    publish(partial, directory)
    beside.unlink()
    print(f"{directory}: {candidate.describe(parent.model)}", file=sys.stdout, flush=True)
    return directory
