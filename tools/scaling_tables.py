"""Prints the tables of docs/scaling.md: `python tools/scaling_tables.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from footprint import Job, Layout, Llama, Method, Mode

STATES: dict[str, float] = {"float32": 4, "bfloat16": 2, "8-bit": 1 + 4 / 256}
MODES: tuple[Mode, ...] = ("step", "forward")
GIB = 2**30
LAYOUTS = ("FSDP2", "TP x FSDP2", "PP x FSDP2")
JOBS: dict[str, tuple[Llama, int, int]] = {  # with the ranks, and the tokens of a step
    "7B": (Llama(), 32, 2**22),
    "70B": (Llama(8192, 28672, 80, 1024, 32000), 256, 2**22),
    "405B": (Llama(16384, 53248, 126, 1024, 128256), 2048, 2**24),
}
EXPERTS = (4, 8, 16)
PER_SECOND_COMPUTED = 4e14
"""Of an H100 in bfloat16: 40 % of its peak."""
PER_SECOND_MOVED = 2.7e12
"""Bytes to and from its memory: 80 % of the peak."""
ROOM = 60 * GIB
"""What weights, experts, gradients and states may take of a GPU with 80 GB."""


def layouts_of(name: str) -> dict[str, Layout]:
    """The three layouts of a model on its ranks."""
    _, ranks, tokens = JOBS[name]
    return {
        "FSDP2": Layout(ranks, tokens=tokens),
        "TP x FSDP2": Layout(ranks // 8, 8, tokens=tokens),
        "PP x FSDP2": Layout(ranks // 8, 1, 8, 16, tokens),
    }


def jobs_of(name: str, layout: str, method: Method) -> list[Job]:
    """Those of the first stage and of the last, which hold and send most."""
    spread = layouts_of(name)[layout]
    return [Job(JOBS[name][0], spread, method, stage) for stage in {0, spread.stages - 1}]


def memory_table(name: str) -> str:
    """The memory of a rank."""
    methods = [("dense", Method("dense", 1))]
    methods += [
        (f'`"step"`, {states} states', Method("step", n, size))
        for states, size in STATES.items()
        for n in EXPERTS
    ]
    methods += [('`"forward"`', Method("forward", n)) for n in EXPERTS]
    rows = []
    for label, method in methods:
        parts = jobs_of(name, "FSDP2", method)[0].memory()
        totals = [max(job.memory().total for job in jobs_of(name, la, method)) for la in LAYOUTS]
        if method.mode == "forward":
            totals[1] = 0
        states = parts.expert_states + parts.other_states
        sizes = [parts.weights + parts.copies, parts.gradients, parts.experts, states, *totals]
        cells = [f"{size / GIB:.1f}" if size else "" for size in sizes]
        rows.append([label, str(method.num_experts), *cells])
    return table(
        ["", "N", "weights", "gradients", "experts", "states", *(f"{la}: all" for la in LAYOUTS)],
        rows,
    )


def wire_table(name: str) -> str:
    """What a rank sends in a step, in GB, and by what the dense model sends."""
    methods = [Method("dense", 1)]
    methods += [Method(mode, n) for mode in MODES for n in EXPERTS]
    rows = []
    for method in methods:
        cells = []
        for layout in LAYOUTS:
            sent, dense = (
                max(job.wire().total for job in jobs_of(name, layout, m))
                for m in (method, methods[0])
            )
            is_refused = method.mode == "forward" and layout == "TP x FSDP2"
            cells.append("" if is_refused else f"{sent / 1e9:,.1f} ({sent / dense:.3f})")
        label = method.mode if method.mode == "dense" else f'`"{method.mode}"`'
        rows.append([label, str(method.num_experts), *cells])
    return table(["", "N", *LAYOUTS], rows)


def bounds_table() -> str:
    """What the experts take of a job, and their update of its time."""
    rows = []
    for name, (model, ranks, tokens) in JOBS.items():
        for n in EXPERTS:
            job = Job(model, Layout(ranks), Method("step", n))
            sizes = [
                Job(model, Layout(ranks), Method("step", n, size)).memory().total * ranks
                for size in STATES.values()
            ]
            update = job.bytes_updated() / PER_SECOND_MOVED
            compute = 6 * model.size * tokens / ranks / PER_SECOND_COMPUTED
            rows.append(
                [
                    name,
                    str(n),
                    *(f"{size / 1e12:.1f} ({-(-size // ROOM):,})" for size in sizes),
                    f"{1e3 * update:.0f} ms of {compute:.1f} s, {update / compute:.2%}",
                    f"{tokens * update / compute / 0.01 / 1e6:.1f}",
                ]
            )
    heads = [f"{states} states: TB (ranks)" for states in STATES]
    return table(["model", "N", *heads, "update", "million tokens for 1 %"], rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> Iterator[str]:
    """All tables of the page."""
    for name in JOBS:
        yield memory_table(name)
        yield wire_table(name)
    yield bounds_table()


if __name__ == "__main__":
    print(*tables(), sep="\n\n")
