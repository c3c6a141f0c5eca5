"""`dsv3 fingerprint`: which weights do checkpoints and running servers hold, and are they the same?"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import ValidationError

from dsv3_plugin.checkpoint.fingerprint import Fingerprint, fingerprint_of_checkpoint
from dsv3_plugin.checkpoint.reader import CheckpointReader, some_names
from dsv3_plugin.errors import CheckpointError, EngineError

_TIMEOUT_S = 600.0
"""A server answers between two steps, and first sums all its weights."""


class Held(StrEnum):
    """The dtype in which an engine holds the weights that are not fp8 (`--dtype`)."""

    bfloat16 = "bfloat16"
    float32 = "float32"


def main(
    sources: Annotated[list[str], typer.Argument(help="Checkpoint folders, and addresses of servers (http://...).")],
    dtype: Annotated[
        Held | None, typer.Option(help="Folders' weights as an engine holds them that was started with this --dtype.")
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Print the digest of every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the fingerprint of the weights of each source. Of several: exit with status 1 unless all are equal.

    A server that drafts nothing holds no MTP layer; all else is compared with the first source then.
    A server answers what it holds now, whatever it was started with. vLLM has to be in its development mode
    (VLLM_SERVER_DEV_MODE=1), which opens more: on a trusted network only.
    """
    found = {source: _fingerprint(source, dtype) for source in sources}
    if as_json:
        print(json.dumps({source: value.model_dump() for source, value in found.items()}, indent=1))
    else:
        for source, value in found.items():
            print(f"{value.digest}  {source} ({len(value.tensors):,} tensors)")
            for name, digest in sorted(value.tensors.items()) if tensors else ():
                print(f"  {digest}  {name}")
    first = sources[0]
    different = False
    for source, value in found.items():
        names = found[first].difference(value)
        if names and (without := _serves_no_drafts({first: found[first], source: value}, names)):
            note = f"{without}: drafts nothing and holds no MTP layer, whose {len(names):,} tensors are not compared"
            typer.echo(note, err=True)
        elif names:
            typer.echo(f"{source}: {len(names):,} tensors are not those of {first}: {some_names(names)}", err=True)
            different = True
    raise typer.Exit(1 if different else 0)


def _serves_no_drafts(found: Mapping[str, Fingerprint], names: Sequence[str]) -> str | None:
    """Which of two sources is a server that lacks all of `names`, layers behind its last one. None: neither."""
    for source, value in found.items():
        last = max(map(_layer, value.tensors), default=-1)
        if _is_server(source) and all(name not in value.tensors and _layer(name) > last for name in names):
            return source
    return None


def _layer(name: str) -> int:
    """-1 where a tensor belongs to none."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return int(layer[1]) if layer else -1


def _is_server(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def _fingerprint(source: str, dtype: Held | None) -> Fingerprint:
    if _is_server(source):
        return fingerprint_of_server(source.rstrip("/"))
    reader = CheckpointReader(Path(source))
    return fingerprint_of_checkpoint(reader, reader.profile(getattr(torch, dtype.value) if dtype else None))


def fingerprint_of_server(address: str) -> Fingerprint:
    """What a server answers: SGLang in its internal state, vLLM to a call of its worker's method.

    Raises `EngineError` where it does not answer, serves another model, or may not answer now.
    """
    try:
        # vLLM first: in its development mode it has a /server_info too, of other things.
        state = _ask(f"{address}/collective_rpc", {"method": "dsv3_fingerprint"})
        if state is not None:
            answers = [{"fingerprint": answer} for answer in state["results"]]
        else:
            state = _ask(f"{address}/server_info") or {}
            answers = [part.get("dsv3") for part in state.get("internal_states", [])]
        if not answers or None in answers:
            raise EngineError(
                f"{address}: no fingerprint: it is no server of dsv3-plugin, or a vLLM without VLLM_SERVER_DEV_MODE=1"
            )
        if problem := next(filter(None, (answer.get("problem") for answer in answers)), None):
            raise EngineError(f"{address}: its weights may not answer: {problem}")
        parts = [Fingerprint.model_validate({"tensors": answer["fingerprint"]["tensors"]}) for answer in answers]
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise EngineError(f"{address}: answered something else than a fingerprint: {error!r}") from None
    try:
        return reduce(Fingerprint.__or__, parts)
    except CheckpointError as error:
        raise EngineError(f"{address}: its {error}") from None


def _ask(url: str, body: Any = None) -> Any:
    """The JSON that a server answers, None where it does not know the address. Raises `EngineError`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        if error.code in (404, 405):
            return None
        said = error.read().decode(errors="replace").strip()
        raise EngineError(f"{url}: status {error.code}: {said[:500]}") from None
    except OSError as error:
        raise EngineError(f"{url}: no answer: {getattr(error, 'reason', error)}") from None
