"""The figures to read."""

from fopd_jax.performance.problem import Fields
from fopd_jax.performance.topology import GIB

TERA = 1e12


def describe(fields: Fields) -> str:
    """One measurement."""
    lines = [
        f"{fields['config']} ({fields['preset']}, {fields['dtype']}, attention {fields['attention']}, "
        f"remat {fields['remat']}), {fields['chips']} chips, mesh {fields['mesh']}",
        f"batch {fields['batch_size']}, {fields['trained_timesteps']} trained timesteps, {fields['teachers']} teachers"
        f"{' + anchor' if fields['anchor'] else ''}, guidance {fields['guidance']:g}, tokens an image "
        f"{fields['tokens']['image']} + {fields['tokens']['text']} of text; trains {fields['trained']}",
        "held a chip: " + ", ".join(f"{name} {_size(size)}" for name, size in fields["held_bytes"].items()),
    ]
    if not fields["fits"]:
        return "\n".join([*lines, f"does not fit: {fields['reason']}"])
    lines += [_step(fields), *_speed(fields), _memory(fields["memory"]), _compile(fields["compile"])]
    return "\n".join(lines + (["", *_phases(fields["phases"])] if "phases" in fields else []))


def describe_learning(fields: Fields) -> str:
    """One measurement of a step of reinforcement learning."""
    lines = [
        f"{fields['config']} ({fields['preset']}, {fields['dtype']}, remat {fields['remat']}), {fields['chips']} "
        f"chips, mesh {fields['mesh']}",
        f"stage {fields['stage']}: {fields['batch_size']} images a rollout, {fields['images_per_prompt']} a prompt, in "
        f"{fields['parts']} parts, guidance {fields['guidance']:g}; trains {fields['trained']}; "
        "neither decoding nor rewards are in these figures",
    ]
    if not fields["fits"]:
        return "\n".join([*lines, f"does not fit: {fields['reason']}"])
    for name, seconds in fields["compile"].items():
        needs = _size(fields["memory"][name]["total"])
        lines.append(f"program {name}: compiled in {seconds:.1f} s; memory a chip {needs}")
    lines.append(f"{'':8}{'median':>12}{'quartiles':>20}{'images/s':>11}{'TFLOP/s':>9}{'MFU':>8}")
    for name, row in fields["phases"].items():
        quartiles = f"{row['lower']:.4g} to {row['upper']:.4g}"
        rate, mfu = row["model_flops_per_second_per_chip"] / TERA, row["mfu"]["matmul"]
        images = row["samples_per_second"]
        lines.append(f"{name:8}{row['median']:>10.4g} s{quartiles:>20}{images:>11.4g}{rate:>9.4g}{mfu:>8.1%}")
    return "\n".join(lines)


def describe_batches(rows: list[Fields]) -> str:
    """A sweep, one line a batch."""
    return "\n".join(
        [f"{'batch':>8}{'median':>12}{'samples/s':>11}{'TFLOP/s':>9}{'MFU':>8}{'program':>12}{'peak':>12}"]
        + [_row(str(each["batch_size"]), each) for each in rows]
    )


def describe_teachers(rows: list[Fields]) -> str:
    """A sweep, one line a number of teachers; growth against the first."""
    lines = [f"{'teachers':>8}{'median':>12}{'samples/s':>11}{'TFLOP/s':>9}{'MFU':>8}{'program':>12}{'peak':>12}"]
    lines += [_row(str(each["teachers"]), each) for each in rows]
    first, last = rows[0], rows[-1]
    if first["fits"] and last["fits"]:
        time = last["step"]["median"] / first["step"]["median"] - 1
        added = (last["memory"]["total"] - first["memory"]["total"]) / (last["teachers"] - first["teachers"])
        lines += [f"from {first['teachers']} to {last['teachers']}: {time:+.1%} a sample, {_size(added)} a teacher"]
    return "\n".join(lines)


# ---- parts


def _step(fields: Fields) -> str:
    step = fields["step"]
    return (
        f"step: median {step['median']:.4g} s of {step['count']} "
        f"(quartiles {step['lower']:.4g} to {step['upper']:.4g}, "
        f"extremes {step['minimum']:.4g} to {step['maximum']:.4g}); "
        f"{fields['samples_per_second_per_chip']:.4g} samples/s/chip"
    )


def _speed(fields: Fields) -> list[str]:
    model, hardware = (fields[f"{name}_flops_per_second_per_chip"] / TERA for name in ("model", "hardware"))
    mfu, hfu = (_utilisation(fields[name]) for name in ("mfu", "hfu"))
    lines = [f"{model:.4g} TFLOP/s a chip: MFU {mfu}"]
    return lines if model == hardware else [*lines, f"{hardware:.4g} with recomputation: HFU {hfu}"]


def _utilisation(found: Fields) -> str:
    datasheet = "" if found["datasheet"] is None else f", {found['datasheet']:.1%} of the datasheet"
    return f"{found['matmul']:.1%} of the matrix product{datasheet}"


def _memory(memory: Fields) -> str:
    parts = ", ".join(f"{name} {_size(memory[name])}" for name in ("arguments", "temporaries", "outputs"))
    peak = "not counted here" if memory["peak"] is None else _size(memory["peak"])
    return f"memory a chip: program {_size(memory['total'])} ({parts}); measured peak {peak}"


def _compile(seconds: Fields) -> str:
    cached = "not from the cache" if seconds["cached"] is None else f"{seconds['cached']:.2f} s from the cache"
    return f"compile: traced in {seconds['lower']:.1f} s, compiled in {seconds['cold']:.1f} s, {cached}"


def _phases(rows: list[Fields]) -> list[str]:
    lines = [f"{'phase':30}{'seconds':>10}{'share':>8}{'TFLOP/s':>9}{'MFU':>8}"]
    for row in rows:
        line = f"{row['phase']:30}{row['seconds']:>10.4f}{row['share']:>8.1%}"
        if row["mfu"]:
            line += f"{row['flops_per_second_per_chip'] / TERA:>9.4g}{row['mfu']:>8.1%}"
        lines.append(line)
    return lines


def _row(name: str, fields: Fields) -> str:
    if not fields["fits"]:
        return f"{name:>8}  does not fit: {fields['reason']}"
    peak = fields["memory"]["peak"]
    return (
        f"{name:>8}{fields['step']['median']:>10.4g} s{fields['samples_per_second']:>11.4g}"
        f"{fields['model_flops_per_second_per_chip'] / TERA:>9.4g}{fields['mfu']['matmul']:>8.1%}"
        f"{_size(fields['memory']['total']):>12}{'-' if peak is None else _size(peak):>12}"
    )


def _size(count: float | int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"
