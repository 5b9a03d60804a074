# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Code that all benchmarks share: alternating repetitions, medians, memory, the machine's rates, and the table.

Only ratios within one run are meaningful. The variants run alternately in one process, in changing order, and a ratio
is the median of the ratios within each repetition.
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
    One repetition of a variant.

    Args:
        seconds (`float`): Wall-clock time, including the work of the device.
        units (`int`): Number of pairs, conversations, ... that were processed.
        waited (`float`, *optional*): Seconds that the training process spent loading and collating data.
        peak_bytes (`int`, *optional*): Peak device memory of this variant, see [`PeakMemory`]; `None` on a CPU.
    """

    seconds: float
    units: int
    waited: float = 0.0
    peak_bytes: int | None = None

    @property
    def seconds_per_unit(self) -> float:
        return self.seconds / self.units


def alternate(variants: Mapping[str, Callable[[], Run]], repeats: int) -> dict[str, list[Run]]:
    """
    Run each variant once per repetition, in reverse order in every second repetition, so that none is always first.

    Args:
        variants (mapping of `str` to callable): Variants to compare, already warmed up.
        repeats (`int`): Number of repetitions.

    Returns:
        `dict[str, list[Run]]`: The runs of each variant, one per repetition.
    """
    runs = {name: [] for name in variants}
    for repetition in range(repeats):
        for name in list(variants) if repetition % 2 == 0 else reversed(variants):
            runs[name].append(variants[name]())
    return runs


@dataclass
class Spread:
    """Median, minimum and maximum of measurements."""

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
    A row of the table: a variant, compared with the baseline and with its floor. Values are per unit, except the runs.

    Args:
        what (`str`): The setting, the same for all variants that are compared.
        variant (`str`): `"stock"`, `"ours"`, ...
        unit (`str`): What is counted: `"pair"`, `"conversation"` or `"candidate"`.
        tokens (`float`): Number of tokens, each counted once even if a variant computes it several attempts.
        runs (`list[Run]`): The repetitions.
        stock (`list[Run]`): The repetitions of the baseline.
        flops (`float`): Operations that the layout of this variant requires, see `flops.py`.
        executed_flops (`float`, *optional*): Executed operations, with padding and recomputation.
        floor_seconds (`float`): Minimum time for `flops` at the machine's rates.
        once_seconds (`float`, *optional*): Seconds spent once, before the first epoch; not included in `runs`.
        notes (`str`, *optional*): Notes on the figures.
    """

    what: str
    variant: str
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
        """Seconds per unit."""
        return Spread.of([run.seconds_per_unit for run in self.runs])

    @property
    def speedup(self) -> Spread:
        """Time of the baseline over the time of this variant, within each repetition."""
        pairs = zip(self.stock, self.runs, strict=True)
        return Spread.of([stock.seconds_per_unit / own.seconds_per_unit for stock, own in pairs])

    @property
    def speedup_without_data(self) -> Spread:
        """The speedup without the time spent loading and collating data."""
        pairs = zip(self.stock, self.runs, strict=True)
        computing = lambda run: (run.seconds - run.waited) / run.units  # noqa: E731
        return Spread.of([computing(stock) / computing(own) for stock, own in pairs])

    @property
    def waited(self) -> float:
        """Share of the time spent loading and collating data."""
        return statistics.median(run.waited / run.seconds for run in self.runs)

    def as_json(self, machine: "Machine") -> dict:
        """Return the row with all derived figures, in SI units."""
        median, peak, stock_peak = self.seconds.median, _peak(self.runs), _peak(self.stock)
        return {
            "what": self.what, "way": self.variant, "unit": self.unit, "tokens": self.tokens,
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
    The rates of the machine, measured in the same run.

    Args:
        device (`str`): Name of the device.
        dtype (`str`): Data type of the weights.
        threads (`int`): Number of CPU threads of torch.
        matmul_flops (`float`): Operations per second of a large matrix product.
        bytes_per_second (`float`): Bytes read and written per second by a memory copy.
        data_sheet_flops (`float`, *optional*): Peak operations per second in the data sheet, if TRL knows it.
        versions (`dict[str, str]`): Versions of the libraries.
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
        Measure the rates of a device.

        Args:
            device (`torch.device`): Device to measure.
            dtype (`torch.dtype`): Data type of the weights.
            quick (`bool`): Whether to use small sizes, for tests only.
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
        """Return the minimum time for the given number of operations."""
        return flops / self.matmul_flops


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rate(device: torch.device, amount: float, work: Callable[[], object], attempts: int = 8) -> float:
    """Return the best rate of several attempts."""
    best = 0.0
    for attempt in range(attempts + 2):  # the first two are warm-up
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        if attempt >= 2:
            best = max(best, amount / (time.perf_counter() - start))
    return best


def matmul_flops(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Return the operations per second of a square matrix product, which has 2 x side^3 operations."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return _rate(device, 2 * side**3, lambda: torch.mm(left, right, out=out))


def bytes_per_second(device: torch.device, megabytes: int) -> float:
    """Return the bytes read and written per second by a copy within the device's memory."""
    source = torch.ones(megabytes * 2**20 // 4, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    return _rate(device, 2 * source.nbytes, lambda: target.copy_(source))


class PeakMemory:
    """
    Measure the peak CUDA memory of one of several models in a process: its permanent memory (`held`) and what it
    allocates while it works. The weights of the other models do not count. `None` on a CPU.

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
    """Return the bytes of the tensors on the type of `device`, with shared memory counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device.type]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


COLUMN_HELP = """\
columns of the table: median [minimum, maximum] over the repetitions
  ms                 per unit: a pair, a conversation or a candidate
  times stock        time of the first variant over that of the variant, within each repetition
  without data       the same without loading and collating data
  tokens/s           each token counts once, even if a variant computes it several times
  data wait          share of the time in which the training process loads and collates data
  peak GiB           peak GPU memory of the variant, and its ratio to that of the first variant
  floor, ms          minimum time for the operations (or bytes) of a unit at the rates measured in this run
  share of matmul peak
                     those operations per second over the rate of a large matrix product; then with padding and
                     recomputation; then over the rate in the data sheet
"""


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every benchmark and the explanation of its table."""
    from shapes import SHAPES

    parser.epilog = COLUMN_HELP
    parser.add_argument("--shape", choices=list(SHAPES), default="cpu", help="model and data, see shapes.py")
    parser.add_argument("--repeats", type=int, default=5, help="number of repetitions of all variants")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    parser.add_argument("--images", type=Path, help="directory of JPEG files; default: generated images")
    parser.add_argument("--device", help="default: the device of the shape")


def report(bench: str, settings: Mapping, machine: Machine, rows: Sequence[Row], output: Path | None) -> dict:
    """
    Print a Markdown table and write all figures as JSON.

    Args:
        bench (`str`): Name of the benchmark.
        settings (mapping): Settings of the benchmark.
        machine ([`Machine`]): Machine of the measurement.
        rows (sequence of [`Row`]): The results.
        output (`Path`, *optional*): JSON file to write.

    Returns:
        `dict`: The content of the JSON file.
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
    "setting", "variant", "ms", "times stock", "without data", "units/s", "tokens/s", "data wait", "peak GiB",
    "floor, ms", "share of matmul peak", "with padding and recomputation", "share of data sheet peak",
)  # fmt: skip


def markdown(result: Mapping) -> str:
    """Return the table of a result of [`report`]: medians, with minimum and maximum in brackets."""
    machine = result["machine"]
    data_sheet = f"{machine['data_sheet_flops'] / 1e12:.3g} TFLOP/s" if machine["data_sheet_flops"] else "n/a"
    lines = [
        f"## {result['bench']}: {', '.join(f'{name} {value}' for name, value in result['settings'].items())}",
        "",
        f"{machine['device']}, {machine['dtype']}, {machine['threads']} threads. Measured in this run: "
        f"{machine['matmul_flops'] / 1e12:.3g} TFLOP/s for a large matrix product, "
        f"{machine['bytes_per_second'] / 1e9:.3g} GB/s for a memory copy; data sheet: {data_sheet}. "
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
            f"{milliseconds} per {row['unit']}",
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
