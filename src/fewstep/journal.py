"""What an interrupted tuning has already found out: an append-only file of finished pieces, and cached references."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._types import FewstepError, Field
from .composite import CountedField
from .coordinates import Coordinates
from .sampler import Provenance, Sampler
from .trajectory import Reference

LARGEST_REFERENCE = 1 << 30
"""Bytes above which a reference is solved again rather than kept on disk."""


class Journal:
    """Results by key; with a directory they survive the process.

    Args:
        directory: where to keep them; None keeps nothing.
        identity: what the results belong to; another identity starts afresh.

    Attributes:
        counters: what results cost is told from these and kept; a result of an earlier process is added to them once, when it
            is first used: they then say what the work has cost in all.
    """

    def __init__(self, directory: Path | None, identity: str) -> None:
        self.counters: tuple[CountedField, ...] = ()
        self._entries: dict[str, Any] = {}
        self._owed: dict[str, list[list[int]]] = {}
        self._directory = None if directory is None else directory / identity[:16]
        if self._directory is None:
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._file = self._directory / "journal.jsonl"
            text = self._file.read_text() if self._file.exists() else ""
            if text and not text.endswith("\n"):  # torn when the process died: the next entry must not be glued to it
                with self._file.open("a") as out:
                    out.write("\n")
        except OSError as error:
            raise FewstepError(f"cannot keep progress in {self._directory}: {error.strerror}; choose another folder") from None
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._entries[entry["key"]] = entry["value"]
                self._owed[entry["key"]] = entry.get("cost", [])
            except (ValueError, KeyError, TypeError):
                continue  # a line that was being written when the process died

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The value under `key`, made (and kept) if it is new. Values are plain JSON data."""
        if key in self._entries:
            self._pay(key)
        else:
            self._keep(key, *self._made(make))
        return self._entries[key]

    def _made(self, make: Callable[[], Any]) -> tuple[Any, list[list[int]]]:
        before = [(c.calls, c.samples) for c in self.counters]
        value = make()
        return value, [[c.calls - n, c.samples - m] for c, (n, m) in zip(self.counters, before, strict=True)]

    def _keep(self, key: str, value: Any, cost: list[list[int]]) -> None:
        self._entries[key] = value
        if self._directory is not None:
            with self._file.open("a") as out:
                out.write(json.dumps({"key": key, "value": value, "cost": cost}) + "\n")

    def _pay(self, key: str) -> None:
        for counter, (calls, samples) in zip(self.counters, self._owed.pop(key, []), strict=False):
            counter.calls += calls
            counter.samples += samples

    def sampler(self, key: str, make: Callable[[], Sampler]) -> Sampler:
        """A table under `key`."""
        data = self.get(key, lambda: _plain(make()))
        times, a, b = (torch.tensor(data[name], dtype=torch.float64) for name in ("times", "a", "b"))
        return Sampler(times, a, b, provenance=Provenance(method=data["method"]))

    def reference(self, key: str, coordinates: Coordinates, make: Callable[[], Reference]) -> Reference:
        """A converged solution under `key`, in a safetensors file of its own."""
        if self._directory is None:
            return make()
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        file = self._directory / f"{key}.safetensors"
        if key in self._entries and file.exists():
            try:
                kept = load_file(file)
                facts = self._entries[key]
                found = Reference(coordinates, kept["knots"], kept["states"], kept["rates"], facts["error"], facts["nfe"])
                self._pay(key)
                return found
            except (SafetensorError, OSError, KeyError):
                del self._entries[key]
        solution, cost = self._made(make)
        tensors = {"knots": solution.knots, "states": solution.states.contiguous(), "rates": solution.rates.contiguous()}
        if solution.states.nbytes < LARGEST_REFERENCE and solution.states.device.type == "cpu":
            partial = file.with_suffix(".partial")
            save_file(tensors, partial)
            partial.replace(file)
            self._keep(key, {"error": solution.error, "nfe": solution.nfe}, cost)
        return solution


def _plain(sampler: Sampler) -> dict[str, Any]:
    return {
        "times": sampler.times.tolist(), "a": sampler.a.tolist(), "b": sampler.b.tolist(), "method": sampler.provenance.method,
    }  # fmt: skip


def digest(noise: Tensor) -> str:
    """A hash of a set of noise."""
    return hashlib.sha256(_bytes(noise)).hexdigest()


def _bytes(noise: Tensor) -> bytes:
    return noise.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()  # NumPy has no bfloat16


def identity(field: Field, noise: Tensor, *words: object) -> str:
    """A hash of what a result depends on: the field's own output on some noise, the noise, and the settings."""
    found = hashlib.sha256(repr(words).encode())
    found.update(_bytes(noise))
    if noise.device.type != "cpu":  # what is kept is on the CPU
        found.update(noise.device.type.encode())
    with torch.no_grad():
        found.update(field(noise, 0.5).detach().float().cpu().numpy().tobytes())
    return found.hexdigest()
