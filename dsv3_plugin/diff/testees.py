"""Two testees on the same tokens: what they compute, down to the first operation that differs.

They run twice where they differ: first with a stream of each operation, then once more to save the call in question
with its arguments, so that an operation is told from what it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance.calls import read_call
from dsv3_plugin.conformance.cases import BLOCK_SIZE
from dsv3_plugin.conformance.compare import Difference
from dsv3_plugin.conformance.programs import Program, Progress, run_programs, work_folder
from dsv3_plugin.conformance.protocol import (
    Capture,
    Case,
    Device,
    Job,
    Request,
    call_file,
    prefix_digest,
    write_message,
)
from dsv3_plugin.conformance.runner import TesteeCommand, cases_of, select
from dsv3_plugin.conformance.taps import operation_of
from dsv3_plugin.conformance.texts import real_text, tokenize
from dsv3_plugin.conformance.validate import require_answers
from dsv3_plugin.diff.calls import blame
from dsv3_plugin.diff.layers import first_difference
from dsv3_plugin.diff.report import Diff, compare
from dsv3_plugin.diff.sides import Side, matched, read_side
from dsv3_plugin.diff.steps import Step
from dsv3_plugin.errors import DiffError
from dsv3_plugin.profile import ATTENTION_VARIABLE

PROMPT_TOKENS = 61
"""Of the prompt where none is given: a number that no weight's size is."""
MOST_TOKENS, SPARE = 512, 8
"""Positions for which the suite starts engines, and how many of them a prompt leaves free."""
_FIRST, _AGAIN = "first", "again"


def make_case(checkpoint: Path, prompt: str | None, case: str | None) -> Case:
    """What the testees run: a case of the suite, or a prompt, of which every position's logits are wanted.

    Raises `ConformanceError` where there is no such case or no tokenizer, `CheckpointError` for a broken checkpoint,
    `DiffError` for a prompt without tokens or with too many.
    """
    reader = CheckpointReader(checkpoint)
    reader.validate()
    if case is not None:
        return select(cases_of(reader), [case])[0]
    token_ids = tokenize(real_text() if prompt is None else prompt, checkpoint)
    if prompt is None:
        token_ids = token_ids[:PROMPT_TOKENS]
    return _case_of(token_ids, reader, "--prompt")


def _case_of(token_ids: Sequence[int], reader: CheckpointReader, what: str) -> Case:
    """One sequence, of which every position's logits are wanted. Raises `DiffError` for none or too many tokens."""
    most = min(MOST_TOKENS, reader.config.max_position_embeddings) - SPARE
    if not 0 < len(token_ids) <= most:
        raise DiffError(f"{what}: {len(token_ids)} tokens; the testees take 1 to {most} of this model")
    request = Request(prompt_token_ids=tuple(token_ids), max_tokens=1, prompt_logprobs=True, top_logprobs=1)
    return Case(name="prompt", title="one prompt", rounds=((request,),), prompt_logits=True)


def diff_testees(
    testees: Sequence[TesteeCommand],
    checkpoint: Path,
    case: Case,
    progress: Progress,
    *,
    device: Device = "cpu",
    keep: Path | None = None,
) -> Diff:
    """Run two testees on a case and compare them. `keep` is a new folder for all that they wrote.

    Raises `DiffError` where the testees have one name, `ConformanceError` where one fails.
    """
    names = [testee.name for testee in testees]
    if len(names) != 2 or len(set(names)) != 2:
        raise DiffError(
            f"two testees with different names are compared, not {', '.join(names)}; NAME=COMMAND names one"
        )
    job = Job(
        checkpoint=str(checkpoint.resolve()), device=device, block_size=BLOCK_SIZE, cases=(case,), operations=True
    )
    with work_folder(keep) as work_dir:
        left, right = _run(job, testees, work_dir / _FIRST, progress)
        diff = compare(left, right, device)
        layers = diff.steps[-1]
        first = first_difference(layers)
        if first is None or operation_of(first[1].stream) is None:
            return diff
        capture = Capture(case=case.name, stream=first[1].stream, prefix=_prefix(right, case.name, first[1]))
        again = work_dir / _AGAIN
        _run(job.model_copy(update={"capture": capture}), testees, again, progress)
        blamed = _blamed(layers, [again / name for name in names], keep is not None)
        return replace(diff, steps=(*diff.steps[:-1], blamed))


def explain(
    diff: Diff,
    sides: tuple[Side, Side],
    testees: Sequence[TesteeCommand],
    checkpoint: Path,
    progress: Progress,
    *,
    device: Device = "cpu",
    keep: Path | None = None,
) -> Diff:
    """`diff` of two dumps, `sides`; where it tells no cause, two testees run the first sequence that differs, up to
    the token that does, and tell formula and layers.

    Raises what `diff_testees` raises, and `DiffError` in the `two_form` profile: all of the sequence would be a prompt.
    """
    if diff.equal or diff.cause is not None:
        return diff
    reader = CheckpointReader(checkpoint)
    if reader.profile().attention != "absorbed":
        raise DiffError(
            f"--testee beside dumps: a sample does not say where its prompt ends, which {ATTENTION_VARIABLE}=two_form"
            " needs: leave --testee out, or compare testees alone, on a --prompt or a --case"
        )
    name, token_ids = _until_they_differ(*sides)
    case = _case_of(token_ids, reader, f"sample {name}")
    again = diff_testees(testees, checkpoint, case, progress, device=device, keep=keep)
    formula, layers = again.steps[2:]
    if again.equal:
        says = (
            f"{testees[0].name} and {testees[1].name}, run again on sample {name}, agree in every bit:"
            " look at what ran: its caches, its schedule, its settings"
        )
        layers = replace(layers, says=(says, *layers.says))
    return replace(diff, steps=(*diff.steps[:2], formula, layers))


def _until_they_differ(left: Side, right: Side) -> tuple[str, tuple[int, ...]]:
    """The name of the first sample that differs, and its tokens up to the first one whose log-probabilities do."""
    for pair in matched(left, right):
        a, b = pair.logprobs()
        if different := (a != b).nonzero().flatten().tolist():
            return pair.left.id, pair.left.token_ids[: pair.tokens[different[0]] + 1]
    raise DiffError(f"{left.name} and {right.name} have no log-probability that differs")


def _run(job: Job, testees: Sequence[TesteeCommand], work_dir: Path, progress: Progress) -> tuple[Side, Side]:
    work_dir.mkdir()
    write_message(job, work_dir)
    run_programs({t.name: Program(t.command, work_dir, work_dir / t.name) for t in testees}, progress)
    for testee in testees:
        require_answers(job, work_dir / testee.name)
    left, right = (read_side(work_dir / testee.name) for testee in testees)
    return left, right


def _prefix(side: Side, case: str, difference: Difference) -> int:
    """The digest of the tokens up to the row."""
    token_ids = side.samples[f"{case}/{difference.request}"].token_ids
    return prefix_digest(token_ids[: difference.position + 1])


def _blamed(layers: Step, folders: Sequence[Path], kept: bool) -> Step:
    """The step with what the saved calls add to it."""
    files = [call_file(folder) for folder in folders]
    (headline, kernels, *others), first = layers.says, layers.found["first"]
    if lacking := [file.parent.name for file in files if not file.is_file()]:
        says = [headline, kernels, f"{' and '.join(lacking)} saved no such call: its arguments are not compared"]
    else:
        left, right = map(read_call, files)
        is_itself, text = blame(left, right, (folders[0].name, folders[1].name))
        module = first["stream"].partition("/")[0]
        says = [headline, text] if is_itself else [f"{module}: {text}", headline]
        command = f"dsv3 replay {' '.join(map(str, files))}"
        says.append(f"alone: {command}" if kept else "with --keep DIR, `dsv3 replay` makes this call again, alone")
    return replace(layers, says=(*says, *others), found=layers.found | {"call": says})
