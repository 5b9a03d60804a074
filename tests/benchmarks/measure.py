# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: alternating repetition, medians, memory, what the machine allows, and the table.

A ratio only means something within one run: the ways to compare take turns in one process, in another order each
time, and the ratio is taken within each repetition before its median is.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch


@dataclass
class Run:
    """
    One repetition of one way to do the work.

    Args:
        seconds (`float`): From begin to end, the device's work included.
        units (`int`): How many pairs, conversations, ... were done.
        waited (`float`, *optional*): Seconds of those spent getting and collating data in the training process.
        peak_bytes (`int`, *optional*): Most device memory of this way alone, see [`PeakMemory`]; `None` on a CPU.
    """

    seconds: float
    units: int
    waited: float = 0.0
    peak_bytes: int | None = None

    @property
    def seconds_a_unit(self) -> float:
        return self.seconds / self.units


def alternate(ways: Mapping[str, Callable[[], Run]], repeats: int) -> dict[str, list[Run]]:
    """
    Runs each way once in each repetition, every second repetition in reverse order, so that none always comes first.

    Args:
        ways (mapping of `str` to callable): What to compare, warm already.
        repeats (`int`): Repetitions.

    Returns:
        `dict[str, list[Run]]`: The runs of each way, one for each repetition.
    """
    runs = {name: [] for name in ways}
    for repetition in range(repeats):
        for name in list(ways) if repetition % 2 == 0 else reversed(ways):
            runs[name].append(ways[name]())
    return runs


@dataclass
class Spread:
    """Median, least and greatest of some figures."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{_digits(self.median)} [{_digits(self.least)}, {_digits(self.greatest)}]"


@dataclass
class Row:
    """
    A line of the table: one way to do some work, beside stock and beside its floor. All but the runs is for one unit.

    Args:
        what (`str`): The work and its setting, the same for the ways that are compared.
        way (`str`): `"stock"`, `"ours"`, ...
        unit (`str`): What is counted: `"pair"`, `"conversation"`, `"candidate"`.
        tokens (`float`): Its tokens, each counted once however often a way computes it.
        runs (`list[Run]`): The repetitions.
        stock (`list[Run]`): Those of the way to compare with.
        flops (`float`): Operations that this way of laying the work out cannot do without, see `flops.py`.
        executed_flops (`float`, *optional*): The same with padding, and what gradient checkpointing computes again.
        floor_seconds (`float`): The least time the machine's rates allow for them.
        once_seconds (`float`, *optional*): Seconds spent on a unit once, before the first epoch; not in `runs`.
        notes (`str`, *optional*): Whatever has to be known to read the figures.
    """

    what: str
    way: str
    unit: str
    tokens: float
    runs: list[Run]
    stock: list[Run] = field(repr=False)
    flops: float
    floor_seconds: float
    executed_flops: float | None = None
    once_seconds: float = 0.0
    notes: str = ""

    @property
    def seconds(self) -> Spread:
        """Seconds a unit."""
        return Spread.of([run.seconds_a_unit for run in self.runs])

    @property
    def speedup(self) -> Spread:
        """Stock's time over this way's, within each repetition."""
        pairs = zip(self.stock, self.runs, strict=True)
        return Spread.of([stock.seconds_a_unit / own.seconds_a_unit for stock, own in pairs])

    @property
    def speedup_without_data(self) -> Spread:
        """The same without the time both spent getting and collating data."""
        pairs = zip(self.stock, self.runs, strict=True)
        computing = lambda run: (run.seconds - run.waited) / run.units  # noqa: E731
        return Spread.of([computing(stock) / computing(own) for stock, own in pairs])

    @property
    def waited(self) -> float:
        """Share of the time spent getting and collating data."""
        return statistics.median(run.waited / run.seconds for run in self.runs)

    def as_json(self, machine: "Machine") -> dict:
        """The row with all that follows from it, in SI units."""
        median, peak, stock_peak = self.seconds.median, _peak(self.runs), _peak(self.stock)
        return {
            "what": self.what, "way": self.way, "unit": self.unit, "tokens": self.tokens,
            "runs": [asdict(run) for run in self.runs], "seconds": asdict(self.seconds),
            "speedup": asdict(self.speedup), "speedup_without_data": asdict(self.speedup_without_data),
            "waited_share": self.waited, "units_per_second": 1 / median, "tokens_per_second": self.tokens / median,
            "peak_bytes": peak, "peak_over_stock": peak / stock_peak if peak and stock_peak else None,
            "once_seconds": self.once_seconds,
            "flops": self.flops, "executed_flops": self.executed_flops, "floor_seconds": self.floor_seconds,
            "floor_over_time": self.floor_seconds / median,
            "share_of_measured_peak": self.flops / median / machine.matmul_flops,
            "share_of_measured_peak_executed": (
                self.executed_flops / median / machine.matmul_flops if self.executed_flops else None
            ),
            "share_of_data_sheet_peak": (
                self.flops / median / machine.data_sheet_flops if machine.data_sheet_flops else None
            ),
            "notes": self.notes,
        }  # fmt: skip


@dataclass
class Machine:
    """
    What the machine allows, measured in the same run.

    Args:
        device (`str`): Its name.
        dtype (`str`): Type of the numbers.
        threads (`int`): Threads of torch on a CPU.
        matmul_flops (`float`): Operations a second of a large matrix product.
        bytes_per_second (`float`): Bytes read and written a second when memory is copied.
        data_sheet_flops (`float`, *optional*): What the maker says of the former, where TRL knows it.
        versions (`dict[str, str]`): Of the libraries.
    """

    device: str
    dtype: str
    threads: int
    matmul_flops: float
    bytes_per_second: float
    data_sheet_flops: float | None
    versions: dict[str, str]

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, quick: bool = False) -> "Machine":
        """
        Args:
            device (`torch.device`): Device that does the work.
            dtype (`torch.dtype`): Type of the weights.
            quick (`bool`): Small sizes that say nothing, for tests.
        """
        from trl.trainer.utils import get_peak_flops

        name = str(dtype).removeprefix("torch.")
        on_gpu = device.type == "cuda"
        device_name = torch.cuda.get_device_name(device) if on_gpu else _processor_name()
        side, megabytes = (64, 1) if quick else (8192, 4096) if on_gpu else (2048, 256)
        return cls(
            device=device_name,
            dtype=name,
            threads=torch.get_num_threads(),
            matmul_flops=matmul_flops(device, dtype, side),
            bytes_per_second=bytes_per_second(device, megabytes),
            data_sheet_flops=get_peak_flops(device_name, name) if on_gpu else None,
            versions={"python": platform.python_version()}
            | {library: version(library) for library in ("torch", "transformers", "trl", "peft")},
        )

    def seconds_for(self, flops: float) -> float:
        """The least time for so many operations."""
        return flops / self.matmul_flops


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rate(device: torch.device, amount: float, work: Callable[[], object], times: int = 8) -> float:
    """The best rate of some tries: what the machine can do."""
    best = 0.0
    for attempt in range(times + 2):  # the first two warm up
        synchronise(device)
        begun = time.perf_counter()
        work()
        synchronise(device)
        if attempt >= 2:
            best = max(best, amount / (time.perf_counter() - begun))
    return best


def matmul_flops(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations a second of a square matrix product: 2 x side^3 of them."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return _rate(device, 2 * side**3, lambda: torch.mm(left, right, out=out))


def bytes_per_second(device: torch.device, megabytes: int) -> float:
    """Bytes a second of a copy within the device's memory, read and written ones counted."""
    source = torch.ones(megabytes * 2**20 // 4, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    return _rate(device, 2 * source.nbytes, lambda: target.copy_(source))


class PeakMemory:
    """
    The most CUDA memory one of several models in a process takes: what it holds all the time (`held`) and what comes
    on top while it works. So the others, whose weights are in memory too, do not count. `None` on a CPU.

    Example:
    ```python
    >>> with PeakMemory(device, lambda: trainer_tensors(trainer)) as memory:
    ...     trainer.train()
    >>> memory.peak_bytes
    ```
    """

    def __init__(self, device: torch.device, held: Callable[[], Sequence[torch.Tensor]]):
        self.device = device
        self.held = held
        self.peak_bytes = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            self._own = bytes_of(self.held(), self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *error) -> None:
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._before + self._own


def bytes_of(tensors: Sequence[torch.Tensor], device: torch.device) -> int:
    """Memory of some tensors on a kind of device, shared memory counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device.type]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


EXPLAINED = """\
columns of the table: median [least, greatest] over the repetitions
  ms                 a unit: a pair, a conversation, a candidate
  times stock        time of the first way over the way's own, within each repetition
  without data       the same without getting and collating data
  tokens/s           each token of a unit counted once, however often a way computes it
  waits for data     share of the time in which the training process gets and collates data
  peak GiB           most GPU memory of this way alone, and as a share of the first way's
  floor, ms          the least time for the operations (or bytes) a unit needs, at the rates measured in this run
  of matmul peak     those operations a second over the rate of a large matrix product; then with padding, and what is
                     computed twice; then over the rate of the data sheet
"""


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every benchmark, and what its table says."""
    from shapes import SHAPES

    parser.epilog = EXPLAINED
    parser.add_argument("--shape", choices=list(SHAPES), default="cpu", help="model and data, see shapes.py")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions, each with every way once")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    parser.add_argument("--images", type=Path, help="folder of JPEG files; drawn ones of the same size without it")
    parser.add_argument("--device", help="default: that of the shape")


def report(bench: str, settings: Mapping, machine: Machine, rows: Sequence[Row], output: Path | None) -> dict:
    """
    Prints a Markdown table and writes it all as JSON.

    Args:
        bench (`str`): Name of the benchmark.
        settings (mapping): What was measured.
        machine ([`Machine`]): What it was measured on.
        rows (sequence of [`Row`]): The results.
        output (`Path`, *optional*): JSON file to write.

    Returns:
        `dict`: What the JSON file holds.
    """
    result = {
        "bench": bench,
        "settings": dict(settings),
        "machine": asdict(machine),
        "rows": [row.as_json(machine) for row in rows],
    }
    print(markdown(result), flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    return result


COLUMNS = (
    "what", "way", "ms", "times stock", "without data", "units/s", "tokens/s", "waits for data", "peak GiB",
    "floor, ms", "of matmul peak", "with padding and recomputing", "of data sheet",
)  # fmt: skip


def markdown(result: Mapping) -> str:
    """The table of what [`report`] writes. Figures are medians, with the least and greatest in brackets."""
    machine = result["machine"]
    data_sheet = f"{machine['data_sheet_flops'] / 1e12:.3g} TFLOP/s" if machine["data_sheet_flops"] else "n/a"
    lines = [
        f"## {result['bench']}: {', '.join(f'{name} {value}' for name, value in result['settings'].items())}",
        "",
        f"{machine['device']}, {machine['dtype']}, {machine['threads']} threads. Measured in this run: "
        f"{machine['matmul_flops'] / 1e12:.3g} TFLOP/s of a large matrix product, "
        f"{machine['bytes_per_second'] / 1e9:.3g} GB/s of a copy; data sheet: {data_sheet}. "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items()),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in result["rows"]:
        milliseconds = Spread(*(1e3 * value for value in row["seconds"].values()))
        cells = (
            row["what"],
            row["way"],
            f"{milliseconds} a {row['unit']}",
            f"{Spread(**row['speedup'])}",
            _digits(row["speedup_without_data"]["median"]),
            _digits(row["units_per_second"]),
            _digits(row["tokens_per_second"]),
            _percent(row["waited_share"]),
            "n/a" if row["peak_bytes"] is None else _memory(row),
            _digits(1e3 * row["floor_seconds"]),
            _percent(row["share_of_measured_peak"]),
            _percent(row["share_of_measured_peak_executed"]),
            _percent(row["share_of_data_sheet_peak"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"- {row['what']}, {row['way']}: {row['notes']}" for row in result["rows"] if row["notes"]]
    return "\n".join([*lines, "", *notes, ""])


def _memory(row: Mapping) -> str:
    share = row["peak_over_stock"]
    return f"{row['peak_bytes'] / 2**30:.1f}" + (f" ({share:.2f}x)" if share else "")


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f}%"


def _digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _peak(runs: Sequence[Run]) -> int | None:
    peaks = [run.peak_bytes for run in runs]
    return None if None in peaks else max(peaks)


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
